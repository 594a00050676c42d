r"""What one step changed: the difference of two low-rank matrices without cancellation.

The obvious stack [B₁, −B₀]·[A₁; A₀] cancels: at a relative change ε it loses log₁₀(1/ε) digits. With
ΔB = B₁ − B₀ and ΔA = A₁ − A₀, both exact or nearly so, the identity

.. math:: B_1 A_1 - B_0 A_0 = [B_1,\ \Delta B]\,[\Delta A;\ A_0]

has an error that does not depend on ε. The triangular factors of [B₁, ΔB] and [A₀ᵀ, ΔAᵀ] hold everything: the
increment's core, the core of the total B₁A₁ (through A₁ = A₀ + ΔA), and the norms of all columns. One QR a side
serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.spectra.singular_values import triangle
from probes.low_rank import LowRankMatrix


@dataclass(frozen=True)
class Stack:
    """Factors of a batch of updates of one shape, each side as one tall float64 matrix in column-major order.

    Args:
        left: ``(batch, columns, out)``: rows are the columns of [B₁, ΔB], or of B₁ alone.
        right: ``(batch, columns, in)``: rows are the columns of [A₀ᵀ, ΔAᵀ], or of A₁ᵀ alone.
        rank: r, the number of columns that belong to B₁.
        scale, scale_before: ``(batch,)``.
    """

    left: Float[Tensor, "batch columns out"]
    right: Float[Tensor, "batch columns in"]
    rank: int
    scale: Float[Tensor, " batch"]
    scale_before: Float[Tensor, " batch"] | None


def stack(
    now: Sequence[LowRankMatrix], before: Sequence[LowRankMatrix] | None, device: torch.device | str = "cpu"
) -> Stack:
    """Stacks a batch of matrices of one shape and rank, with their predecessors of the same shape and rank."""
    rank, (out, in_) = now[0].rank, now[0].shape
    columns = rank if before is None else 2 * rank
    left = torch.empty(len(now), columns, out, dtype=torch.float64, device=device)
    right = torch.empty(len(now), columns, in_, dtype=torch.float64, device=device)
    for index, matrix in enumerate(now):
        left[index, :rank] = matrix.left_factor.detach().mT
        right[index, -rank:] = matrix.right_factor.detach()
    if before is None:
        return Stack(left, right, rank, _scales(now), None)
    for index, matrix in enumerate(before):
        left[index, rank:] = matrix.left_factor.detach().mT
        right[index, :rank] = matrix.right_factor.detach()
    torch.sub(left[:, :rank], left[:, rank:], out=left[:, rank:])
    right[:, rank:] -= right[:, :rank]
    return Stack(left, right, rank, _scales(now), _scales(before))


def _scales(matrices: Sequence[LowRankMatrix]) -> Float[Tensor, " batch"]:
    return torch.tensor([matrix.scale for matrix in matrices], dtype=torch.float64)


@dataclass(frozen=True)
class Cores:
    """Small matrices that carry everything wanted of a :class:`Stack`.

    Args:
        left, right: Triangular factors of the two sides, ``(batch, k, columns)``.
        rank, scale, scale_before: As in the stack.
    """

    left: Float[Tensor, "batch k columns"]
    right: Float[Tensor, "batch l columns"]
    rank: int
    scale: Float[Tensor, " batch"]
    scale_before: Float[Tensor, " batch"] | None

    def member(self, index: int) -> Cores:
        """One matrix of the batch, as a batch of one."""
        one = slice(index, index + 1)
        before = None if self.scale_before is None else self.scale_before[one]
        return Cores(self.left[one], self.right[one], self.rank, self.scale[one], before)

    def energies_now(self) -> tuple[Float[Tensor, "batch rank"], Float[Tensor, "batch rank"]]:
        """‖B₁ₖ‖² and ‖A₁ₖ‖²: squared norms of the columns of B₁ and of the rows of A₁."""
        return self.left[:, :, : self.rank].square().sum(1), self.right_now().square().sum(1)

    def total(self) -> Float[Tensor, "batch j l"]:
        """Core of s₁B₁A₁: the leading block of the left triangle is all there is of B₁."""
        return _times(self.scale, self.left[:, : self.rank, : self.rank] @ self.right_now().mT)

    def right_now(self) -> Float[Tensor, "batch l rank"]:
        """Core of A₁ᵀ = A₀ᵀ + ΔAᵀ."""
        if self.scale_before is None:
            return self.right
        return self.right[:, :, : self.rank] + self.right[:, :, self.rank :]

    def increment(self) -> Float[Tensor, "batch k l"]:
        """Core of s₁B₁A₁ − s₀B₀A₀ = B₁(s₁ΔA + (s₁ − s₀)A₀) + s₀ΔB A₀."""
        assert self.scale_before is not None
        before, change = self.right[:, :, : self.rank], self.right[:, :, self.rank :]
        right_of_now = _times(self.scale, change) + _times(self.scale - self.scale_before, before)
        return (
            self.left[:, :, : self.rank] @ right_of_now.mT
            + _times(self.scale_before, self.left[:, :, self.rank :]) @ before.mT
        )


def join(members: Sequence[Cores]) -> Cores:
    """A batch from members of one shape: the inverse of :meth:`Cores.member`."""
    before = [member.scale_before for member in members if member.scale_before is not None]
    return Cores(
        torch.cat([member.left for member in members]),
        torch.cat([member.right for member in members]),
        members[0].rank,
        torch.cat([member.scale for member in members]),
        torch.cat(before) if before else None,
    )


def _times(scale: Float[Tensor, " batch"], cores: Float[Tensor, "batch k l"]) -> Float[Tensor, "batch k l"]:
    return scale[:, None, None] * cores


def cores(stacked: Stack) -> Cores:
    """The QR step: all the work in the matrices' own dimensions happens here."""
    return Cores(
        triangle(stacked.left.mT).cpu(),
        triangle(stacked.right.mT).cpu(),
        stacked.rank,
        stacked.scale,
        stacked.scale_before,
    )


