"""What goes with the scores, seeds exchanged within arms: a difference between arms is no evidence of an association.

Measure and score are centred in each arm; r is their correlation over all units. Under the null a seed's measures say
nothing of its scores, so that seeds' scores can be exchanged: the same exchange in all arms, as arms of one seed share
data, adapter and order. All n! exchanges of n seeds are made, so p is exact; its smallest is about 1/n!.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import stats

MOST_SEEDS = 9  # 9! exchanges are 362,880


class WithinArms(NamedTuple):
    """An association within arms: r, its 95 % interval and exact p."""

    r: float
    low: float
    high: float
    p: float


def within_arms(x: Float[np.ndarray, "arm seed"], y: Float[np.ndarray, "arm seed"]) -> WithinArms:
    """Correlation over all units, each centred in its arm.

    The interval is Fisher's for a partial correlation: n − arms − 2 degrees of freedom for z. NaN where a centred
    variable is 0, or there are too few units.

    Raises:
        ValueError: If there are more seeds than exchanges can be counted for.

    >>> x = np.array([[1.0, 2.0, 3.0, 4.0], [9.0, 8.0, 6.0, 7.0]])
    >>> within_arms(x, 2 * x + [[100.0], [0.0]]).r
    1.0
    """
    arms, seeds = x.shape
    if seeds > MOST_SEEDS:
        raise ValueError(f"Expected at most {MOST_SEEDS} seeds, of which all exchanges are made, got {seeds}.")
    x, y = (values - values.mean(1, keepdims=True) for values in (x, y))
    size = math.sqrt(float((x**2).sum() * (y**2).sum()))
    if not size > 0:
        return WithinArms(math.nan, math.nan, math.nan, math.nan)
    products = x.T @ y / size  # of one seed's measures with another's scores, over arms
    exchanges = np.array(list(itertools.permutations(range(seeds))))
    found = products[np.arange(seeds), exchanges].sum(1)
    r = min(1.0, max(-1.0, float(found[0])))
    free = arms * seeds - arms - 2
    half = stats.norm.ppf(0.975) / math.sqrt(free) if free > 0 else math.nan
    z = math.atanh(r) if abs(r) < 1 else math.copysign(math.inf, r)
    p = float((np.abs(found) >= abs(found[0]) - 1e-12).mean())
    return WithinArms(r, math.tanh(z - half), math.tanh(z + half), p)


def associations(
    rows: Sequence[Mapping[str, Any]], measures: Sequence[str], scores: Sequence[str], primary: tuple[str, str]
) -> list[dict[str, Any]]:
    """Every measure with every score; all but the primary pair are corrected together by Holm's method.

    Args:
        rows: One a unit, with ``arm`` and ``seed``.
        measures, scores: Columns of the rows. Scores point as they are given.
        primary: The one pair that is not corrected.
    """
    arms, seeds = (sorted({each[name] for each in rows}) for name in ("arm", "seed"))
    table = {(each["arm"], each["seed"]): each for each in rows}

    def of(column: str) -> Float[np.ndarray, "arm seed"]:
        return np.array([[float(table[arm, seed][column]) for seed in seeds] for arm in arms])

    found = []
    for measure, score in itertools.product(measures, scores):
        one = within_arms(of(measure), of(score))
        found.append(
            {
                "measure": measure,
                "score": score,
                **one._asdict(),
                "units": len(rows),
                "primary": (measure, score) == primary,
            }
        )
    add_holm(found)
    return found


def add_holm(found: Sequence[dict[str, Any]]) -> None:
    """Add ``p_holm`` (Holm 1979) over all that is not ``primary`` and has a p; NaN elsewhere."""
    rest = [each for each in found if not each["primary"] and math.isfinite(each["p"])]
    p_values = np.array([each["p"] for each in rest])
    order = p_values.argsort(kind="stable")
    stepped = np.maximum.accumulate(p_values[order] * np.arange(len(rest), 0, -1))
    corrected = np.empty_like(p_values)
    corrected[order] = np.minimum(stepped, 1.0)
    for each in found:
        each["p_holm"] = math.nan
    for each, p in zip(rest, corrected.tolist(), strict=True):
        each["p_holm"] = p
