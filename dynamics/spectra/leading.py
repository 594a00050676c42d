r"""Spectra of which only the leading values are known, and what is exact or bounded nevertheless.

Of the Gram G of a matrix's shorter side, C = G/tr G has the eigenvalues p ∝ σ². Exact are Σσ² = tr G and, for the price
of G alone, Σσ⁴ = ‖G‖_F². Let Q hold the k leading eigenvectors and P = QQᵀ. Then of the rest (1−P)C(1−P), with N = n−k
eigenvalues, the sum R = 1 − Σp_i and the sum of squares F = ‖C‖_F² − 2‖CQ‖_F² + ‖QᵀCQ‖_F² are exact, too. Among spectra
with these two sums the entropy is largest for one large value and N−1 equal ones, and smallest for equal ones, one
smaller, and zeros (Harremoës & Topsøe 2001). So

.. math:: -\sum_i p_i \ln p_i + h_{\min}(R, F) - \Delta \le H \le -\sum_i p_i \ln p_i + h_{\max}(R, F, N)

above without an allowance, since what is left without the blocks beside P has no smaller entropy; below with the
Fannes–Audenaert bound Δ = T ln(n−1) + h(T) (Audenaert 2007), T = √k ‖(1−P)CQ‖_F: the residual of the eigenvectors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.spectra.lanczos import leading_eigenpairs
from dynamics.spectra.measures import ENERGY_SHARE, TOP_K

#: Largest residual of an eigenpair, relative to its eigenvalue: σ is right to half of that whatever the spectrum, and
#: far better where its neighbours are not as near.
_RESIDUAL = 1e-5
_EPSILON = torch.finfo(torch.float64).eps


@dataclass(frozen=True)
class Remainder:
    """What is known of a whole spectrum beside its leading values.

    Args:
        frobenius_norm: √Σσ².
        participation_ratio: (Σσ²)²/Σσ⁴.
        entropy_energy_low, entropy_energy_high: −Σp ln p with p ∝ σ² lies between these, in nats.
    """

    frobenius_norm: float
    participation_ratio: float
    entropy_energy_low: float
    entropy_energy_high: float

    def scaled(self, factor: float) -> Remainder:
        """Return the same of a matrix times a number."""
        return replace(self, frobenius_norm=self.frobenius_norm * factor)


def leading_spectrum(product: Float[Tensor, "n n"], k: int) -> tuple[Float[Tensor, " k"], Remainder] | None:
    """Return the k leading singular values of a matrix, and what is known of the others, from its Gram.

    Args:
        product: The Gram of the shorter side; finite, not zero.
        k: How many. σ below 1e-7 σ₁ are not resolved.

    Returns:
        ``None`` where a decomposition costs no more, or where Lanczos iteration does not converge.

    >>> diagonal = torch.diag(torch.tensor([4.0, 1.0, *[1e-6] * 98], dtype=torch.float64))
    >>> values, remainder = leading_spectrum(diagonal, 2)
    >>> round(remainder.entropy_energy_low, 3), round(remainder.entropy_energy_high, 3)
    (0.501, 0.501)
    """
    energy = float(product.trace())
    share = product / energy
    pairs = leading_eigenpairs(share, k, tolerance=_RESIDUAL)
    if pairs is None:
        return None
    low, high, purity = _entropy_bounds(share, pairs.values.cpu(), pairs.residual)
    values = (pairs.values.cpu().clamp_min(0) * energy).sqrt()
    return values, Remainder(math.sqrt(energy), 1 / purity, low, high)


def _entropy_bounds(
    share: Float[Tensor, "n n"], leading: Float[Tensor, " k"], residual: float
) -> tuple[float, float, float]:
    """Return bounds of the entropy of a matrix of trace 1, and its squared norm."""
    count, k = len(share), len(leading)
    purity = float(torch.linalg.vector_norm(share)) ** 2
    rest = max(0.0, 1.0 - float(leading.sum()))
    squares = purity - float(leading.square().sum()) - 2 * residual**2
    rounding = 16 * _EPSILON * purity
    captured = -float(torch.xlogy(leading.clamp_min(0), leading.clamp_min(0)).sum())
    low = captured + _smallest_entropy(rest, squares + rounding, count - k)
    high = captured + _largest_entropy(rest, squares - rounding, count - k)
    low = max(0.0, low - _continuity(math.sqrt(k) * residual + count * _EPSILON, count))
    high = min(math.log(count), high + count * _EPSILON)
    return low, max(low, high), purity


def _largest_entropy(total: float, squares: float, count: int) -> float:
    """Return the largest −Σp ln p of ``count`` numbers with a sum and, at least, a sum of squares."""
    if total <= 0:
        return 0.0
    purity = min(max(squares / total**2, 1 / count), 1.0)
    largest = (1 + math.sqrt(max(0.0, (count - 1) * (count * purity - 1)))) / count
    other = (1 - largest) / (count - 1) if count > 1 else 0.0
    return _scaled(total, -_xlogx(largest) - (count - 1) * _xlogx(other))


def _smallest_entropy(total: float, squares: float, count: int) -> float:
    """Return the smallest −Σp ln p of ``count`` numbers with a sum and, at most, a sum of squares."""
    if total <= 0:
        return 0.0
    purity = min(max(squares / total**2, 1 / count), 1.0)
    equal = max(1, int(1 / purity))
    root = math.sqrt(max(0.0, equal**2 - equal * (equal + 1) * (1 - purity)))
    value = min((equal + root) / (equal * (equal + 1)), 1 / equal)
    return _scaled(total, -equal * _xlogx(value) - _xlogx(max(0.0, 1 - equal * value)))


def _scaled(total: float, entropy: float) -> float:
    """Return −Σp ln p of numbers that sum to a total, from that of their shares."""
    return total * entropy - _xlogx(total)


def _xlogx(value: float) -> float:
    return value * math.log(value) if value > 0 else 0.0


def _continuity(distance: float, count: int) -> float:
    """Return by how much the entropies of two matrices of trace 1 differ at most, from their distance."""
    if distance >= 1 - 1 / count:
        return math.log(count)
    return distance * math.log(count - 1) - _xlogx(distance) - _xlogx(1 - distance)


def measures_of_leading(
    values: Float[np.ndarray, "matrix k"],
    norm: Float[np.ndarray, " matrix"],
    participation_ratio: Float[np.ndarray, " matrix"],
    tolerance: Float[np.ndarray, " matrix"],
) -> Mapping[str, Float[np.ndarray, " matrix"]]:
    """Return the measures that leading singular values and exact moments determine; all others are not known.

    Args:
        values: Descending, padded with NaN.
        norm: Frobenius norms of the whole spectra.
        participation_ratio: Of the whole spectra.
        tolerance: Of ``numerical_rank``.

    >>> leading = measures_of_leading(np.array([[2.0, 1.0]]), np.array([10.0]) ** 0.5, np.array([3.0]), np.array([0.1]))
    >>> leading["stable_rank"].item(), leading["rank_at_energy"].item(), leading["numerical_rank"].item()
    (2.5, nan, nan)
    """
    relative = values / norm[:, None]
    dominant = relative[:, 0] ** 2
    top = (relative[:, :TOP_K] ** 2).sum(-1) if values.shape[1] >= TOP_K else np.full(len(values), np.nan)
    return {
        "participation_ratio": participation_ratio,
        "stable_rank": 1 / dominant,
        "dominant_ratio": dominant,
        "energy_top_k": top,
        "rank_at_energy": rank_at_energy_of_leading(values, norm, ENERGY_SHARE),
        "numerical_rank": count_beyond(values, tolerance * values[:, 0]),
    }


def rank_at_energy_of_leading(
    values: Float[np.ndarray, "*batch k"], norm: Float[np.ndarray, "*batch"], share: float
) -> Float[np.ndarray, "*batch"]:
    """Return the fewest directions that hold a share of the energy; NaN where the leading ones do not hold it."""
    with np.errstate(invalid="ignore"):
        reached = np.cumsum(np.nan_to_num(values / norm[..., None]) ** 2, -1) >= share - 1e-12
    return np.where(reached.any(-1), 1.0 + (~reached).sum(-1), np.nan)


def count_beyond(
    values: Float[np.ndarray, "*batch k"], edge: Float[np.ndarray, "*batch"]
) -> Float[np.ndarray, "*batch"]:
    """Return how many values lie above an edge; NaN where all leading ones do, since others may, too."""
    with np.errstate(invalid="ignore"):
        beyond = (values > edge[..., None]).sum(-1)
    return np.where(beyond < np.isfinite(values).sum(-1), beyond.astype(np.float64), np.nan)
