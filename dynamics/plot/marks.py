"""Median and quartiles over matrices, over the steps: what the curves of a page have in common.

A line with its intervals, visible also where a point stands alone.

Gains of an update over a fresh gradient, with their intervals, and which of them are proven.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from dynamics.plot.style import COLOURS, MARKERS, NULL_COLOUR, figure_of, logarithmic

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


#: Ends of an interval further from every gain than this factor are cut off: they would hide the rest.
_FAR = 8.0
#: Suffix of the variables, colour, marker and label of both kinds of gain.
_KINDS = (("", COLOURS[0], "o", "gain, 95 % interval"), ("_centred", COLOURS[1], "s", "of the centred Fisher"))


def draw_gains(axes: Axes, here: xr.Dataset, places: tuple[np.ndarray, np.ndarray]) -> None:
    """Both gains side by side on a logarithmic axis; filled where the result calls the update concentrated.

    Args:
        axes: Where.
        here: ``gain``, ``gain_low``, ``gain_high``, the same ``…_centred``, and ``concentrated``, of one dimension.
        places: On the horizontal axis: of the gains, and of the centred ones beside them.
    """
    # Stored with gaps, a flag is a number or NaN.
    proven = np.asarray(here["concentrated"].values, dtype=np.float64) == 1
    axes.axhline(1, color="#444444", linestyle="--", linewidth=1.2, label="as a fresh gradient")
    for at, (suffix, colour, marker, label) in zip(places, _KINDS, strict=True):
        gain, low, high = (here[f"gain{end}{suffix}"].values for end in ("", "_low", "_high"))
        known = np.isfinite(gain) & (gain > 0)
        bottom, top = axes_limits(here)
        axes.vlines(at[known], np.maximum(low, bottom / 2)[known], np.minimum(high, top * 2)[known], color=colour)
        axes.plot(at[known], gain[known], marker, color=colour, markerfacecolor="white", markersize=6, label=label)
        if (known & proven).any():
            axes.plot(at[known & proven], gain[known & proven], marker, color=colour, markersize=6)
    if proven.any():
        axes.plot([], [], "o", color="#444444", markersize=6, label="filled: both above 1")
    axes.set_ylim(*axes_limits(here))
    logarithmic(axes)
    axes.set_ylabel("gain")


def axes_limits(here: xr.Dataset) -> tuple[float, float]:
    """A frame around 1, all gains, and as much of their intervals as leaves those visible."""
    gains = np.concatenate([here[f"gain{suffix}"].values for suffix, *_ in _KINDS])
    ends = np.concatenate([here[f"gain_{end}{suffix}"].values for end in ("low", "high") for suffix, *_ in _KINDS])
    gains = np.append(gains[np.isfinite(gains) & (gains > 0)], 1.0)
    reach = np.clip(np.append(ends[np.isfinite(ends)], gains), gains.min() / _FAR, gains.max() * _FAR)
    return float(reach.min() / 1.15), float(reach.max() * 1.15)
