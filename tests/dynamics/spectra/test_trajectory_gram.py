"""One Gram for all steps of a matrix: against exact arithmetic, and against its twin, which goes step by step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from dynamics.spectra.path import path_gram
from dynamics.spectra.singular_values import TRUSTED, gram_triangles
from dynamics.spectra.trajectory_gram import solve_trajectories
from dynamics.spectra.walk import BatchResult, Previous, solve_batch
from probes import LowRankMatrix
from tests.matrices import orthonormal
from tests.reference import entropy, exact_columns_difference

OUT, IN, RANK, STEPS = 22, 18, 4, 4
Trajectory = list[LowRankMatrix]


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drift(
    relative: float,
    change: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda left, right: (left, right),
    dtype: torch.dtype = torch.float64,
    decay: float = 1.0,
    scales: Sequence[float] = (0.7,) * STEPS,
    rank: int = RANK,
) -> Trajectory:
    """Factors that take a step of a relative size, and then shrink by ``decay``; ``change`` is applied to each pair."""
    left, right = normal(OUT, rank, seed=1), normal(rank, IN, seed=2)
    trajectory = []
    for step, scale in enumerate(scales):
        changed = change(left, right)
        trajectory.append(LowRankMatrix(changed[0].to(dtype), changed[1].to(dtype), scale))
        left = decay * (left + relative * normal(OUT, rank, seed=10 + step))
        right = right + relative * normal(rank, IN, seed=20 + step)
    return trajectory


def conditioned(kappa: float) -> Tensor:
    """A square matrix of this condition number."""
    values = torch.logspace(0, -math.log10(kappa), RANK, dtype=torch.float64)
    return orthonormal(RANK, RANK, 3) @ torch.diag(values) @ orthonormal(RANK, RANK, 4).mT


def ill_left(kappa: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    return lambda left, right: (left @ conditioned(kappa), right)


def ill_both(kappa: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    root = conditioned(math.sqrt(kappa))
    return lambda left, right: (left @ root, root.mT @ right)


def gauge(kappa: float) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Another pair of factors of the same product."""
    mixing = conditioned(kappa)
    return lambda left, right: (left @ mixing, torch.linalg.inv(mixing) @ right)


