"""A matrix kept as its factors: nothing is copied, nothing is rounded."""

from __future__ import annotations

import re

import pytest
import torch

from probes import LowRankMatrix

LEFT = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
RIGHT = torch.tensor([[1.0, 0.0, 2.0, 1.0], [0.0, 1.0, 1.0, 3.0]])


@pytest.mark.parametrize(
    ("left", "right", "shapes"),
    [
        (LEFT, RIGHT.mT, "(3, 2) and (4, 2)"),
        (LEFT[:, 0], RIGHT, "(3,) and (2, 4)"),
        (LEFT, RIGHT[None], "(3, 2) and (1, 2, 4)"),
    ],
)
def test_factors_that_do_not_multiply(left: torch.Tensor, right: torch.Tensor, shapes: str) -> None:
    message = f"Expected factors of shapes (out, rank) and (rank, in), got {shapes}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LowRankMatrix(left, right)


@pytest.mark.parametrize("shape", [(3,), (2, 1), ()])
def test_column_scale_of_another_shape(shape: tuple[int, ...]) -> None:
    message = f"Expected column_scale of shape (rank,) = (2,), got {shape}."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        LowRankMatrix(LEFT, RIGHT, column_scale=torch.ones(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_factors_are_kept_without_a_copy(dtype: torch.dtype) -> None:
    left, right = LEFT.to(dtype), RIGHT.to(dtype)
    matrix = LowRankMatrix(left, right, 2.0, column_scale=torch.tensor([1.0, 3.0]))
    assert matrix.left_factor is left
    assert matrix.right_factor is right
    assert matrix.dtype == dtype
    assert matrix.left.dtype == matrix.right.dtype == matrix.scales().dtype == torch.float64


def test_shape_and_rank() -> None:
    matrix = LowRankMatrix(LEFT, RIGHT)
    assert matrix.shape == (3, 4)
    assert matrix.rank == 2


def test_dtype_is_that_of_the_coarser_factor() -> None:
    assert LowRankMatrix(LEFT, RIGHT.to(torch.bfloat16)).dtype == torch.bfloat16
    assert LowRankMatrix(LEFT.to(torch.float16), RIGHT.double()).dtype == torch.float16


def test_scale_is_folded_into_the_left_factor() -> None:
    matrix = LowRankMatrix(LEFT, RIGHT, 7 / 3)
    assert matrix.scale == 7 / 3
    assert matrix.column_scale is None
    assert matrix.scales().tolist() == [7 / 3, 7 / 3]
    assert torch.equal(matrix.left, LEFT.double() * (7 / 3))
    assert torch.equal(matrix.right, RIGHT.double())
    assert torch.equal(matrix.to_dense(), (LEFT.double() * (7 / 3)) @ RIGHT.double())


def test_column_scales_multiply_the_scale() -> None:
    matrix = LowRankMatrix(LEFT, RIGHT, 0.5, column_scale=torch.tensor([-2.0, 8.0]))
    assert matrix.scales().tolist() == [-1.0, 4.0]
    assert torch.equal(matrix.left, LEFT.double() * torch.tensor([-1.0, 4.0]))
    expected = LEFT.double() @ torch.diag(torch.tensor([-1.0, 4.0], dtype=torch.float64)) @ RIGHT.double()
    assert torch.equal(matrix.to_dense(), expected)


def test_column_scale_is_kept_in_float64() -> None:
    third = torch.tensor([1.0, 1.0], dtype=torch.float64) / 3
    assert torch.equal(LowRankMatrix(LEFT, RIGHT, column_scale=third).scales(), third)
    coarse = LowRankMatrix(LEFT, RIGHT, column_scale=torch.tensor([0.5, 2.0], dtype=torch.bfloat16))
    assert coarse.column_scale is not None
    assert coarse.column_scale.dtype == torch.float64


def test_rank_zero() -> None:
    matrix = LowRankMatrix(torch.ones(3, 0), torch.ones(0, 4), 2.0)
    assert matrix.scales().shape == (0,)
    assert torch.equal(matrix.to_dense(), torch.zeros(3, 4, dtype=torch.float64))


def test_repr() -> None:
    assert repr(LowRankMatrix(LEFT, RIGHT, 2.0)) == (
        "LowRankMatrix(shape=(3, 4), rank=2, scale=2, dtype=torch.float32)"
    )
    assert repr(LowRankMatrix(LEFT, RIGHT, 2.0, column_scale=torch.ones(2))) == (
        "LowRankMatrix(shape=(3, 4), rank=2, scale=2 * column_scale, dtype=torch.float32)"
    )
