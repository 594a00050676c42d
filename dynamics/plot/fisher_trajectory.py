"""One number of the Fisher over the steps, with its intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_interval, first_and_last, legend_below
from dynamics.plot.select import axis_label, chosen, group, long_name, variable_of
from dynamics.plot.style import figure_of, panel, say_nothing_to_draw, shorten, step_axis
from dynamics.schema import ALL, GLOBAL

#: Suffix of the line's label, and label of the interval. The interval of ρ reaches from the held-out value up to the
#: plug-in value; that of SE covers the sampling error of the plug-in value, not the Fisher's own SE.
_LABELS = {
    "dominant_ratio": (", plug-in", "95 % interval, from held-out halves to plug-in"),
    "spectral_entropy": (", plug-in", "95 % sampling error at this N; the Fisher's own SE is larger"),
}


def fisher_trajectory(
    data: xr.DataTree | xr.Dataset,
    *,
    variable: str = "ln_participation_ratio",
    block: str = GLOBAL,
    tasks: Sequence[str] = (ALL,),
    ax: Axes | None = None,
) -> Figure:
    """Draw a measure of the Fisher at each step, for all samples or for some tasks, each with its interval.

    Plug-in measures (SE, ρ) depend on the number of samples. Compare tasks by ``ln_participation_ratio``, which does
    not. Trainings that share a folder get a line each.

    Args:
        data: The result of one run, or its ``/fisher`` group.
        variable: ``spectral_entropy``, ``dominant_ratio``, ``ln_participation_ratio`` or any other of block and task.
        block: A matrix, or ``"global"``.
        tasks: Names of tasks; ``"all"`` stands for all samples.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the variable, the block or a task is not in the result.

    Example: ``plot.fisher_trajectory(tree, variable="spectral_entropy", block="model.layers.0.self_attn.q_proj")``
    """
    fisher = group(data, "fisher")
    dims = variable_of(fisher, variable).dims
    if dims != ("step", "block", "task"):
        raise ValueError(f"Expected a variable of step, block and task, got {variable!r} with {dims}.")
    for task in tasks:
        chosen(fisher, variable, block=block, task=task)
    suffix, interval = _LABELS.get(variable, ("", "95 % interval"))
    steps, segments = fisher["step"].values, _segments(data, fisher)
    values = {task: fisher[variable].sel(block=block, task=task) for task in tasks}
    with panel(ax, f"{long_name(fisher[variable])} of the Fisher", _description(values), block=block) as axes:
        axes.set_ylabel(axis_label(fisher[variable]))
        for number, (task, line) in enumerate(values.items()):
            low, high = (_end(fisher, f"{variable}_{end}").sel(block=block, task=task) for end in ("low", "high"))
            for segment in np.unique(segments):
                rows = segments == segment
                label = f"{task_label(task)}{suffix}" if segment == segments[0] else "_"
                x = steps[rows] + (_offset(number, len(tasks)) if len(steps) == 1 else 0.0)
                ends = (line.values[rows], low.values[rows], high.values[rows])
                draw_interval(axes, x, ends, number, label, interval)
        if any(np.isfinite(line.values).any() for line in values.values()):
            step_axis(axes, steps.tolist())
            if len(steps) == 1:
                axes.set_xlim(steps[0] - 0.5, steps[0] + 0.5)
            legend_below(axes)
        else:
            say_nothing_to_draw(axes)
    return figure_of(axes)


def task_label(task: str) -> str:
    """Return a task as a legend has it.

    >>> task_label("all"), task_label("_ocr")
    ('all samples', ' _ocr')
    """
    if task == ALL:
        return "all samples"
    # matplotlib leaves a label that starts with an underscore out of a legend.
    return f" {shorten(task)}" if task.startswith("_") else shorten(task)


def _offset(number: int, count: int) -> float:
    """Return where a bar of a single step stands, so that all are side by side in the middle half of the axis."""
    return 0.5 * (number - (count - 1) / 2) / count


def _end(fisher: xr.Dataset, name: str) -> xr.DataArray:
    """Return an end of the interval; NaN for a variable that has none."""
    return fisher[name] if name in fisher else xr.full_like(fisher["trace"], np.nan)


def _segments(data: xr.DataTree | xr.Dataset, fisher: xr.Dataset) -> np.ndarray:
    """Return the training of each step, as ``/update`` has it."""
    segments: dict[int, int] = {}
    if isinstance(data, xr.DataTree) and "update" in data.children:
        update = data["update"].to_dataset()
        segments = dict(zip(update["step"].values.tolist(), update["segment"].values.tolist(), strict=True))
    return np.array([segments.get(step, 0) for step in fisher["step"].values.tolist()])


def _description(values: dict[str, xr.DataArray]) -> str:
    ends = {task_label(task).strip(): first_and_last(line) for task, line in values.items()}
    lines = [f"{task}: {words}" for task, words in ends.items() if words]
    return f"Lines over optimizer steps with intervals; {'; '.join(lines)}." if lines else "No step has a value."
