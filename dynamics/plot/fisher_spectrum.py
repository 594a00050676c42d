"""Eigenvalues of the Fisher at one step."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynamics.plot.marks import draw_interval, legend_below
from dynamics.plot.select import axis_label, chosen, group
from dynamics.plot.style import figure_of, logarithmic, panel, say_nothing_to_draw, shorten
from dynamics.schema import ALL, GLOBAL


def fisher_spectrum(
    data: xr.DataTree | xr.Dataset,
    *,
    block: str = GLOBAL,
    task: str = ALL,
    step: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the eigenvalues of the Fisher, largest first, with their intervals, on a logarithmic axis.

    There are at most as many as samples. Large ones are too large in expectation and small ones too small; the
    interval shows how they vary between draws of the samples, not how far they are from those of infinitely many.
    Zeros have no place on a logarithmic axis; the legend gives their number.

    Args:
        data: The result of one run, or its ``/fisher`` group.
        block: A matrix, or ``"global"``.
        task: A task, or ``"all"``.
        step: By default the last one that has eigenvalues.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the block, the task or the step is not in the result.

    Example: ``plot.fisher_spectrum(dynamics.open_run("runs/imax"), step=500)``
    """
    fisher = chosen(group(data, "fisher"), "eigenvalue", step=step, block=block, task=task)
    values, low, high = (fisher[f"eigenvalue{end}"].values for end in ("", "_low", "_high"))
    positive, zeros = values > 0, int((values == 0).sum())
    of_task = "" if task == ALL else f", {shorten(task)}"
    title = f"eigenvalues of the Fisher, step {int(fisher['step']):,}{of_task}"
    with panel(ax, title, _description(values[positive]), block=block) as axes:
        if positive.any():
            label = "plug-in" + (f" ({zeros} zeros not drawn)" if zeros else "")
            ends = (values[positive], low[positive], high[positive])
            draw_interval(axes, fisher["index"].values[positive] + 1, ends, 0, label, "95 % interval, without bias")
            logarithmic(axes)
            axes.set_xlim(left=0.5)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
            axes.set_xlabel("Index, largest first")
            axes.set_ylabel(axis_label(fisher["eigenvalue"]))
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "No eigenvalue above zero")
    return figure_of(axes)


def _description(values: np.ndarray) -> str:
    if not values.size:
        return "No eigenvalue is above zero."
    return f"{values.size} eigenvalues on a logarithmic axis, from {values[0]:.3g} down to {values[-1]:.3g}."