def difference(now: LowRankMatrix, before: LowRankMatrix) -> LowRankMatrix:
    """``now − before`` as a low-rank matrix of rank r₁ + r₀, by the delta stack where the ranks agree.

    >>> import torch
    >>> a, b = torch.ones(1, 2), torch.ones(3, 1)
    >>> difference(LowRankMatrix(b, a, 3.0), LowRankMatrix(b, a, 1.0)).to_dense()[0]
    tensor([2., 2.], dtype=torch.float64)
    """
    left, right = now.left_factor.detach().double(), now.right_factor.detach().double()
    left_before, right_before = before.left_factor.detach().double(), before.right_factor.detach().double()
    if now.rank != before.rank:
        # Of two different parametrisations nothing is close to anything: the plain stack loses no digits.
        return LowRankMatrix(
            torch.cat([now.scale * left, -before.scale * left_before], 1), torch.cat([right, right_before])
        )
    change = now.scale * (right - right_before) + (now.scale - before.scale) * right_before
    return LowRankMatrix(torch.cat([left, left - left_before], 1), torch.cat([change, before.scale * right_before]))


def changes_between(
    now: Sequence[LowRankMatrix], before: Sequence[LowRankMatrix], device: torch.device | str = "cpu"
) -> tuple[Float[Tensor, "batch rank out"], Float[Tensor, "batch rank in"]]:
    """ΔBᵀ and ΔA of matrices of one shape and rank, without stacking what did not change."""
    rank, (out, in_) = now[0].rank, now[0].shape
    left = torch.empty(len(now), rank, out, dtype=torch.float64, device=device)
    right = torch.empty(len(now), rank, in_, dtype=torch.float64, device=device)
    for index, (matrix, predecessor) in enumerate(zip(now, before, strict=True)):
        left[index] = matrix.left_factor.detach().mT
        left[index] -= predecessor.left_factor.detach().mT.to(device)
        right[index] = matrix.right_factor.detach()
        right[index] -= predecessor.right_factor.detach().to(device)
    return left, right


