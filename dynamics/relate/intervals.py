"""95 % intervals of correlations and differences that rest on few units (runs, or clusters of runs)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import special

#: Confidence of every interval of this room.
CONFIDENCE = 0.95
#: Correlations are kept this far from ±1 before Fisher's z.
_EDGE = 1e-12

Ends = tuple[np.ndarray, np.ndarray, np.ndarray]


def jackknife_interval(estimate: Float[np.ndarray, "*sets"], left_out: Float[np.ndarray, "unit ..."]) -> Ends:
    """Return low end, high end and p-value of a correlation, by leaving out each unit in turn.

    On Fisher's scale z = artanh r: z ± t·√((n − 1)/n · Σ (z_i − z̄)²), Student's t with n − 1 degrees of freedom
    (Tukey 1958). Whole runs are left out, so steps of one run may depend on each other in any way. In simulations with
    4 to 20 runs it covers the truth in 0.94 to 0.97 of cases, where BCa bootstraps over runs reach 0.85 to 0.94; where
    runs differ much in how far both variables move, in 0.88 to 0.92.

    Args:
        estimate: Correlation of all units.
        left_out: Correlation without each unit; NaN where nothing is left. Fewer than three units, or a NaN, give no
            interval, and p = 1.

    >>> low, high, p = jackknife_interval(np.array(0.5), np.array([0.4, 0.5, 0.6]))
    >>> bool(low < 0.5 < high), bool(p < 0.05) == bool(low > 0)
    (True, True)
    """
    units = len(left_out)
    z, without = _z(estimate), _z(left_out)
    if units < 3:
        return _no_interval(z)
    error = np.asarray(np.sqrt((units - 1) / units * np.square(without - without.mean(0)).sum(0)))
    return _interval(z, error, units - 1.0)


def spearman_interval(estimate: Float[np.ndarray, "*sets"], units: int) -> Ends:
    """Return low end, high end and p-value of a rank correlation (Bonett & Wright 2000).

    z ± 1.96·√((1 + r²/2)/(n − 3)). A correlation of ±1 is taken as the middle of the last step of its scale,
    1 − 6/(n³ − n), because full agreement of a few ranks does not say that the truth is 1.

    Args:
        estimate: Spearman's correlation.
        units: How many units it is of; fewer than four give no interval, and p = 1.

    >>> [round(float(end), 2) for end in spearman_interval(np.array(1.0), 5)[:2]]
    [0.16, 1.0]
    """
    if units < 4:
        return _no_interval(_z(estimate))
    most = 1 - 6 / (units**3 - units)
    shrunk = np.asarray(np.clip(estimate, -most, most))
    return _interval(_z(shrunk), np.asarray(np.sqrt((1 + shrunk**2 / 2) / (units - 3))), np.inf)


def _interval(z: np.ndarray, error: np.ndarray, freedom: float) -> Ends:
    """Ends z ± t·error, and the p-value that is at most 0.05 exactly where these exclude 0."""
    error = np.maximum(error, _EDGE)
    reach = special.stdtrit(freedom, 0.5 + CONFIDENCE / 2) * error
    tail = 2 * special.stdtr(freedom, -np.abs(z) / error)
    p_value = np.where(np.isnan(error) & ~np.isnan(z), 1.0, tail)
    return np.asarray(np.tanh(z - reach)), np.asarray(np.tanh(z + reach)), p_value


def _z(correlation: np.ndarray) -> np.ndarray:
    return np.asarray(np.arctanh(np.clip(correlation, -1 + _EDGE, 1 - _EDGE)))


def _no_interval(z: np.ndarray) -> Ends:
    return np.full_like(z, np.nan), np.full_like(z, np.nan), np.where(np.isnan(z), np.nan, 1.0)
