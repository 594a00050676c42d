r"""Spectra of dense matrices: the Gram matrix of the shorter side in float64, and its eigenvalues.

For m ≤ n, σ² are the eigenvalues of XXᵀ: m²n/2 multiplications by BLAS ``syrk``, which forms one triangle, and an
eigendecomposition of m×m without vectors, against the many passes of an SVD over the whole of X. What it costs are
small singular values: an eigenvalue is off by about ε·m·σ₁², so σ by that over 2σ. Where this spoils a measure, an SVD
is taken instead, and the spectrum says so.

The difference of two stored matrices, and float64, are formed block by block: in memory are the Gram matrix and some
rows. On request only the leading values are found, from the same Gram matrix (:mod:`dynamics.spectra.leading`).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.spectra.leading import Remainder, leading_spectrum

Method = Literal["gram", "svd", "failed", "lanczos"]

#: Largest share of Σσ by which the Gram may be off: entropy_amplitude, the most sensitive measure, then keeps 1e-6.
AMPLITUDE_ERROR = 1e-6
#: Eigenvalues of a Gram are off by about this times √m·ε·σ₁² (measured on Gaussian and on decaying spectra: < 2).
_ROUNDING = 4.0
#: The smallest σ/σ₁ that ``numerical_rank`` asks about must lie this far above what the Gram resolves.
_MARGIN = 10.0
#: Entries between these square and add up without overflow, and without loss below the smallest number.
_SQUARES_SAFELY = (1e-100, 1e100)
#: Bytes of a matrix that are in float64 at a time.
_BLOCK_BYTES = 2**25
#: Rows and columns of a Gram that are added to at a time.
_TILE = 2048
#: An SVD needs the whole matrix in float64, and a copy: one at a time.
_ONE_SVD = threading.Lock()


@dataclass(frozen=True)
class DenseSpectrum:
    """Singular values of a dense matrix, and how they were found.

    Args:
        values: ``(min(out, in),)``, or as many leading ones as were asked for, descending, on the host; NaN where the
            matrix is not finite or nothing converged.
        method: ``"gram"``, ``"svd"``, ``"failed"``, or ``"lanczos"`` for leading ones alone.
        remainder: What is known of the whole spectrum where only leading values are.
    """

    values: Float[Tensor, " n"]
    method: Method
    remainder: Remainder | None = None


def dense_spectrum(
    matrix: Float[Tensor, "out in"],
    *,
    minus: Float[Tensor, "out in"] | None = None,
    top: int | None = None,
    resolution: float = 0.0,
    method: Literal["auto", "gram", "svd"] = "auto",
) -> DenseSpectrum:
    r"""Return the singular values of a dense matrix, or of a difference of two, in float64.

    Args:
        matrix: Real; computed on its own device.
        minus: Is subtracted, in float64.
        top: How many leading ones are wanted; by default all. Where all cost no more, or the leading ones do not
            converge, it is all.
        resolution: σ/σ₁ down to which singular values must be told from zero; what the matrix's storage format
            resolves, max(out, in)·ε. 0: wherever the Gram's own error lies.
        method: ``"auto"`` takes the Gram, and an SVD where the Gram would be off by more than 1e-6 in Σσ, or does not
            resolve ``resolution``.

    >>> dense_spectrum(torch.diag(torch.tensor([3.0, 4.0]))).values
    tensor([4., 3.], dtype=torch.float64)
    >>> dense_spectrum(torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))).values.tolist()
    [1.0, 1e-09]
    """
    count = min(matrix.shape)
    missing = DenseSpectrum(torch.full((count,), torch.nan, dtype=torch.float64), "failed")
    if method != "svd":
        size, product = _size_and_gram(matrix, minus)
        if size == 0.0:
            return DenseSpectrum(torch.zeros(count, dtype=torch.float64), "gram")
        if size != size or size == float("inf"):
            return missing
        # To the order of one, where squares would be lost below 1e-154; else in the same pass.
        scale = 1.0 if _SQUARES_SAFELY[0] < size < _SQUARES_SAFELY[1] else size
        if scale != 1.0:
            _, product = _size_and_gram(matrix, minus, scale)
        leading = None if top is None else leading_spectrum(product, top)
        if leading is not None:
            values, remainder = leading
            return DenseSpectrum(values * scale, "lanczos", remainder.scaled(scale))
        values = _from_gram(product)
        del product
        if values is not None and (method == "gram" or gram_suffices(values, resolution)):
            return DenseSpectrum(values * scale, "gram")
    with _ONE_SVD:
        dense = torch.cat([rows.clone() for rows in _blocks(matrix, minus, 0)])
        if not bool(dense.isfinite().all()):
            return missing
        try:
            return DenseSpectrum(torch.linalg.svdvals(dense).cpu(), "svd")
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return missing


def _blocks(matrix: Tensor, minus: Tensor | None, axis: int) -> Iterator[Float[Tensor, "rows columns"]]:
    """Yield some rows (``axis`` 0) or columns (1) of a matrix, or of a difference, after others, in float64."""
    matrix, minus = matrix.detach(), None if minus is None else minus.detach()
    length = max(1, _BLOCK_BYTES // (8 * max(1, matrix.shape[1 - axis])))
    for first in range(0, matrix.shape[axis], length):
        part = (slice(None),) * axis + (slice(first, first + length),)
        block = matrix[part].to(torch.float64, copy=minus is not None)
        yield block if minus is None else block.sub_(minus[part].to(matrix.device))


def _size_and_gram(
    matrix: Float[Tensor, "out in"], minus: Float[Tensor, "out in"] | None, scale: float = 1.0
) -> tuple[float, Float[Tensor, "m m"]]:
    """Return the largest absolute entry, NaN if one is not a number, and the Gram of the shorter side over scale²."""
    axis = int(matrix.shape[0] <= matrix.shape[1])
    size, product = 0.0, None
    for block in _blocks(matrix, minus, axis):
        if block.numel():
            largest = max(float(block.max()), -float(block.min()))
            size = largest if largest != largest else max(size, largest)
        rows = block if axis else block.mT
        product = _plus_products(product, rows if scale == 1.0 else rows / scale)
        if size != size:
            break
    return size, matrix.new_zeros(0, 0, dtype=torch.float64) if product is None else product


def _plus_products(product: Float[Tensor, "m m"] | None, rows: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """Add XXᵀ to a Gram, in place and tile by tile: a sum of two whole ones would take twice the memory."""
    if product is None and len(rows) <= _TILE:
        return row_products(rows)
    product = rows.new_zeros(len(rows), len(rows)) if product is None else product
    tiles = [slice(first, first + _TILE) for first in range(0, len(rows), _TILE)]
    for index, tile in enumerate(tiles):
        for other in tiles[:index]:
            product[tile, other] += rows[tile] @ rows[other].mT
            product[other, tile] = product[tile, other].mT
        product[tile, tile] += row_products(rows[tile])
    return product


def gram_matrix(dense: Float[Tensor, "out in"]) -> Float[Tensor, "m m"]:
    """Return XXᵀ of the shorter side, on the matrix's device; symmetric to the last bit.

    >>> gram_matrix(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64))
    tensor([[35., 44.],
            [44., 56.]], dtype=torch.float64)
    """
    return _size_and_gram(dense, None)[1]


def row_products(rows: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """Return XXᵀ, symmetric to the last bit, for half of the work of a product.

    >>> row_products(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    if rows.device.type != "cpu":
        product = rows @ rows.mT
        return (product + product.mT) / 2
    # NumPy hands a product with its own transpose to syrk, without the GIL; SciPy's syrk would hold it.
    array = rows.contiguous().numpy()
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite stays so
        return torch.from_numpy(array @ array.T)


def gram_suffices(values: Float[Tensor, " n"], resolution: float = 0.0) -> bool:
    """Return whether singular values from a Gram are exact enough for every measure.

    Args:
        values: Descending.
        resolution: As in :func:`dense_spectrum`.

    >>> gram_suffices(torch.tensor([1.0, 0.5], dtype=torch.float64))
    True
    >>> gram_suffices(torch.tensor([1.0, 1e-9], dtype=torch.float64))
    False
    """
    error = _ROUNDING * len(values) ** 0.5 * torch.finfo(torch.float64).eps * float(values[0]) ** 2
    lost = error**0.5  # singular values below this are nothing but error
    resolved = values > _MARGIN * lost
    # Errors of eigenvalues have either sign, so those of resolved σ add up like noise; lost σ are too large.
    noise = float((error / (2 * values[resolved])).square().sum()) ** 0.5
    off = noise + lost * float((~resolved).sum())
    suffices = bool(resolved.all()) or resolution * float(values[0]) > _MARGIN * lost
    return suffices and off <= AMPLITUDE_ERROR * float(values.sum())


def _from_gram(product: Float[Tensor, "m m"]) -> Float[Tensor, " m"] | None:
    try:
        return torch.linalg.eigvalsh(product).cpu().flip(-1).clamp_min(0).sqrt()
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return None
