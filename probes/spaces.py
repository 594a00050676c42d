r"""The space in which gradients and updates of a low-rank adapter are compared.

A step of LoRA changes ΔW = s B A by s(dB A + B dA): it cannot leave the tangent space {X A + B Y}, which holds only a
few per cent of ∇W. In the space of all matrices a concentration along the Fisher is therefore an artefact, and in that
of the factors it depends on the gauge (B M, M⁻¹A). The tangent space is the same for every gauge. With orthonormal
bases Q_B of the columns of B and Q_A of the rows of A it is the orthogonal sum of {Q_B Y} and {(1 − Q_B Q_Bᵀ) X Q_Aᵀ},
so a matrix X is represented by the numbers

.. math:: L = Q_B^\top X, \qquad R = (1 - Q_B Q_B^\top)\, X Q_A

and inner products of projections are those of (L, R). Of ∇W both follow from the factors' gradients, ∇_B = s ∇W Aᵀ and
∇_A = s Bᵀ∇W, by small matrices; ∇W is never formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from probes.low_rank import LowRankMatrix
from probes.watched import AdapterProduct, Matrix, whole

#: Singular values of a factor below this share of its largest one, times its longer side, span no direction.
_EPSILON = torch.finfo(torch.float64).eps

#: Share of ∇W that solving for it may lose to rounding.
_LOST = 1e-5


@dataclass(frozen=True)
class TangentSpace:
    """The changes that a step of the factors can reach to first order: {X A + B Y}.

    Args:
        left: Q_B ``(out, b)``; b = 0 while B is zero, as LoRA begins: then only X A can be reached.
        right: Q_A ``(in, a)``.
        from_left: From ∇_B, of the adapters whose B is trained, side by side, to ∇W Q_A = ∇_B from_left: ``(r, a)``.
        from_right: From ∇_A, of those whose A is trained, below each other, to Q_Bᵀ∇W = from_right ∇_A: ``(b, q)``.
        left_condition: Ratio of the largest to the smallest singular value of B, of those that are not zero.
        right_condition: The same of A.
    """

    left: Float[Tensor, "out b"]
    right: Float[Tensor, "in a"]
    from_left: Float[Tensor, "r a"]
    from_right: Float[Tensor, "b q"]
    left_condition: float
    right_condition: float

    @property
    def dimension(self) -> int:
        """b·in + out·a − a·b: r(out + in − r) where both factors are trained and have full rank."""
        (out, b), (in_, a) = self.left.shape, self.right.shape
        return b * in_ + out * a - a * b

    def is_solvable(self, precision: torch.dtype) -> tuple[bool, bool]:
        """Whether Q_Bᵀ∇W follows from ∇_A, and ∇W Q_A from ∇_B, without losing more than 10⁻⁵ of ∇W to rounding.

        The rounding of ∇_A grows with the condition number of B, that of ∇_B with A's; after a few steps from zero, B
        may have a large one.
        """
        rounding = torch.finfo(precision).eps
        return self.left_condition * rounding <= _LOST, self.right_condition * rounding <= _LOST

    def projected_left(
        self, left: Float[Tensor, "sample token out"], right: Float[Tensor, "sample token in"]
    ) -> Float[Tensor, "sample b in"]:
        """Return Q_Bᵀ∇W of ∇W = Σ_t left_t right_tᵀ: twice the operations, and as exact as these are."""
        return (left @ self.left.to(left.dtype)).mT @ right

    def projected_right(
        self, left: Float[Tensor, "sample token out"], right: Float[Tensor, "sample token in"]
    ) -> Float[Tensor, "sample a out"]:
        """Return (∇W Q_A)ᵀ of ∇W = Σ_t left_t right_tᵀ."""
        return (right @ self.right.to(right.dtype)).mT @ left

    def coordinates(
        self, along: Float[Tensor, "sample b in"], beside: Float[Tensor, "sample a out"]
    ) -> Float[Tensor, "sample number"]:
        """Return the coordinates of X from Q_BᵀX and (X Q_A)ᵀ: the one, and what the other adds to it."""
        basis = self.left.to(beside.dtype)  # the long side last: rows stay where they are in every product
        beside = beside - (beside @ basis) @ basis.mT
        return torch.cat([along.flatten(1), beside.flatten(1)], 1)

    def to_matrix(self, coordinates: Float[Tensor, " number"], dtype: torch.dtype = torch.float64) -> LowRankMatrix:
        """Return the change that has these coordinates: Q_B L + R Q_Aᵀ, of rank b + a at most.

        Args:
            coordinates: As :meth:`of_change` returns them; what they have of R inside Q_B is dropped.
            dtype: Of its factors.
        """
        (out, b), (in_, a) = self.left.shape, self.right.shape
        along, beside = coordinates[: b * in_].view(b, in_), coordinates[b * in_ :].view(a, out)
        beside = beside - (beside @ self.left) @ self.left.mT
        left = torch.cat([self.left, beside.mT], 1).to(dtype)
        return LowRankMatrix(left, torch.cat([along, self.right.mT]).to(dtype))

    def factor_gradients(
        self, coordinates: Float[Tensor, "sample number"]
    ) -> tuple[Float[Tensor, "sample r out"], Float[Tensor, "sample q in"]]:
        """Return ∇_Bᵀ and ∇_A from the coordinates of ∇W: of all trained factors, side by side."""
        (out, b), (in_, a) = self.left.shape, self.right.shape
        samples, cut = len(coordinates), b * in_
        along, beside = coordinates[:, :cut].view(samples, b, in_), coordinates[:, cut:].view(samples, a, out)
        left, right = self.left.to(coordinates), self.right.to(coordinates)
        reached = beside + (along @ right).mT @ left.mT  # (∇W Q_A)ᵀ
        to_left, to_right = (torch.linalg.pinv(one).to(coordinates) for one in (self.from_left, self.from_right))
        return to_left.mT @ reached, to_right @ along

    def of_factor_changes(
        self, left_change: Float[Tensor, "sample r out"], right_change: Float[Tensor, "sample q in"]
    ) -> Float[Tensor, "sample number"]:
        """Return the coordinates of s(dB A + B dA), from dBᵀ and dA of all trained factors."""
        left, right = self.left.to(left_change), self.right.to(left_change)
        to_left, to_right = (torch.linalg.pinv(one).to(left_change) for one in (self.from_left, self.from_right))
        # s A of the adapters whose B is trained is to_leftᵀ Q_Aᵀ, and s B of those whose A is, Q_B to_rightᵀ.
        along = (left_change @ left).mT @ (to_left.mT @ right.mT) + to_right.mT @ right_change
        beside = to_left @ left_change + (right_change @ right).mT @ (to_right @ left.mT)
        return self.coordinates(along, beside)

    @property
    def numbers(self) -> int:
        """How many coordinates a change has: more than the dimension, since R lies beside Q_B."""
        (out, b), (in_, a) = self.left.shape, self.right.shape
        return b * in_ + a * out

    def of_change(self, change: Matrix) -> Float[Tensor, " number"]:
        """Return the coordinates of a change of the matrix, in float64."""
        if isinstance(change, LowRankMatrix):
            left, right = (factor.detach().to(self.left.device) for factor in (change.left, change.right))
            along, beside = (self.left.mT @ left) @ right, (left @ (right @ self.right)).mT
        else:
            dense = change.detach().to(self.left.device, torch.float64)
            along, beside = self.left.mT @ dense, (dense @ self.right).mT
        return self.coordinates(along[None], beside[None])[0]


def tangent_space(products: Sequence[AdapterProduct]) -> TangentSpace:
    """Return the tangent space of one matrix's adapters together, at their present values.

    Several adapters on one matrix are one with all their columns; AdaLoRA's diagonal is folded into the factor that it
    is not the gradient of. A factor that is not trained opens no directions. Where columns depend on each other, the
    space is that of what they span.
    """
    with torch.no_grad():
        (out, in_), device = products[0].matrix(whole).shape, products[0].left.device
        of_left, of_right = (torch.zeros(n, 0, dtype=torch.float64, device=device) for n in (in_, out))
        for product in products:
            matrix = product.matrix(whole)
            scales = matrix.scales().to(device)
            if product.left.requires_grad:  # ∇_B = ∇W (diag(s) A)ᵀ
                of_left = torch.cat([of_left, (matrix.right.to(torch.float64) * scales[:, None]).mT], 1)
            if product.right.requires_grad:  # ∇_A = (B diag(s))ᵀ ∇W
                of_right = torch.cat([of_right, matrix.left_factor.to(torch.float64) * scales], 1)
        left, from_right, left_condition = _basis(of_right)
        right, from_left, right_condition = _basis(of_left)
        return TangentSpace(left, right, from_left, from_right.mT, left_condition, right_condition)


def _basis(tall: Float[Tensor, "side r"]) -> tuple[Float[Tensor, "side k"], Float[Tensor, "r k"], float]:
    """Return an orthonormal basis Q of what the columns of X span, M with Q = X M, and X's condition number."""
    vectors, values, turned = torch.linalg.svd(tall, full_matrices=False)
    kept = values > max(tall.shape) * _EPSILON * (values[:1] if len(values) else values)
    # Rank by the factor's own storage would depend on its format; float64's keeps whatever is not exactly dependent.
    values = values[kept]
    condition = float(values[0] / values[-1]) if len(values) else 1.0
    return vectors[:, kept], turned[kept].mT / values, condition


def change_energy(change: Matrix) -> float:
    """Return ‖δ‖² of a change, a product of factors never multiplied out.

    >>> change_energy(LowRankMatrix(torch.ones(2, 1), torch.ones(1, 3), 2.0))
    24.0
    """
    if isinstance(change, LowRankMatrix):
        left, right = change.left.detach(), change.right.detach()
        return float(((left.mT @ left) * (right @ right.mT)).sum())
    return float(change.detach().to(torch.float64).square().sum())
