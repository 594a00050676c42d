"""The tangent space of factors beside the projection written out, and what becomes of it where factors degenerate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from probes import LowRankMatrix
from probes.spaces import TangentSpace, change_energy, tangent_space
from probes.watched import AdapterProduct

GENERATOR = torch.Generator().manual_seed(0)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=GENERATOR)


LEFT, RIGHT, GRADIENTS = random(7, 3), random(3, 5), random(4, 7, 5)
DEPENDENT = torch.cat([LEFT[:, :2], LEFT[:, :1] - LEFT[:, 1:2]], 1)


def product(left: Tensor, right: Tensor, scale: float = 0.5, diagonal: Tensor | None = None) -> AdapterProduct:
    third = None if diagonal is None else nn.Parameter(diagonal)
    return AdapterProduct(nn.Parameter(left), nn.Parameter(right), lambda: scale, diagonal=third)


def onto(columns: Tensor) -> Tensor:
    return columns @ torch.linalg.pinv(columns)


def projected(matrices: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """P_B X + X P_A − P_B X P_A."""
    on_left, on_right = onto(left), onto(right.mT)
    return on_left @ matrices + matrices @ on_right - on_left @ matrices @ on_right


def solved(space: TangentSpace, left: Tensor, right: Tensor) -> Tensor:
    """Coordinates from the factors' gradients."""
    return space.coordinates(space.from_right @ right, (left @ space.from_left).mT)


def assert_same_inner_products(coordinates: Tensor, matrices: Tensor) -> None:
    torch.testing.assert_close(
        coordinates @ coordinates.mT, matrices.flatten(1) @ matrices.flatten(1).mT, rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("left", [LEFT, 0 * LEFT, DEPENDENT, 1e-12 * LEFT], ids=["full", "zero", "dependent", "small"])
def test_coordinates_are_those_of_the_projection(left):
    space = tangent_space([product(left, RIGHT)])
    expected = projected(GRADIENTS, left, RIGHT)
    # ∇_B = s ∇W Aᵀ, ∇_A = s Bᵀ∇W
    assert_same_inner_products(solved(space, 0.5 * GRADIENTS @ RIGHT.mT, 0.5 * left.mT @ GRADIENTS), expected)
    tokens = GRADIENTS.mT, torch.eye(5, dtype=torch.float64).expand(4, 5, 5)  # a matrix is Σ_t column_t e_tᵀ
    coordinates = space.coordinates(space.projected_left(*tokens), space.projected_right(*tokens))
    assert_same_inner_products(coordinates, expected)
    assert_same_inner_products(torch.stack([space.of_change(each) for each in GRADIENTS]), expected)


@pytest.mark.parametrize(
    ("left", "dimension"),
    [(LEFT, 3 * (7 + 5 - 3)), (0 * LEFT, 7 * 3), (DEPENDENT, 2 * 5 + 7 * 3 - 2 * 3)],
    ids=["full", "zero", "dependent"],
)
def test_dimension_is_that_of_what_a_step_can_reach(left, dimension):
    """The rank of (dB, dA) ↦ dB A + B dA."""
    steps = [torch.kron(torch.eye(7).double(), RIGHT.mT.contiguous()), torch.kron(left, torch.eye(5).double())]
    reached = torch.linalg.matrix_rank(torch.cat(steps, 1))
    assert tangent_space([product(left, RIGHT)]).dimension == dimension == int(reached)


def test_adapters_add_up_to_one_with_all_columns():
    other_left, other_right = random(7, 1), random(1, 5)
    space = tangent_space([product(LEFT, RIGHT), product(other_left, other_right, 3.0)])
    stacked = torch.cat([LEFT, other_left], 1), torch.cat([RIGHT, other_right])
    coordinates = torch.stack([space.of_change(each) for each in GRADIENTS])
    assert_same_inner_products(coordinates, projected(GRADIENTS, *stacked))
    scales = torch.tensor([0.5, 0.5, 0.5, 3.0]).double()
    gradients = (GRADIENTS @ stacked[1].mT) * scales, (stacked[0] * scales).mT @ GRADIENTS
    torch.testing.assert_close(solved(space, *gradients), coordinates)


def test_a_frozen_adapter_opens_no_directions():
    frozen = product(random(7, 1), random(1, 5))
    for parameter in frozen.parameters:
        parameter.requires_grad_(False)
    both, one = tangent_space([product(LEFT, RIGHT), frozen]), tangent_space([product(LEFT, RIGHT)])
    torch.testing.assert_close(both.of_change(GRADIENTS[0]), one.of_change(GRADIENTS[0]))


def test_adaloras_diagonal_belongs_to_the_other_factor():
    diagonal = torch.tensor([[1.0], [0.0], [2.0]]).double()
    space = tangent_space([product(LEFT, RIGHT, diagonal=diagonal)])
    kept = [0, 2]  # where E is zero, neither factor reaches anything
    expected = projected(GRADIENTS, LEFT[:, kept], RIGHT[kept])
    gradients = 0.5 * GRADIENTS @ (diagonal * RIGHT).mT, 0.5 * (LEFT * diagonal.mT).mT @ GRADIENTS
    assert_same_inner_products(solved(space, *gradients), expected)


def test_a_change_and_its_factors_are_one():
    change = LowRankMatrix(random(7, 2), random(2, 5), 0.3)
    space = tangent_space([product(LEFT, RIGHT)])
    torch.testing.assert_close(space.of_change(change), space.of_change(change.to_dense()))
    assert change_energy(change) == pytest.approx(change_energy(change.to_dense()), rel=1e-12)


def test_what_is_too_badly_conditioned_is_not_solved():
    vectors, _ = torch.linalg.qr(LEFT)
    space = tangent_space([product(vectors * torch.tensor([1.0, 1e-2, 1e-4]).double(), RIGHT)])
    assert space.left_condition == pytest.approx(1e4)
    assert space.is_solvable(torch.float64) == (True, True)
    assert space.is_solvable(torch.float32) == (False, True)
    assert space.is_solvable(torch.bfloat16) == (False, False)
