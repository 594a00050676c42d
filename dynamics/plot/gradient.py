"""Gradients over the steps: how large before and after clipping, and how many directions they have."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dynamics.plot.marks import draw_band, draw_quartiles, first_and_last, legend_below
from dynamics.plot.select import axis_label, group, long_name, variable_of
from dynamics.plot.style import canvas, describe, figure_of, say_nothing_to_draw, step_axis

#: Draws the norm before and after clipping together.
NORM = "norm"
_NORMS = {"norm_before_clip": "before clipping", "norm_after_clip": "after clipping"}
_UNCLIPPED = {"norm_before_clip": "median over matrices; clipping changed nothing"}


def gradient(data: xr.DataTree | xr.Dataset, *, variable: str = NORM, ax: Axes | None = None) -> Figure:
    """Median and quartiles over matrices of the gradient at each captured step.

    Args:
        data: The result of one run, or its ``/summary_gradient`` group.
        variable: ``"norm"``: the norm before and after clipping, on a logarithmic axis; one line where clipping left
            every step as it was. Or a measure, with the mean and the 5–95 % band of random factors of the same shape
            beside it.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If no gradients were captured, or the variable is not in the result.

    Example: ``plot.gradient(dynamics.open_run("runs/imax"), variable="dominant_ratio")``
    """
    summary = group(data, "summary_gradient")
    lines = _norms(summary) if variable == NORM else {variable: "median over matrices"}
    quantiles = {name: variable_of(summary, f"{name}_quantile") for name in lines}
    title = "gradient norm of a matrix" if variable == NORM else f"{long_name(variable)} of the gradient"
    drawn = any(_can_be_drawn(each.values, variable).any() for each in quantiles.values())
    with canvas(ax) as axes:
        if variable != NORM:
            _draw_null(axes, summary, variable)
        for number, (name, label) in enumerate(lines.items()):
            draw_quartiles(axes, quantiles[name], number, label)
        axes.set_title(title)
        axes.set_ylabel("loss per weight unit" if variable == NORM else axis_label(variable))
        if drawn:
            step_axis(axes, summary["step"].values.tolist())
            if variable == NORM:
                _logarithmic(axes)
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "no values: see the findings")
    figure = figure_of(axes)
    if ax is None:
        describe(figure, title, _words(quantiles, lines))
    return figure


def _norms(summary: xr.Dataset) -> dict[str, str]:
    """Both norms; of two lines that lie on each other only one would be seen."""
    before, after = (variable_of(summary, f"{name}_quantile").values for name in _NORMS)
    return _UNCLIPPED if np.array_equal(before, after, equal_nan=True) else _NORMS


def _can_be_drawn(values: np.ndarray, variable: str) -> np.ndarray:
    """Zeros have no place on a logarithmic axis."""
    return np.isfinite(values) & ((values > 0) | (variable != NORM))


def _draw_null(axes: Axes, summary: xr.Dataset, variable: str) -> None:
    if f"{variable}_null" not in summary:
        return
    steps = summary["step"].values
    mean, low, high = (summary[f"{variable}_null{bound}"].values for bound in ("", "_low", "_high"))
    draw_band(axes, steps, low, high, "random factors, 5–95 %")
    if np.isfinite(mean).any():
        marker = "_" if np.isfinite(mean).sum() == 1 else ""
        axes.plot(
            steps, mean, color="#444444", linestyle="--", linewidth=1.2, marker=marker, label="random factors, mean"
        )


def _logarithmic(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high / low < 12:  # less than a decade may hold no power of ten at all
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))


def _words(quantiles: dict[str, xr.DataArray], lines: dict[str, str]) -> str:
    ends = {name: first_and_last(each.sel(quantile=0.5)) for name, each in quantiles.items()}
    said = [f"{lines[name] if len(lines) > 1 else 'the median'}: {words}" for name, words in ends.items() if words]
    if not said:
        return "No step has a value."
    return f"Lines over optimizer steps, median and quartiles over matrices; {'; '.join(said)}."
