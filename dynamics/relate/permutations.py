"""Permutations of whole runs: all of them where there are few, else random ones; and the p-values that follow.

Every table has what was observed as its first row, so that p = share of rows at least as extreme is k/n! where all are
listed, and (b + 1)/(B + 1) where B are random (Phipson & Smyth 2010): it is never 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, permutations, product

import numpy as np
from jaxtyping import Bool, Float, Int

#: Level of every test of this room.
LEVEL = 0.05
#: Up to so many units all pairings are listed: 8! = 40 320.
EXACT_UNITS = 8
#: Random permutations where not all are listed.
DRAWS = 9999
#: Up to so many sign patterns or splits are listed.
_LISTED = 10_000
#: Statistics that differ by no more than rounding count as equal.
_ROUNDING = 1e-10


def pairings(units: int, *, draws: int = DRAWS, seed: int = 0) -> Int[np.ndarray, "draw unit"]:
    """Return ways to pair the units of one variable with those of another, the observed one first.

    >>> pairings(3).tolist()
    [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    >>> pairings(20, draws=99).shape
    (100, 20)
    """
    if units <= EXACT_UNITS:
        return np.array(list(permutations(range(units))), dtype=np.int64).reshape(-1, units)
    generator = np.random.default_rng(seed)
    rows = np.tile(np.arange(units), (draws + 1, 1))
    rows[1:] = generator.permuted(rows[1:], axis=1)
    return rows


def sign_flips(units: int, *, draws: int = DRAWS, seed: int = 0) -> Int[np.ndarray, "draw unit"]:
    """Return signs ±1 of paired differences, the observed ones (all +1) first.

    >>> sign_flips(2).tolist()
    [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    """
    if 2**units <= _LISTED:
        return np.array(list(product((1, -1), repeat=units)), dtype=np.int64).reshape(-1, units)
    signs = np.random.default_rng(seed).choice(np.array([1, -1]), size=(draws + 1, units))
    signs[0] = 1
    return signs


def splits(first: int, second: int, *, draws: int = DRAWS, seed: int = 0) -> Bool[np.ndarray, "draw unit"]:
    """Return which units are in the first group, the observed split (the first ``first`` ones) first.

    >>> splits(1, 2).tolist()
    [[True, False, False], [False, True, False], [False, False, True]]
    """
    units = first + second
    if math.comb(units, first) <= _LISTED:
        chosen = list(combinations(range(units), first))
    else:
        generator = np.random.default_rng(seed)
        chosen = [tuple(range(first)), *(tuple(generator.permutation(units)[:first]) for _ in range(draws))]
    rows = np.zeros((len(chosen), units), dtype=bool)
    np.put_along_axis(rows, np.array(chosen, dtype=np.int64).reshape(len(chosen), first), True, axis=1)
    return rows


@dataclass(frozen=True)
class PermutationTest:
    """p-values of several statistics under the same permutations; NaN where a statistic is NaN.

    Args:
        p_value: Two-sided, of each alone.
        p_familywise: Adjusted over all of them by the largest statistic of each permutation (max-T, Westfall & Young
            1993): the chance that any of them would be so large.
        smallest_p, smallest_familywise: The least that these could have been for these numbers, had they been paired
            otherwise.
        critical, critical_familywise: What |statistic| must exceed for ``p_value`` or ``p_familywise`` to be at most
            the level: estimate ± critical · standard error is the interval that belongs to the test.
    """

    p_value: Float[np.ndarray, "*sets"]
    p_familywise: Float[np.ndarray, "*sets"]
    smallest_p: Float[np.ndarray, "*sets"]
    smallest_familywise: Float[np.ndarray, "*sets"]
    critical: Float[np.ndarray, "*sets"]
    critical_familywise: Float[np.ndarray, "*sets"]


def permutation_test(statistics: Float[np.ndarray, "draw ..."], level: float = LEVEL) -> PermutationTest:
    """Test each statistic against its values under each permutation, the observed ones in the first row.

    All statistics are one family; they should be on one scale (correlations, t).

    >>> test = permutation_test(np.array([[3.0], [-3.0], [1.0], [2.0]]), level=0.5)
    >>> test.p_value, test.smallest_p, test.critical.round(6)
    (array([0.5]), array([0.5]), array([2.]))
    """
    sets = statistics.shape[1:]
    family = MaxT(level)
    family.add(statistics.reshape(len(statistics), -1))
    test = family.test()
    return PermutationTest(**{name: column.reshape(sets) for name, column in vars(test).items()})


class MaxT:
    """Permutation tests of one family whose statistics come in parts, so that memory does not grow with their number.

    Args:
        level: Of the critical values.

    >>> family = MaxT(level=0.5)
    >>> family.add(np.array([[3.0], [-3.0], [1.0], [2.0]]))
    >>> family.add(np.array([[1.0], [0.5], [4.0], [0.0]]))
    >>> family.test().p_familywise
    array([0.75, 1.  ])
    """

    def __init__(self, level: float = LEVEL) -> None:
        self.level = level
        self._largest: np.ndarray | None = None
        self._alone: list[np.ndarray] = []

    def add(self, statistics: Float[np.ndarray, "draw part"]) -> None:
        """Add statistics under the same permutations as all other parts."""
        size = np.abs(statistics)
        unknown = np.isnan(size[0])
        size = np.where(np.isnan(size), -np.inf, size)
        observed, most = _reached(size[0]), _reached(size.max(0))
        p_values = (size >= observed).mean(0), (size >= most).mean(0)
        row = np.array([observed, most, *p_values, _critical(size, self.level)])
        self._alone.append(np.where(unknown, np.nan, row))
        largest = size.max(1, initial=-np.inf)
        self._largest = largest if self._largest is None else np.maximum(self._largest, largest)

    def test(self, families: int = 1) -> PermutationTest:
        """Return the tests of all parts, in the order in which they were added.

        Args:
            families: Families that there are, by whose number what is familywise is adjusted (Bonferroni).
        """
        assert self._largest is not None
        observed, most, p_value, smallest_p, critical = np.concatenate(self._alone, axis=1)
        largest = np.sort(self._largest)
        unknown = np.isnan(observed)

        def share(limit: np.ndarray) -> np.ndarray:
            reached = len(largest) - np.searchsorted(largest, limit, side="left")  # counted: 1 − 0.95 is more than 0.05
            return np.where(unknown, np.nan, np.minimum(1.0, families * reached / len(largest)))

        over_all = np.where(unknown, np.nan, _critical(largest[:, None], self.level / families))
        return PermutationTest(p_value, share(observed), smallest_p, share(most), critical, over_all)


def _reached(size: np.ndarray) -> np.ndarray:
    """Return the size from which another statistic is at least as large, but for rounding."""
    return size - _ROUNDING * np.maximum(1.0, np.where(np.isfinite(size), size, 0.0))


def _critical(size: np.ndarray, level: float) -> np.ndarray:
    """Return the largest value that at least a share ``level`` of the rows, and one more, reaches."""
    rank = len(size) - 1 - math.floor(level * len(size) + _ROUNDING)
    critical = np.partition(size, rank, axis=0)[rank]
    return critical + 2 * _ROUNDING * np.maximum(1.0, np.where(np.isfinite(critical), critical, 0.0))


def false_discovery_rates(p_values: Float[np.ndarray, "*sets"]) -> Float[np.ndarray, "*sets"]:
    """Return q-values of Benjamini & Hochberg (1995) over all p-values that are not NaN.

    >>> false_discovery_rates(np.array([0.01, np.nan, 0.04]))
    array([0.02,  nan, 0.04])
    """
    finite = np.isfinite(p_values)
    ascending, places = np.unique(p_values[finite], return_inverse=True)
    not_above = np.bincount(places, minlength=len(ascending)).cumsum()  # of all p-values, for each that occurs
    at_each = ascending * (finite.sum() / not_above)
    rates = np.full(p_values.shape, np.nan)
    rates[finite] = np.minimum(np.minimum.accumulate(at_each[::-1])[::-1], 1.0)[places]
    return rates
