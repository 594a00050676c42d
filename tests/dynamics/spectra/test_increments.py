import pytest
import torch

from dynamics.spectra import increments
from dynamics.spectra.singular_values import core_singular_values, singular_values
from probes import LowRankMatrix
from tests.matrices import moved, random_lora
from tests.reference import dense_singular_values, exact_difference

STEP_SIZES = [10.0**-k for k in range(1, 9)]


def rescaled(matrix: LowRankMatrix, scale: float) -> LowRankMatrix:
    return LowRankMatrix(matrix.left_factor, matrix.right_factor, scale)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("relative", STEP_SIZES)
def test_error_does_not_grow_as_steps_shrink(relative, dtype):
    before = random_lora(14, 11, 3, seed=0, dtype=dtype)
    now = moved(before, relative, seed=1)
    expected = torch.linalg.svdvals(exact_difference(now, before))[:6]
    values = core_singular_values(increments.cores(increments.stack([now], [before])).increment())[0]
    if expected[0] == 0:
        pytest.skip("the step is below float32's resolution, so nothing changed")
    assert (values - expected).abs().max() <= 1e-12 * expected[0]


@pytest.mark.parametrize("relative", STEP_SIZES)
def test_difference_as_a_matrix(relative):
    before = random_lora(14, 11, 3, seed=0, dtype=torch.float64)
    now = moved(before, relative, seed=1)
    expected = torch.linalg.svdvals(exact_difference(now, before))[:6]
    assert (singular_values(increments.difference(now, before)) - expected).abs().max() <= 1e-12 * expected[0]


@pytest.mark.parametrize("relative", [1e-1, 1e-8])
def test_a_changed_scale(relative):
    before = rescaled(random_lora(12, 10, 3, seed=0, dtype=torch.float64), 2.0)
    now = rescaled(moved(before, relative, seed=1), 2.0 * (1 + relative))
    expected = torch.linalg.svdvals(exact_difference(now, before))[:6]
    values = core_singular_values(increments.cores(increments.stack([now], [before])).increment())[0]
    assert (values - expected).abs().max() <= 1e-12 * expected[0]
    assert (singular_values(increments.difference(now, before)) - expected).abs().max() <= 1e-12 * expected[0]


def test_the_naive_stack_would_lose_digits():
    before = random_lora(14, 11, 3, seed=0, dtype=torch.float64)
    now = moved(before, 1e-8, seed=1)
    expected = torch.linalg.svdvals(exact_difference(now, before))[:6]
    naive = LowRankMatrix(torch.cat([now.left, -before.left], 1), torch.cat([now.right, before.right]))
    assert (singular_values(naive) - expected).abs().max() > 1e-10 * expected[0]


def test_totals_come_from_the_same_triangles():
    before = random_lora(20, 15, 4, seed=0)
    now = moved(before, 1e-3, seed=1)
    values = core_singular_values(increments.cores(increments.stack([now], [before])).total())[0]
    expected = dense_singular_values(now)[:4]
    assert (values - expected).abs().max() <= 1e-12 * expected[0]


def test_a_batch_equals_its_members():
    pairs = [(moved(random_lora(9, 8, 2, s), 0.1, s), random_lora(9, 8, 2, s)) for s in range(3)]
    now, before = [list(side) for side in zip(*pairs, strict=True)]
    batch = increments.cores(increments.stack(now, before))
    for index, (a, b) in enumerate(pairs):
        alone = increments.cores(increments.stack([a], [b]))
        torch.testing.assert_close(batch.increment()[index], alone.increment()[0])
        torch.testing.assert_close(batch.member(index).total(), alone.total())


def test_difference_between_ranks():
    now, before = random_lora(9, 8, 3, seed=0), random_lora(9, 8, 2, seed=1)
    change = increments.difference(now, before)
    assert change.rank == 5
    torch.testing.assert_close(change.to_dense(), now.to_dense() - before.to_dense())


@pytest.mark.parametrize("relative", [1e-1, 1e-4, 1e-7])
@pytest.mark.parametrize("scales", [(2.0, 2.0, 2.0), (2.0, 1.5, 3.0)])
def test_inner_product_of_consecutive_increments(relative, scales):
    first = rescaled(random_lora(12, 10, 3, seed=0, dtype=torch.float64), scales[0])
    second = rescaled(moved(first, relative, seed=1), scales[1])
    third = rescaled(moved(second, relative, seed=2), scales[2])
    expected = (exact_difference(third, second) * exact_difference(second, first)).sum()
    size = exact_difference(third, second).norm() * exact_difference(second, first).norm()

    now = increments.stack([third], [second])
    reduced, reduced_before = increments.cores(now), increments.cores(increments.stack([second], [first]))
    left, right = increments.cross_grams(now, *increments.changes_between([second], [first]))
    value = increments.inner_products(reduced, reduced_before, left, right)[0]
    assert abs(value - expected) <= 1e-10 * size


def test_members_join_to_their_batch():
    now, before = random_lora(9, 8, 2, 0), random_lora(9, 8, 2, 1)
    batch = increments.cores(increments.stack([now, before], [before, now]))
    joined = increments.join([batch.member(0), batch.member(1)])
    torch.testing.assert_close(joined.increment(), batch.increment(), rtol=0, atol=0)
