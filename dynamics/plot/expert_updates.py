"""Who was trained: the update of each expert over its load."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import legend_below
from dynamics.plot.select import axis_label, group
from dynamics.plot.style import COLOURS, MARKERS, figure_of, panel, say_nothing_to_draw, shorten
from dynamics.routing.dataset import at_step
from dynamics.text import counted, number

#: Layers with a mark of their own.
_MOST_LAYERS = 6


def expert_updates(data: xr.DataTree | xr.Dataset, *, step: int | None = None, ax: Axes | None = None) -> Figure:
    """Draw the norm of each expert's increment over its load, by layer; the dashed line is a uniform load.

    Args:
        data: The result of one run, or its ``/routing`` group.
        step: A step with routing; the last one by default.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the result has no routing, or none of that step.

    Example: ``plot.expert_updates(dynamics.open_run("runs/imax"))``
    """
    routing = at_step(group(data, "routing"), step)
    load = routing["load"].values * routing["experts"].values[:, None]
    norm = routing["update_norm"].values
    drawn = np.isfinite(load) & np.isfinite(norm)
    layers = np.flatnonzero(drawn.any(-1))
    title = f"Increment of each expert over its load at step {int(routing['step']):,}"
    with panel(ax, title, _description(routing, drawn)) as axes:
        if not len(layers):
            say_nothing_to_draw(axes, "No expert has a load and an increment of its own")
            return figure_of(axes)
        for order, row in enumerate(layers.tolist()):
            shown = order if len(layers) <= _MOST_LAYERS else 0
            name = str(routing["layer"].values[row]) if len(layers) <= _MOST_LAYERS else "experts of all layers"
            axes.plot(
                load[row][drawn[row]],
                norm[row][drawn[row]],
                MARKERS[shown % len(MARKERS)],
                color=COLOURS[shown % len(COLOURS)],
                alpha=0.8,
                label=f" {shorten(name)}",
            )
        axes.axvline(1, color="#444444", linestyle="--", linewidth=1.0)
        axes.set_xlim(0, 1.05 * max(load[drawn].max(), 1.0))
        axes.set_ylim(0, 1.08 * norm[drawn].max() or 1.0)
        axes.set_xlabel("Load (1: uniform)")
        axes.set_ylabel(axis_label(routing["update_norm"]))
        legend_below(axes)
    return figure_of(axes)


def _description(routing: xr.Dataset, drawn: np.ndarray) -> str:
    if not drawn.any():
        return "There is no value."
    correlation = routing["load_update_correlation"].values
    correlation = correlation[np.isfinite(correlation)]
    words = f"; rank correlations from {number(correlation.min(), 2)} to {number(correlation.max(), 2)}"
    return (
        f"Points of {counted(int(drawn.sum()), 'expert')} in {counted(int(drawn.any(-1).sum()), 'layer')}"
        f"{words if len(correlation) else ''}."
    )
