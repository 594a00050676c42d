"""One number of each matrix at each step."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.select import RowGroup, axis_label, group, row_groups, title_of, variable_of
from dynamics.plot.style import COLOUR_MAP, MISSING_COLOUR, figure_of, panel, shorten, without_mathematics
from dynamics.text import counted

_DIMS = ("step", "matrix")
#: Inches for a row, and for the whole figure at most: it has to fit a page.
_ROW, _TALLEST = 0.16, 11.0
_MOST_LABELS = 60


def heatmap(
    data: xr.DataTree | xr.Dataset,
    *,
    variable: str = "effective_rank_energy",
    kind: str = "total",
    ax: Axes | None = None,
) -> Figure:
    """Draw one variable as matrix × step, rows by role and within a role by layer, first layer on top.

    Cells without a finite value are grey. Steps are evenly spaced, however far apart they are.

    Args:
        data: The result of one run, or its ``/update`` group.
        variable: Any variable with the dimensions step and matrix.
        kind: ``"total"`` or ``"increment"``.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the variable is not in the result, or not one of matrices and steps.

    Example: ``plot.heatmap(dynamics.open_run("runs/imax"), variable="entropy_deficit")``
    """
    update = group(data, "update")
    values = per_cell(update, variable, kind)
    groups = row_groups(update)
    order = [position for rows in groups for position in rows.positions]
    title = title_of_cells(update, variable, kind)
    description = describe_cells(values, update.sizes["step"])
    with panel(ax, title, description, width=7.2, height=min(1.6 + _ROW * len(order), _TALLEST)) as axes:
        low, high = colour_range(values)
        # An image of one pixel a cell stays small, however many matrices there are.
        image = axes.imshow(
            np.ma.masked_invalid(values[order]),
            aspect="auto",
            interpolation="none",
            vmin=low,
            vmax=high,
            cmap=mpl.colormaps[COLOUR_MAP].with_extremes(bad=MISSING_COLOUR),
        )
        axes.grid(False)
        _label_rows(axes, groups)
        _label_steps(axes, update["step"].values)
        bar = figure_of(axes).colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label(axis_label(variable))
    return figure_of(axes)


def per_cell(update: xr.Dataset, variable: str, kind: str) -> np.ndarray:
    """Return the variable as ``(matrix, step)``.

    Raises:
        ValueError: If it has other dimensions.
    """
    array = variable_of(update, variable)
    if "kind" in array.dims:
        array = array.sel(kind=kind)
    if set(array.dims) != set(_DIMS):
        raise ValueError(f"Expected a variable of step and matrix, got {variable!r} with {array.dims}.")
    return array.transpose("matrix", "step").values.astype(np.float64)


def title_of_cells(update: xr.Dataset, variable: str, kind: str) -> str:
    """Return the title of a heatmap; it names the kind where the variable has kinds."""
    return title_of(variable, kind if "kind" in update[variable].dims else "")


def colour_range(values: np.ndarray) -> tuple[float, float]:
    """Return smallest and largest finite value; for equal values a range of some width.

    >>> colour_range(np.array([[2.0, 2.0, np.nan]]))
    (2.0, 4.0)
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + (abs(low) or 1.0)


def describe_cells(values: np.ndarray, steps: int) -> str:
    """Return what a heatmap shows, for readers who cannot see it."""
    finite = values[np.isfinite(values)]
    cells = f"{counted(values.shape[0], 'matrix', 'matrices')} at {counted(steps, 'step')}"
    if not finite.size:
        return f"Heatmap of {cells}; no cell has a value."
    missing = values.size - finite.size
    rest = f"; {missing} cells without a value" if missing else ""
    return f"Heatmap of {cells}, from {finite.min():.3g} to {finite.max():.3g}{rest}."


def _label_rows(axes: Axes, groups: list[RowGroup]) -> None:
    """Write each group's name beside its middle row, and draw a line between groups."""
    start, ticks, labels = 0, [], []
    for number, rows in enumerate(groups):
        count = len(rows.positions)
        if number:
            axes.axhline(start - 0.5, color="white", linewidth=1.5)
        if rows.numbered:
            ticks.append(start + (count - 1) / 2)
            labels.append(f"{shorten(rows.label, 40)}\n{rows.labels[0]} to {rows.labels[-1]}")
        else:
            ticks += range(start, start + count)
            labels += [shorten(label, 40) for label in rows.labels]
        start += count
    keep = max(1, -(-len(ticks) // _MOST_LABELS))
    axes.set_yticks(ticks[::keep], labels[::keep])
    axes.tick_params(axis="y", length=0)
    without_mathematics(axes.get_yticklabels())


def _label_steps(axes: Axes, steps: np.ndarray) -> None:
    keep = max(1, -(-len(steps) // 10))
    columns = np.arange(0, len(steps), keep)
    axes.set_xticks(columns, [f"{step:,}" for step in steps[columns]], rotation=45 if len(steps) > 5 else 0)
    axes.set_xlabel("Optimizer step")
