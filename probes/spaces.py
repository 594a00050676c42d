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
from probes.watched import Matrix, Product, whole

#: Singular values of a factor below this share of its largest one, times its longer side, span no direction.
_EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class TangentSpace:
    """What a step of the factors can reach at first order: {X A + B Y}.

    Args:
        left: Q_B ``(out, b)``; b = 0 while B is zero, as LoRA begins: then only X A can be reached.
        right: Q_A ``(in, a)``.
        from_left: From ∇_B to ∇W Q_A: ``(r, a)``.
        from_right: From ∇_A to Q_Bᵀ∇W: ``(b, r)``.
    """

    left: Float[Tensor, "out b"]
    right: Float[Tensor, "in a"]
    from_left: Float[Tensor, "r a"]
    from_right: Float[Tensor, "b r"]

    @property
    def dimension(self) -> int:
        """b·in + out·a − a·b: r(out + in − r) where both factors have full rank."""
        (out, b), (in_, a) = self.left.shape, self.right.shape
        return b * in_ + out * a - a * b

    def of_gradients(
        self, left: Float[Tensor, "sample out r"], right: Float[Tensor, "sample r in"]
    ) -> Float[Tensor, "sample number"]:
        """Coordinates of ∇W's projection, from gradients of the factors; in their dtype."""
        dtype = left.dtype
        along = self.from_right.to(dtype) @ right
        beside = left @ self.from_left.to(dtype)
        basis = self.left.to(dtype)
        beside = beside - basis @ (basis.mT @ beside)
        return torch.cat([along.flatten(1), beside.flatten(1)], 1)

    def of_change(self, change: Matrix) -> Float[Tensor, " number"]:
        """Coordinates of a change of the matrix, in float64."""
        if isinstance(change, LowRankMatrix):
            left, right = (each.detach().to(self.left.device) for each in (change.left, change.right))
            along, beside = (self.left.mT @ left) @ right, left @ (right @ self.right)
        else:
            dense = change.detach().to(self.left.device, torch.float64)
            along, beside = self.left.mT @ dense, dense @ self.right
        beside = beside - self.left @ (self.left.mT @ beside)
        return torch.cat([along.flatten(), beside.flatten()])


def tangent_space(products: Sequence[Product]) -> TangentSpace:
    """The tangent space of one matrix's adapters together, at their present values.

    Several adapters on one matrix are one with all their columns; AdaLoRA's diagonal is folded into the factor that it
    is not the gradient of. Where columns depend on each other, the space is that of what they span.
    """
    with torch.no_grad():
        lefts, rights, of_left, of_right = [], [], [], []
        for product in products:
            matrix = product.matrix(whole)
            left, right = matrix.left_factor.to(torch.float64), matrix.right.detach()
            scales = matrix.scales().to(right.device)
            lefts.append(left)
            rights.append(right)
            of_left.append(right * scales[:, None])  # ∇_B = ∇W (diag(s) A)ᵀ
            of_right.append(left * scales)  # ∇_A = (B diag(s))ᵀ ∇W
        left, from_right = _basis(torch.cat(of_right, 1))
        right, from_left = _basis(torch.cat(of_left).mT)
        return TangentSpace(left, right, from_left, from_right.mT)


def _basis(tall: Float[Tensor, "side r"]) -> tuple[Float[Tensor, "side k"], Float[Tensor, "r k"]]:
    """Orthonormal basis Q of what the columns of X span, and M with Q = X M."""
    vectors, values, turned = torch.linalg.svd(tall, full_matrices=False)
    kept = values > max(tall.shape) * _EPSILON * (values[:1] if len(values) else values)
    # Rank by the factor's own storage would depend on its format; float64's keeps whatever is not exactly dependent.
    return vectors[:, kept], turned[kept].mT / values[kept]


def change_energy(change: Matrix) -> float:
    """‖δ‖² of a change, a product of factors never multiplied out.

    >>> change_energy(LowRankMatrix(torch.ones(2, 1), torch.ones(1, 3), 2.0))
    24.0
    """
    if isinstance(change, LowRankMatrix):
        left, right = change.left.detach(), change.right.detach()
        return float(((left.mT @ left) * (right @ right.mT)).sum())
    return float(change.detach().to(torch.float64).square().sum())
