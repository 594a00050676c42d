"""One number over the steps: how the matrices differ, and what chance would give."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.result import axis_label, group, long_name, variable_of
from dynamics.plot.style import COLOURS, MARKERS, NULL_COLOUR, canvas, figure_of, say_nothing_to_draw, step_axis
from dynamics.plot.svg import describe

_SIZES = ("frobenius_norm", "path_length")


def trajectory(
    data: xr.DataTree | xr.Dataset,
    *,
    variable: str = "effective_rank_energy",
    kind: str = "total",
    ax: Axes | None = None,
) -> Figure:
    """Median and quartiles over matrices at each step, with the band of the random-LoRA null where there is one.

    Trainings that share a folder are drawn apart; a line never joins two of them.

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
    if "kind" in quantiles.dims:
        quantiles = quantiles.sel(kind=kind)
    segments = _segments(data, summary)
    of_kind = f", {kind}" if "kind" in summary[f"{variable}_quantile"].dims else ""
    with canvas(ax) as axes:
        _draw_null(axes, summary, variable, kind)
        for number, segment in enumerate(np.unique(segments)):
            label = "median over matrices" if (segments == segments[0]).all() else f"training {segment}, median"
            _draw_segment(axes, quantiles.isel(step=segments == segment), number, label)
        axes.set_title(long_name(variable) + of_kind)
        axes.set_ylabel(axis_label(variable))
        if np.isfinite(quantiles.values).any():
            step_axis(axes, summary["step"].values.tolist())
            if variable in _SIZES:
                axes.set_ylim(bottom=0)
            _legend(axes)
        else:
            say_nothing_to_draw(axes, "no values: see the findings")
    figure = figure_of(axes)
    if ax is None:
        describe(figure, f"{long_name(variable)}{of_kind}", _words(quantiles))
    return figure


def _segments(data: xr.DataTree | xr.Dataset, summary: xr.Dataset) -> np.ndarray:
    """The training of each step: in ``/update``, or on the dataset itself."""
    update = group(data, "update") if isinstance(data, xr.DataTree) else summary
    return update["segment"].values if "segment" in update.coords else np.zeros(summary.sizes["step"], dtype=np.int64)


def _draw_null(axes: Axes, summary: xr.Dataset, variable: str, kind: str) -> None:
    if f"{variable}_null_low" not in summary:
        return
    low, high = (summary[f"{variable}_null_{bound}"].sel(kind=kind).values for bound in ("low", "high"))
    known = np.isfinite(low) & np.isfinite(high)
    steps = summary["step"].values
    if known.sum() == 1:  # a band of one step has no width
        middle = (low + high)[known] / 2
        bar = (high - low)[known] / 2
        axes.errorbar(steps[known], middle, bar, color=NULL_COLOUR, capsize=5, fmt="none", label=_NULL)
        return
    if not known.any():
        return
    # A band may be thinner than a pixel: its edge keeps it visible.
    axes.fill_between(steps, low, high, facecolor=NULL_COLOUR, edgecolor=NULL_COLOUR, alpha=0.45, label=_NULL)


_NULL = "random LoRA of the same shape, 5–95 %"


def _draw_segment(axes: Axes, quantiles: xr.DataArray, number: int, label: str) -> None:
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    steps = quantiles["step"].values
    low, middle, high = (quantiles.sel(quantile=q).values for q in (0.25, 0.5, 0.75))
    axes.plot(steps, middle, color=colour, marker=marker, label=label, zorder=3)
    if np.isfinite(middle).sum() == 1:
        axes.vlines(steps, low, high, color=colour, alpha=0.5, linewidth=4, label="quartiles")
    elif np.isfinite(middle).any():
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0, label="quartiles")


def _legend(axes: Axes) -> None:
    """Above the axes, where it hides no point; "quartiles" said once."""
    entries = dict(zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    axes.legend(
        entries.values(),
        entries.keys(),
        loc="upper center",
        bbox_to_anchor=(0.5, -0.2),
        ncols=3,
        columnspacing=1.0,
        handlelength=1.4,
    )


def _words(quantiles: xr.DataArray) -> str:
    """The figure's first and last number, for who cannot see it."""
    middle = quantiles.sel(quantile=0.5)
    known = middle[np.isfinite(middle.values)]
    if not known.size:
        return "No step has a value."
    ends = [f"{float(known[end]):.3g} at step {int(known['step'][end])}" for end in (0, -1)]
    return "Line over optimizer steps, median and quartiles over matrices. The median is " + (
        f"{ends[0]}." if known.size == 1 else f"{ends[0]} and {ends[1]}."
    )
