"""A matrix kept as the product of two thin factors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class LowRankMatrix:
    r"""A matrix \(\Delta W = s\,L\,\mathrm{diag}(c)\,R\) that is never multiplied out.

    The factors are kept as they were given (same storage, same dtype, no copy), and the scales beside
    them: folding \(s\) into a factor that is then subtracted from its predecessor would cost up to
    eight digits of the difference. ``left @ right`` is the matrix, in float64, every scale folded in.

    Args:
        left: ``(out, rank)``, LoRA's B.
        right: ``(rank, in)``, LoRA's A.
        scale: LoRA's scale, e.g. alpha / r.
        column_scale: \(c\), ``(rank,)``, one more scale for each column of ``left``, kept in float64: where
            columns are scaled differently (AdaLoRA's E, a sum of adapters). Ones by default.

    Raises:
        ValueError: If the factors are not two matrices that can be multiplied, or ``column_scale`` is not
            one number a column.

    >>> import torch
    >>> matrix = LowRankMatrix(torch.ones(3, 1), torch.ones(1, 2), scale=2.0)
    >>> matrix.shape, matrix.rank
    ((3, 2), 1)
    >>> matrix.left @ matrix.right
    tensor([[2., 2.],
            [2., 2.],
            [2., 2.]], dtype=torch.float64)
    """

    __slots__ = ("column_scale", "left_factor", "right_factor", "scale")

    def __init__(self, left: Tensor, right: Tensor, scale: float = 1.0, *, column_scale: Tensor | None = None) -> None:
        if left.ndim != 2 or right.ndim != 2 or left.shape[1] != right.shape[0]:
            raise ValueError(
                f"Expected factors of shapes (out, rank) and (rank, in), "
                f"got {tuple(left.shape)} and {tuple(right.shape)}."
            )
        if column_scale is not None and column_scale.shape != left.shape[1:]:
            raise ValueError(
                f"Expected column_scale of shape (rank,) = ({left.shape[1]},), got {tuple(column_scale.shape)}."
            )
        self.left_factor = left
        self.right_factor = right
        self.scale = float(scale)
        self.column_scale = None if column_scale is None else column_scale.to(torch.float64)

    def scales(self) -> Float[Tensor, " rank"]:
        """The whole scale of each column of ``left_factor``, in float64: ``scale * column_scale``.

        >>> import torch
        >>> halves = torch.tensor([0.5, -1.5])
        >>> LowRankMatrix(torch.ones(3, 2), torch.ones(2, 2), 4.0, column_scale=halves).scales()
        tensor([ 2., -6.], dtype=torch.float64)
        """
        if self.column_scale is None:
            return torch.full((self.rank,), self.scale, dtype=torch.float64)
        return self.scale * self.column_scale

    @property
    def left(self) -> Float[Tensor, "out rank"]:
        """The left factor in float64, every scale folded in: ``(out, rank)``."""
        return self.left_factor.to(torch.float64) * self.scales().to(self.left_factor.device)

    @property
    def right(self) -> Float[Tensor, "rank in"]:
        """The right factor in float64: ``(rank, in)``."""
        return self.right_factor.to(torch.float64)

    @property
    def shape(self) -> tuple[int, int]:
        """``(out, in)``."""
        return self.left_factor.shape[0], self.right_factor.shape[1]

    @property
    def rank(self) -> int:
        """Number of columns of ``left``: an upper bound of the matrix's rank."""
        return self.left_factor.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The coarser of the two dtypes in which the factors are stored."""
        return max(self.left_factor.dtype, self.right_factor.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    def to_dense(self) -> Float[Tensor, "out in"]:
        """Return the product in float64. For tests and small matrices: everything else works on the factors."""
        return self.left @ self.right

    def __repr__(self) -> str:
        scale = f"{self.scale:g}" + ("" if self.column_scale is None else " * column_scale")
        return f"LowRankMatrix(shape={self.shape}, rank={self.rank}, scale={scale}, dtype={self.dtype})"
