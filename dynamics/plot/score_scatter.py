"""A measure against a score, each run a line through its steps."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import legend_below
from dynamics.plot.select import related
from dynamics.plot.style import COLOURS, canvas, describe, figure_of, say_nothing_to_draw, shorten, without_mathematics

#: More runs than this share one legend entry.
_NAMED = 6


def score_scatter(
    data: xr.DataTree | xr.Dataset, *, measure: str | None = None, task: str | None = None, ax: Axes | None = None
) -> Figure:
    """A measure against a task's score as it was given, runs joined over steps; the newest step has the large mark.

    What runs have in common over steps (both move with time) shows as parallel lines, and is no association.

    Args:
        data: A result with ``/association``, or that group.
        measure: Which; by default the one named before looking.
        task: Which; by default the first that has scores.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no association, or no such measure or task.

    Example: ``plot.score_scatter(dynamics.open_run("comparison"), task="vqa/accuracy")``
    """
    found = related(data, "association")
    measure = str(found.attrs["headline"]) if measure is None else measure
    known = [str(name) for name in found["scored_task"].values]
    task = known[0] if task is None else task
    for what, name, names in (("measure", measure, found["measure"].values), ("task", task, known)):
        if name not in names:
            raise ValueError(f"Expected a {what} of the association, got {name!r}. There are: {', '.join(names)}.")
    x, y = found["measure_value"].sel(measure=measure), found["score"].sel(scored_task=task)
    both = np.isfinite(x.values) & np.isfinite(y.values)
    runs = [run for run, there in zip(found["run"].values, both, strict=True) if there.any()]
    with canvas(ax) as axes:
        for number, run in enumerate(runs):
            there = both[found["run"].values.tolist().index(run)]
            across, up = x.sel(run=run).values[there], y.sel(run=run).values[there]
            colour = COLOURS[number % len(COLOURS)] if len(runs) <= _NAMED else COLOURS[0]
            label = shorten(str(run), 24) if len(runs) <= _NAMED else "" if number else f"{len(runs)} runs"
            axes.plot(across, up, color=colour, alpha=0.45, linewidth=1.0)
            axes.plot(across[-1:], up[-1:], "o", color=colour, label=label or "_")
        if runs:
            axes.set_xlabel(shorten(measure, 50))
            axes.set_ylabel(shorten(task, 40))
            legend_below(axes)
            without_mathematics([axes.xaxis.label, axes.yaxis.label, *axes.get_legend().get_texts()])  # type: ignore[union-attr]
        else:
            say_nothing_to_draw(axes, "no step has both")
        axes.set_title("measure and score, runs over steps")
    figure = figure_of(axes)
    if ax is None:
        describe(figure, f"{measure} and {task}", f"A line for each of {len(runs)} runs, over steps.")
    return figure
