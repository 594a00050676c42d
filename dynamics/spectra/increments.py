r"""What one step changed: the difference of two low-rank matrices without cancellation.

The obvious stack [B₁, −B₀]·[A₁; A₀] cancels: at a relative change ε it loses log₁₀(1/ε) digits. With
ΔB = B₁ − B₀ and ΔA = A₁ − A₀, both exact or nearly so, and S the scales of the columns,

.. math:: B_1 S_1 A_1 - B_0 S_0 A_0 = B_1 (S_1 \Delta A + (S_1 - S_0) A_0) + \Delta B\, S_0 A_0

with A₀ = A₁ − ΔA has an error that does not depend on ε. The triangular factors of [B₁, ΔB] and [A₁ᵀ, ΔAᵀ] hold
everything: the increment's core, in their leading blocks the core of the total B₁S₁A₁, and the norms of all columns.
One QR a side serves both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynamics.spectra.singular_values import core_singular_values, tall_triangle
from probes.low_rank import LowRankMatrix


class Workspace:
    """Buffers to reuse: a large allocation is mapped and zeroed by the system each time.

    What was made with a workspace is valid until the next call with the same one; a workspace belongs to one thread.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, torch.device], Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], device: torch.device | str) -> Tensor:
        """Return a float64 tensor of this shape with arbitrary content."""
        key, size = (name, torch.device(device)), math.prod(shape)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(size, dtype=torch.float64, device=device)
        return self._buffers[key][:size].view(shape)

    def leave_accelerators(self) -> None:
        """Let go of all buffers that are not on the host: elsewhere memory is scarce, and allocating is cheap."""
        self._buffers = {key: buffer for key, buffer in self._buffers.items() if buffer.device.type == "cpu"}


@dataclass(frozen=True)
class Stack:
    """Factors of a batch of updates of one shape, each side as one tall float64 matrix in column-major order.

    Args:
        left: ``(batch, columns, out)``: rows are the columns of [B₁, ΔB], or of B₁ alone.
        right: ``(batch, columns, in)``: rows are the columns of [A₁ᵀ, ΔAᵀ], or of A₁ᵀ alone.
        rank: r, the number of columns that belong to B₁: the larger rank of the two ends.
        scale, scale_before: ``(batch, r)``, of each column.
    """

    left: Float[Tensor, "batch columns out"]
    right: Float[Tensor, "batch columns in"]
    rank: int
    scale: Float[Tensor, "batch rank"]
    scale_before: Float[Tensor, "batch rank"] | None


def stack(
    now: Sequence[LowRankMatrix],
    before: Sequence[LowRankMatrix] | None,
    device: torch.device | str = "cpu",
    workspace: Workspace | None = None,
) -> Stack:
    """Stack a batch of matrices with their predecessors: ``now`` of one shape and rank, ``before`` too.

    Where the ranks differ, the smaller pair of factors is extended by zeros: so a rank that grows, by rows and columns
    added to what was there, has the increment of what changed.
    """
    (out, in_), rank_now = now[0].shape, now[0].rank
    rank = rank_now if before is None else max(rank_now, before[0].rank)
    columns = rank if before is None else 2 * rank
    workspace = workspace or Workspace()
    left = workspace.take("left", (len(now), columns, out), device)
    right = workspace.take("right", (len(now), columns, in_), device)
    if before is not None and before[0].rank != rank_now:
        left.zero_()
        right.zero_()
    _copy_factors(now, left[:, :rank_now], right[:, :rank_now])
    if before is None:
        return Stack(left, right, rank, scales(now, rank), None)
    end = rank + before[0].rank
    _copy_factors(before, left[:, rank:end], right[:, rank:end])
    torch.sub(left[:, :rank], left[:, rank:], out=left[:, rank:])
    torch.sub(right[:, :rank], right[:, rank:], out=right[:, rank:])
    return Stack(left, right, rank, scales(now, rank), scales(before, rank))


def stack_sums(
    sums: Sequence[Sequence[LowRankMatrix]], device: torch.device | str = "cpu", workspace: Workspace | None = None
) -> Stack:
    """Stack a batch of sums of products, of one shape and with ranks that are alike term by term.

    >>> one = LowRankMatrix(torch.ones(1, 1), torch.ones(1, 1))
    >>> stack_sums([[one, one]]).left
    tensor([[[1.],
             [1.]]], dtype=torch.float64)
    """
    terms = list(zip(*sums, strict=True))
    ranks, (out, in_) = [term[0].rank for term in terms], terms[0][0].shape
    workspace = workspace or Workspace()
    left = workspace.take("left", (len(sums), sum(ranks), out), device)
    right = workspace.take("right", (len(sums), sum(ranks), in_), device)
    for term, columns, rows in zip(terms, left.split(ranks, 1), right.split(ranks, 1), strict=True):
        _copy_factors(term, columns, rows)
    scale = torch.cat([scales(term, rank) for term, rank in zip(terms, ranks, strict=True)], 1)
    return Stack(left, right, sum(ranks), scale, None)


