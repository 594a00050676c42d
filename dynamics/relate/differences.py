"""Two groups of runs: their difference, its 95 % interval, effect size, and test under every relabelling.

Arrays have units (runs, or means over the runs of a pair) first: ``[unit, *sets]``, where sets are measures × steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import special

from dynamics.relate.correlation import CONFIDENCE
from dynamics.relate.permutations import DRAWS, LEVEL, MaxT, PermutationTest, sign_flips, splits

#: A spread below this share of the values is rounding.
_CONSTANT = 1e-12
#: Statistics at a time: 32 MB.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Difference:
    """First group minus second.

    Args:
        difference: Of the means.
        low, high: 95 % interval (Student's t; Welch's where unpaired); NaN where a group has one unit only.
        error: Standard error behind it.
        freedom: Degrees of freedom of that (Welch–Satterthwaite where unpaired).
        effect_size: Difference over standard deviation, corrected for few units (Hedges & Olkin 1985).
        statistics: t under each relabelling, the observed one first, ``[draw, *sets]``.
    """

    difference: Float[np.ndarray, "*sets"]
    low: Float[np.ndarray, "*sets"]
    high: Float[np.ndarray, "*sets"]
    error: Float[np.ndarray, "*sets"]
    freedom: Float[np.ndarray, "*sets"]
    effect_size: Float[np.ndarray, "*sets"]
    statistics: Float[np.ndarray, "draw ..."]


def paired_difference(
    first: Float[np.ndarray, "pair ..."],
    second: Float[np.ndarray, "pair ..."],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Return the difference of paired units.

    Under the null the sign of each pair's difference is a coin's: signs are flipped. Statistic: mean over standard
    error of the differences. Effect size: mean over standard deviation of the differences (Cohen's d_z), times Hedges'
    correction.

    >>> result = paired_difference(np.array([[3.0], [4.0], [5.0]]), np.array([[1.0], [1.0], [1.0]]))
    >>> result.difference, len(result.statistics)
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
    freedom = np.full_like(error, units - 1.0)
    low, high = _ends(mean, error, freedom)
    effect_size = mean / (scale * np.sqrt(units)) * _hedges(units - 1.0)
    return Difference(mean, low, high, error, freedom, effect_size, statistics)


def unpaired_difference(
    first: Float[np.ndarray, "unit ..."],
    second: Float[np.ndarray, "other ..."],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Return the difference of independent units.

    Under the null labels are exchangeable: they are permuted, with Welch's t as statistic. Studentising makes the test
    right where the groups' spreads differ as the groups grow (Janssen 1997). With few runs it is not: 3 and 5 runs, the
    three with five times the spread, reject in 0.13 of cases at 0.05; Welch's interval then still holds the truth in
    0.95. Decide by both. Effect size: Hedges' g, over the pooled standard deviation.

    >>> result = unpaired_difference(np.array([[3.0], [5.0]]), np.array([[1.0], [1.5]]))
    >>> result.difference, len(result.statistics)
    (array([2.75]), 6)
    """
    count, other = len(first), len(second)
    together = np.concatenate([first, second])
    chosen = splits(count, other, draws=draws, seed=seed).astype(np.float64)
    centred = together - together.mean(0)  # sums of squares lose the spread of numbers far from zero
    # The second group is summed by itself, not as what the first leaves: a split and its mirror image must tie exactly.
    groups = (chosen, count), (1 - chosen, other)
    means = [np.tensordot(chosen, centred, axes=1) / size for chosen, size in groups]
    squares = [np.tensordot(chosen, centred**2, axes=1) for chosen, _ in groups]
    variances = [_variance(*parts) for parts in zip(squares, means, (count, other), strict=True)]
    gap = means[0] - means[1]
    error = np.sqrt(variances[0] / count + variances[1] / other)
    statistics = _ratio(gap, error, np.sqrt((together**2).mean(0)))
    (mean, spread), (mean_, spread_) = _mean_and_deviation(first), _mean_and_deviation(second)
    error = np.sqrt(spread**2 / count + spread_**2 / other)
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = spread**2 / count, spread_**2 / other
        freedom = (parts[0] + parts[1]) ** 2 / (parts[0] ** 2 / (count - 1) + parts[1] ** 2 / (other - 1))
        freedom = np.where(error > 0, freedom, count + other - 2.0)
        pooled = np.sqrt(((count - 1) * spread**2 + (other - 1) * spread_**2) / (count + other - 2))
    difference = mean - mean_
    low, high = _ends(difference, error, freedom)
    size = difference / _solid(pooled, together) * _hedges(count + other - 2.0)
    return Difference(difference, low, high, error, freedom, size, statistics)


