"""Median and quartiles over matrices, over the steps: what the curves of a page have in common."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from dynamics.plot.style import COLOURS, MARKERS, NULL_COLOUR, figure_of

#: Markers of more steps than this would be a thick line.
_MOST_MARKERS = 40


def draw_quartiles(axes: Axes, quantiles: xr.DataArray, number: int, label: str) -> None:
    """A line for the median, with a marker for each of few steps, and a band for the quartiles.

    Args:
        axes: Where.
        quantiles: ``(step, quantile)`` with the quantiles 0.25, 0.5 and 0.75.
        number: Which line of the figure it is: colour and marker.
        label: Of the median, in the legend.
    """
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    steps = quantiles["step"].values
    low, middle, high = (quantiles.sel(quantile=q).values for q in (0.25, 0.5, 0.75))
    known = np.isfinite(middle)
    # What stands alone between gaps has no line: without its marker it would not be seen.
    beside = np.pad(known, 1)
    alone = known & ~beside[:-2] & ~beside[2:]
    shown = known if known.sum() <= _MOST_MARKERS else alone
    axes.plot(steps, middle, color=colour, marker=marker, markevery=shown.tolist(), label=label, zorder=3)
    if known.sum() == 1:
        axes.vlines(steps, low, high, color=colour, alpha=0.5, linewidth=4, label="quartiles")
    elif known.any():
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label="quartiles")


def draw_band(axes: Axes, steps: np.ndarray, low: np.ndarray, high: np.ndarray, label: str) -> None:
    """The null's band; of a single step a bar."""
    known = np.isfinite(low) & np.isfinite(high)
    if known.sum() == 1:  # a band of one step has no width
        middle = (low + high)[known] / 2
        bar = (high - low)[known] / 2
        axes.errorbar(steps[known], middle, bar, color=NULL_COLOUR, capsize=5, fmt="none", label=label)
    elif known.any():
        # A band may be thinner than a pixel: its edge keeps it visible.
        axes.fill_between(steps, low, high, facecolor=NULL_COLOUR, edgecolor=NULL_COLOUR, alpha=0.45, label=label)


#: Entries of a legend that fit in one row.
_ONE_ROW = 3


def legend_below(axes: Axes) -> None:
    """A legend that hides no point; what several lines share is said once, after what is each one's own."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    shown = sorted(entries, key=lambda label: labels.count(label) > 1)
    axes.legend(
        [entries[label] for label in shown],
        shown,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=2 if len(shown) == 4 else 3,  # four in rows of three would leave one alone
        columnspacing=1.0,
        handlelength=1.4,
    )
    if len(shown) > _ONE_ROW:
        # A second row changes which ticks there are, and with them the room that their labels need: lay out once more.
        figure_of(axes).draw_without_rendering()


def first_and_last(middle: xr.DataArray) -> str:
    """The first and the last number of a line, for who cannot see it; ``""`` where there is none."""
    known = middle[np.isfinite(middle.values)]
    if not known.size:
        return ""
    ends = [f"{float(known[end]):.3g} at step {int(known['step'][end])}" for end in (0, -1)]
    return ends[0] if known.size == 1 else f"{ends[0]} and {ends[1]}"
