"""p-values of many pairs at once: the same permutations of whole runs for all of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from dynamics.relate.correlation import paired
from dynamics.relate.pairs import Pair
from dynamics.relate.permutations import PermutationTest, pairings, permutation_test


def permutation_tests(pairs: Sequence[Pair], *, draws: int, seed: int) -> PermutationTest:
    """The tests of all pairs, ``[pair]``; NaN for a pair without products.

    Pairs of the same runs share their permutations, so that the largest correlation of each permutation adjusts all of
    them at once, however much measures and tasks resemble each other. Where pairs have different runs there are several
    such families, and their adjusted p-values are multiplied by the number of families (Bonferroni).
    """
    found = np.full((3, len(pairs)), np.nan)
    families = defaultdict(list)
    for place, pair in enumerate(pairs):
        if pair.products is not None:
            families[pair.grid.runs].append(place)
    for places in families.values():
        products = np.stack([_products(pairs[place]) for place in places])
        test = permutation_test(paired(products, pairings(products.shape[-1], draws=draws, seed=seed)))
        adjusted = np.minimum(1.0, len(families) * test.p_familywise)
        found[:, places] = test.p_value, adjusted, test.smallest_p
    return PermutationTest(*found)


def _products(pair: Pair) -> np.ndarray:
    assert pair.products is not None
    return pair.products


def false_discovery_rates(p_values: Float[np.ndarray, " pair"]) -> Float[np.ndarray, " pair"]:
    """q-values of Benjamini & Hochberg (1995) over all p-values that are known; NaN for the others.

    >>> false_discovery_rates(np.array([0.01, np.nan, 0.04]))
    array([0.02,  nan, 0.04])
    """
    from scipy.stats import false_discovery_control  # here: a second, which most analyses need not wait for

    known = np.isfinite(p_values)
    found = np.full(p_values.shape, np.nan)
    if known.any():
        found[known] = false_discovery_control(p_values[known])
    return found
