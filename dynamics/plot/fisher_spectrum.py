"""Eigenvalues of the Fisher at one step."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynamics.plot.marks import draw_interval, legend_below
from dynamics.plot.select import chosen, group, label_of, of_block, write_title
from dynamics.plot.style import canvas, describe, figure_of, logarithmic, say_nothing_to_draw, shorten
from dynamics.schema import ALL, GLOBAL


def fisher_spectrum(
    data: xr.DataTree | xr.Dataset,
    *,
    block: str = GLOBAL,
    task: str = ALL,
    step: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Eigenvalues of the Fisher, largest first, with their intervals, on a logarithmic axis.

    There are no more of them than samples, and the large ones are too large in expectation, the small ones too small:
    the interval says how they vary from sample to sample, not how far they are from those of infinitely many samples.
    Zeros have no place on a logarithmic axis: their number is in the legend.

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
    here = chosen(group(data, "fisher"), "eigenvalue", step=step, block=block, task=task)
    values, low, high = (here[f"eigenvalue{end}"].values for end in ("", "_low", "_high"))
    kept, zeros = values > 0, int((values == 0).sum())
    of_task = "" if task == ALL else f", {shorten(task)}"
    words = f"eigenvalues of the Fisher, step {int(here['step']):,}{of_task}"
    label = "plug-in" + (f" ({zeros} zeros not drawn)" if zeros else "")
    with canvas(ax) as axes:
        write_title(axes, words, block)
        if kept.any():
            ends = (values[kept], low[kept], high[kept])
            draw_interval(axes, here["index"].values[kept] + 1, ends, 0, label, "95 % interval, bias not included")
            logarithmic(axes)
            axes.set_xlim(left=0.5)
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
            axes.set_xlabel("eigenvalue, largest first")
            axes.set_ylabel(label_of(here["eigenvalue"]))
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "no eigenvalue above zero")
    figure = figure_of(axes)
    if ax is None:
        describe(figure, words + of_block(block), _words(values[kept]))
    return figure


def _words(values: np.ndarray) -> str:
    if not values.size:
        return "No eigenvalue is above zero."
    return f"{values.size} eigenvalues on a logarithmic axis, from {values[0]:.3g} down to {values[-1]:.3g}."
