"""From files to labelled numbers, against dense matrices."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.checkpoints.trajectory import Trajectory
from dynamics.spectra import walk
from dynamics.spectra.dataset import measure_update
from dynamics.spectra.findings import findings_of
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from probes import LowRankMatrix
from tests.matrices import moved
from tests.runs import NAMES, adapter_config, random_factors, write_adapter, write_run

SCALE = 8 / 4  # adapter_config's alpha over rank


def drifting(steps, rank=4, relative=0.1, dtype=torch.float32, **shape):
    """Step → factors, each a small move from the one before."""
    factors = random_factors(rank=rank, dtype=dtype, **shape)
    runs = {}
    for step in steps:
        runs[step] = factors
        matrices = {name: moved(LowRankMatrix(*pair), relative, seed=step) for name, pair in factors.items()}
        factors = {name: (matrix.left_factor, matrix.right_factor) for name, matrix in matrices.items()}
    return runs


def dense(runs, step, name):
    left, right = runs[step][name]
    return SCALE * left.double() @ right.double()


def analyse(run):
    """The measured groups' update, and all findings, of a folder or a trajectory."""
    trajectory = run if isinstance(run, Trajectory) else open_trajectory(run)
    update, findings, _ = trajectory_spectra(trajectory, workers=2)
    measured = measure_update(update)["update"]
    return measured, [*findings, *findings_of(measured)]


@pytest.fixture
def runs():
    return drifting([10, 20, 30, 40])


@pytest.fixture
def update(runs, tmp_path):
    return analyse(write_run(tmp_path / "run", runs))[0]


def test_totals_equal_dense_singular_values(runs, update):
    for step in runs:
        for name in NAMES:
            expected = torch.linalg.svdvals(dense(runs, step, name))[:4].numpy()
            values = update["singular_value"].sel(step=step, kind="total", matrix=name).values
            assert np.abs(values[:4] - expected).max() <= 1e-12 * expected[0]
            assert np.isnan(values[4:]).all()


def test_increments_equal_dense_differences(runs, update):
    for before, step in ((10, 20), (20, 30), (30, 40)):
        for name in NAMES:
            expected = torch.linalg.svdvals(dense(runs, step, name) - dense(runs, before, name))[:8].numpy()
            values = update["singular_value"].sel(step=step, kind="increment", matrix=name).values
            assert np.abs(values - expected).max() <= 1e-12 * expected[0]


def test_the_first_step_has_no_increment(update):
    assert update["from_step"].values.tolist() == [-1, 10, 20, 30]
    first = update.sel(step=10, kind="increment")
    assert (first["count"] == 0).all()
    assert first["frobenius_norm"].isnull().all()
    assert np.isnan(first["frobenius_norm_all"])


def test_path_length_and_cosine_equal_dense_ones(runs, update):
    for name in NAMES:
        changes = [dense(runs, b, name) - dense(runs, a, name) for a, b in ((10, 20), (20, 30), (30, 40))]
        path = np.cumsum([0.0] + [float(change.norm()) for change in changes])
        np.testing.assert_allclose(update["path_length"].sel(matrix=name), path, rtol=1e-12)
        for row, (last, change) in enumerate(pairwise(changes), start=2):
            expected = float((last * change).sum() / (last.norm() * change.norm()))
            assert float(update["increment_cosine"].sel(matrix=name)[row]) == pytest.approx(expected, abs=1e-9)
    assert update["increment_cosine"].isel(step=[0, 1]).isnull().all()


def test_direct_sum_equals_the_block_diagonal_matrix(runs, update):
    blocks = torch.block_diag(*[dense(runs, 40, name) for name in NAMES])
    energy = torch.linalg.svdvals(blocks).square()
    p = energy / energy.sum()
    last = update.sel(step=40, kind="total")
    assert float(last["entropy_energy_block_diagonal"]) == pytest.approx(float(-torch.xlogy(p, p).sum()), rel=1e-12)
    assert float(last["participation_ratio_block_diagonal"]) == pytest.approx(float(1 / p.square().sum()), rel=1e-12)
    assert float(last["frobenius_norm_all"]) == pytest.approx(float(blocks.norm()), rel=1e-12)
    assert float(last["energy_share_by_role"].sum()) == pytest.approx(1)


def test_entropy_deficit_is_null_minus_entropy(runs, tmp_path):
    groups = measure_update(trajectory_spectra(open_trajectory(write_run(tmp_path / "run", runs)))[0])
    update, null = groups["update"], groups["null"]
    expected = null["entropy_energy"] - update["entropy_energy"]
    np.testing.assert_array_equal(update["entropy_deficit"], expected)
    total, increment = update["null_percentile"].sel(step=40).transpose("kind", "matrix").values
    assert ((total >= 0) & (total <= 100)).all()
    assert ((increment >= 0) & (increment <= 100)).all()


