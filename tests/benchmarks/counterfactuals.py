"""How often interventions are right: whether a part lowers the loss, and pays more or less than its share of the norm.

python -m tests.benchmarks.counterfactuals [--sets 400] [--table parts]
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dynamics.fisher.samples import SampleGroups
from dynamics.intervention.effects import adjusted_p, effects
from tests.benchmarks.calibration import Row, main, share
from tests.dynamics.intervention.simulated import (
    CASES,
    agreeing_gradients,
    groups_of_two,
    outcome,
    small_gradient_step,
    tally,
)

_HEADINGS = (
    "c",
    "true share",
    "estimate",
    "of first order",
    "95 % intervals hold D_on / D_off / T / s",
    '"more than its norm" / "less"',
    '"lowers the loss"',
)


def parts(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """What is said of the leading part, with directions from other groups."""
    yield "the part in k directions of other groups", *_HEADINGS
    yield from _rows(rng, sets, cross_fitted=True)


def leakage(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """The same with directions and losses of the same samples."""
    yield "directions of the same samples", *_HEADINGS
    yield from _rows(rng, max(sets // 4, 1), cross_fitted=False)


def _rows(rng: np.random.Generator, sets: int, *, cross_fitted: bool) -> Iterator[Row]:
    for name, case in CASES.items():
        result = tally(case, sets, seed=int(rng.integers(1 << 30)), cross_fitted=cross_fitted)
        for position, k in enumerate(case(rng).k):

            def typical(values: np.ndarray, position: int = position) -> str:
                return f"{np.nanmedian(values[:, position]):.2f}"

            def rates(*flags: np.ndarray, position: int = position) -> str:
                return " / ".join(f"{np.nanmean(column[:, position]):.3f}" for column in flags)

            yield (
                f"{name}, k = {k}",
                typical(result.captured),
                typical(result.true_share),
                typical(result.share),
                typical(result.first_order_share),
                rates(result.holds_on, result.holds_off, result.holds_excess, result.holds_share),
                rates(result.more, result.less),
                rates(result.lowers),
            )


def halves(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often T is called above or below 0 where it is 0, by either standard error."""
    yield "T ≠ 0 called where T = 0", "k", "jackknife over groups alone", "with the variance between splits"
    labels = groups_of_two(256)
    for name, case in (("gradient step", small_gradient_step), ("gradients that agree", agreeing_gradients)):
        false = np.array([_differs(outcome(case(rng), labels, rng).excess, labels) for _ in range(sets)])
        for position, k in enumerate(case(rng).k):
            yield name, str(k), *(share(column) for column in false[:, :, position].T)


def _differs(excess: np.ndarray, labels: SampleGroups) -> list[np.ndarray]:
    """Whether T's interval excludes 0 for each k: of the mean over splits, and of the splits."""
    intervals = effects(excess.mean(0), labels), effects(excess, labels)
    return [((interval.low > 0) | (interval.high < 0))[:, 0] for interval in intervals]


def families(rng: np.random.Generator, sets: int) -> Iterator[Row]:
    """How often any of 15 tests, of 5 numbers of directions and 3 tasks, has an adjusted p ≤ 0.05."""
    yield "any p ≤ 0.05 of 15 null tests", "10 groups (Bonferroni)", "24 groups", "48 groups", "128 groups"
    for law in ("normal", "Student's t, 3 degrees of freedom", "exponential, centred"):
        row = []
        for groups in (10, 24, 48, 128):
            labels = SampleGroups(np.arange(groups), _tasks(groups))
            p_values = (adjusted_p(_values(rng, law, groups), labels).min() for _ in range(sets))
            row.append(share(np.array([p <= 0.05 for p in p_values])))
        yield law, *row
    labels = SampleGroups(np.repeat(np.arange(128), 2), np.repeat(_tasks(128), 2, axis=0))
    false = []
    for _ in range(sets):
        drawn = outcome(small_gradient_step(rng, (1, 2, 4, 8, 16)), labels, rng)
        false.append(adjusted_p(drawn.excess, labels).min() <= 0.05)
    yield "T of a small gradient step", "", "", "", share(np.array(false))


def _tasks(groups: int) -> np.ndarray:
    """All samples, and each of two tasks that share no group."""
    first = np.arange(groups) % 2 == 0
    return np.stack([np.ones(groups, dtype=bool), first, ~first], axis=1)


def _values(rng: np.random.Generator, law: str, groups: int) -> np.ndarray:
    """Five correlated numbers of each group, of mean 0."""
    draws = {
        "normal": lambda size: rng.standard_normal(size),
        "exponential, centred": lambda size: rng.exponential(size=size) - 1,
    }.get(law, lambda size: rng.standard_t(3, size))
    return np.cumsum(draws((5, groups)), axis=0)


#: Each gives a table: headings first, then its rows.
TABLES = {"parts": parts, "leakage": leakage, "halves": halves, "families": families}

if __name__ == "__main__":
    main(TABLES, __doc__, sets=400)
