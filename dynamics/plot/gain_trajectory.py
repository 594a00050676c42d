"""When updates went further along informative directions than a gradient would: the gain over the steps."""

from __future__ import annotations

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_gains, first_and_last, legend_below
from dynamics.plot.select import chosen, group, of_block, variable_of, write_title
from dynamics.plot.style import canvas, describe, figure_of, say_nothing_to_draw, step_axis
from dynamics.schema import GLOBAL


def gain_trajectory(
    data: xr.DataTree | xr.Dataset, *, block: str = GLOBAL, k: int | None = None, ax: Axes | None = None
) -> Figure:
    """The update's share in the k leading directions over a fresh gradient's, at each step, with 95 % intervals.

    Filled where the gain lies above 1 with its interval, uncentred and centred. Of many steps some are so by chance.

    Args:
        data: The result of one run, or its ``/concentration`` group.
        block: A matrix, or ``"global"``.
        k: Number of leading directions; by default the largest that has a gain.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the block or k is not in the result.

    Example: ``plot.gain_trajectory(dynamics.open_run("runs/imax"), k=4)``
    """
    concentration = group(data, "concentration")
    chosen(concentration, "gain", block=block)
    gains = variable_of(concentration, "gain").sel(block=block)
    known = gains["k"].values[gains.notnull().any("step").values]
    k = int(concentration["k"].values[-1] if not known.size else known[-1]) if k is None else k
    chosen(concentration, "gain", k=k)
    here = concentration.sel(block=block, k=k)
    words = f"gain over a gradient, {k} leading direction{'s' if k > 1 else ''}"
    with canvas(ax) as axes:
        write_title(axes, words, block)
        if known.size:
            steps = here["step"].values
            span = float(steps[-1] - steps[0]) or 1.0
            draw_gains(axes, here, (steps - 0.008 * span, steps + 0.008 * span))
            margin = 0.05 if len(steps) > 1 else 0.3
            axes.set_xlim(steps[0] - margin * span, steps[-1] + margin * span)
            step_axis(axes, steps.tolist())
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "no values: see the findings")
    figure = figure_of(axes)
    if ax is None:
        ends = first_and_last(here["gain"])
        said = f"Points over optimizer steps with intervals. The gain is {ends}." if ends else "No step has a value."
        describe(figure, words + of_block(block), said)
    return figure
