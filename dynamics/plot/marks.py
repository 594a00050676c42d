"""Marks that several plots share: lines with intervals, the null's band, gains, and the legend below the axes."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from dynamics.plot.style import COLOURS, MARKERS, NULL_COLOUR, figure_of, logarithmic, without_mathematics
from dynamics.schema import QUANTILES

#: Markers of more points than this would look like a thick line.
_MOST_MARKERS = 40
#: Entries of a legend that fit in one row.
_ONE_ROW = 3
#: Longer entries, in characters, leave room for only two columns.
_LONG = 24
#: The ends of an interval are cut off beyond this factor from all gains, which they would otherwise squeeze together.
_FAR = 8.0
#: Variable, suffix, colour, marker and label of each kind of gain; the last only where the optimizer is known.
_GAINS = (
    ("gain", "", COLOURS[0], "o", "gain, 95 % interval"),
    ("gain", "_centred", COLOURS[1], "s", "gain, centred Fisher"),
    ("gain_optimizer", "", COLOURS[2], "D", "gain over a step of the optimizer"),
)


def draw_quartiles(axes: Axes, quantiles: xr.DataArray, number: int, label: str) -> None:
    """Draw the median over matrices as a line, and the quartiles as a band.

    Args:
        axes: Where to draw.
        quantiles: ``(step, quantile)`` with the quantiles 0.25, 0.5 and 0.75.
        number: Position among the figure's lines; it chooses colour and marker.
        label: Of the median, in the legend.
    """
    low, middle, high = (quantiles.sel(quantile=quantile).values for quantile in QUANTILES)
    draw_interval(axes, quantiles["step"].values, (middle, low, high), number, label, "quartiles")


def draw_interval(
    axes: Axes, x: np.ndarray, values: tuple[np.ndarray, np.ndarray, np.ndarray], number: int, label: str, interval: str
) -> None:
    """Draw a line with a band from the low to the high ends; a point without neighbours gets a bar.

    Args:
        axes: Where to draw.
        x: Positions on the horizontal axis, ascending.
        values: The numbers, their low ends and their high ends; each may be NaN.
        number: Position among the figure's lines; it chooses colour and marker.
        label: Of the line, in the legend; a label that starts with an underscore is left out.
        interval: Of the band, in the legend.
    """
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    middle, low, high = values
    finite = np.isfinite(middle)
    marked = finite if finite.sum() <= _MOST_MARKERS else without_neighbours(finite)
    axes.plot(x, middle, color=colour, marker=marker, markevery=marked.tolist(), label=label, zorder=3)
    bounded = np.isfinite(low) & np.isfinite(high)
    alone = without_neighbours(bounded)
    if (bounded & ~alone).any():
        axes.fill_between(x, low, high, where=bounded.tolist(), color=colour, alpha=0.18, linewidth=0, label=interval)
    if alone.any():
        of_bars = interval if (alone == bounded).all() else "_"
        axes.vlines(x[alone], low[alone], high[alone], color=colour, alpha=0.5, linewidth=3, label=of_bars)


def without_neighbours(present: np.ndarray) -> np.ndarray:
    """Return which points stand alone between gaps: no line reaches them, so they need a marker or a bar.

    >>> without_neighbours(np.array([True, False, True, True])).tolist()
    [True, False, False, False]
    """
    padded = np.pad(present, 1)
    return present & ~padded[:-2] & ~padded[2:]


def draw_band(axes: Axes, steps: np.ndarray, low: np.ndarray, high: np.ndarray, label: str) -> None:
    """Draw the null's band; at a single step a bar, since a band of one step has no width."""
    finite = np.isfinite(low) & np.isfinite(high)
    if finite.sum() == 1:
        middle = (low + high)[finite] / 2
        reach = (high - low)[finite] / 2
        axes.errorbar(steps[finite], middle, reach, color=NULL_COLOUR, capsize=5, fmt="none", label=label)
    elif finite.any():
        # A band may be thinner than a pixel: its edge keeps it visible.
        axes.fill_between(steps, low, high, facecolor=NULL_COLOUR, edgecolor=NULL_COLOUR, alpha=0.45, label=label)


def has_optimizer(shares: xr.Dataset) -> bool:
    """Return whether there is a null of the optimizer, other than the gradient's."""
    if "gain_optimizer" not in shares:
        return False
    beside, gain = shares["gain_optimizer"].values, shares["gain"].values
    return bool((np.isfinite(beside) & (beside != gain)).any())


