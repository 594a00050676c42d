"""A matrix of which only one process's part was saved: blocks of rows or columns that are exactly zero.

Sharded training leaves each process a block of rows. Where a checkpoint was saved without gathering them, the rest is
exactly zero, and every norm and rank is that of the part. Trained weights have no such blocks: rows without a gradient
(tokens that never occurred) are scattered, and a factor that starts at zero is zero as a whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from dynamics.findings import Finding
from probes.low_rank import LowRankMatrix

#: A run of zero rows counts from this share of the rows on; of a side of a vocabulary's length, from the second.
_SHORTEST = 1 / 16
_SHORTEST_OF_VOCABULARY = 1 / 2
#: From this ratio of its sides on a matrix is taken for that of a vocabulary.
_VOCABULARY = 8
#: Share of the other rows that are not zero, beside a missing block.
_DENSE = 0.9
#: In how many parts matrices are cut at most.
_MOST_PARTS = 128
_MOST_NAMED = 8
#: Whole numbers of the size of each format.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, order=True)
class ZeroBlock:
    """Rows or columns of one tensor that are exactly zero in one or several blocks.

    Args:
        tensor: ``lora_A``, ``lora_B``, ``weight`` or ``update``.
        axis: ``rows`` or ``columns``.
        zero, size: How many of them are zero, and how many there are.
    """

    tensor: str
    axis: str
    zero: int
    size: int


def zero_block(is_zero: Bool[Tensor, " n"], shortest: float = _SHORTEST) -> int:
    """Return how many rows lie in blocks of zeros, where the other rows are not zero; 0 where that is not the pattern.

    Args:
        is_zero: Which rows are exactly zero.
        shortest: Share of the rows that a block has at least.

    >>> zero_block(torch.arange(64) >= 8), zero_block(torch.zeros(64, dtype=torch.bool))
    (56, 0)
    >>> zero_block(torch.arange(64) % 2 == 0), zero_block(torch.ones(64, dtype=torch.bool))
    (0, 0)
    """
    size = len(is_zero)
    zeros = int(is_zero.sum())
    if size < 2 or not 0 < zeros <= size - max(1, size / _MOST_PARTS):
        return 0  # nothing is zero, or nearly everything: a few rows are a few trained tokens
    values, lengths = torch.unique_consecutive(is_zero, return_counts=True)
    is_long = values & (lengths >= max(2, shortest * size))
    if not bool(is_long.any()):
        return 0
    at_end = torch.zeros_like(is_long)
    at_end[[0, -1]] = values[[0, -1]]  # beside a long one, what is left at the ends is of other processes too
    inside = int(lengths[is_long | at_end].sum())
    return inside if size - zeros >= _DENSE * (size - inside) else 0


def of_factors(matrix: LowRankMatrix) -> ZeroBlock | None:
    """Return the largest zero block of a product's factors.

    Rows of A and columns of B that are zero together only mean a smaller rank; in a sum of adapters one may be zero.
    """
    if _is_full(matrix.left_factor) and _is_full(matrix.right_factor):
        return None
    left, right = matrix.left_factor != 0, matrix.right_factor != 0
    blocks = []
    for tensor, axis, is_zero, other in (
        ("lora_B", "rows", ~left.any(1), right),
        ("lora_A", "columns", ~right.any(0), left),
    ):
        across = other.shape[1] if axis == "rows" else other.shape[0]
        blocks.append((tensor, axis, is_zero, zero_block(is_zero, _shortest(len(is_zero), across))))
    if matrix.column_scale is None:
        inner_a, inner_b = ~right.any(1), ~left.any(0)
        if bool(inner_b.any()) != bool(inner_a.any()) and bool(left.any()) and bool(right.any()):
            blocks.append(("lora_A", "rows", inner_a, _of_rank(inner_a)))
            blocks.append(("lora_B", "columns", inner_b, _of_rank(inner_b)))
    return _largest(ZeroBlock(tensor, axis, zero, len(mask)) for tensor, axis, mask, zero in blocks if zero)


def _is_full(factor: Tensor) -> bool:
    """Return whether no number is zero, by its bits but for the sign: many times faster than by comparing numbers."""
    bits = factor.detach().cpu().contiguous().view(_BITS[factor.element_size()]).numpy()
    return bool(np.count_nonzero(bits << 1) == bits.size)


def _of_rank(is_zero: Bool[Tensor, " rank"]) -> int:
    """Return the number of zero ranks at the beginning or the end."""
    values, lengths = torch.unique_consecutive(is_zero, return_counts=True)
    return int(lengths.max()) if len(values) == 2 and bool(is_zero.any()) else 0


def of_dense(now: Tensor, start: Tensor | None, *, is_update: bool) -> ZeroBlock | None:
    """Return the largest zero block of a dense matrix, or of its difference from the start.

    Args:
        now: The weight, or the update itself.
        start: What a weight is counted from, if that is known.
        is_update: Which of the two it is.
    """
    stored = [("update" if is_update else "weight", now != 0)]
    if start is not None and not is_update:
        stored.append(("update", now != start.to(now.device)))
    blocks = []
    for tensor, differs in stored:
        for axis, is_zero, other in (("rows", ~differs.any(1), 1), ("columns", ~differs.any(0), 0)):
            zero = zero_block(is_zero, _shortest(len(is_zero), now.shape[other]))
            blocks += [ZeroBlock(tensor, axis, zero, len(is_zero))] if zero else []
    if start is not None and not is_update and not bool((now != 0).any()) and bool((start != 0).any()):
        return ZeroBlock("weight", "rows", len(now), len(now))  # of a stack of matrices, one that another process has
    return _largest(blocks)


def _shortest(size: int, across: int) -> float:
    """Return the share of the rows that a block has at least, by the number of rows and of columns."""
    return _SHORTEST_OF_VOCABULARY if size >= _VOCABULARY * across else _SHORTEST


def _largest(blocks: Iterable[ZeroBlock]) -> ZeroBlock | None:
    return max(blocks, key=lambda block: block.zero / block.size, default=None)


def zero_block_findings(blocks: Sequence[tuple[int, str, ZeroBlock]], matrices: int) -> Iterator[Finding]:
    """Yield one finding for each share of each tensor.

    Args:
        blocks: Step, matrix and block.
        matrices: How many the run has.
    """
    groups: dict[tuple[str, str, float], list[tuple[int, str, ZeroBlock]]] = defaultdict(list)
    for step, name, block in blocks:
        groups[block.tensor, block.axis, round(block.zero / block.size, 3)].append((step, name, block))
    for (tensor, axis, share), members in groups.items():
        names, steps = dict.fromkeys(name for _, name, _ in members), sorted({step for step, _, _ in members})
        first = members[0][2]
        remedy = (
            "Gather the weights before saving (FSDP: full state dict; DeepSpeed: zero_to_fp32.py), and analyse those."
        )
        evidence = {"matrices": len(names), "names": list(names)[:_MOST_NAMED], "share": 1 - share, "steps": steps}
        yield Finding(
            "OD139",
            f"Only {first.size - first.zero} of {first.size} {axis} of {tensor} are not zero ({1 - share:.1%}) in "
            f"{len(names)} of {matrices} matrices, e.g. {next(iter(names))}; the others are exactly zero. "
            "That is what one process holds of a sharded model: norms and ranks are those of the part.",
            remedy,
            step=steps[-1],
            evidence=evidence,
        )
