"""Two groups of runs: difference, 95 % interval, effect size, and the statistic under every relabelling.

Arrays have units (runs, or means over the runs of a pair) first: ``[unit, *sets]``, where sets are measures × steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special

from dynamics.relate.intervals import CONFIDENCE
from dynamics.relate.permutations import DRAWS, sign_flips, splits

#: A spread below this share of the values is rounding.
_CONSTANT = 1e-12


@dataclass(frozen=True)
class Difference:
    """First group minus second.

    Args:
        difference: Of the means.
        low, high: 95 % interval (Student's t; Welch's where unpaired); NaN where a group has one unit only.
        error: Standard error behind it.
        effect_size: Difference over standard deviation, corrected for few units (Hedges & Olkin 1985).
        statistics: t under each relabelling, the observed one first, ``[draw, *sets]``.
    """

    difference: Float[np.ndarray, "*sets"]
    low: Float[np.ndarray, "*sets"]
    high: Float[np.ndarray, "*sets"]
    error: Float[np.ndarray, "*sets"]
    effect_size: Float[np.ndarray, "*sets"]
    statistics: Float[np.ndarray, "draw ..."]


def paired_difference(
    first: Float[np.ndarray, "pair ..."],
    second: Float[np.ndarray, "pair ..."],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Of paired units. Under the null the sign of each pair's difference is a coin's: signs are flipped.

    Statistic: mean over standard error of the differences. Effect size: mean over standard deviation of the differences
    (Cohen's d_z), times Hedges' correction.

    >>> found = paired_difference(np.array([[3.0], [4.0], [5.0]]), np.array([[1.0], [1.0], [1.0]]))
    >>> found.difference, len(found.statistics)
    (array([3.]), 8)
    """
    differences = first - second
    units = len(differences)
    mean, deviation = _mean_and_deviation(differences)
    error = deviation / np.sqrt(units)
    scale = _solid(deviation, differences) / np.sqrt(units)
    signs = sign_flips(units, draws=draws, seed=seed)
    means = np.tensordot(signs / units, differences, axes=1)
    # Σd² does not change under flips, so the mean alone gives the order; t is on one scale over measures.
    square = np.square(differences).mean(0)
    spread = np.sqrt(np.maximum(square - means**2, 0.0) / max(units - 1, 1))
    statistics = _ratio(means, spread, np.sqrt(square))
    low, high = _ends(mean, error, np.full_like(error, units - 1.0))
    return Difference(mean, low, high, error, mean / (scale * np.sqrt(units)) * _hedges(units - 1.0), statistics)


def unpaired_difference(
    first: Float[np.ndarray, "unit ..."],
    second: Float[np.ndarray, "other ..."],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Of independent units. Under the null labels are exchangeable: they are permuted, with Welch's t as statistic.

    Studentising keeps the test nearly right where the groups' spreads differ (Janssen 1997). Effect size: Hedges' g,
    over the pooled standard deviation.

    >>> found = unpaired_difference(np.array([[3.0], [5.0]]), np.array([[1.0], [1.5]]))
    >>> found.difference, len(found.statistics)
    (array([2.75]), 6)
    """
    count, other = len(first), len(second)
    together = np.concatenate([first, second])
    chosen = splits(count, other, draws=draws, seed=seed).astype(np.float64)
    centred = together - together.mean(0)  # sums of squares lose the spread of numbers far from zero
    sums, squares = (np.tensordot(chosen, values, axes=1) for values in (centred, centred**2))
    means = sums / count, (centred.sum(0) - sums) / other
    variances = (
        _variance(squares, means[0], count),
        _variance((centred**2).sum(0) - squares, means[1], other),
    )
    gap = means[0] - means[1]
    error = np.sqrt(variances[0] / count + variances[1] / other)
    statistics = _ratio(gap, error, np.sqrt((together**2).mean(0)))
    (mean, spread), (mean_, spread_) = _mean_and_deviation(first), _mean_and_deviation(second)
    own = np.sqrt(spread**2 / count + spread_**2 / other)
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = spread**2 / count, spread_**2 / other
        freedom = (parts[0] + parts[1]) ** 2 / (parts[0] ** 2 / (count - 1) + parts[1] ** 2 / (other - 1))
        pooled = np.sqrt(((count - 1) * spread**2 + (other - 1) * spread_**2) / (count + other - 2))
    difference = mean - mean_
    low, high = _ends(difference, own, freedom)
    size = difference / _solid(pooled, together) * _hedges(count + other - 2.0)
    return Difference(difference, low, high, np.asarray(own), size, statistics)


def _mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = np.asarray(values.mean(0))
    if len(values) < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, np.asarray(values.std(0, ddof=1))


def _variance(squares: np.ndarray, means: np.ndarray, count: int) -> np.ndarray:
    """From sums of squares; 0 for a single unit, which leaves the other group's spread to the statistic."""
    return np.maximum(squares - count * means**2, 0.0) / max(count - 1, 1)


def _ratio(means: np.ndarray, spread: np.ndarray, size: np.ndarray) -> np.ndarray:
    """t, capped where nothing spreads: there it only has to be the largest."""
    floor = np.maximum(1e-8 * size, np.finfo(np.float64).tiny)
    return np.where(np.abs(means) > 1e-12 * size, means / np.maximum(spread, floor), 0.0)


def _solid(deviation: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(deviation > _CONSTANT * np.abs(values).max(0), deviation, np.nan)


def _ends(mean: np.ndarray, error: np.ndarray, freedom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reach = special.stdtrit(np.where(freedom > 0, freedom, np.nan), 0.5 + CONFIDENCE / 2) * error
    return np.asarray(mean - reach), np.asarray(mean + reach)


def _hedges(freedom: float) -> float:
    """Γ(m/2)/(√(m/2) Γ((m − 1)/2)): what makes a standardised difference of few units unbiased."""
    if freedom < 2:
        return float("nan")
    return float(np.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)) / np.sqrt(freedom / 2))
