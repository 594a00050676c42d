"""Singular values of an update."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from dynamics.plot.select import RULE, group, has_group, standouts
from dynamics.plot.style import (
    COLOURS,
    MARKERS,
    NULL_COLOUR,
    canvas,
    describe,
    figure_of,
    say_nothing_to_draw,
    shorten,
    without_mathematics,
)

_NULL = "chance, this size and shape, 5–95 %"
_LEGEND_LIMIT = 12


def spectrum(
    data: xr.DataTree | xr.Dataset,
    *,
    matrices: Sequence[str] | None = None,
    step: int | None = None,
    kind: str = "total",
    ax: Axes | None = None,
) -> Figure:
    """Singular values of some matrices' updates at one step, on a logarithmic axis.

    For one matrix the band of the random-LoRA null is drawn where the result has it. Zeros have no place on a
    logarithmic axis: their number is in the legend.

    Args:
        data: The result of one run, or its ``/update`` group.
        matrices: Their names; by default those that stand out at the last step.
        step: By default the last one.
        kind: ``"total"`` or ``"increment"``.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If a matrix or the step is not in the result.

    Example: ``plot.spectrum(tree, matrices=["model.layers.0.self_attn.q_proj"], step=500)``
    """
    update = group(data, "update")
    names = list(standouts(update)) if matrices is None else list(matrices)
    step = int(update["step"].values[-1]) if step is None else step
    _check(update, names, step)
    here = update["singular_value"].sel(step=step, kind=kind)
    # The null is that of one update: beside several it would be several bands.
    band = names[0] if len(names) == 1 and has_group(data, "null") else None
    with canvas(ax, height=3.4 + 0.18 * min(len(names), _LEGEND_LIMIT)) as axes:
        if band is not None:
            _draw_null(axes, group(data, "null"), band, step, kind)
        for number, name in enumerate(names):
            _draw(axes, here.sel(matrix=name).values, name, number)
        axes.set_title(f"singular values of the {kind} update, step {step:,}")
        _finish(axes, drawn=any((here.sel(matrix=name).values > 0).any() for name in names))
    figure = figure_of(axes)
    if ax is None:
        rule = RULE if matrices is None else ""
        words = f"Singular values, largest first, of {len(names)} matrices: {', '.join(names)}. {rule}".rstrip()
        describe(figure, f"singular values of the {kind} update at step {step}", words)
    return figure


def spectra_of_standouts(tree: xr.DataTree) -> Figure:
    """One panel for each matrix that stands out at the last step, all on one scale; no panel if nothing moved."""
    update = group(tree, "update")
    reasons = standouts(update)
    rows = max(1, -(-len(reasons) // 3))
    columns = max(1, -(-len(reasons) // rows))
    with canvas(None, width=3.5 * columns, height=2.5 * rows + 0.4) as axes:
        figure = figure_of(axes)
        axes.remove()
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for panel, (name, reason) in zip(panels, reasons.items(), strict=False):
            _draw_standout(tree, panel, name, reason)
        for number, empty in enumerate(panels[len(reasons) :], start=len(reasons)):
            empty.remove()
            if number >= columns:
                panels[number - columns].tick_params(labelbottom=True)
        handles = {label: handle for panel in figure.axes for handle, label in _entries(panel)}
        if _NULL in handles:  # one line needs no legend
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items()) or "none"
    describe(figure, f"singular values of the matrices that stand out at step {int(update['step'][-1])}", listed)
    return figure


def _draw_standout(tree: xr.DataTree, panel: Axes, name: str, reason: str) -> None:
    spectrum(tree, matrices=[name], ax=panel)
    without_mathematics([panel.set_title(f"{shorten(name, 38)}\n{reason}", fontsize=8, fontweight="normal")])
    if (legend := panel.get_legend()) is not None:
        legend.remove()
    panel.label_outer()


def _entries(panel: Axes) -> list[tuple]:
    """What the panels share; each panel's own name is in its title."""
    handles, labels = panel.get_legend_handles_labels()
    return [(handle, label if label == _NULL else "this update") for handle, label in zip(handles, labels, strict=True)]


def _check(update: xr.Dataset, names: Sequence[str], step: int) -> None:
    known = set(update["matrix"].values.tolist())
    for name in names:
        if name not in known:
            raise ValueError(f"Expected the name of a matrix of the result, got {name!r}.")
    steps = update["step"].values.tolist()
    if step not in steps:
        raise ValueError(f"Expected a step of the result, got {step}. There are: {', '.join(map(str, steps))}.")


def _draw(axes: Axes, values: np.ndarray, name: str, number: int) -> None:
    positive = values > 0
    zeros = int((values == 0).sum())
    label = shorten(name, 60) + (f" ({zeros} zeros not drawn)" if zeros else "")
    axes.plot(
        np.flatnonzero(positive) + 1,
        values[positive],
        color=COLOURS[number % len(COLOURS)],
        marker=MARKERS[number % len(MARKERS)],
        # matplotlib leaves out of a legend what starts with an underscore.
        label=f" {label}" if label.startswith("_") else label,
        zorder=3,
    )


def _draw_null(axes: Axes, null: xr.Dataset, name: str, step: int, kind: str) -> None:
    if "singular_value_low" not in null:
        return
    low, high = (null[f"singular_value_{b}"].sel(step=step, kind=kind, matrix=name).values for b in ("low", "high"))
    known = (low > 0) & np.isfinite(high)
    if known.any():
        index = np.flatnonzero(known) + 1
        axes.fill_between(
            index, low[known], high[known], facecolor=NULL_COLOUR, edgecolor=NULL_COLOUR, alpha=0.45, label=_NULL
        )


def _finish(axes: Axes, drawn: bool) -> None:
    if not drawn:
        say_nothing_to_draw(axes, "no singular value above zero")
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(numticks=7))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    low, high = axes.get_ylim()
    if high / low < 12:  # less than a decade may hold no power of ten at all
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=7))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set_xlabel("position, largest first")
    axes.set_ylabel("singular value σ (weight units)")
    handles, labels = axes.get_legend_handles_labels()
    if len(handles) > _LEGEND_LIMIT:
        labels[_LEGEND_LIMIT - 1] = f"… and {len(handles) - _LEGEND_LIMIT + 1} more"
    legend = axes.legend(
        handles[:_LEGEND_LIMIT],
        labels[:_LEGEND_LIMIT],
        loc="upper left",
        bbox_to_anchor=(0.0, -0.18),
        borderaxespad=0.0,
    )
    without_mathematics(legend.get_texts())
