"""Every measure with every task at once: a grid of correlations."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.result import related
from dynamics.plot.style import MISSING_COLOUR, canvas, figure_of, shorten, without_mathematics
from dynamics.plot.svg import describe


def association_grid(data: xr.DataTree | xr.Dataset, *, ax: Axes | None = None) -> Figure:
    """Correlation of each measure (rows) with each task's score (columns); in brackets where it is not shown.

    Args:
        data: A result with ``/association``, or that group.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no association.

    Example: ``plot.association_grid(dynamics.open_run("comparison"))``
    """
    found = related(data, "association")
    values, holds = found["coefficient"].values, found["holds"].values.astype(bool)
    rows, columns = [[str(name) for name in found[dim].values] for dim in ("measure", "task")]
    with canvas(ax, width=2.6 + 0.85 * len(columns), height=1.3 + 0.3 * len(rows)) as axes:
        axes.set_facecolor(MISSING_COLOUR)
        image = axes.imshow(np.ma.masked_invalid(values), cmap="PuOr", vmin=-1, vmax=1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                number = f"{value:.2f}".replace("-", "−")
                shown = bool(holds[row, column])
                axes.text(
                    column,
                    row,
                    number if shown else f"({number})",
                    ha="center",
                    va="center",
                    fontsize=7,
                    fontweight="bold" if shown else "normal",
                    color="white" if abs(value) > 0.7 else "#222222",
                )
        axes.set_xticks(range(len(columns)), [shorten(name, 22) for name in columns], rotation=35, ha="right")
        axes.set_yticks(range(len(rows)), [shorten(name, 34) for name in rows])
        without_mathematics([*axes.get_xticklabels(), *axes.get_yticklabels()])
        axes.grid(False)
        axes.set_title("correlation with scores")
        figure = figure_of(axes)
        figure.colorbar(image, ax=axes, label="correlation")
    if ax is None:
        shown = f"{int(holds.sum())} of {holds.size} are shown."
        describe(figure, "correlation of each measure with each score", f"A grid of numbers; {shown}")
    return figure
