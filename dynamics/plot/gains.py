"""Gains of an update over a fresh gradient, with their intervals, and which of them are proven."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes

from dynamics.plot.style import COLOURS, logarithmic

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
