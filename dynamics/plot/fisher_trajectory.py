"""One number of the Fisher over the steps, with its intervals."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_interval, first_and_last, legend_below
from dynamics.plot.select import chosen, group, label_of, name_of, of_block, variable_of, write_title
from dynamics.plot.style import (
    canvas,
    describe,
    figure_of,
    say_nothing_to_draw,
    shorten,
    step_axis,
    without_mathematics,
)
from dynamics.schema import ALL, GLOBAL

_INTERVAL = "95 % interval"
#: The interval of ρ is not one around its plug-in value, which lies near the upper end; that of SE is not the Fisher's.
_BOUNDS = {
    "dominant_ratio": (", plug-in", "95 % interval, from held-out halves to plug-in"),
    "spectral_entropy": (", plug-in", "95 % sampling error at this N; the Fisher's own is larger"),
}


def fisher_trajectory(
    data: xr.DataTree | xr.Dataset,
    *,
    variable: str = "ln_participation_ratio",
    block: str = GLOBAL,
    tasks: Sequence[str] = (ALL,),
    ax: Axes | None = None,
) -> Figure:
    """A measure of the Fisher at each step, for all samples or for some tasks, each with its interval.

    Plug-in measures (SE, ρ) depend on the number of samples: compare tasks by ``ln_participation_ratio``, which does
    not. Trainings that share a folder are drawn apart.

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
    if variable_of(fisher, variable).dims != ("step", "block", "task"):
        dims = fisher[variable].dims
        raise ValueError(f"Expected a variable of step, block and task, got {variable!r} with {dims}.")
    for task in tasks:
        chosen(fisher, variable, block=block, task=task)
    of_line, of_band = _BOUNDS.get(variable, ("", _INTERVAL))
    words = f"{name_of(fisher[variable])} of the Fisher"
    steps, segments = fisher["step"].values, _segments(data, fisher)
    middles = {task: fisher[variable].sel(block=block, task=task) for task in tasks}
    with canvas(ax) as axes:
        for number, (task, middle) in enumerate(middles.items()):
            low, high = (
                _end(fisher, f"{variable}_{end}").sel(block=block, task=task).values for end in ("low", "high")
            )
            for segment in np.unique(segments):
                here = segments == segment
                label = f"{words_of_task(task)}{of_line}" if segment == segments[0] else "_"
                ends = (middle.values[here], low[here], high[here])
                at = steps[here] + (_beside(number, len(tasks)) if len(steps) == 1 else 0.0)
                draw_interval(axes, at, ends, number, label, of_band)
        write_title(axes, words, block)
        axes.set_ylabel(label_of(fisher[variable]))
        if any(np.isfinite(middle.values).any() for middle in middles.values()):
            step_axis(axes, steps.tolist())
            if len(steps) == 1:
                axes.set_xlim(steps[0] - 0.5, steps[0] + 0.5)
            legend_below(axes)
            without_mathematics(axes.get_legend().get_texts())  # type: ignore[union-attr]
        else:
            say_nothing_to_draw(axes, "no values: see the findings")
    figure = figure_of(axes)
    if ax is None:
        describe(figure, words + of_block(block), _words(middles))
    return figure


def words_of_task(task: str) -> str:
    """A task in a legend.

    >>> words_of_task("all"), words_of_task("_ocr")
    ('all samples', ' _ocr')
    """
    if task == ALL:
        return "all samples"
    # matplotlib leaves out of a legend what starts with an underscore.
    return f" {shorten(task)}" if task.startswith("_") else shorten(task)


def _beside(number: int, count: int) -> float:
    """Bars of a single step stand side by side, in the middle half of the axis."""
    return 0.5 * (number - (count - 1) / 2) / count


def _end(fisher: xr.Dataset, name: str) -> xr.DataArray:
    """An end of the interval; NaN for a variable that has none."""
    return fisher[name] if name in fisher else xr.full_like(fisher["trace"], np.nan)


def _segments(data: xr.DataTree | xr.Dataset, fisher: xr.Dataset) -> np.ndarray:
    """The training of each step, as ``/update`` knows it."""
    known: dict[int, int] = {}
    if isinstance(data, xr.DataTree) and "update" in data.children:
        update = data["update"].to_dataset()
        known = dict(zip(update["step"].values.tolist(), update["segment"].values.tolist(), strict=True))
    return np.array([known.get(step, 0) for step in fisher["step"].values.tolist()])


def _words(middles: dict[str, xr.DataArray]) -> str:
    ends = {words_of_task(task).strip(): first_and_last(middle) for task, middle in middles.items()}
    said = [f"{task}: {words}" for task, words in ends.items() if words]
    return f"Lines over optimizer steps with intervals; {'; '.join(said)}." if said else "No step has a value."
