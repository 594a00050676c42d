r"""Factorisations other than B A, kept as products of thin factors without forming the matrix.

* **Tucker** (LoCon with a middle factor): \(W_{i,(jwh)} = \sum_m U_{im} \sum_n T_{mnwh} V_{nj}\) has rank r: the middle
  factor is multiplied into the right one.
* **LoHa** (Hyeon-Woo et al. 2022): \((B_1 A_1) \circ (B_2 A_2)\) is the product of row-wise and column-wise Khatri–Rao
  products, of rank at most \(r_1 r_2\).
* **LoKr** (LyCORIS): \(C \otimes D = (L_C \otimes L_D)(R_C \otimes R_D)\) where \(C = L_C R_C\), \(D = L_D R_D\); a
  factor that is stored whole is a product with an identity on its shorter side. Of rank at most that of a full matrix.

Kernels are flattened to (out, in·kernel) as everywhere. All in float64: products of two stored numbers of float32 or
coarser are exact there.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def tucker(
    up: Float[Tensor, "out r *one"], middle: Float[Tensor, "r s *kernel"], down: Float[Tensor, "s in *one"]
) -> Factors:
    """Factors of a Tucker decomposition: ``(out, r)`` and ``(r, in·kernel)``.

    >>> left, right = tucker(torch.ones(5, 2, 1, 1), torch.ones(2, 3, 3, 3), torch.ones(3, 4, 1, 1))
    >>> left.shape, right.shape
    (torch.Size([5, 2]), torch.Size([2, 36]))
    """
    right = torch.einsum("mn...,nj->mj...", middle.double(), down.double().flatten(1))
    return up.double().flatten(1), right.flatten(1)


def hadamard(left: Factors, right: Factors) -> Factors:
    """Factors of the entrywise product of two products: ``(out, r₁r₂)`` and ``(r₁r₂, in)``.

    >>> ones = torch.ones(3, 2), torch.ones(2, 4)
    >>> columns, rows = hadamard(ones, ones)
    >>> torch.equal(columns @ rows, torch.full((3, 4), 4.0, dtype=torch.float64))
    True
    """
    (b1, a1), (b2, a2) = ([each.double() for each in factors] for factors in (left, right))
    columns = (b1[:, :, None] * b2[:, None, :]).flatten(1)
    rows = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)
    return columns, rows


def kronecker(left: Factors, right: Factors) -> Factors:
    """Factors of the Kronecker product of two products.

    >>> c, d = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
    >>> columns, rows = kronecker(as_product(c), as_product(d))
    >>> columns.shape, torch.equal(columns @ rows, torch.kron(c, d).double())
    (torch.Size([8, 4]), True)
    """
    columns, rows = ([each.double().contiguous() for each in pair] for pair in zip(left, right, strict=True))
    return torch.kron(*columns), torch.kron(*rows)  # torch.kron refuses some strides


def as_product(matrix: Float[Tensor, "out in"]) -> Factors:
    """A whole matrix as a product with the identity on its shorter side.

    >>> [tuple(factor.shape) for factor in as_product(torch.ones(5, 3))]
    [(5, 3), (3, 3)]
    """
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype)
    return (matrix, identity) if matrix.shape[0] >= matrix.shape[1] else (identity, matrix)