def _copy_factors(
    matrices: Sequence[LowRankMatrix], left: Float[Tensor, "batch r out"], right: Float[Tensor, "batch r in"]
) -> None:
    for matrix, columns, rows in zip(matrices, left.unbind(), right.unbind(), strict=True):
        columns.copy_(matrix.left_factor.detach().mT)
        rows.copy_(matrix.right_factor.detach())


def scales(matrices: Sequence[LowRankMatrix], rank: int) -> Float[Tensor, "batch rank"]:
    """Return the scales of the columns of each matrix, ones up to ``rank``."""
    columns = torch.tensor([matrix.scale for matrix in matrices], dtype=torch.float64)[:, None].repeat(1, rank)
    for row, matrix in enumerate(matrices):
        if matrix.column_scale is not None:
            columns[row, : matrix.rank] = matrix.scales()
        if matrix.rank < rank:
            columns[row, matrix.rank :] = 1.0
    return columns


def difference(now: LowRankMatrix, before: LowRankMatrix) -> LowRankMatrix:
    """Return the increment itself, as float64 factors of rank r₁ + r₀, without cancellation where ranks agree.

    B₁(S₁ΔA + (S₁ − S₀)A₀) + ΔB S₀A₀ as above; across a change of rank [B₁S₁, −B₀S₀]·[A₁; A₀].

    >>> one, two = (LowRankMatrix(torch.full((1, 1), x), torch.ones(1, 1), 0.5) for x in (1.0, 3.0))
    >>> difference(two, one).to_dense()
    tensor([[1.]], dtype=torch.float64)
    """
    right, right_before = now.right.detach(), before.right.detach()
    if now.rank != before.rank:
        left = torch.cat([now.left.detach(), -before.left.detach()], 1)
        return LowRankMatrix(left, torch.cat([right, right_before]))
    left = now.left_factor.detach().to(torch.float64)
    left_change = left - before.left_factor.detach().to(torch.float64)
    scale, scale_before = (matrix.scales().to(right.device)[:, None] for matrix in (now, before))
    change = scale * (right - right_before) + (scale - scale_before) * right_before
    return LowRankMatrix(torch.cat([left, left_change], 1), torch.cat([change, scale_before * right_before]))


