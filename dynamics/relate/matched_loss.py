"""Measures at equal loss instead of equal step. Descriptive: the loss is itself a consequence of the recipe."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def common_levels(loss: Float[np.ndarray, "run step"], count: int = 5) -> Float[np.ndarray, " level"]:
    """Losses that every run passes: evenly spaced inside what all have in common, falling; empty if nothing is.

    >>> common_levels(np.array([[3.0, 1.0], [2.0, 0.5]]), 3)
    array([1.75, 1.5 , 1.25])
    """
    known = loss[np.isfinite(loss).any(-1)]
    if not len(known):
        return np.empty(0)
    top, bottom = np.nanmax(known, axis=-1).min(), np.nanmin(known, axis=-1).max()
    return np.linspace(top, bottom, count + 2)[1:-1] if top > bottom else np.empty(0)


def at_loss(
    values: Float[np.ndarray, "step measure"], loss: Float[np.ndarray, " step"], levels: Float[np.ndarray, " level"]
) -> Float[np.ndarray, "level measure"]:
    """One run's measures where its loss first falls to each level, between steps by straight lines.

    NaN where it never does, or where a measure is missing on either side.

    >>> at_loss(np.array([[0.0], [10.0]]), np.array([2.0, 1.0]), np.array([1.5, 0.5]))
    array([[ 5.],
           [nan]])
    """
    found = np.full((len(levels), values.shape[1]), np.nan)
    steps = np.flatnonzero(np.isfinite(loss))
    for place, level in enumerate(levels):
        reached = steps[loss[steps] <= level]
        if not len(reached):
            continue
        after = int(reached[0])
        before = steps[steps < after]
        if not len(before):
            found[place] = values[after] if loss[after] == level else np.nan
            continue
        start = int(before[-1])
        share = (loss[start] - level) / (loss[start] - loss[after])
        found[place] = values[start] + share * (values[after] - values[start])
    return found
