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

#: Up to so many units all pairings are listed: 8! = 40 320.
EXACT_UNITS = 8
#: Random permutations where not all are listed.
DRAWS = 9999
#: Up to so many sign patterns or splits are listed.
_LISTED = 10_000
#: Statistics that differ by no more than rounding count as equal.
_ROUNDING = 1e-10


def pairings(units: int, *, draws: int = DRAWS, seed: int = 0) -> Int[np.ndarray, "draw unit"]:
    """Ways to pair the units of one variable with those of another, the observed one first.

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
    """Signs ±1 of paired differences, the observed ones (all +1) first.

    >>> sign_flips(2).tolist()
    [[1, 1], [1, -1], [-1, 1], [-1, -1]]
    """
    if 2**units <= _LISTED:
        return np.array(list(product((1, -1), repeat=units)), dtype=np.int64).reshape(-1, units)
    signs = np.random.default_rng(seed).choice(np.array([1, -1]), size=(draws + 1, units))
    signs[0] = 1
    return signs


def splits(first: int, second: int, *, draws: int = DRAWS, seed: int = 0) -> Bool[np.ndarray, "draw unit"]:
    """Which units are in the first group, the observed split (the first ``first`` ones) first.

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
        smallest_p: The least that ``p_value`` could have been for these numbers, had they been paired otherwise.
    """

    p_value: Float[np.ndarray, "*sets"]
    p_familywise: Float[np.ndarray, "*sets"]
    smallest_p: Float[np.ndarray, "*sets"]


def permutation_test(statistics: Float[np.ndarray, "draw ..."]) -> PermutationTest:
    """Two-sided p-values from statistics under each permutation, the observed ones in the first row.

    All statistics are one family; they should be on one scale (correlations, t).

    >>> test = permutation_test(np.array([[3.0], [-3.0], [1.0], [2.0]]))
    >>> test.p_value, test.smallest_p
    (array([0.5]), array([0.5]))
    """
    size = np.abs(statistics)
    unknown = np.isnan(size[0])
    size = np.where(np.isnan(size), -np.inf, size)
    reached = size[0] - _ROUNDING * np.maximum(1.0, np.where(unknown, 0.0, size[0]))
    largest = size.reshape(len(size), -1).max(1, initial=-np.inf).reshape(-1, *(1,) * (size.ndim - 1))
    most = size.max(0)
    near_most = most - _ROUNDING * np.maximum(1.0, np.where(unknown, 0.0, most))
    found = ((size >= reached).mean(0), (largest >= reached).mean(0), (size >= near_most).mean(0))
    return PermutationTest(*(np.where(unknown, np.nan, share) for share in found))
