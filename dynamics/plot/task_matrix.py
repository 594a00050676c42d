"""Each pair of tasks at one step: a number with its interval."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from dynamics.plot.select import axis_label, chosen, group, long_name, variable_of
from dynamics.plot.style import COLOUR_MAP, MISSING_COLOUR, ON_LIGHT, figure_of, panel, shorten, without_mathematics
from dynamics.schema import ALL, GLOBAL

_PAIR = ("step", "block", "task", "task_")
#: Orange below zero, purple above: distinguishable with any kind of colour vision.
_DIVERGING = "PuOr"
_COSINES = ("cosine", "cosine_raw")
_SHARES = ("overlap", "magnitude_similarity")
#: With more tasks than this numbers no longer fit their cells.
_MOST_WRITTEN = 9
_MOST_NAMED = 40
#: From this brightness on black letters are easier to read than white ones.
_BRIGHT = 0.45


def task_matrix(
    data: xr.DataTree | xr.Dataset,
    *,
    variable: str = "cosine",
    block: str = GLOBAL,
    step: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw one variable as task × task, with the 95 % interval in each cell where it is stored.

    Bold: the interval of a signed number excludes 0. Hatched grey: no value; a cosine has none if the mean gradient of
    one of the two tasks is indistinguishable from zero.

    Args:
        data: The result of one run, or its ``/tasks`` group.
        variable: ``cosine``, ``overlap``, ``magnitude_similarity``, ``transfer`` or any other of two tasks.
        block: A matrix, or ``"global"``.
        step: By default the last one that has a value.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the variable is not in the result or not one of two tasks, or there is no such block or step.

    Example: ``plot.task_matrix(dynamics.open_run("runs/imax"), variable="overlap")``
    """
    tasks = group(data, "tasks")
    if variable_of(tasks, variable).dims != _PAIR:
        raise ValueError(f"Expected a variable of two tasks, got {variable!r} with {tasks[variable].dims}.")
    separate = tasks.sel(task=tasks["task"] != ALL, task_=tasks["task_"] != ALL)
    pairs = chosen(separate, variable, step=step, block=block)
    names = [str(name) for name in pairs["task"].values]
    values = pairs[variable].values.astype(np.float64)
    title = f"{long_name(pairs[variable])}, step {int(pairs['step']):,}"
    side = min(0.88 * len(names), 7.0)
    width, height = max(side + 2.6, 4.6), max(side + 1.2, 2.6)
    with panel(ax, title, _description(names, values), block=block, width=width, height=height) as axes:
        low, high, colours = _range(variable, values)
        image = axes.imshow(
            np.ma.masked_invalid(values),
            vmin=low,
            vmax=high,
            interpolation="none",
            cmap=mpl.colormaps[colours].with_extremes(bad=MISSING_COLOUR),
        )
        _hatch(axes, values)
        if len(names) <= _MOST_WRITTEN:
            _write(axes, pairs, variable, (values - low) / (high - low), colours)
        _name(axes, names, directed=variable == "transfer")
        axes.grid(False)
        bar = figure_of(axes).colorbar(image, ax=axes, fraction=0.046, pad=0.03)
        bar.set_label(axis_label(pairs[variable]))
    return figure_of(axes)


def _range(variable: str, values: np.ndarray) -> tuple[float, float, str]:
    """Return the lowest and highest value of the colours, the same for every run where natural, and their map."""
    if variable in _COSINES:
        return -1.0, 1.0, _DIVERGING
    if variable in _SHARES:
        return 0.0, 1.0, COLOUR_MAP
    reach = float(np.abs(values[np.isfinite(values)]).max(initial=0.0)) or 1.0
    return -reach, reach, _DIVERGING


def _hatch(axes: Axes, values: np.ndarray) -> None:
    """Hatch cells without a value, which tells them from every colour in print as well."""
    for row, column in np.argwhere(~np.isfinite(values)):
        axes.add_patch(
            Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#aaaaaa", linewidth=0)
        )


def _write(axes: Axes, pairs: xr.Dataset, variable: str, shade: np.ndarray, colours: str) -> None:
    """Write value and interval into each cell, dark on light colours and light on dark ones."""
    values, signed = pairs[variable].values.astype(np.float64), colours == _DIVERGING
    low, high = (
        pairs[f"{variable}_{end}"].values if f"{variable}_{end}" in pairs else np.full(values.shape, np.nan)
        for end in ("low", "high")
    )
    missing = "not\nresolved" if variable == "cosine" else "no\nvalue"
    for row, column in np.ndindex(*values.shape):
        value, bottom, top = (float(array[row, column]) for array in (values, low, high))
        if not np.isfinite(value):
            axes.text(column, row, missing, ha="center", va="center", fontsize=7, color=ON_LIGHT)
            continue
        interval = (
            f"\n{_short(bottom)} to {_short(top)}" if row != column and np.isfinite(bottom) and np.isfinite(top) else ""
        )
        axes.text(
            column,
            row,
            f"{_short(value)}{interval}",
            ha="center",
            va="center",
            fontsize=7,
            fontweight="bold" if interval and signed and (bottom > 0 or top < 0) else "normal",
            color=_ink(float(shade[row, column]), colours),
        )


def _short(value: float) -> str:
    """Return a number with two digits: a cell has no room for more.

    >>> _short(-0.123), _short(437.2)
    ('−0.12', '437')
    """
    return (f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2g}").replace("-", "−")


def _ink(shade: float, colours: str) -> str:
    red, green, blue, _ = mpl.colormaps[colours](float(np.clip(shade, 0, 1)))
    return ON_LIGHT if 0.299 * red + 0.587 * green + 0.114 * blue > _BRIGHT else "white"


def _name(axes: Axes, names: list[str], *, directed: bool) -> None:
    keep = max(1, -(-len(names) // _MOST_NAMED))
    ticks = np.arange(0, len(names), keep)
    labels = [shorten(names[tick], 24) for tick in ticks]
    axes.set_yticks(ticks, labels)
    axes.set_xticks(ticks, labels, rotation=40, ha="right", rotation_mode="anchor")
    axes.tick_params(length=0)
    if directed:
        axes.set_ylabel("A gradient step on this task …")
        axes.set_xlabel("… lowers the loss of this one")
    without_mathematics([*axes.get_xticklabels(), *axes.get_yticklabels()])


def _description(names: list[str], values: np.ndarray) -> str:
    pairs = [
        f"{names[row]} and {names[column]} {_short(value) if np.isfinite(value) else 'without a value'}"
        for (row, column), value in np.ndenumerate(values)
        if row < column
    ]
    listed = "; ".join(pairs[:12]) + (f"; and {len(pairs) - 12} more" if len(pairs) > 12 else "")
    return f"Matrix of {len(names)} tasks: {listed or 'a single one'}."