def cross_grams(
    stacked: Stack, left_before: Float[Tensor, "batch r out"], right_before: Float[Tensor, "batch r in"]
) -> tuple[Float[Tensor, "batch r r"], Float[Tensor, "batch r r"]]:
    """ΔB_tᵀΔB_{t−1} and ΔA_tΔA_{t−1}ᵀ: what the triangular factors of two steps do not hold of each other."""
    left, right = stacked.left[:, stacked.rank :], stacked.right[:, stacked.rank :]
    return (left @ left_before.mT).cpu(), (right @ right_before.mT).cpu()


def inner_products(
    reduced: Cores,
    reduced_before: Cores,
    left_changes: Float[Tensor, "batch r r"],
    right_changes: Float[Tensor, "batch r r"],
) -> Float[Tensor, " batch"]:
    r"""⟨Δ_t, Δ_{t−1}⟩ of consecutive increments, from r×r cross-Grams.

    Both increments are products of {B_{t−1}, ΔB_t, ΔB_{t−1}} and {A_{t−1}, ΔA_t, ΔA_{t−1}}. Every Gram among these but
    ΔB_tᵀΔB_{t−1} and ΔA_tΔA_{t−1}ᵀ already stands in the triangular factors, so these two r×r products are all
    that is computed in the matrices' own dimensions.

    Args:
        reduced: Of step t, with its predecessor.
        reduced_before: Of step t−1, with its predecessor.
        left_changes, right_changes: As :func:`cross_grams` gives them.
    """
    assert reduced.scale_before is not None
    assert reduced_before.scale_before is not None
    r = reduced.rank
    # Left: Δ_t has columns [B_t, ΔB_t] = [B_{t−1} + ΔB_t, ΔB_t]; Δ_{t−1} has [B_{t−1}, ΔB_{t−1}].
    gram, gram_before = reduced.left.mT @ reduced.left, reduced_before.left.mT @ reduced_before.left
    middle_changed = gram_before[:, :r, r:]  # B_{t−1}ᵀ ΔB_{t−1}
    changed_middle = gram[:, r:, :r] - gram[:, r:, r:]  # ΔB_tᵀ B_{t−1} = ΔB_tᵀ(B_t − ΔB_t)
    left = torch.cat(
        [
            torch.cat([gram_before[:, :r, :r] + changed_middle, middle_changed + left_changes], 2),
            torch.cat([changed_middle, left_changes], 2),
        ],
        1,
    )
    # Right: Δ_t has rows [s_tΔA_t + (s_t − s_{t−1})A_{t−1}; s_{t−1}A_{t−1}]; Δ_{t−1} the same one step earlier, with
    # A_{t−2} = A_{t−1} − ΔA_{t−1}. In the bases {A_{t−1}, ΔA_t} and {A_{t−2}, ΔA_{t−1}}:
    gram, gram_before = reduced.right.mT @ reduced.right, reduced_before.right.mT @ reduced_before.right
    change_now = gram[:, r:, :r]  # ΔA_t A_{t−1}ᵀ
    middle_first = gram_before[:, :r, :r] + gram_before[:, r:, :r]  # A_{t−1} A_{t−2}ᵀ
    middle_change = gram_before[:, :r, r:] + gram_before[:, r:, r:]  # A_{t−1} ΔA_{t−1}ᵀ
    now, before, earlier = reduced.scale, reduced.scale_before, reduced_before.scale_before
    rows_change = torch.cat([change_now - right_changes, right_changes], 2)  # ΔA_t against {A_{t−2}, ΔA_{t−1}}
    rows_middle = torch.cat([middle_first, middle_change], 2)  # A_{t−1} against the same
    rows = torch.cat([_times(now, rows_change) + _times(now - before, rows_middle), _times(before, rows_middle)], 1)
    first, change = rows[:, :, :r], rows[:, :, r:]
    right = torch.cat([_times(before, change) + _times(before - earlier, first), _times(earlier, first)], 2)
    return (left * right).sum((1, 2))
