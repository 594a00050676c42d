"""Gradients over the steps: their size before and after clipping, and how many directions they have."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_band, draw_quartiles, first_and_last, legend_below
from dynamics.plot.select import axis_label, group, long_name, variable_of
from dynamics.plot.style import figure_of, logarithmic, panel, say_nothing_to_draw, step_axis

#: Draws the norm before and after clipping together.
NORM = "norm"
_NORMS = {"norm_before_clip": "before clipping", "norm_after_clip": "after clipping"}
_UNCLIPPED = {"norm_before_clip": "median over matrices; clipping changed nothing"}


def gradient(data: xr.DataTree | xr.Dataset, *, variable: str = NORM, ax: Axes | None = None) -> Figure:
    """Draw median and quartiles over matrices of the gradient at each captured step.

    Args:
        data: The result of one run, or its ``/summary_gradient`` group.
        variable: ``"norm"`` for the norm before and after clipping on a logarithmic axis, one line if clipping changed
            nothing. Or a measure, with mean and 5–95 % band of random factors of the same shape.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If no gradients were captured, or the variable is not in the result.

    Example: ``plot.gradient(dynamics.open_run("runs/imax"), variable="dominant_ratio")``
    """
    summary = group(data, "summary_gradient")
    lines = _norms(summary) if variable == NORM else {variable: "median over matrices"}
    quantiles = {name: variable_of(summary, f"{name}_quantile") for name in lines}
    title = "gradient norm of a matrix" if variable == NORM else f"{long_name(variable)} of the gradient"
    with panel(ax, title, _description(quantiles, lines)) as axes:
        axes.set_ylabel("Gradient norm (loss per weight unit)" if variable == NORM else axis_label(variable))
        if variable != NORM:
            _draw_null(axes, summary, variable)
        for number, (name, label) in enumerate(lines.items()):
            draw_quartiles(axes, quantiles[name], number, label)
        if any(_can_be_drawn(line.values, variable).any() for line in quantiles.values()):
            step_axis(axes, summary["step"].values.tolist())
            if variable == NORM:
                logarithmic(axes)
            legend_below(axes)
        else:
            say_nothing_to_draw(axes)
    return figure_of(axes)


def _norms(summary: xr.Dataset) -> dict[str, str]:
    """Return the lines of both norms; a single one where they are equal, since one would hide the other."""
    before, after = (variable_of(summary, f"{name}_quantile").values for name in _NORMS)
    return _UNCLIPPED if np.array_equal(before, after, equal_nan=True) else _NORMS


def _can_be_drawn(values: np.ndarray, variable: str) -> np.ndarray:
    """Return which values are finite and, for the logarithmic axis of the norm, above zero."""
    return np.isfinite(values) & ((values > 0) | (variable != NORM))


def _draw_null(axes: Axes, summary: xr.Dataset, variable: str) -> None:
    if f"{variable}_null" not in summary:
        return
    steps = summary["step"].values
    mean, low, high = (summary[f"{variable}_null{end}"].values for end in ("", "_low", "_high"))
    draw_band(axes, steps, low, high, "random factors, 5–95 %")
    finite = np.isfinite(mean).sum()
    if finite:
        axes.plot(
            steps,
            mean,
            color="#444444",
            linestyle="--",
            linewidth=1.2,
            marker="_" if finite == 1 else "",
            label="random factors, mean",
        )


def _description(quantiles: dict[str, xr.DataArray], lines: dict[str, str]) -> str:
    ends = {name: first_and_last(line.sel(quantile=0.5)) for name, line in quantiles.items()}
    medians = [f"{lines[name] if len(lines) > 1 else 'the median'}: {words}" for name, words in ends.items() if words]
    if not medians:
        return "No step has a value."
    return f"Lines over optimizer steps, median and quartiles over matrices; {'; '.join(medians)}."
