"""One number over the steps: how the matrices differ, and what chance would give."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_band, draw_quartiles, first_and_last, legend_below
from dynamics.plot.select import axis_label, group, title_of, variable_of
from dynamics.plot.style import figure_of, panel, say_nothing_to_draw, step_axis

_SIZES = ("frobenius_norm", "path_length")


def trajectory(
    data: xr.DataTree | xr.Dataset,
    *,
    variable: str = "effective_rank_energy",
    kind: str = "total",
    ax: Axes | None = None,
) -> Figure:
    """Draw median and quartiles over matrices at each step, with the band of the random-LoRA null where there is one.

    Trainings that share a folder get a line each.

    Args:
        data: The result of one run, or its ``/summary`` group.
        variable: ``frobenius_norm``, ``path_length``, ``increment_cosine`` or a measure.
        kind: ``"total"`` (since the start of training) or ``"increment"`` (since the previous checkpoint).
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the variable is not in the result.

    Example: ``plot.trajectory(dynamics.open_run("runs/imax"), variable="stable_rank")``
    """
    summary = group(data, "summary")
    quantiles = variable_of(summary, f"{variable}_quantile")
    kind = kind if "kind" in quantiles.dims else ""
    quantiles = quantiles.sel(kind=kind) if kind else quantiles
    with panel(ax, title_of(variable, kind), _description(quantiles)) as axes:
        axes.set_ylabel(axis_label(variable))
        if f"{variable}_null_low" in summary:
            low, high = (summary[f"{variable}_null_{end}"].sel(kind=kind).values for end in ("low", "high"))
            draw_band(axes, summary["step"].values, low, high, "chance, same shape, 5–95 %")
        segments = _segments(data, summary)
        for number, segment in enumerate(np.unique(segments)):
            label = "median over matrices" if (segments == segments[0]).all() else f"training {segment}, median"
            draw_quartiles(axes, quantiles.isel(step=segments == segment), number, label)
        if np.isfinite(quantiles.values).any():
            step_axis(axes, summary["step"].values.tolist())
            if variable in _SIZES:
                axes.set_ylim(bottom=0)
            legend_below(axes)
        else:
            say_nothing_to_draw(axes)
    return figure_of(axes)


def _segments(data: xr.DataTree | xr.Dataset, summary: xr.Dataset) -> np.ndarray:
    """Return the training of each step, as ``/update`` or the dataset itself has it."""
    update = group(data, "update") if isinstance(data, xr.DataTree) else summary
    return update["segment"].values if "segment" in update.coords else np.zeros(summary.sizes["step"], dtype=np.int64)


def _description(quantiles: xr.DataArray) -> str:
    ends = first_and_last(quantiles.sel(quantile=0.5))
    if not ends:
        return "No step has a value."
    return f"Line over optimizer steps, median and quartiles over matrices. The median is {ends}."
