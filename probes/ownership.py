r"""Which sample each row of a layer's output belongs to: found out, not assumed.

Images, tiles and routed tokens come in any number a sample and in any order, and some models let samples meet.
Backpropagation is linear in the losses: with a weight w_i on the loss of sample i, the gradient of a row that only this
loss depends on is w_i times that of the unweighted sum, and that of a row that several losses depend on is not. Weights
are powers of two, which scale floating-point numbers exactly, so that the comparison is exact in every precision. They
are the larger the smaller a sample's gradients are: none hides behind the rounding of another's. Where kernels add up
in an order that varies, a repeated pass says how much that changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from probes.layer_rules import Call, gradient_rows
from probes.sample_gradients import at_least_single

#: Weights of samples with equal gradients are so many powers of two; fewer where the range of numbers is small.
_LEVELS, _LEVELS_OF_FLOAT16 = 32, 8

#: Gradients smaller than the largest by more powers of two are not made as large.
_RANGE = 64

#: Gradients may differ from what they should be by so many times what repeating a pass changes.
_REPEATABILITY = 16.0


@dataclass(frozen=True)
class Split:
    """How rows are taken apart by sample.

    Args:
        samples: N.
        index: Numbers of each sample's rows, filled up with the number of all rows, which stands for a row of zeros;
            ``None`` where each sample has as many rows, one sample's after the other's, in every call.

    >>> Split(2)([torch.tensor([1, 2, 3, 4])]).tolist()
    [[1, 2], [3, 4]]
    >>> Split(2, torch.tensor([[2, 4], [0, 1]]))([torch.tensor([1, 2, 3, 4])]).tolist()
    [[3, 0], [1, 2]]
    """

    samples: int
    index: Int[Tensor, "sample token"] | None = None

    def __call__(self, rows: Sequence[Tensor]) -> Tensor:
        """Return rows of one or several calls, ``(row, …)``, as ``(sample, token, …)``."""
        if self.index is None:
            parts = [part.reshape(self.samples, len(part) // self.samples, *part.shape[1:]) for part in rows]
            return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        return torch.cat([*rows, rows[0].new_zeros(1, *rows[0].shape[1:])])[self.index]


def split_by(samples: int, sample_of_row: Sequence[Int[Tensor, " row"] | None], lengths: Sequence[int]) -> Split:
    """Return how the rows of several calls together are taken apart.

    Args:
        samples: N.
        sample_of_row: By call, the sample of each row, −1 for none; ``None`` where rows are in order.
        lengths: Rows of each call.

    >>> split_by(2, [torch.tensor([1, -1, 0, 1])], [4]).index.tolist()
    [[2, 4], [0, 3]]
    """
    device = next((numbers.device for numbers in sample_of_row if numbers is not None), None)
    if device is None:
        return Split(samples)
    numbers = torch.cat(
        [
            torch.arange(samples, device=device).repeat_interleave(length // samples) if given is None else given
            for given, length in zip(sample_of_row, lengths, strict=True)
        ]
    )
    order = numbers.argsort(stable=True)[(numbers < 0).sum() :]
    counts = torch.bincount(numbers[order], minlength=samples)
    starts = (counts.cumsum(0) - counts).repeat_interleave(counts)
    index = torch.full((samples, int(counts.max())), len(numbers), device=device)
    index[numbers[order], torch.arange(len(order), device=device) - starts] = order
    return Split(samples, index)


def samples_of_rows(
    losses: Float[Tensor, " sample"], calls: Sequence[Call], rows: Mapping[int, Float[Tensor, "row feature"]]
) -> dict[int, Int[Tensor, " row"] | None]:
    """Return the sample of each row of the calls' outputs, by one to three more backward passes.

    Args:
        losses: With their graph; at least two.
        calls: Whose outputs the losses depend on.
        rows: By the call's identity, gradients of the sum of losses with respect to its output.

    Returns:
        By the call's identity: ``None`` where each sample has as many rows, one sample's after the other's; else the
        sample of each row, −1 where the losses do not depend on it. Calls with rows of several samples are missing.
    """
    exponents = _exponents(len(losses), calls, rows).to(losses.device)
    placed: dict[int, Tensor | None] = {}
    passes = [(exponents[0], _weighted(losses, calls, exponents[0]))]
    left = _place(placed, calls, rows, passes, len(losses))
    if left:
        passes.append((exponents[1], _weighted(losses, left, exponents[1])))
        left = _place(placed, left, rows, passes, len(losses))
    if left:
        repeated = _weighted(losses, left, torch.zeros_like(exponents[0]))
        _place(placed, left, rows, passes, len(losses), repeated)
    return placed


def _place(
    placed: dict[int, Tensor | None],
    calls: Sequence[Call],
    rows: Mapping[int, Tensor],
    passes: Sequence[tuple[Tensor, Mapping[int, Tensor]]],
    samples: int,
    repeated: Mapping[int, Tensor] | None = None,
) -> list[Call]:
    """Add the calls whose rows are of one sample each, as far as the passes tell, and return the others."""
    left = []
    for call in calls:
        gradients = rows[id(call)]
        weighted = [(exponents, given[id(call)]) for exponents, given in passes]
        noise = None if repeated is None else (repeated[id(call)] - gradients).abs().amax(1)
        if len(gradients) % samples == 0:
            length = len(gradients) // samples
            weights = torch.exp2(weighted[0][0]).to(gradients).repeat_interleave(length)[:, None]
            straight = torch.arange(samples, device=gradients.device).repeat_interleave(length)
            # The first comparison, which ends most, is the same without thought of what is not finite.
            if torch.equal(weighted[0][1], gradients * weights) or _holds(gradients, straight, weighted, noise):
                placed[id(call)] = None
                continue
        if len(weighted) == 2:
            numbers = _decoded(gradients, weighted)
            if _holds(gradients, numbers, weighted, noise):
                placed[id(call)] = numbers
                continue
        left.append(call)
    return left


def _exponents(samples: int, calls: Sequence[Call], rows: Mapping[int, Tensor]) -> Float[Tensor, "pass sample"]:
    """Return logarithms of the weights of two passes, which together name each sample.

    Those of the first grow as gradients get smaller, by more than these do. How large a sample's gradients are, is
    known where rows are in order; elsewhere any weights will do.
    """
    sizes = torch.zeros(samples, dtype=torch.float64)
    for call in calls:
        gradients = rows[id(call)]
        if gradients.numel() and len(gradients) % samples == 0:
            largest = gradients.abs().reshape(samples, -1).amax(1).double().cpu()
            sizes = torch.maximum(sizes, (largest / largest.max()).nan_to_num(0))
    smaller = torch.where(sizes > 0, -sizes.log2(), 0).round().clamp(0, _RANGE)
    rank = smaller.argsort(stable=True).argsort()
    half = any(call.output.dtype == torch.float16 for call in calls)
    levels = _LEVELS_OF_FLOAT16 if half else _LEVELS
    first = smaller + rank * min(samples, levels) // samples
    twins = (first[:, None] == first).tril(-1).sum(1)  # samples before this one with the same weight
    return torch.stack([first, (twins + 5 * first) % levels - levels // 2]).float()


def _weighted(losses: Tensor, calls: Sequence[Call], exponents: Float[Tensor, " sample"]) -> dict[int, Tensor]:
    """Return gradients of the weighted sum of losses, as rows, by the call's identity."""
    outputs = [call.output for call in calls]
    weights = torch.exp2(exponents).to(losses)
    gradients = torch.autograd.grad(losses, outputs, weights, retain_graph=True, allow_unused=True)
    return {
        id(call): gradient_rows(
            call, at_least_single(torch.zeros_like(call.output) if gradient is None else gradient.detach())
        )
        for call, gradient in zip(calls, gradients, strict=True)
    }


