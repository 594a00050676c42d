"""Every measure with every task at once: a grid of correlations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.association import most_telling
from dynamics.plot.select import related
from dynamics.plot.style import MISSING_COLOUR, canvas, describe, figure_of, shorten, without_mathematics

#: Tasks that a grid has at most by default: more cannot be read.
_MOST_TASKS = 20


def association_grid(
    data: xr.DataTree | xr.Dataset, *, tasks: Sequence[str] | None = None, ax: Axes | None = None
) -> Figure:
    """Draw the correlation of each measure (rows) with each score (columns); in brackets where it is not shown.

    Args:
        data: A result with ``/association``, or that group.
        tasks: Which; by default up to 20: the mean of all tasks, those with something shown, then the first.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no association, or no such task.

    Example: ``plot.association_grid(dynamics.open_run("comparison"))``
    """
    # Here, not above: it takes a second, and most results have no associations.
    from seaborn import heatmap

    association = related(data, "association")
    chosen = most_telling(association, _MOST_TASKS) if tasks is None else list(tasks)
    if unknown := sorted(set(chosen) - set(association["task"].values.tolist())):
        raise ValueError(f"Expected tasks of the association, got {unknown[0]!r}.")
    found = association.sel(task=chosen)
    count = association.sizes["task"]
    values, holds = found["coefficient"].values, found["holds"].values.astype(bool)
    rows, columns = [[str(name) for name in found[dim].values] for dim in ("measure", "task")]
    labels = [
        [_label(float(value), shown=bool(shown)) for value, shown in zip(*row, strict=True)]
        for row in zip(values, holds, strict=True)
    ]
    with canvas(ax, width=2.6 + 0.85 * len(columns), height=1.3 + 0.3 * len(rows)) as axes:
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
            cbar_kws={"label": "correlation"},
        )
        axes.set_xticks(np.arange(len(columns)) + 0.5, [shorten(name, 22) for name in columns], rotation=35, ha="right")
        axes.set_yticks(np.arange(len(rows)) + 0.5, [shorten(name, 34) for name in rows], rotation=0)
        without_mathematics([*axes.get_xticklabels(), *axes.get_yticklabels()])
        axes.grid(False)
        part = f", {len(columns)} of {count} tasks" if len(columns) < count else ""
        axes.set_title(f"correlation with scores{part}")
    figure = figure_of(axes)
    if ax is None:
        shown = f"{int(holds.sum())} of {holds.size} are shown."
        describe(figure, "correlation of each measure with each score", f"A grid of numbers; {shown}")
    return figure


def _label(value: float, *, shown: bool) -> str:
    """A number with a minus sign as such, in brackets where the association is not shown.

    >>> _label(-0.314, shown=False)
    '(−0.31)'
    """
    if not np.isfinite(value):
        return ""
    number = f"{value:.2f}".replace("-", "−")
    return number if shown else f"({number})"