@dataclass(frozen=True)
class Cores:
    """Small matrices that hold all that spectra need of a :class:`Stack`.

    Args:
        left, right: Triangular factors of the two sides, ``(batch, k, columns)``.
        rank, scale, scale_before: As in the stack.
        by_gram: Which members have both triangles from a Gram.
    """

    left: Float[Tensor, "batch k columns"]
    right: Float[Tensor, "batch l columns"]
    rank: int
    scale: Float[Tensor, "batch rank"]
    scale_before: Float[Tensor, "batch rank"] | None
    by_gram: Bool[Tensor, " batch"] | None = None

    def one_by_one(self) -> list[Cores]:
        """Return each matrix of the batch, as a batch of one."""
        before = [None] * len(self.left) if self.scale_before is None else self.scale_before.split(1)
        columns = zip(self.left.split(1), self.right.split(1), self.scale.split(1), before, strict=True)
        return [Cores(left, right, self.rank, scale, scale_before) for left, right, scale, scale_before in columns]

    def members(self, part: slice) -> Cores:
        """Return consecutive matrices of the batch."""
        before = None if self.scale_before is None else self.scale_before[part]
        return Cores(self.left[part], self.right[part], self.rank, self.scale[part], before)

    def energies(self) -> tuple[Float[Tensor, "batch rank"], Float[Tensor, "batch rank"]]:
        """Return ‖B₁ₖ‖² and ‖A₁ₖ‖²: squared norms of the columns of B₁ and of the rows of A₁."""
        return self.left[:, :, : self.rank].square().sum(1), self.right[:, :, : self.rank].square().sum(1)

    def total(self) -> Float[Tensor, "batch j i"]:
        """Return the core of B₁S₁A₁: the leading blocks are all there is of B₁ and A₁."""
        r = self.rank
        return _columns(self.left[:, :r, :r], self.scale) @ self.right[:, :r, :r].mT

    def increment(self) -> Float[Tensor, "batch k l"]:
        """Return the core of B₁S₁A₁ − B₀S₀A₀."""
        assert self.scale_before is not None
        r = self.rank
        change, before = self.right[:, :, r:], self.right[:, :, :r] - self.right[:, :, r:]
        beside_now = _columns(change, self.scale) + _columns(before, self.scale - self.scale_before)
        beside_change = _columns(before, self.scale_before)
        return self.left[:, :, :r] @ beside_now.mT + self.left[:, :, r:] @ beside_change.mT

    def factors(self) -> list[FactorSpectra]:
        """Return what the null of each increment is conditioned on; see :class:`FactorSpectra`."""
        assert self.scale_before is not None
        r = self.rank
        left_before, right_before = (side[:, :, :r] - side[:, :, r:] for side in (self.left, self.right))
        right_change = self.right[:, :, r:]
        left_change = _columns(self.left[:, :, r:], self.scale) + _columns(left_before, self.scale - self.scale_before)
        moved_left, moved_right = (side.abs().amax(1) != 0 for side in (left_change, right_change))
        left = core_singular_values(_columns(_columns(left_before, self.scale_before), moved_right.double()))
        right = core_singular_values(_columns(right_before, moved_left.double()))
        norms = [torch.linalg.vector_norm(change, dim=(1, 2)).tolist() for change in (left_change, right_change)]
        counts = [moved.sum(1).tolist() for moved in (moved_right, moved_left)]
        columns = zip(left.unbind(), right.unbind(), *counts, *norms, strict=True)
        return [
            FactorSpectra(_first(of_left, rows), _first(of_right, columns), *moves)
            for of_left, of_right, rows, columns, *moves in columns
        ]


@dataclass(frozen=True)
class FactorSpectra:
    r"""The factors that an increment starts from, and how far each moved.

    With the scales folded into B, the increment is (B₀ + ΔB)(A₀ + ΔA) − B₀A₀. If ΔB and ΔA are white noise, its
    singular values depend on B₀ and A₀ through their own singular values alone, up to a relative rotation in ΔBΔA. A
    column of B₀ counts only where the row of A beside it moved, and a row of A₀ where its column of B did: an adapter
    that is frozen adds nothing to the increment.

    Args:
        left: Singular values of B₀, one for each row of A that moved, descending; zeros beyond ``out``.
        right: Singular values of A₀, one for each column of B that moved, descending; zeros beyond ``in``.
        left_change, right_change: ‖ΔB‖_F and ‖ΔA‖_F.
    """

    left: Float[Tensor, " p"]
    right: Float[Tensor, " q"]
    left_change: float
    right_change: float


def _first(values: Float[Tensor, " k"], count: int) -> Float[Tensor, " count"]:
    """Return the ``count`` largest values, zeros appended where there are fewer."""
    return values[:count] if count <= len(values) else torch.nn.functional.pad(values, (0, count - len(values)))


def join(members: Sequence[Cores]) -> Cores:
    """Join members of one shape to a batch: the inverse of :meth:`Cores.one_by_one`."""
    before = [member.scale_before for member in members if member.scale_before is not None]
    return Cores(
        torch.cat([member.left for member in members]),
        torch.cat([member.right for member in members]),
        members[0].rank,
        torch.cat([member.scale for member in members]),
        torch.cat(before) if before else None,
    )


def _columns(cores: Float[Tensor, "batch k r"], scale: Float[Tensor, "batch r"]) -> Float[Tensor, "batch k r"]:
    """Multiply each column by its scale."""
    return cores * scale[:, None, :]


def cores(stacked: Stack, *, fast: bool = False) -> Cores:
    """Return the triangular factors, on the host: all the work in the matrices' own dimensions happens here.

    Args:
        stacked: The factors.
        fast: As in :func:`~dynamics.spectra.singular_values.tall_triangle`.
    """
    (left, left_by_gram), (right, right_by_gram) = (
        tall_triangle(side.mT, fast=fast) for side in (stacked.left, stacked.right)
    )
    by_gram = left_by_gram & right_by_gram
    return Cores(left, right, stacked.rank, stacked.scale, stacked.scale_before, by_gram)


