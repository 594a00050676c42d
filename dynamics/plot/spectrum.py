"""Singular values of an update."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynamics.plot.select import RULE, group, has_group, standouts
from dynamics.plot.style import (
    COLOURS,
    MARKERS,
    NULL_COLOUR,
    STYLE,
    describe,
    figure_of,
    logarithmic,
    panel,
    say_nothing_to_draw,
    shorten,
    without_mathematics,
)

_NULL = "chance, same size and shape, 5–95 %"
_LEGEND_LIMIT = 12


def spectrum(
    data: xr.DataTree | xr.Dataset,
    *,
    matrices: Sequence[str] | None = None,
    step: int | None = None,
    kind: str = "total",
    ax: Axes | None = None,
) -> Figure:
    """Draw the singular values of some matrices' updates at one step, on a logarithmic axis.

    A single matrix is drawn with the band of its random-LoRA null, where the result has one. Zeros have no place on a
    logarithmic axis; the legend gives their number.

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
    values = {name: update["singular_value"].sel(step=step, kind=kind, matrix=name).values for name in names}
    title = f"singular values of the {kind} update, step {step:,}"
    description = f"Singular values, largest first, of {len(names)} matrices: {', '.join(names)}."
    if matrices is None:
        description += f" {RULE}"
    with panel(ax, title, description, height=3.4 + 0.18 * min(len(names), _LEGEND_LIMIT)) as axes:
        if not any((sigma > 0).any() for sigma in values.values()):
            say_nothing_to_draw(axes, "No singular value above zero")
            return figure_of(axes)
        if len(names) == 1 and has_group(data, "null"):  # beside several updates there would be several bands
            _draw_null(axes, group(data, "null"), names[0], step, kind)
        for number, (name, sigma) in enumerate(values.items()):
            _draw(axes, sigma, name, number)
        logarithmic(axes)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        axes.set_xlabel("Index, largest first")
        axes.set_ylabel("Singular value σ (weight units)")
        _write_legend(axes)
    return figure_of(axes)


def spectra_of_standouts(tree: xr.DataTree) -> Figure:
    """Draw one panel for each matrix that stands out at the last step, all on one scale; none if nothing moved."""
    update = group(tree, "update")
    reasons = standouts(update)
    rows = max(1, -(-len(reasons) // 3))
    columns = max(1, -(-len(reasons) // rows))
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(3.5 * columns, 2.5 * rows + 0.4), layout="constrained")
        panels = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axes, (name, reason) in zip(panels, reasons.items(), strict=False):
            _draw_standout(tree, axes, name, reason)
        for number, empty in enumerate(panels[len(reasons) :], start=len(reasons)):
            empty.remove()
            if number >= columns:
                panels[number - columns].tick_params(labelbottom=True)
        handles = {label: handle for axes in figure.axes for handle, label in _entries(axes)}
        if _NULL in handles:  # one line needs no legend
            figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items()) or "none"
    describe(figure, f"Singular values of the matrices that stand out, step {int(update['step'][-1]):,}", listed)
    return figure


def _draw_standout(tree: xr.DataTree, axes: Axes, name: str, reason: str) -> None:
    spectrum(tree, matrices=[name], ax=axes)
    without_mathematics([axes.set_title(f"{shorten(name, 38)}\n{reason}", fontsize=8, fontweight="normal")])
    if (legend := axes.get_legend()) is not None:
        legend.remove()
    axes.label_outer()


def _entries(axes: Axes) -> list[tuple]:
    """Return the legend entries that the panels share; a matrix is named in its panel's title."""
    handles, labels = axes.get_legend_handles_labels()
    return [(handle, label if label == _NULL else "this update") for handle, label in zip(handles, labels, strict=True)]


def _check(update: xr.Dataset, names: Sequence[str], step: int) -> None:
    matrices = set(update["matrix"].values.tolist())
    for name in names:
        if name not in matrices:
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
        # matplotlib leaves a label that starts with an underscore out of a legend.
        label=f" {label}" if label.startswith("_") else label,
        zorder=3,
    )


def _draw_null(axes: Axes, null: xr.Dataset, name: str, step: int, kind: str) -> None:
    if "singular_value_low" not in null:
        return
    low, high = (null[f"singular_value_{end}"].sel(step=step, kind=kind, matrix=name).values for end in ("low", "high"))
    drawn = (low > 0) & np.isfinite(high)
    if drawn.any():
        index = np.flatnonzero(drawn) + 1
        axes.fill_between(
            index, low[drawn], high[drawn], facecolor=NULL_COLOUR, edgecolor=NULL_COLOUR, alpha=0.45, label=_NULL
        )


def _write_legend(axes: Axes) -> None:
    """Put the legend below the axes, one long name to a row."""
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
