"""The path of a run is that of its updates stacked into vectors."""

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics.checkpoints import open_trajectory
from dynamics.spectra import path as path_module
from dynamics.spectra.path import path_shape, renamed_path, training_path
from tests.runs import counted_openings, drifting, write_run, write_state
from tests.whole_models import MATRICES, model_tensors, write_dense_run, write_model


def vectors(run, names, base=None):
    """Each step's update as one vector, from the matrices themselves."""
    trajectory = open_trajectory(run, base=base)
    rows = []
    for checkpoint in trajectory.checkpoints:
        with checkpoint.open() as matrices:
            parts = [matrices[name] for name in names]
            rows.append(
                torch.cat([(p if isinstance(p, torch.Tensor) else p.to_dense()).double().flatten() for p in parts])
            )
    return torch.stack(rows)


def test_adapters(tmp_path):
    run = write_run(tmp_path / "run")
    trajectory = open_trajectory(run)
    found = training_path(trajectory)
    rows = vectors(run, trajectory.matrices)
    np.testing.assert_allclose(found["gram"].values, (rows @ rows.T).numpy(), rtol=1e-10)
    expected = path_shape((rows @ rows.T).numpy())
    np.testing.assert_allclose(found["length"].values, expected.length, rtol=1e-8)
    assert found["matrices"].item() == len(trajectory.matrices)
    assert found["participation_ratio"].item() == pytest.approx(expected.participation_ratio)


@pytest.mark.parametrize("budget", [2**28, 8 * 8 * 4])
def test_dense_from_the_base_row_by_row(tmp_path, monkeypatch, budget):
    monkeypatch.setattr(path_module, "BUDGET", budget)
    run, base = write_dense_run(tmp_path / "run", (10, 20, 30)), write_model(tmp_path / "base")
    found = training_path(open_trajectory(run, base=base))
    start = torch.cat([model_tensors()[f"{name}.weight"].double().flatten() for name in MATRICES])
    rows = vectors(run, MATRICES) - start
    np.testing.assert_allclose(found["gram"].values, (rows @ rows.T).numpy(), rtol=1e-10)
    assert found["distance"].dims == ("step",)
    assert found["step"].values.tolist() == found["step_"].values.tolist() == [10, 20, 30]


def test_dense_without_a_base_begins_at_the_first_checkpoint(tmp_path):
    run = write_dense_run(tmp_path / "run", (10, 20, 30))
    found = training_path(open_trajectory(run))
    rows = vectors(run, MATRICES)
    rows = rows - rows[0]
    np.testing.assert_allclose(found["gram"].values, (rows @ rows.T).numpy(), rtol=1e-10, atol=1e-12)
    assert found["distance"].values[0] == 0


def test_a_matrix_that_is_not_everywhere_is_left_out_and_counted(tmp_path):
    tensors = {step: model_tensors(step) for step in (10, 20)}
    del tensors[20]["model.layers.1.self_attn.q_proj.weight"]
    found = training_path(open_trajectory(write_dense_run(tmp_path, tensors), base=write_model(tmp_path / "base")))
    assert found["matrices"].item() == len(MATRICES) - 1


def test_trainings_in_one_folder_have_paths_of_their_own(tmp_path):
    """A second training wrote over the first's later checkpoints."""
    log = [{"step": 5, "loss": 1.0}], [{"step": 5, "loss": 9.0}]
    for step, which in ((10, 0), (20, 1), (30, 1), (40, 0)):
        write_model(tmp_path / f"checkpoint-{step}", model_tensors(step))
        write_state(tmp_path / f"checkpoint-{step}", step, log[which])
    trajectory = open_trajectory(tmp_path, base=write_model(tmp_path / "base"))
    segments = [checkpoint.segment for checkpoint in trajectory.checkpoints]
    assert len(set(segments)) == 2
    found = training_path(trajectory)
    together = np.equal.outer(segments, segments)
    assert (np.isfinite(found["gram"].values) == together).all()
    assert found.sizes["segment"] == 2
    assert found["segment"].values.tolist() == [0, 1]
    assert found["step_segment"].values.tolist() == segments


def test_a_path_of_an_earlier_version_gets_the_names_of_today(tmp_path):
    path = training_path(open_trajectory(write_run(tmp_path, drifting((10, 20, 30)))))
    earlier = path.rename(segment="training").rename(step_segment="segment")
    assert earlier["component_share"].dims == ("training", "component")
    xr.testing.assert_identical(renamed_path(earlier), path)
    xr.testing.assert_identical(renamed_path(path), path)


def test_one_checkpoint_has_no_path(tmp_path):
    assert training_path(open_trajectory(write_dense_run(tmp_path, (10,)), base=write_model(tmp_path / "base"))) is None


@pytest.mark.parametrize("files", [2, 3, 5])
@pytest.mark.parametrize("dense", [False, True])
def test_block_by_block_it_is_the_same(tmp_path, monkeypatch, files, dense):
    steps = tuple(range(10, 80, 10))
    run = write_dense_run(tmp_path / "run", steps) if dense else write_run(tmp_path / "run", drifting(steps))
    trajectory = open_trajectory(run)
    whole = training_path(trajectory)
    most_open = counted_openings(monkeypatch, trajectory)
    monkeypatch.setattr(path_module, "_allowed_files", lambda: files + dense)
    in_blocks = training_path(trajectory)
    assert most_open() <= files + dense
    np.testing.assert_allclose(in_blocks["gram"].values, whole["gram"].values, rtol=1e-12)
    assert in_blocks["matrices"].item() == whole["matrices"].item() == len(trajectory.matrices)


def test_a_matrix_that_is_not_finite_at_one_step_is_left_out_of_every_block(tmp_path, monkeypatch):
    runs = drifting((10, 20, 30, 40, 50))
    name = next(iter(runs[30]))
    runs[30][name][0][0, 0] = torch.nan
    monkeypatch.setattr(path_module, "_allowed_files", lambda: 2)
    trajectory = open_trajectory(write_run(tmp_path / "run", runs))
    path = training_path(trajectory)
    rows = vectors(tmp_path / "run", [other for other in trajectory.matrices if other != name])
    np.testing.assert_allclose(path["gram"].values, (rows @ rows.T).numpy(), rtol=1e-10)
    assert path["matrices"].item() == len(trajectory.matrices) - 1


@pytest.mark.parametrize("dense", [False, True])
def test_more_checkpoints_than_files_may_be_open(tmp_path, dense):
    resource = pytest.importorskip("resource")
    steps = tuple(range(1, 121))
    run = write_dense_run(tmp_path / "run", steps) if dense else write_run(tmp_path / "run", drifting(steps))
    trajectory = open_trajectory(run)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, before[1]))
    try:
        path = training_path(trajectory)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    assert np.isfinite(path["gram"].values).all()
    assert path["matrices"].item() == len(trajectory.matrices)
