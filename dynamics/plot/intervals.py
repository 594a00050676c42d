"""A line with its intervals, visible also where a point stands alone."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes

from dynamics.plot.style import COLOURS, MARKERS

#: Markers of more points than this would be a thick line.


def draw_interval(
    axes: Axes, at: np.ndarray, ends: tuple[np.ndarray, np.ndarray, np.ndarray], number: int, label: str, interval: str
) -> None:
    """A line, and a band from the low to the high ends; of a point without neighbours a bar.

    Args:
        axes: Where.
        at: Positions on the horizontal axis, ascending.
        ends: The numbers, their low ends and their high ends; each may be NaN.
        number: Which line of the figure it is: colour and marker.
        label: Of the line, in the legend; one that starts with an underscore is not in it.
        interval: Of the band, in the legend.
    """
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    middle, low, high = ends
    alone = without_neighbours(np.isfinite(middle))
    shown = np.isfinite(middle) if np.isfinite(middle).sum() <= _MOST_MARKERS else alone
    axes.plot(at, middle, color=colour, marker=marker, markevery=shown.tolist(), label=label, zorder=3)
    bounded = np.isfinite(low) & np.isfinite(high)
    alone = without_neighbours(bounded)
    if (bounded & ~alone).any():
        axes.fill_between(at, low, high, where=bounded.tolist(), color=colour, alpha=0.18, linewidth=0, label=interval)
    if alone.any():
        known = interval if (alone == bounded).all() else "_"
        axes.vlines(at[alone], low[alone], high[alone], color=colour, alpha=0.5, linewidth=3, label=known)


def without_neighbours(known: np.ndarray) -> np.ndarray:
    """What stands alone between gaps: it has no line.

    >>> without_neighbours(np.array([True, False, True, True])).tolist()
    [True, False, False, False]
    """
    beside = np.pad(known, 1)
    return known & ~beside[:-2] & ~beside[2:]
