"""Changes of the losses of each task over the steps, beside what gradients at the start predict."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_interval, first_and_last, legend_below
from dynamics.plot.select import axis_label, group, long_name
from dynamics.plot.style import COLOURS, figure_of, panel, say_nothing_to_draw, shorten, step_axis


def losses(data: xr.DataTree | xr.Dataset, *, ax: Axes | None = None) -> Figure:
    """Draw how the loss of each task changed since the training began, with intervals, and what was predicted.

    Retained tasks say so. Dotted: to first order; dashed: to second order.

    Args:
        data: The result of one run, or its ``/loss`` group.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the result has no losses of probe samples.

    Example: ``plot.losses(dynamics.open_run("runs/imax"))``
    """
    table = group(data, "loss")
    steps = table["step"].values
    flags = zip(table["task"].values.tolist(), table["retained"].values.tolist(), strict=True)
    labels = {task: _label(task, retained=bool(retained)) for task, retained in flags}
    values = {task: table["change"].sel(task=task) for task in labels}
    with panel(ax, long_name(table["change"]), _description(values, labels)) as axes:
        axes.set_ylabel(axis_label(table["change"]))
        if any(np.isfinite(line.values[1:]).any() for line in values.values()):
            axes.axhline(0, color="#444444", linewidth=0.8)
            for number, (task, line) in enumerate(values.items()):
                low, high = (table[f"change_{end}"].sel(task=task).values for end in ("low", "high"))
                draw_interval(axes, steps, (line.values, low, high), number, labels[task], "95 % interval")
                for order, style in (("first", ":"), ("second", "--")):
                    predicted = table[f"predicted_{order}"].sel(task=task).values
                    present = np.isfinite(predicted)
                    if present.any():
                        colour, label = COLOURS[number % len(COLOURS)], f"predicted, {order} order"
                        axes.plot(steps[present], predicted[present], style, color=colour, linewidth=1.4, label=label)
            step_axis(axes, steps.tolist())
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "No step has a change of the loss")
    return figure_of(axes)


def _label(task: str, *, retained: bool) -> str:
    # matplotlib leaves a label that starts with an underscore out of a legend.
    name = f" {shorten(task)}" if task.startswith("_") else shorten(task)
    return f"{name} (retained)" if retained else name


def _description(values: dict[str, xr.DataArray], labels: dict[str, str]) -> str:
    ends = {labels[task].strip(): first_and_last(line[1:]) for task, line in values.items()}
    lines = [f"{task}: {words}" for task, words in ends.items() if words]
    return f"Lines over optimizer steps with intervals; {'; '.join(lines)}." if lines else "There is no value."
