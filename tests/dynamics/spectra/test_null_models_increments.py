"""Steps of pure noise in the factors lie in the middle of the null of increments, however far training has come."""

import numpy as np
import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.spectra import raw, walk
from dynamics.spectra.dataset import measure_update
from dynamics.spectra.findings import findings_of
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from dynamics.store import open_run
from probes import LowRankMatrix
from tests.runs import random_factors, write_records, write_run


def gaussian(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def update_of(steps):
    """``/update`` of matrices whose factors are given at each step."""
    results, places, before = {}, {}, None
    for step, matrices in enumerate(steps):
        now = list(matrices.values())
        solved = walk.solve_batch(now, before)
        before = walk.Previous(now, [one.noise for one in solved])
        results |= {(step, name): one.spectra for name, one in zip(matrices, solved, strict=True)}
        places |= {name: MatrixShape(*matrix.shape, matrix.rank, "F32") for name, matrix in matrices.items()}
    return measure_update(raw.raw_update({step: (0, step - 1) for step in range(len(steps))}, places, results))[
        "update"
    ]


def increments(steps):
    """The increments of the same."""
    return update_of(steps).sel(kind="increment").isel(step=slice(1, None))


def noise_steps(out, in_, rank, ratio, *, steps=5, matrices=20, scale=2.0, column_scale=None):
    """White steps of equal size in both factors, from ‖B‖ = ratio·‖A‖, as Adam's first steps are."""
    made = [{} for _ in range(steps)]
    for matrix in range(matrices):
        right = gaussian(rank, in_, seed=2 * matrix) / in_**0.5
        left = gaussian(out, rank, seed=2 * matrix + 1) * (ratio * (rank / (out * rank)) ** 0.5)
        for step in range(steps):
            made[step][f"layers.{matrix}.w"] = LowRankMatrix(left, right, scale, column_scale=column_scale)
            left = left + 1e-4 * gaussian(out, rank, seed=1000 * step + matrix + 500)
            right = right + 1e-4 * gaussian(rank, in_, seed=1000 * step + matrix + 800)
    return made


@pytest.mark.parametrize(("out", "in_", "rank"), [(256, 256, 8), (64, 96, 4)])
@pytest.mark.parametrize("ratio", [0.0, 0.005, 0.5, 1.7])
def test_noise_lies_in_the_middle_of_its_null(out, in_, rank, ratio):
    update = increments(noise_steps(out, in_, rank, ratio))
    percentile = update["null_percentile"].values
    assert 40 < percentile.mean() < 60  # 80 uniform numbers: a standard error of 3.2
    assert (percentile < 10).mean() < 0.2
    assert abs(update["entropy_deficit"].values.mean()) < 0.01
    assert (update["marchenko_pastur_outliers"].values > 0).mean() < 0.08


def test_adapters_of_other_scales_and_a_frozen_one():
    """The sum of two adapters of which one does not move is compared with noise in the other alone."""
    moving = noise_steps(128, 96, 4, 0.5, matrices=10)
    left, right = gaussian(128, 6, seed=1), gaussian(6, 96, seed=2)
    columns = torch.tensor([0.25] * 6 + [2.0] * 4, dtype=torch.float64)
    both = [
        {
            name: LowRankMatrix(
                torch.cat([left, one.left_factor], 1), torch.cat([right, one.right_factor]), column_scale=columns
            )
            for name, one in step.items()
        }
        for step in moving
    ]
    alone, beside = increments(moving), increments(both)
    np.testing.assert_allclose(beside["entropy_energy"], alone["entropy_energy"], rtol=1e-9)
    np.testing.assert_allclose(beside["entropy_deficit"].mean(), 0, atol=0.02)
    np.testing.assert_allclose(beside["entropy_deficit"], alone["entropy_deficit"], atol=0.05)


def test_a_frozen_factor_moves_only_the_other():
    steps = noise_steps(128, 96, 4, 0.5, matrices=10)
    for name, one in steps[0].items():
        for step in steps:
            step[name] = LowRankMatrix(step[name].left_factor, one.right_factor, one.scale)
    update = increments(steps)
    assert (update["right_factor_change"] == 0).all()
    assert update["left_factor_value"].isnull().all()
    assert 35 < update["null_percentile"].values.mean() < 65


def test_a_step_of_one_direction_is_far_below_its_null():
    steps = noise_steps(128, 96, 8, 0.5, steps=2, matrices=3)
    for name, one in steps[1].items():
        change = gaussian(128, 1, seed=1) @ gaussian(1, 8, seed=2)
        steps[1][name] = LowRankMatrix(steps[0][name].left_factor + 1e-3 * change, one.right_factor, one.scale)
    update = increments(steps)
    assert (update["entropy_deficit"] > 0.5).all()
    assert (update["null_percentile"] == 0).all()


def test_across_a_change_of_rank_there_is_no_null_and_a_finding_says_so():
    small, large = (noise_steps(30, 20, rank, 1.0, steps=1, matrices=4)[0] for rank in (2, 5))
    update = update_of([small, large])
    changed = update.sel(step=1)
    assert changed["entropy_energy"].sel(kind="increment").notnull().all()
    assert changed["entropy_deficit"].sel(kind="increment").isnull().all()
    assert changed["entropy_deficit"].sel(kind="total").notnull().all()
    (finding,) = [finding for finding in findings_of(update) if finding.code == "OD208"]
    assert finding.message.startswith("4 of 4 LoRA increments have no null model, so their entropy_deficit is")


def drifting_run():
    steps = {}
    factors = random_factors(out=24, in_=30, rank=4)
    for step in (10, 20, 30):
        steps[step] = factors
        noise = random_factors(out=24, in_=30, rank=4, seed=step)
        factors = {
            name: (left + 0.1 * noise[name][0], right + 0.1 * noise[name][1]) for name, (left, right) in factors.items()
        }
    return steps


def test_records_and_checkpoints_have_the_same_null(tmp_path):
    steps = drifting_run()
    checkpoints = measure_update(trajectory_spectra(open_trajectory(write_run(tmp_path / "a", steps)))[0])
    write_records(tmp_path / "b", steps, from_start=False)
    records = open_run(tmp_path / "b")
    for name in ("entropy_deficit", "null_percentile", "marchenko_pastur_outliers"):
        np.testing.assert_allclose(records["update"][name].values, checkpoints["update"][name].values, atol=1e-9)


def test_records_of_an_earlier_version_have_no_null_of_increments_and_say_so(tmp_path, monkeypatch):
    raw_update = raw.raw_update
    with monkeypatch.context() as earlier:
        earlier.setattr(raw, "raw_update", lambda *arguments: raw_update(*arguments).drop_vars(raw.ADDED))
        write_records(tmp_path, drifting_run(), from_start=False)
    tree = open_run(tmp_path)
    increment = tree["update"].sel(kind="increment", step=[20, 30])
    assert increment["entropy_energy"].notnull().all()
    assert increment["entropy_deficit"].isnull().all()
    assert (increment["marchenko_pastur_outliers"].isnull()).all()
    assert tree["update"]["entropy_deficit"].sel(kind="total").notnull().all()
    assert '"OD208"' in tree.attrs["findings"]
