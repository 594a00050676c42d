"""Random halves of the groups: directions are found in one half and judged on the other."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int

#: Number of random splits, each used in both directions.
SPLITS = 4


def half_splits(
    group: Int[np.ndarray, " sample"], splits: int, seed: int
) -> Iterator[tuple[Int[np.ndarray, " first"], Int[np.ndarray, " second"]]]:
    """Samples of one half of the groups and of the other; each split comes twice, the second time the other way round.

    >>> halves = list(half_splits(np.array([0, 0, 1, 1]), 1, seed=0))
    >>> sorted(tuple(first.tolist()) for first, _ in halves)
    [(0, 1), (2, 3)]
    """
    codes = np.unique(group)
    generator = np.random.default_rng(seed)
    for _ in range(splits):
        first = np.isin(group, generator.permutation(codes)[: len(codes) // 2])
        for chosen in (first, ~first):
            yield np.flatnonzero(chosen), np.flatnonzero(~chosen)
