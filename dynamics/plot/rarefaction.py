"""What a measure of the Fisher would be with fewer samples: tasks compared at equal numbers."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.fisher_trajectory import words_of_task
from dynamics.plot.marks import legend_below
from dynamics.plot.select import chosen, group, label_of, name_of, of_block, tasks_of, variable_of, write_title
from dynamics.plot.style import (
    COLOURS,
    MARKERS,
    canvas,
    describe,
    doubling_axis,
    figure_of,
    say_nothing_to_draw,
    without_mathematics,
)
from dynamics.schema import ALL, GLOBAL

_MEASURES = ("spectral_entropy", "dominant_ratio", "participation_ratio")
_CURVE = "rarefied_{}"


def rarefaction(
    data: xr.DataTree | xr.Dataset,
    *,
    variable: str = "spectral_entropy",
    block: str = GLOBAL,
    step: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A plug-in measure of n groups with one sample of each, over n, for all samples and for each task.

    Compare curves at the same n, never their ends: each measure changes with n as long as the curve has not become
    flat. Bars are the standard deviation over random subsets, where it is stored; no standard error.

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
    fisher, name = group(data, "fisher"), _CURVE.format(variable)
    here = chosen(fisher, name, step=step, block=block)
    words = f"{variable.replace('_', ' ')} of n groups, step {int(here['step']):,}"
    curves = {task: here[name].sel(task=task).values for task in [ALL, *tasks_of(fisher)]}
    with canvas(ax) as axes:
        for number, (task, curve) in enumerate(curves.items()):
            _draw(axes, here["n"].values, curve, _deviation(here, name, task), number, words_of_task(task))
        write_title(axes, words, block)
        if np.isfinite(np.array(list(curves.values()))).any():
            doubling_axis(axes, here["n"].values.tolist(), "n: groups with one sample of each")
            axes.set_ylabel(label_of(variable_of(here, name)))
            axes.set_ylim(bottom=0)
            legend_below(axes)
            without_mathematics(axes.get_legend().get_texts())  # type: ignore[union-attr]
        else:
            say_nothing_to_draw(axes, "no values: see the findings")
    figure = figure_of(axes)
    if ax is None:
        describe(figure, words + of_block(block), _words(here["n"].values, curves, name_of(here[name])))
    return figure


def _deviation(here: xr.Dataset, name: str, task: str) -> np.ndarray | None:
    """Standard deviation over subsets; ``None`` where it is not stored."""
    name = f"{name}_deviation"
    return here[name].sel(task=task).values if name in here else None


def _draw(axes: Axes, n: np.ndarray, curve: np.ndarray, spread: np.ndarray | None, number: int, label: str) -> None:
    known = np.isfinite(curve)
    if not known.any():
        return
    axes.errorbar(
        n[known],
        curve[known],
        None if spread is None else np.nan_to_num(spread[known]),
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        capsize=2,
        elinewidth=1,
        label=label,
    )


def _words(n: np.ndarray, curves: dict[str, np.ndarray], name: str) -> str:
    said = []
    for task, curve in curves.items():
        known = np.flatnonzero(np.isfinite(curve))
        if known.size:
            first, last = known[0], known[-1]
            ends = f"{curve[first]:.3g} at n = {n[first]}, {curve[last]:.3g} at n = {n[last]}"
            said.append(f"{words_of_task(task).strip()}: {ends}")
    return f"Curves of the {name}; {'; '.join(said)}." if said else "There is no curve."
