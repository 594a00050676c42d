r"""Gradients of one parameter for each of N samples, as the products that they are made of.

A linear layer's is Σ_t δ_it x_itᵀ: two matrices of N·T rows hold N gradients of out × in numbers. Inner products come
from these directly (Σ_tt' (x_it·x_jt')(δ_it·δ_jt')) or from gradients multiplied out a few rows at a time, whichever
takes fewer operations.

Where N·d would not fit into memory, a seeded random projection keeps k numbers of each gradient. With S ``(d, k)`` of
independent normal entries of variance 1/k, Ĝ = GS has

.. math:: E\,\hat K_{ij} = K_{ij}, \qquad E\,\hat K_{ij}^2 = K_{ij}^2 + (K_{ii} K_{jj} + K_{ij}^2)/k :

inner products without bias, and a participation ratio whose bias is known and taken out again
(:func:`dynamics.fisher.spectrum.without_projection`). Spectra keep a bias: SE is too large or small by up to about
N/(2k) nat. S is never stored, but made again from its seed for each batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.low_rank import LowRankMatrix

#: Bytes that multiplied-out gradients, or token-by-token products, may take at once.
BUDGET = 2**28

#: The same on a processor, where they are read again soonest from its cache; rows that a product should have at least.
CACHE, FEWEST_ROWS = 2**22, 32


def at_least_single(tensor: Tensor) -> Tensor:
    """Return a tensor in its own precision, half precision in single: sums over tokens and samples would round.

    >>> at_least_single(torch.ones(1, dtype=torch.bfloat16)).dtype
    torch.float32
    """
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


@dataclass(frozen=True)
class Materialised:
    """Gradients as they are, ``(sample, *shape)``."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one gradient."""
        return tuple(self.values.shape[1:])

    def rows(self, first: int, last: int) -> Float[Tensor, "sample row column"]:
        """Return rows of the gradients as matrices."""
        return self.values[:, first:last].flatten(2) if self.values.ndim > 2 else self.values[:, first:last, None]


