"""Updates of dense weights: two stored weights, subtracted in float64 when somebody looks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.trajectory import OpenCheckpoint
from probes.low_rank import LowRankMatrix


@dataclass(frozen=True)
class DenseUpdate:
    r"""A dense update \(W - W_0\) that is not yet formed.

    Args:
        now: The weight, ``(out, in)``, as stored; or the update itself, where ``start`` is ``None``.
        start: The weight that it is counted from, of the same shape, as stored.

    Raises:
        ValueError: If the two have different shapes.

    >>> update = DenseUpdate(torch.tensor([[1.5, 2.0]]), torch.tensor([[1.0, 2.0]], dtype=torch.bfloat16))
    >>> update.shape, update.dtype
    ((1, 2), torch.bfloat16)
    >>> update.difference()
    tensor([[0.5000, 0.0000]], dtype=torch.float64)
    """

    now: Tensor
    start: Tensor | None = None

    def __post_init__(self) -> None:
        if self.start is not None and self.start.shape != self.now.shape:
            shapes = f"{tuple(self.now.shape)} and {tuple(self.start.shape)}"
            raise ValueError(f"Expected two weights of one shape, got {shapes}.")

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.now.shape[0], self.now.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The coarser of the two dtypes: the one whose rounding is in the difference."""
        stored = [self.now.dtype] if self.start is None else [self.now.dtype, self.start.dtype]
        return max(stored, key=lambda dtype: torch.finfo(dtype).eps)

    def difference(self, device: str | torch.device = "cpu") -> Float[Tensor, "out in"]:
        """The update in float64, of memory of its own: beside it only the stored weights are needed."""
        update = self.now.to(device, torch.float64, copy=True)
        return update if self.start is None else update.sub_(self.start.to(device))


def update_since(name: str, now: OpenCheckpoint, before: OpenCheckpoint | None) -> LowRankMatrix | DenseUpdate | None:
    """The total update of a matrix; ``None`` where it is a weight whose start is not known.

    Args:
        name: Name of the matrix.
        now: The checkpoint, open.
        before: What totals are counted from (``trajectory.start_of(checkpoint)``), open; ``None`` if nothing is.

    Raises:
        UnreadableMatrix: If one of the two files no longer holds what its header said.
    """
    if now.shapes[name].holds == "update":
        matrix = now[name]
        return matrix if isinstance(matrix, LowRankMatrix) else DenseUpdate(matrix)
    if now.shapes[name].holds == "state":
        return None
    shape = None if before is None else before.shapes.get(name)
    if before is None or shape is None or (shape.out, shape.in_) != (now.shapes[name].out, now.shapes[name].in_):
        return None
    weight, start = now[name], before[name]
    assert isinstance(weight, Tensor)
    assert isinstance(start, Tensor), "weights are counted from weights"
    return DenseUpdate(weight, start)