def test_gaussian_factors_look_like_their_null(tmp_path):
    names = [f"layers.{i}.w" for i in range(60)]
    run = write_run(tmp_path / "run", {1: random_factors(names, out=40, in_=30, rank=4, seed=5)})
    percentile = analyse(run)[0]["null_percentile"].sel(step=1, kind="total").values
    assert 0.2 < (percentile < 50).mean() < 0.8
    assert (percentile < 5).mean() < 0.2


def test_a_zero_update_is_flagged_and_its_measures_are_missing(runs, tmp_path):
    runs[10] = {name: (torch.zeros_like(left), right) for name, (left, right) in runs[10].items()}
    update, findings = analyse(write_run(tmp_path / "run", runs))
    first = update.sel(step=10, kind="total")
    assert first["is_zero"].all()
    assert (first["frobenius_norm"] == 0).all()
    assert (first["singular_value"].isel(index=slice(4)) == 0).all()
    assert first["effective_rank_energy"].isnull().all()
    assert [(f.code, f.step) for f in findings if f.code == "OD202"] == [("OD202", 10)]
    # From zero on, the increment is the total.
    np.testing.assert_allclose(
        update["frobenius_norm"].sel(step=20, kind="increment"), update["frobenius_norm"].sel(step=20, kind="total")
    )


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_broken_factor_is_named_and_costs_only_what_it_touches(runs, tmp_path, bad, side):
    runs[20][NAMES[1]][side][0, 0] = bad
    update, findings = analyse(write_run(tmp_path / "run", runs))
    finding = next(f for f in findings if f.code == "OD201")
    assert (finding.matrix, finding.step) == (NAMES[1], 20)
    assert finding.file == "checkpoint-20/adapter_model.safetensors"
    total, increment = (update["frobenius_norm"].sel(kind=kind, matrix=NAMES[1]) for kind in ("total", "increment"))
    assert np.isnan(total).values.tolist() == [False, True, False, False]
    assert np.isnan(increment).values.tolist() == [True, True, True, False]
    others = [name for name in NAMES if name != NAMES[1]]
    assert update["frobenius_norm"].sel(kind="total", matrix=others).notnull().all()
    assert np.isnan(update["entropy_energy_block_diagonal"].sel(step=20, kind="total"))


def test_a_matrix_that_comes_later(runs, tmp_path):
    del runs[10][NAMES[2]]
    update, _ = analyse(write_run(tmp_path / "run", runs))
    late = update.sel(matrix=NAMES[2])
    assert late["count"].sel(kind="total").values.tolist() == [0, 4, 4, 4]
    assert late["count"].sel(kind="increment").values.tolist() == [0, 0, 8, 8]
    assert np.isfinite(update["frobenius_norm_all"].sel(step=10, kind="total"))


def test_a_matrix_missing_in_the_middle_leaves_its_next_increment_unknown(runs, tmp_path):
    del runs[20][NAMES[2]]
    update, findings = analyse(write_run(tmp_path / "run", runs))
    assert update["count"].sel(matrix=NAMES[2], kind="increment").values.tolist() == [0, 0, 0, 8]
    all_of_them = update["frobenius_norm_all"].sel(kind="increment").values
    assert np.isnan(all_of_them).tolist() == [True, False, True, False]
    assert [(f.matrix, f.step) for f in findings if f.code == "OD204" and f.matrix] == [(NAMES[2], 30)]


def test_a_zero_increment_has_no_direction(runs, tmp_path):
    still = {name: (left * 0, right) for name, (left, right) in runs[10].items()}
    moved_but_zero = {name: (left, right + 1) for name, (left, right) in still.items()}
    update, _ = analyse(write_run(tmp_path / "run", {1: still, 2: moved_but_zero, 3: runs[10], 4: runs[20]}))
    assert (update["frobenius_norm"].sel(step=2, kind="increment") == 0).all()
    assert update["increment_cosine"].sel(step=[2, 3]).isnull().all()
    assert update["increment_cosine"].sel(step=4).notnull().all()


