"""Scores of groups of runs side by side: every run, and the mean of each group."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.select import refuse_unknown, related
from dynamics.plot.style import COLOURS, MARKERS, MOST_PANELS, panels, shorten, without_mathematics
from dynamics.text import counted


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
    refuse_unknown(drawn, known)
    groups = compared["group"].values.tolist()

    def draw(axes: Axes, task: str) -> None:
        one = compared["score"].sel(task=task)
        for position, name in enumerate(groups):
            values = one.values[one["run_group"].values == name]
            values = values[np.isfinite(values)]
            spots = position + np.linspace(-0.12, 0.12, values.size) if values.size > 1 else np.array([position])
            colour, marker = COLOURS[position % len(COLOURS)], MARKERS[position % len(MARKERS)]
            axes.plot(spots[: values.size], values, marker, color=colour, alpha=0.8)
            mean = float(compared["group_mean"].sel(group=name, task=task))
            if np.isfinite(mean):
                axes.hlines(mean, position - 0.25, position + 0.25, color=colour, linewidth=2)
        axes.set_xlim(-0.6, len(groups) - 0.4)
        axes.set_xticks(range(len(groups)), [shorten(str(name), 16) for name in groups])
        without_mathematics(axes.get_xticklabels())
        axes.grid(visible=False, axis="x")

    statements = [str(statement) for statement in compared.attrs.get("statements", [])]
    return panels(drawn, draw, f"scores of {counted(len(groups), 'group')}", " ".join(statements[:1]))
