"""Scores of a run over steps, the best of each ringed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.select import group, has_group, refuse_unknown
from dynamics.plot.style import COLOURS, MOST_PANELS, NULL_COLOUR, panels, step_axis
from dynamics.plot.training_log import logged_number
from dynamics.relate.score_changes import score_changes
from dynamics.text import number

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
    refuse_unknown(drawn, list(known))
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

    return panels(drawn, draw, "scores over steps", "; ".join(words))
