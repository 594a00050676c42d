"""Critical sharpness over the steps, beside what the learning rate allows."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.fisher_trajectory import task_label
from dynamics.plot.marks import draw_interval, first_and_last, legend_below
from dynamics.plot.select import axis_label, group, long_name, tasks_of
from dynamics.plot.style import figure_of, logarithmic, panel, say_nothing_to_draw, step_axis
from dynamics.schema import ALL

_NAME = "critical_sharpness"


def sharpness(data: xr.DataTree | xr.Dataset, *, ax: Axes | None = None) -> Figure:
    """Draw the critical sharpness of all samples and of each task over the steps, with 2/η of gradient descent.

    Above the dashed line the step as it is raises the loss. Where the learning rate is unknown, sharpness is in units
    of the step, and the line is at 2. Intervals without an upper end are left out.

    Args:
        data: The result of one run, or its ``/sharpness`` group: results of several steps by
            ``xarray.concat(results, "step")``.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the result has no sharpness.

    Example: ``plot.sharpness(xr.concat(results, "step"))``
    """
    effects = group(data, "sharpness")
    steps = effects["step"].values
    values = {task: effects[_NAME].sel(task=task) for task in [ALL, *tasks_of(effects)]}
    has_rate = np.isfinite(effects["learning_rate"].values)
    edge = 2 / np.where(has_rate, effects["learning_rate"].values, 1.0)
    label = "2/η" if has_rate.all() else "2: the step as it is" if not has_rate.any() else "2/η, or 2"
    with panel(ax, long_name(effects[_NAME]), _description(values, edge)) as axes:
        axes.set_ylabel(axis_label(effects[_NAME]))
        if any(np.isfinite(line.values).any() for line in values.values()):
            for number, (task, line) in enumerate(values.items()):
                low, high = (effects[f"{_NAME}_{end}"].sel(task=task).values for end in ("low", "high"))
                draw_interval(axes, steps, (line.values, low, high), number, task_label(task), "95 % interval")
            marker = "_" if len(steps) == 1 else ""
            axes.plot(steps, edge, color="#444444", linestyle="--", linewidth=1.2, marker=marker, label=label)
            step_axis(axes, steps.tolist())
            logarithmic(axes)
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "No step has a critical sharpness")
    return figure_of(axes)


def _description(values: dict[str, xr.DataArray], edge: np.ndarray) -> str:
    ends = {task_label(task).strip(): first_and_last(line) for task, line in values.items()}
    lines = [f"{task}: {words}" for task, words in ends.items() if words]
    last = f"the dashed line ends at {edge[-1]:.3g}"
    return f"Lines over optimizer steps with intervals; {'; '.join([*lines, last])}." if lines else "There is no value."
