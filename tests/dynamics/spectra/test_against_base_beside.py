"""Updates beside the weights they changed: sizes, shared directions, intruders, and a cache that changes nothing."""

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics.checkpoints import open_trajectory
from dynamics.spectra import against_base as module
from dynamics.spectra.against_base import base_overlap, compare_with_base, intruders
from dynamics.spectra.base_directions import decompose_base
from dynamics.spectra.cache import cache_folder, write_tensors
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from tests.runs import write_run
from tests.whole_models import MATRICES, model_tensors, write_dense_run, write_model


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def trajectory(tmp_path):
    return open_trajectory(write_dense_run(tmp_path / "run"), base=write_model(tmp_path / "base"))


def found_of(trajectory, **options):
    return compare_with_base(trajectory, trajectory_spectra(trajectory)[0], **options)


def test_relative_sizes_are_those_of_the_matrices(trajectory):
    found = found_of(trajectory)
    base, last = model_tensors(), model_tensors(20)
    for name in MATRICES:
        weight = base[f"{name}.weight"].double()
        expected = (last[f"{name}.weight"].double() - weight).norm() / weight.norm()
        assert found["relative_size"].sel(step=20, matrix=name).item() == pytest.approx(float(expected), rel=1e-6)
    assert set(found) == {"relative_size", "base_norm", "changed_share", "lost_in_merge"}
    assert not cache_folder().exists()


def test_directions_are_those_of_the_functions(trajectory):
    found = found_of(trajectory, directions=True, k=3)
    weight = model_tensors()["model.layers.0.mlp.up_proj.weight"]
    update = model_tensors(20)["model.layers.0.mlp.up_proj.weight"].double() - weight.double()
    base = decompose_base(weight)
    here = found.sel(matrix="model.layers.0.mlp.up_proj")
    shared, strange = base_overlap(update, base, 3), intruders(update, weight, base, k=3)
    for name, expected in {
        "overlap_left": shared.left,
        "overlap_right": shared.right,
        "overlap_left_null": shared.left_null,
        "energy_right": shared.energy_right,
        "intruders": strange.count,
        "intruder_energy": strange.energy_share,
        "intruder_energy_null": strange.null_energy_share,
    }.items():
        assert here[name].item() == pytest.approx(expected, abs=1e-5), name
    assert all({"units", "long_name", "definition"} <= set(variable.attrs) for variable in found.values())


def test_the_cache_gives_the_same_and_damage_is_computed_anew(trajectory, monkeypatch):
    first = found_of(trajectory, directions=True, k=3)
    written = []
    monkeypatch.setattr(
        module, "write_tensors", lambda key, tensors: written.append(key) or write_tensors(key, tensors)
    )
    xr.testing.assert_allclose(found_of(trajectory, directions=True, k=3), first, rtol=1e-9)
    assert not written
    for path in list(cache_folder().iterdir())[:2]:
        path.write_bytes(b"nonsense")
    again = found_of(trajectory, directions=True, k=3)
    assert len(written) == 2
    np.testing.assert_allclose(again["overlap_left"].values, first["overlap_left"].values, atol=1e-6)


def test_a_merged_adapter_of_a_planted_direction_is_an_intruder(tmp_path):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(60, 40, generator=generator, dtype=torch.float64)
    strange = (
        torch.randn(60, 1, generator=generator, dtype=torch.float64) @ torch.randn(1, 40, generator=generator).double()
    )
    tuned = weight + 40 * strange / strange.norm()
    write_model(tmp_path / "base", {"a.weight": weight})
    write_model(tmp_path / "run" / "checkpoint-5", {"a.weight": tuned})
    found = found_of(open_trajectory(tmp_path / "run", base=tmp_path / "base"), directions=True, k=4).isel(matrix=0)
    assert found["intruders"] >= 1
    assert found["intruder_energy"] > 0.5
    assert found["overlap_left"] < 0.5


def test_adapters_beside_their_base(tmp_path):
    run = write_run(tmp_path / "run")
    names = open_trajectory(run).matrices
    shapes = open_trajectory(run).checkpoints[-1].shapes
    weights = {f"{name}.weight": torch.randn(shapes[name].out, shapes[name].in_) for name in names[1:]}
    found = found_of(open_trajectory(run, base=write_model(tmp_path / "base", weights)), directions=True, k=2)
    assert np.isnan(found["overlap_left"].values[0])  # the base has no such matrix
    assert np.isfinite(found["overlap_left"].values[1:]).all()
    assert np.isfinite(found["relative_size"].values[:, 1:]).all()


def test_a_base_that_is_not_finite_is_missing(tmp_path):
    weights = model_tensors()
    weights["lm_head.weight"][0, 0] = torch.nan
    trajectory = open_trajectory(write_dense_run(tmp_path / "run"), base=write_model(tmp_path / "base", weights))
    found = found_of(trajectory, directions=True, k=2).sel(matrix="lm_head")
    assert np.isnan(found["overlap_left"])
    assert np.isnan(found["relative_size"]).all()


def test_without_a_base_there_is_nothing(tmp_path):
    assert found_of(open_trajectory(write_dense_run(tmp_path))) is None
