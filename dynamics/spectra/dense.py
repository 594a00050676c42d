r"""Exact spectra of dense matrices: the Gram matrix of the shorter side in float64, and its eigenvalues.

For m ≤ n, σ² are the eigenvalues of XXᵀ: m²n/2 multiplications by BLAS ``syrk``, which forms one triangle, and an
eigendecomposition of m×m without vectors, against the many passes of an SVD over the whole of X. What it costs are
small singular values: an eigenvalue is off by about ε·m·σ₁², so σ by that over 2σ. Where this spoils a measure, an SVD
is taken instead, and the spectrum says so.

If the shorter side is too long for that, :func:`moments` are exact without a decomposition, and :func:`entropy_bracket`
gives leading singular values by randomised subspace iteration (Halko, Martinsson & Tropp 2011) and bounds the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from scipy.sparse.linalg import eigsh
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
    r"""Return all singular values of a dense matrix, in float64.

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
        values = _from_gram(gram_matrix(dense if scale == 1.0 else dense / scale))
        if values is not None and (method == "gram" or gram_suffices(values, resolution)):
            return DenseSpectrum(values * scale, "gram")
    try:
        return DenseSpectrum(torch.linalg.svdvals(dense).cpu(), "svd")
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return DenseSpectrum(torch.full((count,), torch.nan, dtype=torch.float64), "failed")


def gram_matrix(dense: Float[Tensor, "out in"]) -> Float[Tensor, "m m"]:
    """Return XXᵀ of the shorter side, on the matrix's device; symmetric to the last bit.

    >>> gram_matrix(torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64))
    tensor([[35., 44.],
            [44., 56.]], dtype=torch.float64)
    """
    return row_products(dense if dense.shape[0] <= dense.shape[1] else dense.mT)


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


#: Probes of the residual: its norm is underestimated with a probability of 10 to the minus this.
_PROBES = 10
#: Power steps on each probe; the factor of the bound is the (2·steps + 1)-th root of 10√(2/π).
_STEPS = 3


@dataclass(frozen=True)
class Moments:
    """Numbers of a spectrum that need no decomposition.

    Args:
        energy: Σσ², the squared Frobenius norm.
        participation_ratio: (Σσ²)²/Σσ⁴.
        spectral_norm: σ₁, to machine precision.
        stable_rank: Σσ²/σ₁².
    """

    energy: float
    participation_ratio: float
    spectral_norm: float
    stable_rank: float


@dataclass(frozen=True)
class Bracket:
    """Leading singular values of a spectrum, and bounds of its entropy.

    Args:
        values: ``(k,)``, descending; each at most the singular value that it stands for.
        energy: Σσ² of the whole matrix.
        entropy_low, entropy_high: −Σp ln p with p ∝ σ² lies between these, in nats.
    """

    values: Float[Tensor, " k"]
    energy: float
    entropy_low: float
    entropy_high: float


def moments(matrix: Float[Tensor, "out in"]) -> Moments:
    r"""Return the exact participation ratio and stable rank for the price of one Gram matrix G.

    Σσ² = tr G and Σσ⁴ = ‖G‖_F²; σ₁² is G's largest eigenvalue, by Lanczos iteration (ARPACK). NaN where there is no
    spectrum: a matrix that is zero or not finite.

    >>> round(moments(torch.diag(torch.tensor([2.0, 1.0]))).participation_ratio, 6)  # 25 / 17
    1.470588
    """
    dense = matrix.detach().to(torch.float64)
    energy = float(dense.square().sum())
    if energy == 0 or not math.isfinite(energy):
        return Moments(energy, math.nan, 0.0 if energy == 0 else math.nan, math.nan)
    product = gram_matrix(dense).cpu() / energy
    if len(product) < 3:  # ARPACK wants more
        largest = float(torch.linalg.eigvalsh(product)[-1])
    else:
        start = product.sum(1).numpy()  # ARPACK's own start is random
        largest = float(eigsh(product.numpy(), k=1, v0=start, return_eigenvectors=False)[0])
    return Moments(energy, 1 / float(product.square().sum()), math.sqrt(largest * energy), 1 / largest)


