"""How many runs it would take."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int
from scipy import special

#: Level of every test of this room, and the power that ``units_needed`` aims at.
LEVEL, POWER = 0.05, 0.8
_REACH = float(special.ndtri(1 - LEVEL / 2) + special.ndtri(POWER))


def units_needed(
    estimate: Float[np.ndarray, "*sets"], error: Float[np.ndarray, "*sets"], units: Int[np.ndarray, "*sets"], least: int
) -> Float[np.ndarray, "*sets"]:
    """Units for 80 % power at the 5 % level, if the truth is as estimated: n·((1.96 + 0.84)·SE/estimate)².

    A planning number, as rough as the estimate: standard errors are taken to shrink with √n.

    Args:
        estimate: Of an effect whose null value is 0 (for correlations on Fisher's scale).
        error: Its standard error with ``units`` units.
        units: Units that it is from.
        least: Fewest units with which the test can reach the level at all.

    Returns:
        At least ``least``; NaN where the estimate or its error is not known, infinite for an estimate of 0.

    >>> units_needed(np.array([0.5]), np.array([0.25]), np.array([8]), 4)
    array([16.])
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.divide(error, np.abs(estimate))
    return np.asarray(np.where(np.isnan(ratio), np.nan, np.maximum(least, np.ceil(units * (_REACH * ratio) ** 2))))
