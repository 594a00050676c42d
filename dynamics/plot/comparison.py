"""Groups of runs over steps: every run, and the median of each group."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import legend_below
from dynamics.plot.select import related, variable_of
from dynamics.plot.style import (
    COLOURS,
    MARKERS,
    figure_of,
    panel,
    say_nothing_to_draw,
    shorten,
    step_axis,
    without_mathematics,
)
from dynamics.text import counted


def comparison(data: xr.DataTree | xr.Dataset, *, measure: str | None = None, ax: Axes | None = None) -> Figure:
    """Draw a measure of each run over steps, one colour for each group, and the group's median.

    Args:
        data: A result with ``/comparison``, or that group.
        measure: Name of the measure; by default the headline measure.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no comparison, or no such measure.

    Example: ``plot.comparison(dynamics.open_run("comparison"), measure="increment/stable_rank")``
    """
    compared = related(data, "comparison")
    measures = [str(name) for name in variable_of(compared, "value")["measure"].values]
    measure = str(compared.attrs["headline"]) if measure is None else measure
    if measure not in measures:
        raise ValueError(f"Expected a measure of the comparison, got {measure!r}. There are: {', '.join(measures)}.")
    one = compared.sel(measure=measure)
    finite = np.isfinite(one["value"].values)
    statements = [str(statement) for statement in compared.attrs.get("statements", [])]
    description = " ".join([f"{measure}: lines over optimizer steps.", *statements[:1]])
    with panel(ax, "runs by group", description) as axes:
        without_mathematics([axes.set_ylabel(shorten(measure, 44))])
        if not finite.any():
            say_nothing_to_draw(axes, "No run has this measure")
            return figure_of(axes)
        for number, group in enumerate(one["group"].values):
            runs = one["run"].values[one["run_group"].values == group]
            colour = COLOURS[number % len(COLOURS)]
            for run in runs:
                _draw_line(axes, one["value"].sel(run=run), color=colour, alpha=0.35, linewidth=0.9)
            _draw_line(
                axes,
                one["group_median"].sel(group=group),
                color=colour,
                marker=MARKERS[number % len(MARKERS)],
                linewidth=2.2,
                label=f"{shorten(str(group), 24)}, median of {counted(len(runs), 'run')}",
            )
        axes.plot([], [], color="#444444", alpha=0.5, linewidth=0.9, label="single runs")
        step_axis(axes, one["step"].values[finite.any(0)].tolist())
        legend_below(axes)
    return figure_of(axes)


def _draw_line(axes: Axes, values: xr.DataArray, **style: Any) -> None:
    """Draw a line through the steps that have a value."""
    finite = np.isfinite(values.values)
    axes.plot(values["step"].values[finite], values.values[finite], **style)