@pytest.mark.parametrize(("out", "in_", "rank"), [(8, 100, 64), (2, 300, 8), (20, 20, 15)])
def test_the_null_has_the_rank_of_the_factors_not_of_the_product(tmp_path, out, in_, rank):
    names = [f"layers.{i}.w" for i in range(40)]
    factors = random_factors(names, out=out, in_=in_, rank=rank, seed=3)
    update, _ = analyse(write_run(tmp_path / "run", {1: factors}, config=adapter_config(rank=rank)))
    percentile = update["null_percentile"].sel(step=1, kind="total").values
    assert 0.2 < (percentile < 50).mean() < 0.8
    assert (update["factor_rank"].sel(kind="total") == rank).all()


def test_a_single_direction_is_not_more_concentrated_than_chance(tmp_path):
    run = write_run(tmp_path / "run", {1: random_factors(rank=1)}, config=adapter_config(rank=1))
    update, findings = analyse(run)
    assert update["null_percentile"].isnull().all()
    assert "OD205" not in [f.code for f in findings]


def test_a_rank_that_changes(tmp_path):
    small, large = random_factors(rank=2, seed=1), random_factors(rank=5, seed=2)
    folder = tmp_path / "run"
    write_adapter(folder / "checkpoint-1", small, adapter_config(rank=2, alpha=4))
    write_adapter(folder / "checkpoint-2", large, adapter_config(rank=5, alpha=10))
    trajectory = open_trajectory(folder)
    update, _ = analyse(trajectory)
    assert update["adapter_rank"].values.tolist() == [5] * 4
    if trajectory.checkpoints[0].segment == trajectory.checkpoints[1].segment:
        change = 2.0 * (large[NAMES[0]][0].double() @ large[NAMES[0]][1].double())
        change -= 2.0 * (small[NAMES[0]][0].double() @ small[NAMES[0]][1].double())
        expected = torch.linalg.svdvals(change)[:7].numpy()
        values = update["singular_value"].sel(step=2, kind="increment", matrix=NAMES[0]).values
        np.testing.assert_allclose(values, expected, rtol=1e-10)


def test_matrices_of_unequal_shape_and_any_batch_size(tmp_path, monkeypatch):
    factors = {
        "layers.0.a": random_factors(["x"], 12, 10, 4, seed=0)["x"],
        "layers.0.b": random_factors(["x"], 30, 10, 4, seed=1)["x"],
        "layers.1.a": random_factors(["x"], 12, 10, 4, seed=2)["x"],
    }
    run = write_run(tmp_path / "run", {1: factors})
    together = analyse(run)[0]
    monkeypatch.setattr(walk, "BATCH_BYTES", {"cpu": 1})
    alone = analyse(run)[0]
    np.testing.assert_allclose(together["singular_value"], alone["singular_value"], rtol=1e-12)
    for name, (left, right) in factors.items():
        expected = torch.linalg.svdvals(SCALE * left.double() @ right.double())[:4]
        np.testing.assert_allclose(alone["singular_value"].sel(matrix=name, kind="total", step=1), expected, rtol=1e-10)


def test_bf16_increments_below_its_resolution_are_flagged(tmp_path):
    runs = drifting([1, 2], relative=1e-4, dtype=torch.bfloat16, out=200, in_=150)
    update, findings = analyse(write_run(tmp_path / "run", runs))
    assert update["quantisation_limited"].sel(step=2, kind="increment").all()
    assert not update["quantisation_limited"].sel(kind="total").any()
    assert [f.code for f in findings].count("OD203") == 1


def test_threads_of_the_caller_are_as_before(runs, tmp_path):
    before = torch.get_num_threads()
    analyse(write_run(tmp_path / "run", runs))
    assert torch.get_num_threads() == before


def test_suggested_ranks_hold_their_share_of_energy(tmp_path):
    left, right = torch.eye(12)[:, :4] * torch.tensor([10.0, 5.0, 0.1, 0.01]), torch.eye(10)[:4]
    update, _ = analyse(write_run(tmp_path / "run", {1: {"layers.0.w": (left, right)}}))
    assert update["suggested_rank"].values.tolist() == [2.0]
    assert update["suggested_rank"].attrs["energy"] == 0.99


def test_an_absurd_size_is_warned_of(tmp_path):
    """A damaged file, or a training that diverged: no weight has entries of a thousand."""
    factors = {10: random_factors(seed=1), 20: random_factors(seed=2)}
    left, right = factors[20][NAMES[0]]
    factors[20][NAMES[0]] = (left * 1e20, right)
    _, findings = analyse(write_run(tmp_path, factors))
    (warning,) = [finding for finding in findings if finding.code == "OD141"]
    assert (warning.severity, warning.matrix, warning.step) == ("warning", NAMES[0], 20)
    assert warning.evidence["largest"] > 1e19
