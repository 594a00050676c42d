"""How much of an update lies along the Fisher's leading directions, beside what chance and a gradient would give."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_gains, legend_below
from dynamics.plot.select import chosen, group, of_block, write_title
from dynamics.plot.style import (
    COLOURS,
    NULL_COLOUR,
    canvas,
    describe,
    doubling_axis,
    figure_of,
    say_nothing_to_draw,
)
from dynamics.schema import GLOBAL

_UPDATE, _GRADIENT = COLOURS[0], COLOURS[5]
_LEADING = "k leading directions of the Fisher"


def concentration(
    data: xr.DataTree | xr.Dataset,
    *,
    show: str = "share",
    block: str = GLOBAL,
    step: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The share of an update in the k leading informative directions with both nulls, or its gain over a gradient.

    Two comparisons, each with its own directions. Of all samples: the update beside a random direction. Of half of
    the groups: the update beside fresh gradients of the other half, of as many samples as are behind the update.

    Args:
        data: The result of one run, or its ``/concentration`` group.
        show: ``"share"``: shares of the squared norm and both nulls. ``"gain"``: the update's share over a fresh
            gradient's, uncentred and centred, with 95 % intervals; filled where both lie above 1.
        block: A matrix, or ``"global"``.
        step: By default the last one that has an update.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the block or the step is not in the result, or ``show`` is neither.

    Example: ``plot.concentration(dynamics.open_run("runs/imax"), show="gain")``
    """
    if show not in ("share", "gain"):
        raise ValueError(f"Expected show='share' or show='gain', got {show!r}.")
    what = {
        "share": ("captured", "share of the update", _draw_shares),
        "gain": ("gain", "gain over a gradient", _draw_gain),
    }
    variable, name, draw = what[show]
    here = chosen(group(data, "concentration"), variable, step=step, block=block)
    words = f"{name} in k leading directions, step {int(here['step']):,}"
    with canvas(ax) as axes:
        write_title(axes, words, block)
        if np.isfinite(here[variable].values).any():
            draw(axes, here)
            doubling_axis(axes, here["k"].values.tolist(), _LEADING)
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "no values: see the findings")
    figure = figure_of(axes)
    if ax is None:
        describe(figure, words + of_block(block), _words(here, show))
    return figure


def _draw_shares(axes: Axes, here: xr.Dataset) -> None:
    k = here["k"].values
    batch = float(here["null_batch"])
    of_samples = "" if np.isnan(batch) else f" of {batch:,.0f} samples"
    nulls: Mapping[str, tuple[str, str, str]] = {
        "null_isotropic": (NULL_COLOUR, "random direction", ":"),
        "null_gradient": (_GRADIENT, f"fresh gradient{of_samples}", "--"),
    }
    for name, (colour, label, line) in nulls.items():
        middle, low, high = (here[f"{name}{end}"].values for end in ("", "_low", "_high"))
        if np.isfinite(middle).any():
            axes.fill_between(k, low, high, facecolor=colour, edgecolor=colour, alpha=0.25, linewidth=0.8)
            axes.plot(k, middle, color=colour, linestyle=line, label=f"{label}, mean and 95 %")
    axes.plot(k, here["captured"].values, color=_UPDATE, marker="o", label="update, directions of all samples")
    if np.isfinite(split := here["captured_split"].values).any():
        axes.plot(
            k,
            split,
            color=_UPDATE,
            marker="s",
            markerfacecolor="white",
            linestyle="--",
            label="update, of half of them",
        )
    axes.set_ylabel("share of squared norm")
    axes.set_ylim(bottom=0)


def _draw_gain(axes: Axes, here: xr.Dataset) -> None:
    k = here["k"].values
    draw_gains(axes, here, (k * 0.97, k * 1.03))


def _words(here: xr.Dataset, show: str) -> str:
    k = here["k"].values
    known = np.flatnonzero(np.isfinite(here["captured" if show == "share" else "gain"].values))
    if not known.size:
        return "No k has a value."
    last = here.isel(k=int(known[-1]))
    if show == "share":
        return (
            f"Lines over k. In {k[known[-1]]} directions lie {float(last['captured']):.1%} of the update, "
            f"{float(last['null_isotropic']):.1%} of a random direction."
        )
    ends = f"{float(last['gain_low']):.3g} to {float(last['gain_high']):.3g}"
    return (
        f"Points over k with intervals. With {k[known[-1]]} directions the gain is {float(last['gain']):.3g} ({ends})."
    )
