"""Associations of measures with scores: a correlation for each measure and task, with its interval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import legend_below
from dynamics.plot.select import related, variable_of
from dynamics.plot.style import COLOURS, figure_of, panel, say_nothing_to_draw, shorten, without_mathematics
from dynamics.schema import ALL
from dynamics.text import counted

_LONGEST = 34
#: Inches: a taller figure takes hundreds of megabytes and cannot be read.
_TALLEST = 30.0


def association(
    data: xr.DataTree | xr.Dataset, *, tasks: Sequence[str] | None = None, ax: Axes | None = None
) -> Figure:
    """Draw the correlation of each measure with each task's score, with 95 % intervals; right of 0: better scores.

    Filled: significant, the headline measure by its own p-value, all others after correction for measures and tasks.
    Hollow marks are no evidence for or against an association.

    Args:
        data: A result with ``/association``, or that group.
        tasks: Names of tasks; by default four: the mean of all tasks, those with something significant, then the first.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no association, or no such task.

    Example: ``plot.association(dynamics.open_run("comparison"), tasks=["vqa/accuracy"])``
    """
    group = related(data, "association")
    names = [str(task) for task in variable_of(group, "coefficient")["task"].values]
    tasks = list(tasks) if tasks is not None else most_telling(group, 4)
    if unknown := [task for task in tasks if task not in names]:
        raise ValueError(f"Expected tasks of the association, got {unknown[0]!r}. There are: {', '.join(names)}.")
    rows = group.sel(task=tasks)
    headline = str(group.attrs.get("headline", ""))
    measures = sorted(map(str, rows["measure"].values), key=lambda measure: measure != headline)
    part = f"; {len(tasks)} of {counted(len(names), 'task')}" if len(tasks) < len(names) else ""
    title = f"association with scores, {counted(int(rows['n_runs'].max()), 'run')}{part}"
    statements = [str(statement) for statement in group.attrs.get("statements", [])]
    description = " ".join(["Points with intervals.", *statements[:1]])
    height = min(_TALLEST, 1.4 + 0.24 * len(measures) * max(1, len(tasks) / 2))
    with panel(ax, title, description, width=7.2, height=height) as axes:
        if np.isfinite(rows["coefficient"].values).any():
            _draw(axes, rows, measures, tasks)
            _name_rows(axes, measures, headline)
            axes.set_xlim(-1.05, 1.05)
            axes.set_xlabel("Correlation with the score")
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "No associations: see the findings")
    return figure_of(axes)


def most_telling(association: xr.Dataset, count: int) -> list[str]:
    """Return the tasks to draw of many: the mean of all, those with something significant, then the first."""
    holds = np.asarray(association["holds"].transpose("task", "measure").values, dtype=bool)
    significant = {str(task): bool(row.any()) for task, row in zip(association["task"].values, holds, strict=True)}
    first = sorted(significant, key=lambda task: (task != ALL, not significant[task]))[:count]
    return [task for task in significant if task in first]


def _draw(axes: Axes, rows: xr.Dataset, measures: Sequence[str], tasks: Sequence[str]) -> None:
    axes.axvline(0, color="#444444", linestyle="--", linewidth=1.2)
    for number, task in enumerate(tasks):
        of_task = rows.sel(task=task, measure=list(measures))
        y = np.arange(len(measures)) + 0.6 * (number - (len(tasks) - 1) / 2) / max(len(tasks), 1)
        colour = COLOURS[number % len(COLOURS)]
        value, low, high = (of_task[name].values for name in ("coefficient", "low", "high"))
        significant = of_task["holds"].values.astype(bool)
        label = "mean of all tasks" if task == ALL else shorten(task, _LONGEST)
        axes.hlines(y, low, high, color=colour)
        axes.plot(value, y, "o", color=colour, markerfacecolor="white", markersize=6, label=label)
        if significant.any():
            axes.plot(value[significant], y[significant], "o", color=colour, markersize=6)
    if rows["holds"].values.any():
        axes.plot([], [], "o", color="#444444", markersize=6, label="filled: significant")


def _name_rows(axes: Axes, measures: Sequence[str], headline: str) -> None:
    """Write the measures beside their rows, the first on top."""
    labels = [f"{shorten(measure, _LONGEST)}{' (headline)' if measure == headline else ''}" for measure in measures]
    axes.set_yticks(range(len(measures)), labels)
    without_mathematics(axes.get_yticklabels())
    axes.set_ylim(len(measures) - 0.5, -0.5)
