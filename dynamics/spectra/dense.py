r"""Exact spectra of dense matrices: the Gram matrix of the shorter side in float64, and its eigenvalues.

For m ≤ n, σ² are the eigenvalues of XXᵀ: m²n/2 multiplications by BLAS ``syrk``, which forms one triangle, and an
eigendecomposition of m×m without vectors, against the many passes of an SVD over the whole of X. What it costs are
small singular values: an eigenvalue is off by about ε·m·σ₁², so σ by that over 2σ. Where this spoils a measure, an SVD
is taken instead, and the spectrum says so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.linalg.blas import dsyrk  # pyright: ignore[reportAttributeAccessIssue]
from torch import Tensor

Method = Literal["gram", "svd", "failed"]

#: Largest share of Σσ by which the Gram may be off: entropy_amplitude, the most sensitive measure, then keeps 1e-6.
AMPLITUDE_ERROR = 1e-6
#: Eigenvalues of a Gram are off by about this times √m·ε·σ₁² (measured on Gaussian and on decaying spectra: < 2).
_ROUNDING = 4.0
#: The smallest σ/σ₁ that ``numerical_rank`` asks about must lie this far above what the Gram resolves.
_MARGIN = 10.0
#: Entries between these square and add up without overflow, and without loss below the smallest number.
_SQUARES_SAFELY = (1e-100, 1e100)


@dataclass(frozen=True)
class DenseSpectrum:
    """Singular values of a dense matrix, and how they were found.

    Args:
        values: ``(min(out, in),)``, descending, on the host; NaN where the matrix is not finite or nothing converged.
        method: ``"gram"``, ``"svd"``, or ``"failed"``.
    """

    values: Float[Tensor, " n"]
    method: Method


def dense_spectrum(
    matrix: Float[Tensor, "out in"], *, resolution: float = 0.0, method: Literal["auto", "gram", "svd"] = "auto"
) -> DenseSpectrum:
    r"""All singular values of a dense matrix, in float64.

    Args:
        matrix: Real; computed on its own device.
        resolution: σ/σ₁ down to which singular values must be told from zero; what the matrix's storage format
            resolves, max(out, in)·ε. 0: wherever the Gram's own error lies.
        method: ``"auto"`` takes the Gram, and an SVD where the Gram would be off by more than 1e-6 in Σσ, or does not
            resolve ``resolution``.

    >>> dense_spectrum(torch.diag(torch.tensor([3.0, 4.0])))
    DenseSpectrum(values=tensor([4., 3.], dtype=torch.float64), method='gram')
    >>> dense_spectrum(torch.diag(torch.tensor([1.0, 1e-9], dtype=torch.float64))).values.tolist()
    [1.0, 1e-09]
    """
    dense = matrix.detach().to(torch.float64)
    count = min(dense.shape)
    if not bool(dense.isfinite().all()):
        return DenseSpectrum(torch.full((count,), torch.nan, dtype=torch.float64), "failed")
    if method != "svd":
        size = max(float(dense.max()), -float(dense.min())) if dense.numel() else 0.0
        if size == 0.0:
            return DenseSpectrum(torch.zeros(count, dtype=torch.float64), "gram")
        # To the order of one, where squares would be lost below 1e-154; else without another copy of the matrix.
        scale = 1.0 if _SQUARES_SAFELY[0] < size < _SQUARES_SAFELY[1] else size
        values = _from_gram(gram(dense if scale == 1.0 else dense / scale))
        if values is not None and (method == "gram" or gram_suffices(values, resolution)):
            return DenseSpectrum(values * scale, "gram")
    try:
        return DenseSpectrum(torch.linalg.svdvals(dense).cpu(), "svd")
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return DenseSpectrum(torch.full((count,), torch.nan, dtype=torch.float64), "failed")


def gram(dense: Float[Tensor, "out in"]) -> Float[Tensor, "m m"]:
    """XXᵀ of the shorter side, on the matrix's device; symmetric to the last bit.

    >>> gram(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64))
    tensor([[35., 44.],
            [44., 56.]], dtype=torch.float64)
    """
    return inner_products(dense if dense.shape[0] <= dense.shape[1] else dense.mT)


def inner_products(rows: Float[Tensor, "m n"]) -> Float[Tensor, "m m"]:
    """XXᵀ, half of the work of a product: it is symmetric, to the last bit.

    >>> inner_products(torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64)
    """
    if rows.device.type != "cpu":
        product = rows @ rows.mT
        return (product + product.mT) / 2
    # BLAS is column-major: the transpose of a row-major array is its own view, so nothing is copied.
    array = rows.contiguous().numpy()
    upper = dsyrk(1.0, array.T, trans=1)
    return torch.from_numpy(np.triu(upper) + np.triu(upper, 1).T)


def gram_suffices(values: Float[Tensor, " n"], resolution: float = 0.0) -> bool:
    """Whether singular values from a Gram are exact enough for every measure.

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
    known = values > _MARGIN * lost
    # Errors of eigenvalues have either sign, so those of known σ add up like noise; what is lost is always too large.
    noise = float((error / (2 * values[known])).square().sum()) ** 0.5
    off = noise + lost * float((~known).sum())
    resolved = bool(known.all()) or resolution * float(values[0]) > _MARGIN * lost
    return resolved and off <= AMPLITUDE_ERROR * float(values.sum())


def _from_gram(product: Float[Tensor, "m m"]) -> Float[Tensor, " m"] | None:
    try:
        return torch.linalg.eigvalsh(product).cpu().flip(-1).clamp_min(0).sqrt()
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return None