def relabelled_difference(
    first: Float[np.ndarray, "unit ..."],
    second: Float[np.ndarray, "other ..."],
    *,
    pairs: bool,
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> tuple[Difference, PermutationTest]:
    """Return the differences, without statistics, and their tests as one family; memory does not grow with its size.

    Args:
        first, second: Values of the units of each group; NaN makes a set's test NaN.
        pairs: Whether units are paired, in this order.
        level: Of critical values.
        draws, seed: Of random relabellings.

    >>> difference, test = relabelled_difference(np.arange(3.0)[:, None] + 9, np.arange(4.0)[:, None], pairs=False)
    >>> difference.difference, test.p_value.round(3)
    (array([8.5]), array([0.029]))
    """
    sets = first.shape[1:]
    columns = [values.reshape(len(values), -1) for values in (first, second)]
    relabelled = paired_difference if pairs else unpaired_difference
    width = max(1, _AT_ONCE // max(draws + 1, 10_000))  # so many relabellings are listed where these are all
    tests = MaxT(level)
    parts = []
    for start in range(0, max(1, columns[0].shape[1]), width):
        part = relabelled(*(values[:, start : start + width] for values in columns), draws=draws, seed=seed)
        tests.add(np.where(np.isnan(part.difference), np.nan, part.statistics))
        parts.append([getattr(part, name) for name in _NUMBERS])
    numbers = [np.concatenate(column).reshape(sets) for column in zip(*parts, strict=True)]
    test = tests.test()
    shaped = PermutationTest(**{name: column.reshape(sets) for name, column in vars(test).items()})
    return Difference(*numbers, statistics=np.empty((0, *sets))), shaped


#: Numbers of each set of a difference.
_NUMBERS = ("difference", "low", "high", "error", "freedom", "effect_size")


def students_test(
    difference: Difference, freedom: Float[np.ndarray, "*sets"], level: float = LEVEL
) -> tuple[Float[np.ndarray, "*sets"], Float[np.ndarray, "*sets"]]:
    """Return Student's p-value of t = difference/error, and what |t| must exceed for it to be at most ``level``.

    >>> difference = paired_difference(np.array([[3.0], [4.0], [6.0]]), np.array([[1.0], [1.0], [1.0]]))
    >>> [number.round(3) for number in students_test(difference, difference.freedom)]
    [array([0.063]), array([4.303])]
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.abs(difference.difference) / difference.error
    freedom = np.where(freedom > 0, freedom, np.nan)
    p_value = np.where(difference.difference == 0, 1.0, 2 * special.stdtr(freedom, -t))
    return p_value, special.stdtrit(freedom, 1 - level / 2)


def _mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean = np.asarray(values.mean(0))
    if len(values) < 2:
        return mean, np.full_like(mean, np.nan)
    return mean, np.asarray(values.std(0, ddof=1))


def _variance(squares: np.ndarray, means: np.ndarray, count: int) -> np.ndarray:
    """Return the variance from sums of squares; 0 for a single unit: the other group's spread then counts alone."""
    return np.maximum(squares - count * means**2, 0.0) / max(count - 1, 1)


def _ratio(means: np.ndarray, spread: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Return t, capped where nothing spreads: there it only has to be the largest."""
    floor = np.maximum(1e-8 * size, np.finfo(np.float64).tiny)
    return np.where(np.abs(means) > 1e-12 * size, means / np.maximum(spread, floor), 0.0)


def _solid(deviation: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(deviation > _CONSTANT * np.abs(values).max(0), deviation, np.nan)


def _ends(mean: np.ndarray, error: np.ndarray, freedom: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    reach = special.stdtrit(np.where(freedom > 0, freedom, np.nan), 0.5 + CONFIDENCE / 2) * error
    return np.asarray(mean - reach), np.asarray(mean + reach)


def _hedges(freedom: float) -> float:
    """Return Γ(m/2)/(√(m/2) Γ((m − 1)/2)), which makes a standardised difference of few units unbiased."""
    if freedom < 2:
        return float("nan")
    return float(np.exp(special.gammaln(freedom / 2) - special.gammaln((freedom - 1) / 2)) / np.sqrt(freedom / 2))