def zero_column(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([torch.zeros(OUT, 1, dtype=torch.float64), left[:, 1:]], 1), right


def duplicated(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([left[:, 1:2], left[:, 1:]], 1), right


def growing_and_shrinking() -> Trajectory:
    small, large = drift(0.1, rank=2), drift(0.1)
    return [small[0], LowRankMatrix(large[1].left_factor, large[1].right_factor, 0.5), large[2], small[3]]


def leaving_and_returning(where: str) -> Trajectory:
    """B, or the whole update, is zero at the first step and at the third."""
    trajectory = drift(0.1)
    for step in (0, 2):
        matrix = trajectory[step]
        right = torch.zeros_like(matrix.right_factor) if where == "both" else matrix.right_factor
        trajectory[step] = LowRankMatrix(torch.zeros_like(matrix.left_factor), right, matrix.scale)
    return trajectory


def frozen_right() -> Trajectory:
    trajectory = drift(0.1)
    return [LowRankMatrix(matrix.left_factor, trajectory[0].right_factor, matrix.scale) for matrix in trajectory]


def column_scales() -> Trajectory:
    scales = [torch.tensor([1.0, 0.0, 3.0, -2.0]) * factor for factor in (1.0, 1.5, 0.5, 0.5)]
    return [
        LowRankMatrix(matrix.left_factor, matrix.right_factor, 2.0, column_scale=scale)
        for matrix, scale in zip(drift(0.1), scales, strict=True)
    ]


HARD: dict[str, Trajectory] = {
    **{f"steps of {relative:g}": drift(relative) for relative in (1e-1, 1e-3, 1e-6, 1e-10)},
    **{f"one factor, condition {kappa:g}": drift(0.01, ill_left(kappa)) for kappa in (1e2, 1e4, 1e6, 1e8)},
    **{f"both factors, condition {kappa:g}": drift(0.01, ill_both(kappa)) for kappa in (1e2, 1e4, 1e8)},
    **{f"small steps, condition {kappa:g}": drift(1e-6, ill_left(kappa)) for kappa in (1e3, 1e8)},
    **{f"gauge, condition {kappa:g}": drift(0.1, gauge(kappa)) for kappa in (1e1, 1e2, 1e3)},
    **{f"shrinking to {decay:g}": drift(0.1, decay=decay) for decay in (0.5, 1e-1, 1e-2, 1e-4)},
    **{f"{dtype}": drift(0.01, dtype=dtype) for dtype in (torch.bfloat16, torch.float16, torch.float32)},
    "bfloat16, hardly moved": drift(1e-3, dtype=torch.bfloat16),
    "a zero column": drift(0.1, zero_column),
    "a duplicated column": drift(0.1, duplicated),
    "nothing moved": drift(0.0),
    "a frozen factor": frozen_right(),
    "other scales": drift(0.01, scales=(0.7, 1.4, 1.4, -0.2)),
    "scaled columns": column_scales(),
    "B is zero at times": leaving_and_returning("left"),
    "zero at times": leaving_and_returning("both"),
    "large": drift(0.1, lambda left, right: (1e60 * left, 1e60 * right)),
    "small": drift(0.1, lambda left, right: (1e-60 * left, 1e-60 * right)),
    "another rank": growing_and_shrinking(),
}


def nothing(matrix: LowRankMatrix) -> LowRankMatrix:
    return LowRankMatrix(torch.zeros_like(matrix.left_factor), torch.zeros_like(matrix.right_factor))


def by_steps(trajectory: Trajectory) -> list[BatchResult]:
    """The slow twin: a QR decomposition of each side at each step."""
    results: list[BatchResult] = []
    for step, matrix in enumerate(trajectory):
        previous = None
        if step:
            earlier = None if step < 2 else lambda step=step: [trajectory[step - 2]]
            previous = Previous.of_factors([trajectory[step - 1]], [results[-1]], earlier)
        results += solve_batch([matrix], previous)
    return results


def entropies(values: Tensor) -> list[float]:
    return [entropy(values.tolist()), entropy(values.square().tolist())] if float(values.max()) > 0 else [0.0, 0.0]


def is_exact(values: Tensor, update: Tensor) -> bool:
    """Whether singular values are within 1e-9 σ₁, and their entropies within 1e-12, of those of an exact matrix."""
    truth = torch.linalg.svdvals(update)
    if float(truth[0]) == 0:
        return not values.any()
    truth = torch.nn.functional.pad(truth, (0, max(0, len(values) - len(truth))))[: len(values)]
    near = (values - truth).abs().max() <= 1e-9 * truth[0]
    return bool(near) and np.allclose(entropies(values / truth[0]), entropies(truth / truth[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", HARD)
def test_spectra_are_those_of_exact_arithmetic(name: str) -> None:
    trajectory = HARD[name]
    (result,) = solve_trajectories([trajectory])
    assert result is not None
    increments = [exact_columns_difference(now, before) for before, now in pairwise(trajectory)]
    for step, (matrix, solved) in enumerate(zip(trajectory, result.steps, strict=True)):
        assert is_exact(solved.spectra.total, exact_columns_difference(matrix, nothing(matrix))), step
        if step:
            assert solved.spectra.increment is not None
            assert is_exact(solved.spectra.increment, increments[step - 1]), step
        if step > 1 and math.isfinite(solved.spectra.inner_product):
            sizes = [float(torch.linalg.vector_norm(increments[row])) for row in (step - 1, step - 2)]
            truth = float((increments[step - 1] * increments[step - 2]).sum())
            assert abs(solved.spectra.inner_product - truth) <= 1e-9 * math.prod(sizes), step


@pytest.mark.parametrize("name", HARD)
def test_the_twin_that_goes_step_by_step_agrees(name: str) -> None:
    (result,) = solve_trajectories([HARD[name]])
    assert result is not None
    for solved, twin in zip(result.steps, by_steps(HARD[name]), strict=True):
        one, two = solved.spectra, twin.spectra
        largest = float(max(two.total.max(), 0 if two.increment is None else two.increment.max()))
        torch.testing.assert_close(one.total, two.total, rtol=0, atol=1e-9 * largest)
        assert (one.increment is None) == (two.increment is None)
        if one.increment is not None and two.increment is not None:
            torch.testing.assert_close(one.increment, two.increment, rtol=0, atol=1e-9 * largest)
        assert one.ranks == two.ranks
        assert solved.is_finite == twin.is_finite
        for value, other in ((one.total_noise, two.total_noise), (one.increment_noise, two.increment_noise)):
            assert value == pytest.approx(other, rel=1e-9)
        assert one.inner_product == pytest.approx(two.inner_product, rel=1e-9, abs=1e-9 * largest**2, nan_ok=True)
        assert (one.factors is None) == (two.factors is None)
        if one.factors is not None and two.factors is not None:
            for side in ("left", "right"):
                values, others = getattr(one.factors, side), getattr(two.factors, side)
                torch.testing.assert_close(
                    values, others, rtol=0, atol=1e-9 * float(others.max()) if len(others) else 0
                )
                moved = getattr(one.factors, f"{side}_change"), getattr(two.factors, f"{side}_change")
                assert moved[0] == pytest.approx(moved[1], rel=1e-9)


@pytest.mark.parametrize("name", HARD)
def test_the_path_is_that_of_all_pairs(name: str) -> None:
    (result,) = solve_trajectories([HARD[name]])
    assert result is not None
    pairs = path_gram(HARD[name])
    norms = np.sqrt(pairs.diagonal())
    assert (np.abs(result.path - pairs) <= 1e-9 * np.outer(norms, norms)).all()


ROUTES = {
    "steps of 0.1": ["gram_core"] * 4,
    "steps of 1e-10": ["gram_core"] * 4,
    "a zero column": ["gram_core"] * 4,
    "nothing moved": ["gram_core"] * 4,
    "a frozen factor": ["gram_core"] * 4,
    "one factor, condition 1e+08": ["qr_core"] * 4,
    "a duplicated column": ["qr_core"] * 4,
    "shrinking to 0.0001": ["gram_core", "qr_core", "qr_core", "qr_core"],
    "B is zero at times": ["gram_core", "qr_core", "qr_core", "qr_core"],  # from zero, all of B is its change
}


@pytest.mark.parametrize("name", ROUTES)
def test_a_gram_that_cannot_hold_a_step_is_not_used_for_it(name: str) -> None:
    (result,) = solve_trajectories([HARD[name]])
    assert result is not None
    assert [step.spectra.found_by[0] for step in result.steps] == ROUTES[name]


@pytest.mark.parametrize("name", ["shrinking to 0.0001", "a duplicated column"])
def test_without_the_guards_digits_would_be_lost(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamics.spectra.trajectory_gram.TRUSTED", 0.0)
    (result,) = solve_trajectories([HARD[name]])
    assert result is not None
    exact = [
        is_exact(step.spectra.total, exact_columns_difference(matrix, nothing(matrix)))
        for step, matrix in zip(result.steps, HARD[name], strict=True)
    ]
    assert not all(exact)


def test_a_batch_equals_its_members() -> None:
    members = [drift(0.1), drift(1e-4), drift(0.1, ill_left(1e8))]
    for alone, together in zip(members, solve_trajectories(members), strict=True):
        (single,) = solve_trajectories([alone])
        assert single is not None
        assert together is not None
        for one, two in zip(single.steps, together.steps, strict=True):
            torch.testing.assert_close(one.spectra.total, two.spectra.total, rtol=1e-12, atol=0)
        np.testing.assert_allclose(single.path, together.path, rtol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e200, 1e-170])
@pytest.mark.parametrize("side", ["left_factor", "right_factor"])
def test_what_squares_cannot_hold_is_left_to_the_twin(bad: float, side: str) -> None:
    trajectory = drift(0.1)
    factor = getattr(trajectory[2], side)
    if bad == 1e-170:
        factor *= bad
        trajectory = [trajectory[2], trajectory[2]]
    else:
        factor[1, 1] = bad
    assert solve_trajectories([trajectory, drift(0.1)[: len(trajectory)]])[0] is None
    assert solve_trajectories([trajectory, drift(0.1)[: len(trajectory)]])[1] is not None


def test_more_columns_than_rows_are_left_to_the_twin() -> None:
    assert solve_trajectories([[LowRankMatrix(torch.ones(3, 2), torch.ones(2, 9))]]) == [None]


def test_the_guard_is_the_smallest_pivot() -> None:
    angle = 1e-2
    columns = torch.tensor([[1.0, math.cos(angle)], [0.0, math.sin(angle)]], dtype=torch.float64)
    triangle, pivot = gram_triangles(columns.mT @ columns)
    torch.testing.assert_close(triangle, columns)
    assert float(pivot) == pytest.approx(math.sin(angle))
    assert TRUSTED == 1e-4
