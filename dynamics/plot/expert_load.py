"""Which expert of which layer gets how many tokens."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynamics.plot.select import group
from dynamics.plot.style import COLOUR_MAP, MISSING_COLOUR, figure_of, panel, shorten, without_mathematics
from dynamics.routing.dataset import at_step
from dynamics.text import counted

#: Inches for a layer, and for the whole figure at most.
_ROW, _TALLEST = 0.2, 11.0
_MOST_LABELS = 40


def expert_load(data: xr.DataTree | xr.Dataset, *, step: int | None = None, ax: Axes | None = None) -> Figure:
    """Draw the load of each expert, layer × expert, in multiples of a uniform load; first layer on top.

    Cells of experts without a token have a cross. Grey: the layer has no such expert, or was not counted.

    Args:
        data: The result of one run, or its ``/routing`` group.
        step: A step with routing; the last one by default.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the result has no routing, or none of that step.

    Example: ``plot.expert_load(dynamics.open_run("runs/imax"))``
    """
    routing = at_step(group(data, "routing"), step)
    layers = [str(name) for name in routing["layer"].values]
    load = routing["load"].values * routing["experts"].values[:, None]
    finite = load[np.isfinite(load)]
    dead = np.argwhere(load == 0)
    title = f"Load of each expert at step {int(routing['step']):,}"
    with panel(ax, title, _description(load, dead), width=7.2, height=min(1.8 + _ROW * len(layers), _TALLEST)) as axes:
        image = axes.imshow(
            np.ma.masked_invalid(load),
            aspect="auto",
            interpolation="none",
            vmin=0.0,
            vmax=max(float(finite.max(initial=0.0)), 1.0),
            cmap=mpl.colormaps[COLOUR_MAP].with_extremes(bad=MISSING_COLOUR),
        )
        axes.grid(False)
        if len(dead):
            axes.plot(dead[:, 1], dead[:, 0], "x", color="white", markersize=4)
        keep = max(1, -(-len(layers) // _MOST_LABELS))
        axes.set_yticks(range(0, len(layers), keep), [shorten(name, 32) for name in layers[::keep]])
        axes.tick_params(axis="y", length=0)
        without_mathematics(axes.get_yticklabels())
        axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True))
        axes.set_xlabel("Expert")
        figure_of(axes).colorbar(image, ax=axes, fraction=0.05, pad=0.02).set_label("Load (1: uniform)")
    return figure_of(axes)


def _description(load: np.ndarray, dead: np.ndarray) -> str:
    finite = load[np.isfinite(load)]
    if not finite.size:
        return "There is no value."
    return (
        f"Heatmap of {counted(load.shape[0], 'layer')} and up to {counted(load.shape[1], 'expert')}, from "
        f"{finite.min():.3g} to {finite.max():.3g} times a uniform load; {counted(len(dead), 'expert')} without a "
        "token."
    )
