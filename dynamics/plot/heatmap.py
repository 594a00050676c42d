"""One number of every matrix at every step."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.select import RowGroup, axis_label, group, long_name, row_groups, variable_of
from dynamics.plot.style import COLOUR_MAP, MISSING_COLOUR, canvas, describe, figure_of, shorten, without_mathematics

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
    """Matrix × step of one variable, rows by role and within a role by layer, first layer on top.

    Cells without a finite value are grey. Columns are steps, evenly spaced whatever the steps between them.

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
    order = [position for each in groups for position in each.positions]
    title = f"{long_name(variable)}{kind_words(update, variable, kind)}"
    with canvas(ax, width=7.2, height=min(1.6 + _ROW * len(order), _TALLEST)) as axes:
        masked = np.ma.masked_invalid(values[order])
        low, high = colour_range(values)
        # An image of one pixel a cell stays small, however many matrices there are.
        image = axes.imshow(
            masked,
            aspect="auto",
            interpolation="none",
            vmin=low,
            vmax=high,
            cmap=mpl.colormaps[COLOUR_MAP].with_extremes(bad=MISSING_COLOUR),
        )
        axes.grid(False)
        axes.set_title(title)
        _label_rows(axes, groups)
        _label_steps(axes, update["step"].values)
        bar = figure_of(axes).colorbar(image, ax=axes, fraction=0.05, pad=0.02)
        bar.set_label(axis_label(variable))
    figure = figure_of(axes)
    if ax is None:
        describe(figure, title, words_of_cells(values, update.sizes["step"]))
    return figure


def per_cell(update: xr.Dataset, variable: str, kind: str) -> np.ndarray:
    """The variable as ``(matrix, step)``.

    Raises:
        ValueError: If it has other dimensions.
    """
    array = variable_of(update, variable)
    if "kind" in array.dims:
        array = array.sel(kind=kind)
    if set(array.dims) != set(_DIMS):
        raise ValueError(f"Expected a variable of step and matrix, got {variable!r} with {array.dims}.")
    return array.transpose("matrix", "step").values.astype(np.float64)


def kind_words(update: xr.Dataset, variable: str, kind: str) -> str:
    """``", total"``, for a variable that has kinds."""
    return f", {kind}" if "kind" in update[variable].dims else ""


def colour_range(values: np.ndarray) -> tuple[float, float]:
    """Smallest and largest finite value; a range of some width even for equal ones.

    >>> colour_range(np.array([[2.0, 2.0, np.nan]]))
    (2.0, 4.0)
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    return low, high if high > low else low + (abs(low) or 1.0)


def words_of_cells(values: np.ndarray, steps: int) -> str:
    """What a heatmap shows, for who cannot see it."""
    finite = values[np.isfinite(values)]
    cells = f"{values.shape[0]} matrices at {steps} steps"
    if not finite.size:
        return f"Heatmap of {cells}; no cell has a value."
    missing = values.size - finite.size
    rest = f"; {missing} cells without a value" if missing else ""
    return f"Heatmap of {cells}, from {finite.min():.3g} to {finite.max():.3g}{rest}."


def _label_rows(axes: Axes, groups: list[RowGroup]) -> None:
    """The group's name beside its middle row, a line between groups."""
    start, ticks, labels = 0, [], []
    for number, each in enumerate(groups):
        count = len(each.positions)
        if number:
            axes.axhline(start - 0.5, color="white", linewidth=1.5)
        if each.numbered:
            ticks.append(start + (count - 1) / 2)
            labels.append(f"{shorten(each.label, 40)}\n{each.labels[0]} to {each.labels[-1]}")
        else:
            ticks += range(start, start + count)
            labels += [shorten(label, 40) for label in each.labels]
        start += count
    keep = max(1, -(-len(ticks) // _MOST_LABELS))
    axes.set_yticks(ticks[::keep], labels[::keep])
    axes.tick_params(axis="y", length=0)
    without_mathematics(axes.get_yticklabels())


def _label_steps(axes: Axes, steps: np.ndarray) -> None:
    keep = max(1, -(-len(steps) // 10))
    places = np.arange(0, len(steps), keep)
    axes.set_xticks(places, [f"{step:,}" for step in steps[places]], rotation=45 if len(steps) > 5 else 0)
    axes.set_xlabel("optimizer step")
