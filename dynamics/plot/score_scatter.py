"""A measure against a score, each run a line through its steps."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import legend_below
from dynamics.plot.select import related
from dynamics.plot.style import COLOURS, figure_of, panel, say_nothing_to_draw, shorten, without_mathematics
from dynamics.text import counted

#: More runs than this share one legend entry.
_NAMED = 6


def score_scatter(
    data: xr.DataTree | xr.Dataset, *, measure: str | None = None, task: str | None = None, ax: Axes | None = None
) -> Figure:
    """Draw a measure against a task's score as it was given, a line for each run with a mark at its last step.

    Parallel lines only show that both change over time; that is no evidence of an association.

    Args:
        data: A result with ``/association``, or that group.
        measure: Name of the measure; by default the headline measure.
        task: Name of the task; by default the first that has scores.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no association, or no such measure or task.

    Example: ``plot.score_scatter(dynamics.open_run("comparison"), task="vqa/accuracy")``
    """
    group = related(data, "association")
    tasks = [str(name) for name in group["scored_task"].values]
    measure = str(group.attrs["headline"]) if measure is None else measure
    task = tasks[0] if task is None else task
    for what, name, names in (("measure", measure, group["measure"].values), ("task", task, tasks)):
        if name not in names:
            raise ValueError(f"Expected a {what} of the association, got {name!r}. There are: {', '.join(names)}.")
    values, scores = group["measure_value"].sel(measure=measure), group["score"].sel(scored_task=task)
    both = dict(zip(group["run"].values, np.isfinite(values.values) & np.isfinite(scores.values), strict=True))
    runs = [run for run, steps in both.items() if steps.any()]
    count = counted(len(runs), "run")
    description = f"{task} against {measure}: a line for each of {count}, over steps."
    with panel(ax, f"score and measure, {count}", description) as axes:
        if not runs:
            say_nothing_to_draw(axes, "No step has both")
            return figure_of(axes)
        for number, run in enumerate(runs):
            x, y = values.sel(run=run).values[both[run]], scores.sel(run=run).values[both[run]]
            colour = COLOURS[number % len(COLOURS)] if len(runs) <= _NAMED else COLOURS[0]
            label = shorten(str(run), 24) if len(runs) <= _NAMED else "_" if number else count
            axes.plot(x, y, color=colour, alpha=0.45, linewidth=1.0)
            axes.plot(x[-1:], y[-1:], "o", color=colour, label=label)
        without_mathematics([axes.set_xlabel(shorten(measure, 50)), axes.set_ylabel(shorten(task, 40))])
        legend_below(axes)
    return figure_of(axes)
