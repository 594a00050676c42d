"""The mathematics, as named properties over the catalogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynamics.spectra.singular_values import singular_values
from probes import LowRankMatrix
from tests.matrices import orthonormal

Function = Callable[[Tensor], Tensor]


def assert_same_spectrum(one: LowRankMatrix | Tensor, other: LowRankMatrix | Tensor, tolerance: float = 1e-12) -> None:
    """Equal singular values up to ``tolerance`` of the largest; appended zeros do not count."""
    first, second = singular_values(one), singular_values(other)
    length = min(len(first), len(second))
    largest = first[0].clamp_min(1e-300)
    assert (first[:length] - second[:length]).abs().max() <= tolerance * largest
    assert torch.cat([first[length:], second[length:], first.new_zeros(1)]).max() <= tolerance * largest


def assert_rotation_invariant(matrix: LowRankMatrix) -> None:
    out, in_ = matrix.shape
    rotated = LowRankMatrix(
        orthonormal(out, out, 11) @ matrix.left_factor.double(),
        matrix.right_factor.double() @ orthonormal(in_, in_, 12),
        matrix.scale,
    )
    assert_same_spectrum(matrix, rotated)


def assert_transpose_invariant(matrix: LowRankMatrix) -> None:
    assert_same_spectrum(matrix, LowRankMatrix(matrix.right_factor.mT, matrix.left_factor.mT, matrix.scale))


def assert_zero_padding_invariant(matrix: LowRankMatrix) -> None:
    left, right = matrix.left_factor, matrix.right_factor
    padded = LowRankMatrix(
        torch.cat([left, left.new_zeros(left.shape[0], 3)], 1),
        torch.cat([right, torch.ones(3, right.shape[1], dtype=right.dtype)], 0),
        matrix.scale,
    )
    assert_same_spectrum(matrix, padded)


def assert_gauge_invariant(matrix: LowRankMatrix) -> None:
    """(BM, M⁻¹A) is the same update."""
    gauge = orthonormal(matrix.rank, matrix.rank, 13) * torch.linspace(0.5, 2.0, matrix.rank, dtype=torch.float64)
    changed = LowRankMatrix(
        matrix.left_factor.double() @ gauge, torch.linalg.solve(gauge, matrix.right_factor.double()), matrix.scale
    )
    assert_same_spectrum(matrix, changed)


def assert_scale_free(function: Function, values: Tensor, scale: float) -> None:
    torch.testing.assert_close(function(values * scale), function(values), rtol=1e-12, atol=1e-14, equal_nan=True)


def assert_order_free(function: Function, values: Tensor) -> None:
    torch.testing.assert_close(function(values.flip(-1)), function(values), rtol=1e-12, atol=1e-14, equal_nan=True)


def assert_ignores_appended_zeros(function: Function, values: Tensor) -> None:
    padded = torch.cat([values, torch.zeros(3, dtype=values.dtype)])
    torch.testing.assert_close(function(padded), function(values), rtol=1e-12, atol=1e-14, equal_nan=True)


def assert_ignores_padding(function: Function, values: Tensor) -> None:
    padded = torch.cat([values, torch.full((3,), torch.nan, dtype=values.dtype)])
    torch.testing.assert_close(function(padded), function(values), rtol=1e-12, atol=1e-14, equal_nan=True)


def assert_rank_bounds(function: Function, values: Tensor) -> None:
    """1 ≤ rank ≤ number of non-zero singular values."""
    rank = float(function(values))
    assert 1 - 1e-12 <= rank <= int((values > 0).sum()) + 1e-9


def assert_undefined_for_zero(function: Function) -> None:
    assert function(torch.zeros(4, dtype=torch.float64)).isnan()


def assert_nan_in_nan_out(function: Function) -> None:
    assert function(torch.tensor([torch.nan, 1.0, 0.5])).isnan()
    assert function(torch.full((3,), torch.nan)).isnan()