@dataclass(frozen=True)
class Outer:
    """Σ_t left_it right_itᵀ, ``(row, column)``."""

    left: Float[Tensor, "sample token row"]
    right: Float[Tensor, "sample token column"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one gradient."""
        return self.left.shape[-1], self.right.shape[-1]

    def rows(self, first: int, last: int) -> Float[Tensor, "sample row column"]:
        """Return rows of the gradients as matrices."""
        left = self.left[:, :, first:last]
        # The longer side last: half the time where the other one is a factor's rank.
        return (self.right.mT @ left).mT if last - first > self.right.shape[-1] else left.mT @ self.right


@dataclass(frozen=True)
class Scatter:
    """Σ_t e(place_it) right_itᵀ: what an embedding adds to its rows."""

    places: Int[Tensor, "sample token"]
    right: Float[Tensor, "sample token column"]
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one gradient."""
        return self.count, self.right.shape[-1]

    def rows(self, first: int, last: int) -> Float[Tensor, "sample row column"]:
        """Return rows of the gradients as matrices."""
        inside = (self.places >= first) & (self.places < last)
        rows = self.right.new_zeros(len(self.right), last - first, self.right.shape[-1])
        targets = torch.where(inside, self.places - first, 0)[..., None].expand_as(self.right)
        return rows.scatter_add_(1, targets, self.right * inside[..., None])


Term = Materialised | Outer | Scatter


@dataclass(frozen=True)
class SampleGradient:
    """Gradients of one parameter, the sum of terms; zero if there are none.

    Args:
        shape: Of the parameter.
        samples: N.
        terms: Each of the parameter's shape, as a matrix of its first dimension by all others.
    """

    shape: tuple[int, ...]
    samples: int
    terms: Sequence[Term]

    def dense(self, like: Tensor) -> Float[Tensor, "sample ..."]:
        """Return the gradients multiplied out, ``(sample, *shape)``."""
        if not self.terms:
            return at_least_single(like.new_zeros(self.samples, *self.shape))
        return self.rows(0, self.shape[0]).reshape(self.samples, *self.shape)

    def of_samples(self, chosen: Bool[Tensor, " n"]) -> SampleGradient:
        """Return the gradients of some samples."""
        if chosen.all():
            return self
        terms: list[Term] = []
        for term in self.terms:
            kept = chosen.to(_tensor(term).device)
            if isinstance(term, Materialised):
                terms.append(Materialised(term.values[kept]))
            elif isinstance(term, Outer):
                terms.append(Outer(term.left[kept], term.right[kept]))
            else:
                terms.append(Scatter(term.places[kept], term.right[kept], term.count))
        return SampleGradient(self.shape, int(chosen.sum()), terms)

    def transposed(self) -> SampleGradient:
        """Return the transposes of gradients that are matrices."""
        terms = [
            Outer(term.right, term.left) if isinstance(term, Outer) else Materialised(term.rows(0, self.shape[0]).mT)
            for term in self.terms
        ]
        return SampleGradient(self.shape[::-1], self.samples, terms)

    def led_by(self, matrix: Float[Tensor, "new row"]) -> SampleGradient:
        """Return the products of a matrix and each gradient."""
        terms: list[Term] = []
        for term in self.terms:
            factor = matrix.to(_tensor(term))
            if isinstance(term, Outer):
                terms.append(Outer(term.left @ factor.mT, term.right))
            else:
                terms.append(Materialised(factor @ term.rows(0, self.shape[0])))
        return SampleGradient((len(matrix), *self.shape[1:]), self.samples, terms)

    def rows(self, first: int, last: int) -> Float[Tensor, "sample row column"]:
        """Return rows of the gradients as matrices; there must be a term."""
        return functools.reduce(torch.add, [term.rows(first, last) for term in self.terms])


def stacked(parts: Sequence[SampleGradient]) -> SampleGradient:
    """Return the gradients of several batches as those of one; shorter sequences are filled up with zeros.

    Raises:
        Nothing: where batches differ in how their gradients are made, they are multiplied out.
    """
    if len(parts) == 1:
        return parts[0]
    kinds = {tuple(type(term) for term in part.terms) for part in parts}
    samples = sum(part.samples for part in parts)
    if len(kinds) == 1:
        columns = zip(*(part.terms for part in parts), strict=True)
        return SampleGradient(parts[0].shape, samples, [_stack_terms(column) for column in columns])
    like = next(_tensor(term) for part in parts for term in part.terms)
    return SampleGradient(parts[0].shape, samples, [Materialised(torch.cat([part.dense(like) for part in parts]))])


def summed(parts: Sequence[SampleGradient]) -> SampleGradient:
    """Return sums of gradients that are multiplied out, of one shape."""
    values = torch.stack([_tensor(part.terms[0]) for part in parts]).sum(0)
    return SampleGradient(parts[0].shape, parts[0].samples, [Materialised(values)])


def compact(gradient: SampleGradient) -> SampleGradient:
    """Return the gradients multiplied out, if that takes less memory than the products they are made of."""
    if not gradient.terms or all(isinstance(term, Materialised) for term in gradient.terms):
        return gradient
    numbers = sum(
        term.values.numel()
        if isinstance(term, Materialised)
        else term.right.numel() + (term.left.numel() if isinstance(term, Outer) else term.places.numel())
        for term in gradient.terms
    )
    if numbers <= gradient.samples * math.prod(gradient.shape):
        return gradient
    values = gradient.dense(_tensor(gradient.terms[0]))
    return SampleGradient(gradient.shape, gradient.samples, [Materialised(values)])


def gram(gradient: SampleGradient) -> Float[Tensor, "n n"]:
    """Return inner products of the gradients, ``(N, N)``, float64 on the host."""
    total = torch.zeros(gradient.samples, gradient.samples, dtype=torch.float64)
    if not gradient.terms:
        return total
    if len(gradient.terms) == 1 and _token_by_token_is_cheaper(gradient.terms[0]):
        return _token_by_token(gradient.terms[0])
    gradient = _longer_first(gradient)
    step = _rows_at_once(gradient)
    for first in range(0, gradient.shape[0], step):
        rows = gradient.rows(first, min(first + step, gradient.shape[0])).flatten(1)
        total += (rows @ rows.mT).to(device="cpu", dtype=torch.float64)
    return total


def scaled_grams(
    gradient: SampleGradient, scale: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "n n"], Float[Tensor, "n n"]]:
    """Return ⟨g_i, p∘g_j⟩ and ⟨p∘g_i, p∘g_j⟩ of gradients g, ``(N, N)`` each, float64 on the host.

    Args:
        gradient: Of N samples.
        scale: p, of the shape of one gradient.

    >>> gradient = SampleGradient((2,), 2, [Materialised(torch.eye(2))])
    >>> [part.diagonal().tolist() for part in scaled_grams(gradient, torch.tensor([2.0, 3.0]))]
    [[2.0, 3.0], [4.0, 9.0]]
    """
    between, within = torch.zeros(2, gradient.samples, gradient.samples, dtype=torch.float64)
    if not gradient.terms:
        return between, within
    scale = scale.reshape(gradient.shape[0], -1)
    step = max(1, _rows_at_once(gradient) // 2)
    for first in range(0, gradient.shape[0], step):
        last = min(first + step, gradient.shape[0])
        rows = gradient.rows(first, last)
        scaled = (rows * scale[first:last].to(rows)).flatten(1)
        between += (rows.flatten(1) @ scaled.mT).to(device="cpu", dtype=torch.float64)
        within += (scaled @ scaled.mT).to(device="cpu", dtype=torch.float64)
    return (between + between.mT) / 2, within


def _longer_first(gradient: SampleGradient) -> SampleGradient:
    """Return gradients whose inner products are the same, transposed where that makes products of longer rows."""
    if any(not isinstance(term, Outer) for term in gradient.terms) or gradient.shape[0] >= gradient.shape[-1]:
        return gradient
    return gradient.transposed()


def _rows_at_once(gradient: SampleGradient) -> int:
    tensor = _tensor(gradient.terms[0])
    row = gradient.samples * max(1, math.prod(gradient.shape[1:])) * tensor.element_size()
    step = max(1, BUDGET // row)
    if tensor.device.type != "cpu" or all(isinstance(term, Materialised) for term in gradient.terms):
        return step
    return min(step, max(FEWEST_ROWS, CACHE // row))


def inner_products(gradient: SampleGradient, change: Tensor | LowRankMatrix) -> Float[Tensor, " n"]:
    """Return the inner product of each gradient with a change of the parameter, float64 on the host.

    Args:
        gradient: Of N samples.
        change: Of the parameter's shape; a product of factors is not multiplied out.
    """
    total = torch.zeros(gradient.samples, dtype=torch.float64)
    for term in gradient.terms:
        total += _inner_products(term, change, gradient.shape).to(device="cpu", dtype=torch.float64)
    return total


def weighted_sums(gradient: SampleGradient, weights: Float[Tensor, "part n"]) -> Float[Tensor, "part ..."]:
    """Return Σ_i w_i g_i for each row of weights, float64, of the parameter's shape.

    >>> gradient = SampleGradient((2,), 2, [Materialised(torch.eye(2))])
    >>> weighted_sums(gradient, torch.tensor([[2.0, 3.0]])).tolist()
    [[2.0, 3.0]]
    """
    shape = (len(weights), *gradient.shape)
    total = torch.zeros(shape, dtype=torch.float64, device=weights.device)
    for term in gradient.terms:
        w = weights.to(_tensor(term).device, torch.float64)
        if isinstance(term, Materialised):
            total += (w @ term.values.flatten(1).to(torch.float64)).view(shape).to(total.device)
            continue
        right = term.right.to(torch.float64)
        for part, of_part in enumerate(w):
            scaled = (right * of_part[:, None, None]).flatten(0, 1)
            if isinstance(term, Outer):
                total[part] += (term.left.to(torch.float64).flatten(0, 1).mT @ scaled).view(gradient.shape)
            else:
                total[part].view(term.count, -1).index_add_(0, term.places.flatten(), scaled)
    return total


def _inner_products(term: Term, change: Tensor | LowRankMatrix, shape: tuple[int, ...]) -> Float[Tensor, " n"]:
    if isinstance(term, Materialised):
        dense = change.to_dense() if isinstance(change, LowRankMatrix) else change
        return term.values.flatten(1).to(torch.float64) @ dense.to(term.values.device, torch.float64).flatten()
    right = term.right.to(torch.float64)
    if isinstance(change, LowRankMatrix):
        left_factor, right_factor = (factor.detach().to(right.device) for factor in (change.left, change.right))
        moved = right @ right_factor.mT  # (sample, token, rank)
        if isinstance(term, Scatter):
            return (moved * left_factor[term.places]).sum((1, 2))
        return (moved * (term.left.to(torch.float64) @ left_factor)).sum((1, 2))
    dense = change.detach().to(right.device, torch.float64).reshape(shape[0], -1)
    if isinstance(term, Scatter):
        return (right * dense[term.places]).sum((1, 2))
    return ((right @ dense.mT) * term.left).sum((1, 2))


def _token_by_token_is_cheaper(term: Term) -> bool:
    """Compare multiplications for all pairs of tokens with those for gradients multiplied out and then paired."""
    if isinstance(term, Materialised):
        return False
    samples, tokens, columns = term.right.shape
    rows = term.left.shape[-1] if isinstance(term, Outer) else term.count
    paired = samples**2 * tokens**2 * ((rows if isinstance(term, Outer) else 1) + columns)
    made = samples * tokens * (rows if isinstance(term, Outer) else 1) * columns
    return paired < made + samples**2 * rows * columns


def _token_by_token(term: Term) -> Float[Tensor, "n n"]:
    assert not isinstance(term, Materialised)
    samples, tokens, _ = term.right.shape
    flat = term.right.flatten(0, 1)
    step = max(1, BUDGET // (tokens * samples * tokens * term.right.element_size() * 2))
    total = torch.zeros(samples, samples, dtype=torch.float64)
    for first in range(0, samples, step):
        last = min(first + step, samples)
        right = term.right[first:last].flatten(0, 1) @ flat.mT
        if isinstance(term, Outer):
            left = term.left[first:last].flatten(0, 1) @ term.left.flatten(0, 1).mT
        else:
            left = (term.places[first:last].flatten()[:, None] == term.places.flatten()).to(right.dtype)
        pairs = (left * right).reshape(last - first, tokens, samples, tokens)
        total[first:last] = pairs.sum((1, 3)).to(device="cpu", dtype=torch.float64)
    return total


def _stack_terms(terms: Sequence[Term]) -> Term:
    first = terms[0]
    if isinstance(first, Materialised):
        return Materialised(torch.cat([term.values for term in terms]))  # pyright: ignore[reportAttributeAccessIssue]
    longest = max(term.right.shape[1] for term in terms)  # pyright: ignore[reportAttributeAccessIssue]
    right = torch.cat([_filled(term.right, longest) for term in terms])  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(first, Outer):
        return Outer(torch.cat([_filled(term.left, longest) for term in terms]), right)  # pyright: ignore[reportAttributeAccessIssue]
    places = torch.cat([_filled(term.places[..., None], longest)[..., 0] for term in terms])  # pyright: ignore[reportAttributeAccessIssue]
    return Scatter(places, right, first.count)


def _filled(tensor: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, 0, 0, length - tensor.shape[1]))


def _tensor(term: Term) -> Tensor:
    return term.values if isinstance(term, Materialised) else term.right


#: Bytes of S that are made at once.
PROJECTION_BUDGET = 2**26


def projected(gradient: SampleGradient, dimension: int, seed: int, like: Tensor) -> Float[Tensor, "sample k"]:
    """Return the gradients of one parameter, projected.

    Args:
        gradient: Of N samples.
        dimension: k.
        seed: Of S; the same for all batches, another for each parameter.
        like: Format and device of a gradient that is zero.

    Returns:
        In single precision at least. The same on the same kind of device.

    >>> from probes.sample_gradients import Materialised
    >>> gradient = SampleGradient((2,), 1, [Materialised(torch.tensor([[3.0, 4.0]]))])
    >>> projected(gradient, 10000, 0, torch.ones(1)).norm().round().item()
    5.0
    """
    columns = max(1, math.prod(gradient.shape[1:]))
    step = max(1, PROJECTION_BUDGET // (4 * columns * dimension))
    projection = like.new_zeros(gradient.samples, dimension, dtype=torch.promote_types(like.dtype, torch.float32))
    generator = torch.Generator(device=like.device).manual_seed(seed)
    for first in range(0, gradient.shape[0] if gradient.terms else 0, step):
        last = min(first + step, gradient.shape[0])
        rows = gradient.rows(first, last).flatten(1)
        part = torch.randn(rows.shape[1], dimension, generator=generator, dtype=projection.dtype, device=like.device)
        projection += rows.to(projection.dtype) @ part
    return projection / dimension**0.5
