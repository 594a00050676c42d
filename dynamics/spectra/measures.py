r"""Measures of concentration: pure functions of singular values.

With σ the singular values of a matrix, every measure is a function of a distribution over directions,

.. math:: p_i = \sigma_i^a / \sum_j \sigma_j^a

with a = 2 (*energy*) or a = 1 (*amplitude*); for eigenvalues of a positive semi-definite matrix p_i = λ_i/Σλ.
Most are Rényi numbers exp(H_α(p)), which fall as α grows: H_0 = ln rank, H_1 Shannon's entropy,
H_2 = −ln Σp², H_∞ = −ln p_1.

Conventions shared by all functions of this file: ``values`` is ``[..., rank]``, the result ``[...]``, float64.
An all-zero spectrum has no distribution: NaN, never 0. NaN *after* the last number is padding, as the stored
result has it; NaN before a number makes the result NaN. All are unchanged by scale, order and appended zeros
unless the docstring says otherwise.

The update of a whole model is the direct sum of its matrices' updates: its spectrum is all spectra together. With
w_l = ‖ΔW_l‖_F²/Σ‖ΔW‖_F² the chain rule of entropy gives, exactly,

.. math:: SE(\oplus_l) = H(w) + \sum_l w_l\, SE_l, \qquad 1/PR(\oplus_l) = \sum_l w_l^2 / PR_l.

An average of entropies over matrices of different shape and size has no such meaning and is not offered.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float
from scipy.special import xlogy
from torch import Tensor

_EXPONENTS = {"energy": 2, "amplitude": 1, "eigenvalue": 1}

#: The share of energy that ``rank_at_energy`` must reach, and the number of directions of ``energy_top_k``,
#: where the result stores one number for each.
ENERGY_SHARE = 0.9
TOP_K = 4


def _tensor(values: Any) -> Tensor:
    """Return float64 from a tensor, an array, a labelled array or a sequence."""
    if isinstance(values, Tensor):
        return values.detach().to(torch.float64)
    return torch.from_numpy(np.array(values, dtype=np.float64))


def _clean(values: Any, *, eigenvalues: bool = False) -> tuple[Float[Tensor, "... rank"], Bool[Tensor, "*_"]]:
    """Return values over their largest, padding as zeros, and where there is no distribution."""
    values = _tensor(values)
    if values.ndim == 0:
        raise ValueError("Expected values of shape [..., rank], got a single number.")
    missing = values.isnan()
    number_follows = (~missing).flip(-1).cummax(-1).values.flip(-1)
    broken = (missing & number_follows).any(-1) | values.isinf().any(-1)
    values = values.nan_to_num(0.0, 0.0, 0.0)
    largest = values.amax(-1) if values.shape[-1] else values.new_zeros(values.shape[:-1])
    # A symmetric eigensolver returns the zeros of a PSD matrix as ±rounding of the largest.
    tolerance = 1e-10 * largest.clamp_min(0) if eigenvalues else torch.zeros_like(largest)
    if (values < -tolerance[..., None]).any():
        kind = "eigenvalues of a positive semi-definite matrix" if eigenvalues else "singular values"
        raise ValueError(f"Expected {kind}, which are not negative; the smallest is {values.min():.3g}.")
    undefined = broken | (largest <= 0)
    return values.clamp_min(0) / torch.where(undefined, 1.0, largest)[..., None], undefined


def _missing_where(undefined: Tensor, result: Tensor) -> Tensor:
    return torch.where(undefined, torch.nan, result)


def _distribution(values: Any, weights: str) -> tuple[Float[Tensor, "... rank"], Bool[Tensor, "*_"]]:
    if weights not in _EXPONENTS:
        raise ValueError(f"Expected weights 'energy', 'amplitude' or 'eigenvalue', got {weights!r}.")
    scaled, undefined = _clean(values, eigenvalues=weights == "eigenvalue")
    powers = scaled ** _EXPONENTS[weights]
    return powers / torch.where(undefined, 1.0, powers.sum(-1))[..., None], undefined


def spectral_entropy(values: Any, weights: str = "energy") -> Tensor:
    r"""Return the Shannon entropy of the spectrum, −Σ p ln p, in nats.

    For ``weights="eigenvalue"`` it is the von Neumann entropy of M/tr M, the SE of a Fisher matrix.

    Args:
        values: ``[..., rank]`` singular values, or eigenvalues with ``weights="eigenvalue"``.
        weights: ``"energy"`` (p ∝ σ²), ``"amplitude"`` (p ∝ σ) or ``"eigenvalue"`` (p ∝ λ).

    Raises:
        ValueError: On unknown weights or negative values.

    >>> round(float(spectral_entropy([1.0, 1.0, 1.0, 0.0])), 6)  # ln 3
    1.098612
    """
    p, undefined = _distribution(values, weights)
    return _missing_where(undefined, -torch.xlogy(p, p).sum(-1))


def effective_rank(values: Any, weights: str = "energy") -> Tensor:
    """Return exp of :func:`spectral_entropy`: the number of equal directions with the same entropy.

    ``weights="amplitude"`` is the effective rank of Roy & Vetterli (2007); ``"energy"`` weighs
    directions by their share of the squared Frobenius norm.

    >>> round(float(effective_rank([3.0, 3.0, 0.0])), 6)
    2.0
    """
    return spectral_entropy(values, weights).exp()


def participation_ratio(values: Any, weights: str = "energy") -> Tensor:
    """Return 1/Σp², for singular values (Σσ²)²/Σσ⁴: exp of the Rényi entropy of order 2.

    >>> round(float(participation_ratio([2.0, 1.0])), 6)  # 25 / 17
    1.470588
    """
    p, undefined = _distribution(values, weights)
    return _missing_where(undefined, 1 / p.square().sum(-1))


def dominant_ratio(values: Any, weights: str = "energy") -> Tensor:
    """Return the largest share p_1; for a Fisher matrix (``weights="eigenvalue"``) ρ = λ_1/tr F.

    >>> float(dominant_ratio([2.0, 1.0]))
    0.8
    """
    p, undefined = _distribution(values, weights)
    return _missing_where(undefined, p.amax(-1)) if p.shape[-1] else _missing_where(undefined, undefined.double())


def stable_rank(values: Any, weights: str = "energy") -> Tensor:
    """Return ‖·‖_F²/‖·‖_2² = 1/:func:`dominant_ratio`.

    >>> float(stable_rank([2.0, 1.0]))
    1.25
    """
    return 1 / dominant_ratio(values, weights)


def nuclear_rank(values: Any) -> Tensor:
    """Return ‖·‖_*/‖·‖_2 = Σσ/σ_1.

    >>> float(nuclear_rank([2.0, 1.0]))
    1.5
    """
    return 1 / dominant_ratio(values, "amplitude")


def energy_top_k(values: Any, k: int = TOP_K) -> Tensor:
    """Return the share of the squared Frobenius norm in the k largest directions.

    >>> float(energy_top_k([2.0, 1.0, 0.0], k=1))
    0.8
    """
    p, undefined = _distribution(values, "energy")
    return _missing_where(undefined, p.sort(-1, descending=True).values[..., :k].sum(-1))


def rank_at_energy(values: Any, energy: float = ENERGY_SHARE) -> Tensor:
    """Return the fewest directions that hold at least the share ``energy`` of the squared Frobenius norm.

    >>> float(rank_at_energy([2.0, 1.0, 0.0], energy=0.9))
    2.0
    """
    if not 0 < energy <= 1:
        raise ValueError(f"Expected a share of energy in (0, 1], got {energy}.")
    p, undefined = _distribution(values, "energy")
    held = p.sort(-1, descending=True).values.cumsum(-1)
    # 1e-12: a sum of r shares is exact to r·2⁻⁵³, and a share of 1 must be reached.
    return _missing_where(undefined, 1 + (held < energy - 1e-12).sum(-1).double())


def numerical_rank(values: Any, tolerance: float | Tensor) -> Tensor:
    """Return how many singular values exceed ``tolerance``·σ_1; 0 for a zero matrix.

    >>> float(numerical_rank([1.0, 1e-3, 1e-9], tolerance=1e-6))
    2.0
    """
    scaled, undefined = _clean(values)
    zero = undefined & (_tensor(values) == 0).any(-1)
    tolerance = torch.as_tensor(tolerance, dtype=torch.float64)
    count = (scaled > tolerance[..., None]).sum(-1).double()
    return torch.where(zero, 0.0, _missing_where(undefined, count))


def condition_number(values: Any) -> Tensor:
    """Return σ_1/σ_r over the values given; infinite if one of them is zero.

    Padding is left out; a zero is a singular value and counts, so appended zeros do change this one.

    >>> float(condition_number([2.0, 1.0]))
    2.0
    """
    scaled, undefined = _clean(values)
    present = ~_tensor(values).isnan()
    smallest = torch.where(present, scaled, torch.inf).amin(-1) if scaled.shape[-1] else undefined.double()
    return _missing_where(undefined, 1 / smallest)


def gini(values: Any) -> Tensor:
    r"""Return the Gini coefficient of the energies σ²: 0 if all are equal, (r−1)/r if one direction holds all.

    Σ_i (2i − r − 1) e_i / (r Σe), e ascending. It is relative to the number of values given: zeros count.

    >>> float(gini([1.0, 0.0, 0.0, 0.0]))
    0.75
    """
    p, undefined = _distribution(values, "energy")
    present = ~_tensor(values).isnan()
    count = present.sum(-1)
    # Padding has p = 0 and so comes first in ascending order: shift the ranks past it.
    ascending = p.sort(-1).values
    rank = torch.arange(1, p.shape[-1] + 1, dtype=torch.float64) - (p.shape[-1] - count)[..., None]
    return _missing_where(undefined, ((2 * rank - count[..., None] - 1) * ascending).sum(-1) / count.clamp_min(1))


def hoyer(values: Any) -> Tensor:
    r"""Return Hoyer's sparseness of the singular values, (√r − ‖σ‖₁/‖σ‖₂)/(√r − 1): 0 flat, 1 for one direction.

    NaN for a single value, where it is 0/0. It is relative to the number of values given: zeros count.

    >>> float(hoyer([1.0, 0.0, 0.0, 0.0]))
    1.0
    """
    scaled, undefined = _clean(values)
    root = (~_tensor(values).isnan()).sum(-1).double().sqrt()
    ratio = scaled.sum(-1) / torch.where(undefined, 1.0, torch.linalg.vector_norm(scaled, dim=-1))
    return _missing_where(undefined | (root <= 1), (root - ratio) / (root - 1))


#: Measures that need nothing but the singular values, ``[..., rank]`` to ``[...]``; ``schema.MEASURES`` defines them.
#: Those that need a tolerance or a null model are added where these are known.
MEASURES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "entropy_energy": spectral_entropy,
    "entropy_amplitude": partial(spectral_entropy, weights="amplitude"),
    "effective_rank_energy": effective_rank,
    "effective_rank_amplitude": partial(effective_rank, weights="amplitude"),
    "participation_ratio": participation_ratio,
    "stable_rank": stable_rank,
    "nuclear_rank": nuclear_rank,
    "dominant_ratio": dominant_ratio,
    "energy_top_k": energy_top_k,
    "rank_at_energy": rank_at_energy,
    "condition_number": condition_number,
    "gini": gini,
    "hoyer": hoyer,
}


def rank_tolerance(out: int, in_: int, epsilon: float) -> float:
    """Return the default tolerance of :func:`numerical_rank`: max(out, in)·ε of the storage dtype.

    In half precision this exceeds 1 for common shapes, which no singular value would pass: above 0.1 it is √ε instead.

    >>> rank_tolerance(100, 50, 2**-52) == 100 * 2**-52
    True
    """
    tolerance = max(out, in_) * epsilon
    return tolerance if tolerance <= 0.1 else math.sqrt(epsilon)


def _shares(energy: Float[np.ndarray, "*batch matrix"]) -> Float[np.ndarray, "*batch matrix"]:
    total = energy.sum(-1, keepdims=True)
    return np.divide(energy, total, out=np.full_like(energy, np.nan), where=total > 0)


def _weighted(share: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Return share·value, 0 where the share is 0: a zero update has no entropy, and none to contribute."""
    return np.where(share == 0, 0.0, share * value)


