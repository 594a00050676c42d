"""Slow, obvious twins of the fast paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from probes import LowRankMatrix


def dense_singular_values(matrix: LowRankMatrix) -> Tensor:
    """Through the explicit product, in float64."""
    return torch.linalg.svdvals(matrix.to_dense())


def exact_product(matrix: LowRankMatrix, scales: list[Fraction]) -> list[list[Fraction]]:
    """B diag(s) A in rational arithmetic: floats are rationals, so nothing is rounded."""
    left = [[Fraction(x) for x in row] for row in matrix.left_factor.tolist()]
    right = [[Fraction(x) for x in row] for row in matrix.right_factor.tolist()]
    return [[sum(s * row[k] * right[k][j] for k, s in enumerate(scales)) for j in range(len(right[0]))] for row in left]


def exact_difference(now: LowRankMatrix, before: LowRankMatrix) -> Tensor:
    """``now − before``, every entry right to the last bit of float64."""
    products = [exact_product(matrix, [Fraction(matrix.scale)] * matrix.rank) for matrix in (now, before)]
    return _difference(*products)


def exact_columns_difference(now: LowRankMatrix, before: LowRankMatrix) -> Tensor:
    """The same where each column has its own scale."""
    products = [exact_product(matrix, [Fraction(s) for s in matrix.scales().tolist()]) for matrix in (now, before)]
    return _difference(*products)


def _difference(now: list[list[Fraction]], before: list[list[Fraction]]) -> Tensor:
    pairs = zip(now, before, strict=True)
    entries = [[float(a - b) for a, b in zip(row, other, strict=True)] for row, other in pairs]
    return torch.tensor(entries, dtype=torch.float64)


def rounding_noise_energy(matrix: LowRankMatrix) -> float:
    """Σ ulp²/12, entry by entry, carried through the product to first order."""
    bits = {torch.bfloat16: 7, torch.float16: 10, torch.float32: 23}[matrix.left_factor.dtype]
    smallest = {torch.bfloat16: -126, torch.float16: -14, torch.float32: -126}[matrix.left_factor.dtype]

    def variance(x: float) -> float:
        exponent = smallest if x == 0 else max(math.frexp(abs(x))[1] - 1, smallest)
        return 4.0 ** (exponent - bits) / 12

    left, right = matrix.left_factor.tolist(), matrix.right_factor.tolist()
    total = 0.0
    for k in range(matrix.rank):
        column, row = [each[k] for each in left], right[k]
        total += sum(variance(x) for x in column) * sum(y * y for y in row)
        total += sum(x * x for x in column) * sum(variance(y) for y in row)
    return matrix.scale**2 * total


def entropy(weights: list[float]) -> float:
    """−Σ p ln p over the non-zero shares."""
    total = sum(weights)
    return -sum(w / total * math.log(w / total) for w in weights if w > 0)


def per_sample_gradients(model: torch.nn.Module, batch: dict, loss: Callable) -> dict[str, torch.Tensor]:
    """Gradient of each sample's loss with respect to each trainable parameter, one backward pass for each sample."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    modes = {module: module.training for module in model.modules()}
    model.eval()
    rows = []
    for each in loss(model, batch):
        gradients = torch.autograd.grad(each, [p for _, p in named], retain_graph=True, allow_unused=True)
        rows.append([torch.zeros_like(p) if g is None else g for g, (_, p) in zip(gradients, named, strict=True)])
    for module, mode in modes.items():
        module.training = mode
    return {name: torch.stack([row[place] for row in rows]) for place, (name, _) in enumerate(named)}


def flat_gradients(model: torch.nn.Module, batch: dict, loss: Callable) -> torch.Tensor:
    """G ``(sample, number)``, float64."""
    found = per_sample_gradients(model, batch, loss).values()
    return torch.cat([gradient.flatten(1).double() for gradient in found], 1)
