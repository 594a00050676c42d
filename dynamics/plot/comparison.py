"""Groups of runs over steps: every run, and the median of each group."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import legend_below
from dynamics.plot.select import related, variable_of
from dynamics.plot.style import (
    COLOURS,
    MARKERS,
    canvas,
    describe,
    figure_of,
    say_nothing_to_draw,
    shorten,
    step_axis,
    without_mathematics,
)


def comparison(data: xr.DataTree | xr.Dataset, *, measure: str | None = None, ax: Axes | None = None) -> Figure:
    """A measure of each run over steps, runs of a group in one colour, and the group's median.

    Args:
        data: A result with ``/comparison``, or that group.
        measure: Which; by default the one named before looking.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no comparison, or no such measure.

    Example: ``plot.comparison(dynamics.open_run("comparison"), measure="increment/stable_rank")``
    """
    found = related(data, "comparison")
    known = [str(name) for name in variable_of(found, "value")["measure"].values]
    measure = str(found.attrs["headline"]) if measure is None else measure
    if measure not in known:
        raise ValueError(f"Expected a measure of the comparison, got {measure!r}. There are: {', '.join(known)}.")
    here = found.sel(measure=measure)
    steps = here["step"].values
    groups = [str(group) for group in here["group"].values]
    owner = [str(group) for group in here["run_group"].values]
    with canvas(ax) as axes:
        known_values = np.isfinite(here["value"].values)
        if known_values.any():
            for number, group in enumerate(groups):
                colour = COLOURS[number % len(COLOURS)]
                runs = [run for run, of in zip(here["run"].values, owner, strict=True) if of == group]
                for run in runs:
                    values = here["value"].sel(run=run).values
                    there = np.isfinite(values)
                    axes.plot(steps[there], values[there], color=colour, alpha=0.35, linewidth=0.9)
                middle = here["group_median"].sel(group=group).values
                there = np.isfinite(middle)
                marker = MARKERS[number % len(MARKERS)]
                label = f"{shorten(group, 24)}, median of {len(runs)} run{'s' if len(runs) != 1 else ''}"
                axes.plot(steps[there], middle[there], color=colour, marker=marker, linewidth=2.2, label=label)
            axes.plot([], [], color="#444444", alpha=0.5, linewidth=0.9, label="single runs")
            step_axis(axes, steps[known_values.any(0)].tolist())
            legend_below(axes)
            without_mathematics(axes.get_legend().get_texts())  # type: ignore[union-attr]
        else:
            say_nothing_to_draw(axes, "no run has this measure")
        without_mathematics([axes.set_title(shorten(measure, 60))])
    figure = figure_of(axes)
    if ax is None:
        statements = [str(text) for text in found.attrs.get("statements", [])]
        describe(figure, f"{measure} by group", f"Lines over optimizer steps. {' '.join(statements[:1])}")
    return figure