def entropy_of_direct_sum(
    energy: Float[np.ndarray, "*batch matrix"], entropy: Float[np.ndarray, "*batch matrix"]
) -> Float[np.ndarray, "*batch"] | np.float64:
    """Return H(w) + Σ w_l SE_l in nats.

    Args:
        energy: ‖ΔW_l‖_F²; 0 for a matrix that is not there, NaN for one that could not be measured.
        entropy: Energy entropy of each matrix in nats; may be NaN where the energy is 0.

    Returns:
        NaN where all energies are 0 or one is NaN.

    >>> entropy_of_direct_sum(np.array([2.0, 2.0]), np.array([0.0, np.log(2)])) / np.log(2)
    np.float64(1.5)
    """
    share = _shares(energy)
    return (-xlogy(share, share) + _weighted(share, entropy)).sum(-1)


def participation_ratio_of_direct_sum(
    energy: Float[np.ndarray, "*batch matrix"], participation_ratio: Float[np.ndarray, "*batch matrix"]
) -> Float[np.ndarray, "*batch"] | np.float64:
    """Return 1/Σ(w_l²/PR_l); arguments as in :func:`entropy_of_direct_sum`.

    >>> participation_ratio_of_direct_sum(np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    np.float64(4.0)
    """
    share = _shares(energy)
    return 1 / _weighted(share, share / participation_ratio).sum(-1)