def _decoded(rows: Tensor, passes: Sequence[tuple[Tensor, Tensor]]) -> Int[Tensor, " row"]:
    """Return the sample of each row by the ratio of its gradients.

    −1 for rows of zeros, −2 where there is no such sample.
    """
    largest = rows.abs().amax(1, keepdim=True)
    unit = (rows / largest).double()
    ratios = [(unit * (weighted / largest)).sum(1) / unit.square().sum(1) for _, weighted in passes]
    is_samples = torch.stack(
        [
            ratio.log2().round()[:, None] == exponents.to(ratio)
            for ratio, (exponents, _) in zip(ratios, passes, strict=True)
        ]
    ).all(0)
    numbers = torch.where(is_samples.any(1), is_samples.int().argmax(1), -2)
    return torch.where(largest[:, 0] == 0, -1, numbers)


def _holds(
    rows: Tensor, numbers: Tensor, passes: Sequence[tuple[Tensor, Tensor]], noise: Float[Tensor, " row"] | None
) -> bool:
    """Return whether weighted gradients are the sample's weight times the unweighted ones, up to the noise."""
    if bool((numbers == -2).any()):
        return False
    for exponents, weighted in passes:
        weights = torch.exp2(exponents).to(rows)[numbers.clamp(min=0), None]
        expected = rows * weights
        same = (weighted == expected) | (weighted.isnan() & expected.isnan())
        if noise is not None:
            # A sample's rows are as noisy as its noisiest one; rows of no sample are exactly zero.
            worst = noise.new_zeros(len(exponents) + 1).scatter_reduce(0, numbers + 1, noise, "amax")
            worst[0] = 0
            same |= (weighted - expected).abs() <= _REPEATABILITY * worst[numbers + 1, None] * weights
        if not bool(same.all()):
            return False
    return True
