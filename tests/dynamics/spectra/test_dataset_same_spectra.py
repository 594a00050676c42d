"""Whether two measurements are of the same weights: storage formats are, other trainings are not."""

import math

import pytest
import torch
import xarray as xr

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.spectra import raw
from dynamics.spectra.dataset import SAME_SPECTRA, same_spectra
from dynamics.spectra.walk import MatrixSpectra, solve_batch
from probes.low_rank import LowRankMatrix

SIZE, RANK = 32, 4
NAMES = ("layers.0.q_proj", "layers.1.q_proj")
#: Half of the last place of 1 in each format: the largest relative error of rounding.
HALF_PLACES = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def update_of(factors: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> xr.Dataset:
    solved = solve_batch([LowRankMatrix(left, right, 2.0) for left, right in factors.values()])
    results = {(1, name): one.spectra for name, one in zip(factors, solved, strict=True)}
    return raw.raw_update({1: (0, 0)}, dict.fromkeys(factors, MatrixShape(SIZE, SIZE, RANK, "F32")), results)


def update_with(**totals: list[float]) -> xr.Dataset:
    results = {
        (1, name): MatrixSpectra(torch.tensor(total, dtype=torch.float64), None, 0.0, 0.0, math.nan, (len(total), 0))
        for name, total in totals.items()
    }
    return raw.raw_update({1: (0, 0)}, dict.fromkeys(totals, MatrixShape(3, 3, 3, "F32")), results)


def trained(seed: int, steps: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """LoRA factors of two matrices after some steps of Adam; the seed chooses the first A and the order of the data."""
    data = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, SIZE, generator=data)
    targets = {name: inputs @ torch.randn(SIZE, SIZE, generator=data) / SIZE for name in NAMES}
    generator = torch.Generator().manual_seed(seed)
    factors = {
        name: (torch.zeros(SIZE, RANK), torch.randn(RANK, SIZE, generator=generator) / SIZE**0.5) for name in NAMES
    }
    parameters = [factor.requires_grad_() for pair in factors.values() for factor in pair]
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(steps):
        rows = torch.randperm(len(inputs), generator=generator)[:16]
        loss = sum(
            (inputs[rows] @ a.mT @ b.mT - targets[name][rows]).square().mean() for name, (b, a) in factors.items()
        )
        optimizer.zero_grad()
        torch.as_tensor(loss).backward()
        optimizer.step()
    return {name: (left.detach(), right.detach()) for name, (left, right) in factors.items()}


@pytest.mark.parametrize("steps", [1, 10, 100])
@pytest.mark.parametrize("dtype", HALF_PLACES)
def test_a_copy_in_another_format_is_the_same(dtype, steps):
    factors = trained(0, steps)
    stored = {name: (left.to(dtype), right.to(dtype)) for name, (left, right) in factors.items()}
    agreement = same_spectra(update_of(factors), update_of(stored))
    assert agreement.is_same
    assert not agreement.is_other
    assert 0 < agreement.difference <= 2 * HALF_PLACES[dtype]


@pytest.mark.parametrize("dtype", HALF_PLACES)
def test_even_if_every_entry_is_rounded_as_far_as_it_can_be(dtype):
    halfway = torch.full((SIZE, 1), 1 + HALF_PLACES[dtype])
    stored = halfway.to(dtype)
    assert (stored == 1).all()
    exact, rounded = (update_of({"w": (tall, tall.mT)}) for tall in (halfway, stored))
    agreement = same_spectra(exact, rounded)
    assert agreement.difference == pytest.approx(2 * HALF_PLACES[dtype], rel=0.01)
    assert agreement.is_same


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_another_seed_of_one_training_is_another_from_its_first_step_on(steps):
    agreement = same_spectra(update_of(trained(0, steps)), update_of(trained(1, steps)))
    assert agreement.is_other
    assert not agreement.is_same
    assert agreement.difference > 3 * SAME_SPECTRA


@pytest.mark.parametrize(("factor", "same"), [(0.999, True), (1.001, False)])
def test_the_matrix_that_differs_most_decides_at_the_threshold(factor, same):
    one = update_with(a=[4.0, 3.0], b=[2.0, 1.0])
    other = update_with(a=[4.0, 3.0], b=[2.0 * (1 - factor * SAME_SPECTRA), 1.0 * (1 - factor * SAME_SPECTRA)])
    for agreement in (same_spectra(one, other), same_spectra(other, one)):
        assert agreement.is_same is same
        assert agreement.is_other is not same
        assert agreement.difference == pytest.approx(factor * SAME_SPECTRA)
        assert agreement.matrix == "b"


def test_the_distance_is_that_of_whole_spectra_relative_to_the_larger_one():
    agreement = same_spectra(update_with(a=[3.0, 4.0]), update_with(a=[3.0]))  # (3, 4) and (3, 0)
    assert agreement.difference == pytest.approx(4 / 5)


def test_zero_and_zero_are_the_same_and_zero_and_an_update_are_not():
    zero, moved = update_with(a=[0.0, 0.0]), update_with(a=[1e-30, 0.0])
    assert same_spectra(zero, zero).difference == 0
    assert same_spectra(zero, moved).difference == 1


@pytest.mark.parametrize("unknown", [{"b": [1.0]}, {"a": [math.nan]}, {}], ids=["other names", "failed", "none at all"])
def test_what_cannot_be_compared_is_neither_the_same_nor_another(unknown):
    agreement = same_spectra(update_with(a=[1.0]), update_with(**unknown))
    assert (agreement.is_same, agreement.is_other, agreement.matrix) == (False, False, "")
    assert math.isnan(agreement.difference)


def test_a_spectrum_that_failed_in_one_leaves_the_decision_to_the_others():
    agreement = same_spectra(update_with(a=[1.0], b=[math.nan]), update_with(a=[1.0], b=[5.0]))
    assert (agreement.is_same, agreement.matrix) == (True, "a")


def test_a_step_taken_from_many_is_compared_as_one_measured_alone():
    steps = raw.concatenate([update_with(a=[2.0]), update_with(a=[3.0]).assign_coords(step=[2])])
    assert same_spectra(steps.sel(step=2), update_with(a=[3.0])).difference == 0
