"""A measure of the Fisher with fewer samples, so that tasks can be compared at equal numbers."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.fisher_trajectory import task_label
from dynamics.plot.marks import legend_below
from dynamics.plot.select import axis_label, chosen, group, long_name, tasks_of
from dynamics.plot.style import COLOURS, MARKERS, doubling_axis, figure_of, panel, say_nothing_to_draw
from dynamics.schema import ALL, GLOBAL

_MEASURES = ("spectral_entropy", "dominant_ratio", "participation_ratio")


def rarefaction(
    data: xr.DataTree | xr.Dataset,
    *,
    variable: str = "spectral_entropy",
    block: str = GLOBAL,
    step: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw a plug-in measure of n groups with one sample of each, over n, for all samples and for each task.

    Compare curves at the same n, never at their ends: a measure changes with n until its curve is flat. Bars are the
    standard deviation over random subsets, where it is stored; they are no standard error.

    Args:
        data: The result of one run, or its ``/fisher`` group.
        variable: ``spectral_entropy``, ``dominant_ratio`` or ``participation_ratio``.
        block: A matrix, or ``"global"``.
        step: By default the last one that has a curve.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no curve of that variable, or the block or the step is not in the result.

    Example: ``plot.rarefaction(dynamics.open_run("runs/imax"), variable="participation_ratio")``
    """
    if variable not in _MEASURES:
        raise ValueError(f"Expected one of {', '.join(_MEASURES)}, got {variable!r}.")
    name = f"rarefied_{variable}"
    fisher = group(data, "fisher")
    at_step = chosen(fisher, name, step=step, block=block)
    n = at_step["n"].values
    curves = {task: at_step[name].sel(task=task).values for task in [ALL, *tasks_of(fisher)]}
    title = f"{variable.replace('_', ' ')} of n groups, step {int(at_step['step']):,}"
    with panel(ax, title, _description(n, curves, long_name(at_step[name])), block=block) as axes:
        if np.isfinite(np.array(list(curves.values()))).any():
            for number, (task, curve) in enumerate(curves.items()):
                _draw(axes, n, curve, _deviation(at_step, name, task), number, task_label(task))
            doubling_axis(axes, n.tolist(), "Number n of groups, one sample of each")
            axes.set_ylabel(axis_label(at_step[name]))
            axes.set_ylim(bottom=0)
            legend_below(axes)
        else:
            say_nothing_to_draw(axes)
    return figure_of(axes)


def _deviation(fisher: xr.Dataset, name: str, task: str) -> np.ndarray | None:
    """Return the standard deviation over subsets, ``None`` where it is not stored."""
    name = f"{name}_deviation"
    return fisher[name].sel(task=task).values if name in fisher else None


def _draw(axes: Axes, n: np.ndarray, curve: np.ndarray, deviation: np.ndarray | None, number: int, label: str) -> None:
    finite = np.isfinite(curve)
    if not finite.any():
        return
    axes.errorbar(
        n[finite],
        curve[finite],
        None if deviation is None else np.nan_to_num(deviation[finite]),
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        capsize=2,
        elinewidth=1,
        label=label,
    )


def _description(n: np.ndarray, curves: dict[str, np.ndarray], name: str) -> str:
    parts = []
    for task, curve in curves.items():
        finite = np.flatnonzero(np.isfinite(curve))
        if finite.size:
            first, last = (f"{curve[end]:.3g} at n = {n[end]}" for end in (finite[0], finite[-1]))
            parts.append(f"{task_label(task).strip()}: {first}, {last}")
    return f"Curves of the {name}; {'; '.join(parts)}." if parts else "There is no curve."