def draw_gains(axes: Axes, gains: xr.Dataset, x: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """Draw the gains side by side on a logarithmic axis, filled where the result calls the update concentrated.

    Args:
        axes: Where to draw.
        gains: ``gain``, ``gain_low``, ``gain_high``, the same ``…_centred``, and ``concentrated``, of one dimension;
            those of ``gain_optimizer`` where they are known.
        x: Positions on the horizontal axis: of the gains, of the centred ones, and of those over the optimizer.
    """
    # A flag that is stored with gaps is a number or NaN.
    flags = {
        name: np.asarray(gains[flag].values, dtype=np.float64) == 1
        for name, flag in (("gain", "concentrated"), ("gain_optimizer", "concentrated_optimizer"))
        if flag in gains
    }
    bottom, top = gain_limits(gains)
    null = "its null" if has_optimizer(gains) else "a fresh gradient"
    axes.axhline(1, color="#444444", linestyle="--", linewidth=1.2, label=f"as {null}")
    for at, (name, suffix, colour, marker, label) in zip(x, _GAINS, strict=True):
        if name == "gain_optimizer" and not has_optimizer(gains):
            continue
        gain, low, high = (gains[f"{name}{end}{suffix}"].values for end in ("", "_low", "_high"))
        drawn = np.isfinite(gain) & (gain > 0)
        filled = drawn & flags[name]
        axes.vlines(at[drawn], np.maximum(low, bottom / 2)[drawn], np.minimum(high, top * 2)[drawn], color=colour)
        axes.plot(at[drawn], gain[drawn], marker, color=colour, markerfacecolor="white", markersize=6, label=label)
        if filled.any():
            axes.plot(at[filled], gain[filled], marker, color=colour, markersize=6)
    if any(flag.any() for flag in flags.values()):
        axes.plot([], [], "o", color="#444444", markersize=6, label="filled: both above 1")
    axes.set_ylim(bottom, top)
    logarithmic(axes)
    axes.set_ylabel(f"Gain over {null}")


def gain_limits(gains: xr.Dataset) -> tuple[float, float]:
    """Return limits that hold 1, all gains, and as much of their intervals as leaves the gains readable."""
    drawn = [kind for kind in _GAINS if kind[0] == "gain" or has_optimizer(gains)]
    values = np.concatenate([gains[f"{name}{suffix}"].values for name, suffix, *_ in drawn])
    ends = np.concatenate(
        [gains[f"{name}_{end}{suffix}"].values for end in ("low", "high") for name, suffix, *_ in drawn]
    )
    values = np.append(values[np.isfinite(values) & (values > 0)], 1.0)
    reach = np.clip(np.append(ends[np.isfinite(ends)], values), values.min() / _FAR, values.max() * _FAR)
    return float(reach.min() / 1.15), float(reach.max() * 1.15)


def legend_below(axes: Axes, distance: float = 0.2) -> None:
    """Put the legend below the axes, where it hides no point; entries that several lines share come once, and last.

    Names from files are drawn as they are.

    Args:
        axes: With labelled lines.
        distance: From the axes, over their height.
    """
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    ordered = sorted(entries, key=lambda label: labels.count(label) > 1)
    legend = axes.legend(
        [entries[label] for label in ordered],
        ordered,
        loc="upper center",
        bbox_to_anchor=(0.5, -distance),
        # A fourth entry would stand alone in a row of three.
        ncols=2 if len(ordered) == 4 or (len(ordered) > _ONE_ROW and max(map(len, ordered)) > _LONG) else 3,
        columnspacing=1.0,
        handlelength=1.4,
    )
    without_mathematics(legend.get_texts())
    if len(ordered) > _ONE_ROW:
        # A second row changes which ticks there are, and with them the room their labels need: lay out once more.
        figure_of(axes).draw_without_rendering()


def first_and_last(values: xr.DataArray) -> str:
    """Return the first and the last finite number over steps in words, ``""`` where there is none."""
    finite = values[np.isfinite(values.values)]
    if not finite.size:
        return ""
    ends = [f"{float(finite[end]):.3g} at step {int(finite['step'][end]):,}" for end in (0, -1)]
    return ends[0] if finite.size == 1 else f"{ends[0]} and {ends[1]}"
