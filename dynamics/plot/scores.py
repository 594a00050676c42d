"""Scores of a run over steps, and scores of groups of runs side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.select import group, has_group, related
from dynamics.plot.style import (
    COLOURS,
    MARKERS,
    NULL_COLOUR,
    STYLE,
    describe,
    say_nothing_to_draw,
    shorten,
    step_axis,
    without_mathematics,
)
from dynamics.plot.training_log import logged_number
from dynamics.relate.score_changes import score_changes
from dynamics.text import counted, number

#: Panels of one figure.
MOST_PANELS = 6
_COLUMNS = 3
#: Beside it stands the training loss, which is in the same units.
_LOSS = "eval_loss"


def scores(data: xr.DataTree | xr.Dataset, *, tasks: Sequence[str] | None = None) -> Figure:
    """Draw scores of one run over steps, a panel each, with ± one standard error and a ring around the best.

    Beside ``eval_loss`` stands the training loss as logged, where the data is a tree that has it.

    Args:
        data: The result of one run, or its ``/score`` group.
        tasks: Names of scores; by default the first six that have a value.

    Raises:
        ValueError: If there are no scores, or not of such a task.

    Example: ``plot.scores(dynamics.open_run("runs/imax"), tasks=["eval_loss"])``
    """
    table = group(data, "score").load()
    known = {row["task"]: row for row in score_changes(table)}
    drawn = list(known)[:MOST_PANELS] if tasks is None else list(tasks)
    _refuse_unknown(drawn, list(known))
    losses = group(data, "training").load() if has_group(data, "training") else None
    words = [
        f"{task}: {number(row['last']['score'])} at step {row['last']['step']:,}"
        + (f", best {number(row['best']['score'])} at step {row['best']['step']:,}" if row["best"] else "")
        for task, row in known.items()
        if task in drawn
    ]

    def draw(axes: Axes, task: str) -> None:
        one = table.sel(task=task)
        values, errors = one["score"].values, np.nan_to_num(one["standard_error"].values)
        finite = np.isfinite(values)
        steps = one["step"].values[finite]
        if task == _LOSS and losses is not None and (logged := logged_number(losses, "loss")) is not None:
            present = np.isfinite(logged.values)
            rows = np.argsort(losses["log_step"].values[present], kind="stable")
            axes.plot(
                losses["log_step"].values[present][rows],
                logged.values[present][rows],
                color=NULL_COLOUR,
                linewidth=1.0,
                label="training loss",
            )
            axes.legend()
        axes.errorbar(
            steps,
            values[finite],
            yerr=errors[finite] if errors[finite].any() else None,
            color=COLOURS[0],
            marker="o",
            markersize=4,
            linewidth=1.6,
            elinewidth=1.0,
        )
        if (best := known[task]["best"]) is not None:
            axes.plot(best["step"], best["score"], "o", markersize=10, fillstyle="none", color=COLOURS[1])
        step_axis(axes, steps.tolist())

    return _panels(drawn, draw, "scores over steps", "; ".join(words))


def score_comparison(data: xr.DataTree | xr.Dataset, *, tasks: Sequence[str] | None = None) -> Figure:
    """Draw the compared score of every run, group by group, a panel for each score; the line is the group's mean.

    Args:
        data: A result with ``/score_comparison``, or that group.
        tasks: Names of scores; by default the first six, the mean over scores (``all``) among them.

    Raises:
        ValueError: If there is no comparison of scores, or not of such a task.

    Example: ``plot.score_comparison(dynamics.open_run("comparison"), tasks=["vqa/accuracy"])``
    """
    compared = related(data, "score_comparison")
    known = [str(task) for task in compared["task"].values]
    drawn = known[:MOST_PANELS] if tasks is None else list(tasks)
    _refuse_unknown(drawn, known)
    groups = list(dict.fromkeys(compared["run_group"].values.tolist()))

    def draw(axes: Axes, task: str) -> None:
        one = compared["score"].sel(task=task)
        for position, name in enumerate(groups):
            values = one.values[one["run_group"].values == name]
            values = values[np.isfinite(values)]
            spots = position + np.linspace(-0.12, 0.12, values.size) if values.size > 1 else np.array([position])
            colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
            axes.plot(spots[: values.size], values, marker, color=colour, alpha=0.8)
            if values.size:
                axes.hlines(values.mean(), position - 0.25, position + 0.25, color=colour, linewidth=2)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_xticks(range(len(groups)), [shorten(str(name), 16) for name in groups])
        without_mathematics(axes.get_xticklabels())
        axes.grid(visible=False, axis="x")

    statements = [str(statement) for statement in compared.attrs.get("statements", [])]
    return _panels(drawn, draw, f"scores of {counted(len(groups), 'group')}", " ".join(statements[:1]))


def _refuse_unknown(tasks: Sequence[str], known: Sequence[str]) -> None:
    for task in tasks:
        if task not in known:
            raise ValueError(f"Expected a task with scores, got {task!r}. There are: {', '.join(known)}.")


def _panels(tasks: Sequence[str], draw: Callable[[Axes, str], None], title: str, description: str) -> Figure:
    """Return a figure with a panel for each task."""
    columns = min(max(len(tasks), 1), _COLUMNS)
    rows = -(-max(len(tasks), 1) // columns)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.8 * columns, 2.7 * rows), layout="constrained")
        panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
        for axes, task in zip(panels, tasks, strict=False):
            without_mathematics([axes.set_title(shorten(task, 34))])
            draw(axes, task)
        if not tasks:
            say_nothing_to_draw(panels[0], "No score has a value")
        for axes in panels[max(len(tasks), 1) :]:
            axes.set_visible(False)
    describe(figure, title[:1].upper() + title[1:], description)
    return figure