def changes_between(
    now: Sequence[LowRankMatrix],
    before: Sequence[LowRankMatrix],
    device: torch.device | str = "cpu",
    workspace: Workspace | None = None,
) -> tuple[Float[Tensor, "batch rank out"], Float[Tensor, "batch rank in"]]:
    """Return ΔBᵀ and ΔA of matrices of one shape and rank, without stacking what did not change."""
    rank, (out, in_) = now[0].rank, now[0].shape
    workspace = workspace or Workspace()
    left = workspace.take("left change", (len(now), rank, out), device)
    right = workspace.take("right change", (len(now), rank, in_), device)
    for index, (matrix, predecessor) in enumerate(zip(now, before, strict=True)):
        left[index] = matrix.left_factor.detach().mT
        left[index] -= predecessor.left_factor.detach().mT.to(device)
        right[index] = matrix.right_factor.detach()
        right[index] -= predecessor.right_factor.detach().to(device)
    return left, right


def cross_grams(
    stacked: Stack, left_before: Float[Tensor, "batch r out"], right_before: Float[Tensor, "batch r in"]
) -> tuple[Float[Tensor, "batch r r"], Float[Tensor, "batch r r"]]:
    """Return ΔB_tᵀΔB_{t−1} and ΔA_tΔA_{t−1}ᵀ: what the triangular factors of two steps do not hold of each other."""
    left, right = stacked.left[:, stacked.rank :], stacked.right[:, stacked.rank :]
    return (left @ left_before.mT).cpu(), (right @ right_before.mT).cpu()


def increment_products(
    reduced: Cores,
    reduced_before: Cores,
    left_changes: Float[Tensor, "batch r r"],
    right_changes: Float[Tensor, "batch r r"],
) -> Float[Tensor, " batch"]:
    r"""Return ⟨Δ_t, Δ_{t−1}⟩ of consecutive increments, from r×r cross-Grams.

    In the bases {B_{t−1}, ΔB_t}, {A_{t−1}, ΔA_t} of one and {B_{t−1}, ΔB_{t−1}}, {A_{t−1}, ΔA_{t−1}} of the other,

    .. math:: \Delta_t \sim \begin{pmatrix} S_t - S_{t-1} & S_t \\ S_t & S_t \end{pmatrix}, \qquad
              \Delta_{t-1} \sim \begin{pmatrix} S_{t-1} - S_{t-2} & S_{t-2} \\ S_{t-2} & -S_{t-2} \end{pmatrix}

    so the inner product is Σ (MᵀGM') ∘ H with the bases' cross-Grams G and H. Of these, all but ΔB_tᵀΔB_{t−1} and
    ΔA_tΔA_{t−1}ᵀ already stand in the triangular factors. No term is larger than the result's own order.

    Args:
        reduced: Of step t, with its predecessor.
        reduced_before: Of step t−1, with its predecessor, of the same rank.
        left_changes, right_changes: As :func:`cross_grams` gives them.
    """
    assert reduced_before.scale_before is not None
    now, before, earlier = reduced.scale, reduced_before.scale, reduced_before.scale_before
    left = _bases_gram(reduced.left, reduced_before.left, left_changes)
    right = _bases_gram(reduced.right, reduced_before.right, right_changes)
    coefficients = _blocks(now - before, now, now, now)
    coefficients_before = _blocks(before - earlier, earlier, earlier, -earlier)
    return ((coefficients.mT @ left @ coefficients_before) * right).sum((1, 2))


def _bases_gram(
    core: Float[Tensor, "batch k columns"],
    core_before: Float[Tensor, "batch l columns"],
    changes: Float[Tensor, "batch r r"],
) -> Float[Tensor, "batch columns columns"]:
    """Return the Gram of {X_{t−1}, ΔX_t} against {X_{t−1}, ΔX_{t−1}} on one side."""
    r = changes.shape[-1]
    gram, gram_before = core.mT @ core, core_before.mT @ core_before
    change_middle = gram[:, r:, :r] - gram[:, r:, r:]  # ΔX_tᵀX_{t−1} = ΔX_tᵀ(X_t − ΔX_t)
    return torch.cat([gram_before[:, :r], torch.cat([change_middle, changes], 2)], 1)


def _blocks(*diagonals: Float[Tensor, "batch r"]) -> Float[Tensor, "batch n n"]:
    """Join two by two diagonal blocks, given row by row."""
    first, second, third, fourth = (diagonal.diag_embed() for diagonal in diagonals)
    return torch.cat([torch.cat([first, second], 2), torch.cat([third, fourth], 2)], 1)
