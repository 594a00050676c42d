"""However a training is cut into tiles of checkpoints, and matrices into batches, the numbers are the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.schema import DECOMPOSITIONS
from dynamics.spectra import trajectory_spectra as module
from dynamics.spectra import walk
from dynamics.spectra.path import training_path
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from tests.runs import NAMES, counted_openings, drifting, write_run
from tests.whole_models import write_dense_run, write_model

STEPS = (10, 20, 30, 40, 50, 60, 70)


def adapters(folder):
    return open_trajectory(write_run(folder / "run", drifting(STEPS)))


def broken(folder):
    """One matrix is not finite at a step, one is absent at another, of one the update is zero for a while."""
    runs = drifting(STEPS)
    runs[40][NAMES[0]][0][0, 0] = torch.nan
    del runs[30][NAMES[1]]
    runs[50][NAMES[2]][0].zero_()
    return open_trajectory(write_run(folder / "run", runs))


def dense(folder):
    return open_trajectory(write_dense_run(folder / "run", STEPS), base=write_model(folder / "base"))


@pytest.mark.parametrize("make", [adapters, broken, dense])
@pytest.mark.parametrize("opened", [3, 4, 6])
def test_tiles_of_checkpoints(tmp_path, monkeypatch, make, opened):
    trajectory = make(tmp_path)
    whole, findings, grams = trajectory_spectra(trajectory)
    most_open = counted_openings(monkeypatch, trajectory)
    monkeypatch.setattr(module, "checkpoints_open_at_once", lambda checkpoints, starts: opened)
    tiled, findings_of_tiles, none = trajectory_spectra(trajectory)
    assert most_open() <= opened + (make is dense)
    assert findings_of_tiles == findings
    assert not none
    for name in set(whole.data_vars) - {"decomposition"}:
        np.testing.assert_allclose(tiled[name], whole[name], rtol=1e-9, atol=1e-12, err_msg=str(name))
    np.testing.assert_allclose(training_path(trajectory)["gram"], training_path(trajectory, grams)["gram"], rtol=1e-10)


@pytest.mark.parametrize(("limit", "bytes_"), [("TILE_BYTES", 2**12), ("READ_BYTES", 1)])
def test_little_memory(tmp_path, monkeypatch, limit, bytes_):
    trajectory = adapters(tmp_path)
    whole = trajectory_spectra(trajectory)[0]
    monkeypatch.setattr(module, limit, bytes_)
    monkeypatch.setattr(walk, "BATCH_BYTES", {"cpu": 1})
    np.testing.assert_allclose(trajectory_spectra(trajectory)[0]["singular_value"], whole["singular_value"], rtol=1e-9)


def test_the_number_of_workers_changes_no_bit(tmp_path):
    trajectory = adapters(tmp_path)
    one, many = (trajectory_spectra(trajectory, workers=workers)[0] for workers in (1, 3))
    np.testing.assert_array_equal(one["singular_value"], many["singular_value"])
    np.testing.assert_array_equal(one["inner_product"], many["inner_product"])


def test_what_a_gram_cannot_hold_is_solved_by_qr(tmp_path):
    update = trajectory_spectra(broken(tmp_path))[0]
    by_qr = update["decomposition"].sel(kind="total") == DECOMPOSITIONS.index("qr_core")
    steps = {name: update["step"].values[by_qr.sel(matrix=name)].tolist() for name in NAMES}
    assert steps[NAMES[0]] == list(STEPS)  # not finite at one step
    assert steps[NAMES[1]] == [10, 20, 40, 50, 60, 70]  # absent at one step
    assert steps[NAMES[2]] == [50, 60]  # zero, and all of it new at the step after
    assert steps[NAMES[3]] == []


@pytest.mark.parametrize(("bytes_", "side_by_side"), [(2**29, 4), (8 * 3 * 8**2 // 2, 2), (1, 1)])
def test_large_dense_matrices_have_fewer_workers_with_more_threads(tmp_path, monkeypatch, bytes_, side_by_side):
    trajectory = dense(tmp_path)
    whole = trajectory_spectra(trajectory, workers=1)[0]
    chosen, workers = [], module.single_threaded_workers
    monkeypatch.setattr(module, "CORE_BYTES", bytes_)
    monkeypatch.setattr(
        module, "single_threaded_workers", lambda *counts: chosen.append(counts) or workers(counts[0], 1)
    )
    found = trajectory_spectra(trajectory, workers=4)[0]
    assert chosen == [(side_by_side, 4 // side_by_side)]
    np.testing.assert_array_equal(found["singular_value"], whole["singular_value"])
