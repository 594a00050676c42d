"""The gain of updates over fresh gradients at each step: when updates favoured informative directions."""

from __future__ import annotations

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_gains, first_and_last, legend_below
from dynamics.plot.select import chosen, group, variable_of
from dynamics.plot.style import figure_of, panel, say_nothing_to_draw, step_axis
from dynamics.schema import GLOBAL
from dynamics.text import counted


def gain_trajectory(
    data: xr.DataTree | xr.Dataset, *, block: str = GLOBAL, k: int | None = None, ax: Axes | None = None
) -> Figure:
    """Draw the update's share in the k leading directions over a fresh gradient's, at each step, with 95 % intervals.

    Filled where the intervals of both gains, uncentred and centred, lie above 1. Of many steps some do so by chance.
    Beside them, where it is known, the gain over a fresh step of the optimizer.

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
    finite = variable_of(concentration, "gain").sel(block=block).notnull().any("step").values
    if k is None:
        k = int(concentration["k"].values[finite][-1] if finite.any() else concentration["k"].values[-1])
    chosen(concentration, "gain", k=k)
    gains = concentration.sel(block=block, k=k)
    ends = first_and_last(gains["gain"])
    description = f"Points over optimizer steps with intervals. The gain is {ends}." if ends else "No step has a value."
    title = f"gain over a fresh gradient, {counted(k, 'leading direction')}"
    with panel(ax, title, description, block=block) as axes:
        if finite.any():
            steps = gains["step"].values
            span = float(steps[-1] - steps[0]) or 1.0
            draw_gains(axes, gains, (steps - 0.008 * span, steps + 0.008 * span, steps + 0.024 * span))
            margin = 0.05 if len(steps) > 1 else 0.3
            axes.set_xlim(steps[0] - margin * span, steps[-1] + margin * span)
            step_axis(axes, steps.tolist())
            legend_below(axes)
        else:
            say_nothing_to_draw(axes)
    return figure_of(axes)
