"""Correlations of all measures with all tasks, as a grid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.association import most_telling
from dynamics.plot.select import related
from dynamics.plot.style import MISSING_COLOUR, figure_of, panel, shorten, without_mathematics
from dynamics.text import counted

#: Tasks of a grid by default: more cannot be read.
_MOST_TASKS = 20


def association_grid(
    data: xr.DataTree | xr.Dataset, *, tasks: Sequence[str] | None = None, ax: Axes | None = None
) -> Figure:
    """Draw the correlation of each measure (rows) with each score (columns); in brackets if it is not significant.

    Args:
        data: A result with ``/association``, or that group.
        tasks: Names of tasks; by default up to 20: the mean of all, those with something significant, then the first.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no association, or no such task.

    Example: ``plot.association_grid(dynamics.open_run("comparison"))``
    """
    # Imported here because it takes a second, and most results have no associations.
    from seaborn import heatmap

    association = related(data, "association")
    names = association["task"].values.tolist()
    tasks = most_telling(association, _MOST_TASKS) if tasks is None else list(tasks)
    if unknown := [task for task in tasks if task not in names]:
        raise ValueError(f"Expected tasks of the association, got {unknown[0]!r}. There are: {', '.join(names)}.")
    grid = association.sel(task=tasks)
    values, holds = grid["coefficient"].values, grid["holds"].values.astype(bool)
    rows, columns = [[str(name) for name in grid[dim].values] for dim in ("measure", "task")]
    labels = [_label(float(value), holds=bool(flag)) for value, flag in zip(values.flat, holds.flat, strict=True)]
    part = f", {len(columns)} of {counted(len(names), 'task')}" if len(columns) < len(names) else ""
    description = f"A grid of numbers; {int(holds.sum())} of {holds.size} are significant."
    width, height = 2.6 + 0.85 * len(columns), 1.3 + 0.3 * len(rows)
    with panel(ax, f"correlation with scores{part}", description, width=width, height=height) as axes:
        axes.set_facecolor(MISSING_COLOUR)
        heatmap(
            values,
            ax=axes,
            mask=~np.isfinite(values),
            annot=np.array(labels, dtype=object).reshape(values.shape),
            fmt="",
            annot_kws={"fontsize": 7},
            cmap="PuOr",
            vmin=-1,
            vmax=1,
            linewidths=0.5,
            cbar_kws={"label": "Correlation"},
        )
        axes.set_xticks(np.arange(len(columns)) + 0.5, [shorten(name, 22) for name in columns], rotation=35, ha="right")
        axes.set_yticks(np.arange(len(rows)) + 0.5, [shorten(name, 34) for name in rows], rotation=0)
        without_mathematics([*axes.get_xticklabels(), *axes.get_yticklabels()])
        axes.grid(False)
    return figure_of(axes)


def _label(value: float, *, holds: bool) -> str:
    """Return a number with a proper minus sign, in brackets where the association is not significant.

    >>> _label(-0.314, holds=False)
    '(−0.31)'
    """
    if not np.isfinite(value):
        return ""
    number = f"{value:.2f}".replace("-", "−")
    return number if holds else f"({number})"
