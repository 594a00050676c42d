"""The gradient of one block from those of its parameters, or of the layer that it adapts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.blocks import Block
from probes.layer_rules import adapted_layer
from probes.low_rank import LowRankMatrix
from probes.sample_gradients import Materialised, Outer, SampleGradient, Scatter, Term, at_least_single
from probes.spaces import TangentSpace
from probes.watched import Matrix, without_values


def factors(block: Block) -> list[nn.Parameter]:
    """Return A and B of a low-rank matrix's first adapter, trained or not."""
    return [block.products[0].right, block.products[0].left] if block.tangent is not None else []


def part_of(change: Matrix | None, view: Callable[[Tensor], Tensor] | None) -> Matrix | None:
    """Return a block's part of a parameter's change."""
    return view(change) if view is not None and isinstance(change, Tensor) else change


def viewed(gradient: SampleGradient, view: Callable[[Tensor], Tensor] | None, parameter: Tensor) -> SampleGradient:
    """Return a block's part of a parameter's gradients."""
    if view is None:
        return gradient
    part = view(without_values(parameter))
    if part.numel() == parameter.numel():  # all of it, flattened perhaps: rows stay rows
        return SampleGradient(tuple(part.shape), gradient.samples, gradient.terms)
    values = torch.stack([view(values) for values in gradient.dense(parameter)])
    return SampleGradient(tuple(part.shape), gradient.samples, [Materialised(values)])


def gradient_as_matrix(
    block: Block, layer: nn.Module, term: Term | None, gradients: Mapping[int, SampleGradient], samples: int
) -> SampleGradient:
    """Return the gradient of the adapted weight itself, from what its layer was given and gave.

    Raises:
        ValueError: If the layer's inputs and outputs do not determine it.
    """
    out, in_ = block.products[0].matrix(without_values).shape
    # An embedding's rows are words; the adapter's matrix is (dimension, words).
    shape = (in_, out) if isinstance(adapted_layer(layer), nn.Embedding) else (out, in_)
    if term is None and any(gradients[id(parameter)].terms for parameter, _ in block.parameters):
        raise ValueError(
            f"Expected a layer whose inputs and outputs give the gradient of {block.name!r}, got a "
            f"{type(adapted_layer(layer)).__name__} that is called, or computes, in another way. "
            "Choose space='tangent'."
        )
    return SampleGradient(shape, samples, [] if term is None else [term])


def along(change: Matrix, gradient: SampleGradient) -> Matrix:
    """Return the change of a matrix in the orientation of its gradient."""
    if tuple(change.shape) == gradient.shape or len(gradient.shape) != 2:
        return change
    return LowRankMatrix(change.right.mT, change.left.mT) if isinstance(change, LowRankMatrix) else change.mT


def in_tangent_space(
    block: Block,
    tangent: TangentSpace,
    matrix: Term | None,
    precision: torch.dtype,
    gradients: Mapping[int, SampleGradient],
) -> SampleGradient:
    """Return a block's gradient in tangent space.

    It comes from gradients of the factors, or from s ∇W itself for a side where solving would lose too many digits.
    """
    solve_left, solve_right = (True, True) if matrix is None else tangent.is_solvable(precision)
    products, scale = block.products, block.products[0].scale()
    samples = next(iter(gradients.values())).samples
    zero = at_least_single(products[0].left.new_zeros(samples, 0, 1))
    if matrix is None or solve_left:
        trained = [viewed(gradients[id(p.right)], p.right_view, p.right) for p in products if p.right.requires_grad]
        along = _solved(tangent.from_right, trained, zero.expand(-1, -1, len(tangent.right)))
    else:
        along = tangent.projected_left(*_factored(matrix)) / scale
    if matrix is None or solve_right:
        trained = [viewed(gradients[id(p.left)], p.left_view, p.left) for p in products if p.left.requires_grad]
        beside = _solved(
            tangent.from_left.mT, [g.transposed() for g in trained], zero.expand(-1, -1, len(tangent.left))
        )
    else:
        beside = tangent.projected_right(*_factored(matrix)) / scale
    coordinates = tangent.coordinates(along, beside)
    return SampleGradient(tuple(coordinates.shape[1:]), len(coordinates), [Materialised(coordinates)])


def _factored(matrix: Term) -> tuple[Float[Tensor, "sample token out"], Float[Tensor, "sample token in"]]:
    """Return left and right of Σ_t left_t right_tᵀ; the rows of a dense matrix are the right."""
    assert not isinstance(matrix, Scatter)
    if isinstance(matrix, Outer):
        return matrix.left, matrix.right
    ones = torch.eye(matrix.shape[0], dtype=matrix.values.dtype, device=matrix.values.device)
    return ones.expand(len(matrix.values), *ones.shape), matrix.values


def _solved(
    solution: Float[Tensor, "basis r"], factors: Sequence[SampleGradient], zero: Float[Tensor, "sample 0 length"]
) -> Float[Tensor, "sample basis length"]:
    """Return the solution times gradients of factors, ``(rank, length)`` each, below each other.

    It is multiplied to the side of the rank, before tokens are summed: there are fewer numbers there.
    """
    parts = solution.split([factor.shape[0] for factor in factors], 1)
    solved = [factor.led_by(part).dense(zero) for factor, part in zip(factors, parts, strict=True)]
    return functools.reduce(torch.add, solved) if solved else solution.to(zero.dtype) @ zero