def entropy_bracket(
    matrix: Float[Tensor, "out in"], directions: int = 64, *, iterations: int = 4, seed: int = 0
) -> Bracket:
    r"""Return leading singular values, and bounds of the spectral entropy that hold whatever the rest looks like.

    With P the projection on the directions found, XᵀX = XᵀPX + Xᵀ(1−P)X without a cross term. The spectrum of X
    majorises the two spectra side by side, so its entropy is at most theirs, which is largest if the rest, of energy R,
    is spread evenly:

    .. math:: H \le -\sum_i p_i \ln p_i + R \ln\frac{n-k}{R}

    and by Ky Fan's inequality the sum of its j largest eigenvalues is at most Σ_{i≤j} σ̃_i² + min(j r², R), with r the
    spectral norm of the rest, so its entropy is at least that of the spectrum with just these sums. r is bounded by
    power iteration from random vectors (Halko, Martinsson & Tropp 2011, Lemma 4.1), wrong with a probability of 1e-10.

    Args:
        matrix: ``(out, in)``.
        directions: k, how many to look for.
        iterations: Of the subspace.
        seed: Of the random vectors; the same seed gives the same numbers.

    Raises:
        ValueError: If no direction is asked for.

    >>> bracket = entropy_bracket(torch.diag(torch.tensor([3.0, 2.0, 1e-9])), directions=2)
    >>> round(bracket.entropy_low, 6), round(bracket.entropy_high, 6)  # H(9/13, 4/13)
    (0.617242, 0.617242)
    """
    if directions < 1:
        raise ValueError(f"Expected at least 1 direction, got {directions}.")
    dense = matrix.detach().to(torch.float64)
    wide = dense if dense.shape[0] <= dense.shape[1] else dense.mT
    count, k = wide.shape[0], min(directions, wide.shape[0])
    energy = float(wide.square().sum())
    if energy == 0 or not math.isfinite(energy):
        return Bracket(torch.full((k,), 0.0 if energy == 0 else math.nan).double(), energy, math.nan, math.nan)
    generator = torch.Generator(wide.device).manual_seed(seed)
    basis = torch.linalg.qr(wide @ _normal(wide.shape[1], k, generator, wide)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.mT @ basis).Q).Q
    inside = basis.mT @ wide
    values = torch.linalg.svdvals(inside)
    shares = values.square() / energy
    rest = max(0.0, 1.0 - float(shares.sum()))
    low = _most_concentrated(shares.cpu(), rest, _residual_norm(wide, basis, generator) ** 2 / energy, count)
    high = _entropy(shares.cpu()) + (rest * math.log((count - k) / rest) if rest > 0 and count > k else 0.0)
    return Bracket(values.cpu(), energy, low, max(low, high))


def _normal(rows: int, columns: int, generator: torch.Generator, like: Tensor) -> Float[Tensor, "rows columns"]:
    return torch.randn(rows, columns, generator=generator, dtype=like.dtype, device=like.device)


def _residual_norm(wide: Float[Tensor, "m n"], basis: Float[Tensor, "m k"], generator: torch.Generator) -> float:
    """Return an upper bound of ‖(1−P)X‖₂."""

    def outside(columns: Tensor) -> Tensor:
        return columns - basis @ (basis.mT @ columns)

    probes = outside(wide @ _normal(wide.shape[1], _PROBES, generator, wide))
    for _ in range(_STEPS):
        probes = outside(wide @ (wide.mT @ probes))
    largest = float(probes.norm(dim=0).max())
    return (10 * math.sqrt(2 / math.pi) * largest) ** (1 / (2 * _STEPS + 1))


def _most_concentrated(shares: Float[Tensor, " k"], rest: float, peak: float, count: int) -> float:
    """Return the entropy of the spectrum whose j largest shares sum to Σ_{i≤j} shares_i + min(j·peak, rest)."""
    if rest == 0 or peak == 0:
        return _entropy(shares)
    peak = min(peak, rest)
    numbers = torch.arange(1, count + 1, dtype=torch.float64)
    added = torch.diff((numbers * peak).clamp_max(rest), prepend=torch.zeros(1, dtype=torch.float64))
    added[: len(shares)] += shares
    return _entropy(added)


def _entropy(shares: Float[Tensor, " n"]) -> float:
    return -float(torch.xlogy(shares, shares).sum())
