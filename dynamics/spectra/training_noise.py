r"""Which singular directions of an update stand above what noisy steps alone would add up to.

Steps that are independent of each other add up in energy. A direction that nothing but gradient noise feeds has, after
T steps, at most

.. math:: T \cdot \operatorname{median}_t\; \sigma_i^2(\Delta_t) / \tau_t

with Δ_t the increments of the run, each of τ_t steps, and σ_i their i-th singular value: less where the loss pulls the
direction back, and about 1.5 times as much where the learning rate falls to 0 along a cosine, since the median is then
below the mean. A direction that training needs is fed in the same sense again and again, and ends above. One that was
learned within the first increments also ends above: the later ones, of which the median is, hold noise alone.

The ratio is one-sided. A needed direction can be below 1 where gradients are noisy, and is not told from noise then.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

#: Fewest increments from which noise is estimated.
FEWEST_INCREMENTS = 3
#: Fewest steps between checkpoints, in the median: within fewer, a momentum of 0.9 makes steps add up like a trend.
FEWEST_STEPS = 20
#: From this ratio on a direction is more than noise. The largest of noise alone was 5.4 in 1,620 simulated trainings
#: (``tests/adapters.py``), and up to 1 no more than noise.
ABOVE, NOISE = 6.0, 1.0
#: The states of an adapter's rank.
STATES = ("idle", "ends within", "used up", "unclear")
#: An adapter is idle from this share of its rank on.
IDLE = 0.5


def energy_above_noise(
    total: Float[np.ndarray, "matrix index"],
    increments: Float[np.ndarray, "interval matrix index2"],
    intervals: Sequence[int],
    steps: int,
) -> Float[np.ndarray, "matrix index"]:
    """Return σ² of each direction over what independent steps of the size of the increments would add up to.

    Args:
        total: Singular values of the update since the start, descending, padded with NaN.
        increments: Those of its increments, likewise.
        intervals: Steps of each increment.
        steps: Steps since the start.

    Returns:
        NaN where fewer than 3 increments of a matrix are known, the intervals are shorter than 20 steps in the median,
        or the increments are zero.

    >>> total, increments = np.array([[4.0, 1.0]]), np.ones((4, 1, 2))
    >>> energy_above_noise(total, increments, [50] * 4, 200)
    array([[4.  , 0.25]])
    """
    count = total.shape[1]
    if len(intervals) < FEWEST_INCREMENTS or np.median(intervals) < FEWEST_STEPS:
        return np.full(total.shape, np.nan)
    aligned = np.full((*increments.shape[:2], count), np.nan)
    aligned[..., : increments.shape[2]] = increments[..., :count]
    rate = aligned**2 / np.asarray(intervals, dtype=np.float64)[:, None, None]
    is_enough = np.isfinite(rate).sum(0) >= FEWEST_INCREMENTS
    noise = np.full(total.shape, np.nan)
    noise[is_enough] = steps * np.nanmedian(rate[:, is_enough], axis=0)
    return np.divide(total**2, noise, out=np.full(total.shape, np.nan), where=noise > 0)


def states_of_rank(
    rank: Float[np.ndarray, " matrix"],
    needed: Float[np.ndarray, " matrix"],
    above_noise: Float[np.ndarray, "matrix index"],
) -> list[str]:
    """Return how each adapter uses its rank, as one of ``STATES``.

    - ``used up``: its last direction stands above noise, and half of its rank does not hold 99 % of the energy. A
      larger rank may hold more; that the rank is just right looks the same;
    - ``idle``: half of its rank or less holds 99 % of the energy, and the last direction does not stand above noise;
    - ``ends within``: it is not idle, its first direction stands above noise, and its last one is no more than noise;
    - ``unclear``: none of these is shown, or half of it holds the energy and the rest is no noise.

    Args:
        rank: Directions that the adapter has.
        needed: Fewest directions that hold 99 % of its energy.
        above_noise: See :func:`energy_above_noise`.

    >>> above = np.array([[90.0, 80.0, 0.1, 0.1], [90.0, 80.0, 70.0, 60.0], [90.0, 80.0, 70.0, 0.2]])
    >>> states_of_rank(np.full(3, 4.0), np.array([2.0, 4.0, 4.0]), above)
    ['idle', 'used up', 'ends within']
    """
    states = []
    for directions, energy, ratios in zip(rank.tolist(), needed.tolist(), above_noise.tolist(), strict=True):
        last = ratios[int(directions) - 1]
        is_half = directions > 1 and energy <= IDLE * directions
        if last >= ABOVE:
            states.append("unclear" if is_half else "used up")
        elif is_half:
            states.append("idle")
        elif ratios[0] >= ABOVE and last <= NOISE:
            states.append("ends within")
        else:
            states.append("unclear")
    return states
