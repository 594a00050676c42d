r"""Leading eigenvalues and vectors of a symmetric matrix, by block Lanczos iteration with residuals that are checked.

The Krylov space of a random block is orthogonalised in full and restarted with its leading Ritz vectors (thick restart;
Wu & Simon 2000). A block of several columns is one product of matrices instead of many by a vector, and finds
eigenvalues that coincide. For a unit vector y with the Ritz value θ some eigenvalue lies within ‖Gy − θy‖ of θ, so the
residual says what is right, whatever the spectrum; what does not converge is not returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

#: Residual of a pair, relative to its Ritz value: σ, the square root of the eigenvalue, is then right to half of that.
RESIDUAL = 1e-7
#: Columns that are multiplied at a time.
_BLOCK = 16
#: Columns that may be multiplied in all: so many, and as a share of the rows. Beyond, a decomposition costs no more.
_PRODUCTS = (1024, 0.5)
#: Rounding of a product, in ε·θ₁; no residual is smaller.
_ROUNDING = 16.0


@dataclass(frozen=True)
class Eigenpairs:
    """Leading eigenvalues and vectors.

    Args:
        values: ``(k,)``, descending; the i-th is at most the i-th eigenvalue.
        vectors: ``(n, k)``, orthonormal columns.
        residual: ‖G Y − Y Θ‖_F.
    """

    values: Float[Tensor, " k"]
    vectors: Float[Tensor, "n k"]
    residual: float


def leading_eigenpairs(
    product: Float[Tensor, "n n"], k: int, *, tolerance: float = RESIDUAL, seed: int = 0
) -> Eigenpairs | None:
    """Return the k largest eigenvalues and their vectors; ``None`` where they do not converge or cost as much as all.

    Args:
        product: Symmetric, positive semi-definite, float64.
        k: How many.
        tolerance: Largest ‖Gy − θy‖ of a pair, relative to θ; of θ near zero relative to rounding of the largest.
        seed: Of the first block; the same seed gives the same numbers.

    >>> found = leading_eigenpairs(torch.diag(torch.arange(200.0, dtype=torch.float64) ** 2), 2)
    >>> [round(value, 6) for value in found.values.tolist()]
    [39601.0, 39204.0]
    """
    count = len(product)
    if 8 * k > count or count < 4 * _BLOCK:
        return None
    longest, allowed = min(3 * k + 8 * _BLOCK, count - _BLOCK), max(_PRODUCTS[0], _PRODUCTS[1] * count)
    generator = torch.Generator(product.device).manual_seed(seed)
    basis = product.new_empty(count, longest)
    images = torch.empty_like(basis)
    width = used = 0
    block = _orthonormal(_random(product, _BLOCK, generator), basis[:, :0])
    confirmed, nothing = -1.0, 1e-13 * float(torch.linalg.vector_norm(product))
    while True:
        new = slice(width, width + block.shape[1])
        basis[:, new] = block
        torch.matmul(product, block, out=(image := torch.empty_like(block)))
        images[:, new] = image
        width, used = new.stop, used + block.shape[1]
        fits = width + _BLOCK <= basis.shape[1]
        if width >= k and (not fits or width % (4 * _BLOCK) == 0):
            ritz, turn = torch.linalg.eigh(basis[:, :width].mT @ images[:, :width])
            ritz, turn = ritz.flip(-1), turn.flip(-1)
            vectors = basis[:, :width] @ turn[:, :k]
            residuals = torch.linalg.vector_norm(images[:, :width] @ turn[:, :k] - vectors * ritz[:k], dim=0)
            floor = _ROUNDING * count**0.5 * torch.finfo(product.dtype).eps * float(ritz[0])
            if bool((residuals <= (tolerance * ritz[:k]).clamp_min(floor)).all()):
                # A block finds no more copies of an eigenvalue than it has columns: another one finds those left.
                if float(ritz[k - 1]) <= confirmed:
                    return Eigenpairs(ritz[:k], vectors, float(torch.linalg.vector_norm(residuals)))
                confirmed = float(ritz[k - 1]) * (1 + tolerance) + floor
                image = _random(product, _BLOCK, generator)
            if used > allowed:
                return None
        # The residuals of all Ritz pairs lie in the span of the next block.
        image = image - basis[:, :width] @ (basis[:, :width].mT @ image)
        lost = torch.linalg.vector_norm(image, dim=0) <= nothing
        if bool(lost.any()):  # no new direction, nothing but rounding
            image = torch.where(lost, _random(product, _BLOCK, generator), image)
        block = _orthonormal(image, basis[:, :width])
        if not fits:
            kept = min(k + 2 * _BLOCK, width)
            basis[:, :kept] = basis[:, :width] @ turn[:, :kept]
            images[:, :kept] = images[:, :width] @ turn[:, :kept]
            width = kept


def _random(product: Tensor, columns: int, generator: torch.Generator) -> Float[Tensor, "n columns"]:
    return torch.randn(len(product), columns, generator=generator, dtype=product.dtype, device=product.device)


def _orthonormal(block: Float[Tensor, "n b"], basis: Float[Tensor, "n d"]) -> Float[Tensor, "n b"]:
    """Return an orthonormal basis of what a block adds to one."""
    for _ in range(2):
        block = torch.linalg.qr(block - basis @ (basis.mT @ block)).Q
    return block
