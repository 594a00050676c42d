"""The association within a single run: its trend removed, its autocorrelation counted. Descriptive.

One run is one observation of how a measure and a score move together. What is reported describes this run; it is no
evidence about runs, and gets no p-value.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special

from dynamics.relate.intervals import CONFIDENCE

#: Degree of the polynomial in the step's place that is removed. With a straight line, two independent saturating curves
#: still "correlate" at the 5 % level in 96 % of cases; with a cubic in 4 to 8 %.
DEGREE = 3


@dataclass(frozen=True)
class Described:
    """Correlation of what is left after detrending; the interval holds for this run's fluctuations only.

    Args:
        coefficient: Pearson's correlation of the residuals.
        low, high: 95 % interval from the effective number of steps.
        effective_steps: N* of Pyper & Peterman, at most the number of steps.
    """

    coefficient: Float[np.ndarray, "*sets"]
    low: Float[np.ndarray, "*sets"]
    high: Float[np.ndarray, "*sets"]
    effective_steps: Float[np.ndarray, "*sets"]


def detrended(values: Float[np.ndarray, "*sets step"], degree: int = DEGREE) -> Float[np.ndarray, "*sets step"]:
    """Values without their least-squares polynomial in the step's place (first, second, …).

    >>> np.abs(detrended(np.array([1.0, 4.0, 9.0, 16.0, 25.0]), degree=2)).max() < 1e-12
    np.True_
    """
    place = np.linspace(-1, 1, values.shape[-1])
    basis = np.linalg.qr(np.vander(place, min(degree, len(place) - 1) + 1))[0]
    return values - (values @ basis) @ basis.T


def effective_steps(
    x: Float[np.ndarray, "*#sets step"], y: Float[np.ndarray, "*#sets step"]
) -> Float[np.ndarray, "*#sets"]:
    """Number of independent pairs with as much information: 1/N* = 1/N + (2/N) Σ_j (1 − j/N) ρ_xx(j) ρ_yy(j).

    Pyper & Peterman 1998, lags up to N/5, autocorrelations weighted by N/(N − j). Between 1 and N.

    Args:
        x, y: Series around zero.

    >>> rng = np.random.default_rng(0)
    >>> slow = rng.standard_normal((2, 200)).cumsum(1)
    >>> bool(effective_steps(*slow) < 40)
    True
    """
    count = x.shape[-1]
    lag = np.arange(1, max(1, count // 5) + 1)
    product = _autocorrelation(x, lag) * _autocorrelation(y, lag)
    inverse = 1 / count + 2 / count * ((1 - lag / count) * (count / (count - lag)) ** 2 * product).sum(-1)
    return np.asarray(np.clip(1 / np.where(inverse > 1 / count, inverse, 1 / count), 1, count))


def _autocorrelation(values: np.ndarray, lag: np.ndarray) -> np.ndarray:
    count = values.shape[-1]
    energy = np.square(values).sum(-1)
    products = [(values[..., : count - shift] * values[..., shift:]).sum(-1) for shift in lag]
    return np.stack(products, axis=-1) / np.where(energy > 0, energy, np.nan)[..., None]


def describe_run(x: Float[np.ndarray, "*#sets step"], y: Float[np.ndarray, "*#sets step"]) -> Described:
    """The detrended association of two series of one run.

    The interval is Fisher's with N* − 3 − degree degrees of freedom, NaN where that is below 1, as it is for fewer than
    eight steps.

    >>> rng = np.random.default_rng(1)
    >>> x = rng.standard_normal(30)
    >>> round(float(describe_run(x, 2 * x + np.arange(30.0) ** 2).coefficient), 6)
    1.0
    """
    left = detrended(x), detrended(y)
    norms = [np.sqrt(np.square(part).sum(-1)) for part in left]
    sizes = [np.abs(part).max(-1) for part in (x, y)]
    solid = [norm > 1e-12 * size for norm, size in zip(norms, sizes, strict=True)]
    coefficient = (left[0] * left[1]).sum(-1) / np.where(solid[0] & solid[1], norms[0] * norms[1], np.nan)
    steps = effective_steps(*left)
    freedom = steps - 3 - DEGREE
    reach = special.ndtri(0.5 + CONFIDENCE / 2) / np.sqrt(np.where(freedom >= 1, freedom, np.nan))
    z = np.arctanh(np.clip(coefficient, -1 + 1e-12, 1 - 1e-12))
    return Described(
        np.asarray(coefficient), np.asarray(np.tanh(z - reach)), np.asarray(np.tanh(z + reach)), np.asarray(steps)
    )
