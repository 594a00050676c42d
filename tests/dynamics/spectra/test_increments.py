import pytest
import torch

from dynamics.spectra import increments
from dynamics.spectra.singular_values import core_singular_values, singular_values
from probes import LowRankMatrix
from tests.matrices import moved, random_lora
from tests.reference import dense_singular_values, exact_columns_difference, exact_difference

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


@pytest.mark.parametrize("relative", [1e-1, 1e-8])
def test_a_changed_scale(relative):
    before = rescaled(random_lora(12, 10, 3, seed=0, dtype=torch.float64), 2.0)
    now = rescaled(moved(before, relative, seed=1), 2.0 * (1 + relative))
    expected = torch.linalg.svdvals(exact_difference(now, before))[:6]
    values = core_singular_values(increments.cores(increments.stack([now], [before])).increment())[0]
    assert (values - expected).abs().max() <= 1e-12 * expected[0]


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
        torch.testing.assert_close(batch.one_by_one()[index].total(), alone.total())


@pytest.mark.parametrize("relative", [1e-1, 1e-8])
@pytest.mark.parametrize("grown", [True, False])
def test_a_rank_that_changes_by_added_directions(relative, grown):
    small = random_lora(14, 11, 2, seed=0, dtype=torch.float64)
    zero, fresh = torch.zeros(14, 3, dtype=torch.float64), random_lora(3, 11, 3, seed=5).right_factor.double()
    extended = LowRankMatrix(
        torch.cat([small.left_factor, zero], 1), torch.cat([small.right_factor, fresh]), small.scale
    )
    now, before = (moved(extended, relative, seed=1), small) if grown else (moved(small, relative, seed=1), extended)
    expected = torch.linalg.svdvals(exact_difference(now, before))[:7]
    reduced = increments.cores(increments.stack([now], [before]))
    assert (core_singular_values(reduced.increment())[0, :7] - expected).abs().max() <= 1e-12 * expected[0]
    total = dense_singular_values(now)[: now.rank]
    assert (core_singular_values(reduced.total())[0, : now.rank] - total).abs().max() <= 1e-12 * total[0]


@pytest.mark.parametrize("shrink", [1e-6, 1e-10])
def test_totals_keep_their_digits_where_a_factor_shrank(shrink):
    now = random_lora(14, 11, 3, seed=1, dtype=torch.float64)
    before = LowRankMatrix(now.left_factor, now.right_factor / shrink, now.scale)
    values = core_singular_values(increments.cores(increments.stack([now], [before])).total())[0]
    expected = dense_singular_values(now)[:3]
    assert (values - expected).abs().max() <= 1e-12 * expected[0]


def test_columns_of_different_scale():
    """As in the sum of two adapters, or AdaLoRA's diagonal."""

    def columns(matrix, scales):
        return LowRankMatrix(matrix.left_factor, matrix.right_factor, 1.0, column_scale=torch.tensor(scales).double())

    first = random_lora(12, 10, 4, seed=0, dtype=torch.float64)
    second, third = (moved(first, 1e-7, seed=s) for s in (1, 2))
    steps = [
        columns(first, [7 / 3, 7 / 3, 4.5, 4.5]),
        columns(second, [7 / 3, 7 / 3, 4.5, 4.5]),
        columns(third, [7 / 3, 2, 4.5, 4]),
    ]
    changes = [exact_columns_difference(steps[2], steps[1]), exact_columns_difference(steps[1], steps[0])]
    middle = increments.cores(increments.stack([steps[1]], [steps[0]]))
    expected = torch.linalg.svdvals(changes[1])[:8]
    assert (core_singular_values(middle.increment())[0] - expected).abs().max() <= 1e-12 * expected[0]
    last = increments.stack([steps[2]], [steps[1]])
    reduced = increments.cores(last)
    left, right = increments.cross_grams(last, *increments.changes_between([steps[1]], [steps[0]]))
    inner = increments.increment_products(reduced, middle, left, right)[0]
    assert abs(inner - (changes[0] * changes[1]).sum()) <= 1e-6 * changes[0].norm() * changes[1].norm()


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
    value = increments.increment_products(reduced, reduced_before, left, right)[0]
    assert abs(value - expected) <= 1e-10 * size


def test_members_join_to_their_batch():
    now, before = random_lora(9, 8, 2, 0), random_lora(9, 8, 2, 1)
    batch = increments.cores(increments.stack([now, before], [before, now]))
    joined = increments.join(batch.one_by_one())
    torch.testing.assert_close(joined.increment(), batch.increment(), rtol=0, atol=0)


def test_a_workspace_keeps_what_is_on_the_host():
    workspace = increments.Workspace()
    kept = workspace.take("left", (2, 3), "cpu")
    workspace.take("left", (2, 3), "meta")
    workspace.leave_accelerators()
    assert workspace.take("left", (3, 2), "cpu").data_ptr() == kept.data_ptr()
    assert {device.type for _, device in workspace._buffers} == {"cpu"}


@pytest.mark.parametrize("fast", [False, True])
def test_sums_of_products_have_the_spectra_of_their_dense_sums(fast):
    ranks = (2, 3, 1)
    sums = [[random_lora(9, 8, rank, seed=10 * index + rank) for rank in ranks] for index in range(2)]
    values = core_singular_values(increments.cores(increments.stack_sums(sums), fast=fast).total())
    expected = torch.stack([torch.linalg.svdvals(sum(term.to_dense() for term in terms)) for terms in sums])
    assert (values[:, :6] - expected[:, :6]).abs().max() <= 1e-12 * expected.max()


@pytest.mark.parametrize("relative", STEP_SIZES)
def test_the_difference_itself_loses_no_digits(relative):
    before = random_lora(14, 11, 3, seed=0, dtype=torch.float64)
    now = moved(before, relative, seed=1)
    exact = exact_difference(now, before)
    assert (increments.difference(now, before).to_dense() - exact).norm() <= 1e-12 * exact.norm()


def test_the_difference_follows_scales_and_ranks():
    generator = torch.Generator().manual_seed(1)
    matrices = [
        LowRankMatrix(
            torch.randn(5, rank, generator=generator),
            torch.randn(rank, 4, generator=generator),
            scale,
            column_scale=torch.rand(rank, generator=generator),
        )
        for rank, scale in ((2, 0.5), (2, 3.0), (3, 1.0))
    ]
    for now in matrices:
        for before in matrices:
            expected = now.to_dense() - before.to_dense()
            torch.testing.assert_close(increments.difference(now, before).to_dense(), expected, rtol=1e-12, atol=1e-12)