def known_quantiles(
    values: Float[np.ndarray, "*batch matrix"], quantiles: Sequence[float]
) -> Float[np.ndarray, "*batch quantile"]:
    """Return quantiles along the last axis of what is not NaN, linear between two numbers; NaN where there is nothing.

    As ``numpy.nanquantile``, which walks the rows one by one in Python: 500 steps of 224 matrices take it seconds.

    >>> known_quantiles(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]), [0.5])
    array([[ 2.],
           [nan]])
    """
    if values.size == 0:
        return np.full((*values.shape[:-1], len(quantiles)), np.nan)
    points = torch.tensor(quantiles, dtype=torch.float64)
    results = torch.nanquantile(torch.from_numpy(np.array(values, dtype=np.float64)), points, dim=-1)
    return np.moveaxis(results.numpy(), 0, -1)


#: Share of an update's energy that the suggested rank holds.
ENERGY = 0.99


def rank_pattern(ranks: xr.DataArray) -> dict[str, int]:
    """Return suggested ranks as ``peft.LoraConfig(rank_pattern=...)`` takes them: matrix to rank.

    Matrices that ``rank_pattern`` cannot name one by one (single experts, one of several adapters) and those
    without a suggestion (zero or unreadable throughout) are left out. PEFT takes a key for every module whose name
    ends in it, so a name that another one ends in is anchored by ``^``. A different rank changes α/r: keep the
    scale by an ``alpha_pattern`` of scale·rank. PEFT has no rank 0: a matrix that needs none gets 1; name it in
    ``exclude_modules`` to leave it alone.

    Args:
        ranks: A rank, or NaN, for each matrix, such as ``/update/suggested_rank``.
    """
    suggested: Mapping[str, float] = dict(zip(ranks["matrix"].values.tolist(), ranks.values.tolist(), strict=True))
    endings = {name.split(".", start)[start] for name in suggested for start in range(1, name.count(".") + 1)}
    return {
        f"^{name}" if name in endings else name: max(int(rank), 1)
        for name, rank in suggested.items()
        if rank == rank and not name.endswith("]") and "@" not in name  # NaN is not itself
    }
