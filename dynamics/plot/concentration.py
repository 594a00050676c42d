"""The share of an update in the Fisher's leading directions, beside those of a random direction and a gradient."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import draw_gains, has_optimizer, legend_below
from dynamics.plot.select import chosen, group
from dynamics.plot.style import COLOURS, NULL_COLOUR, doubling_axis, figure_of, panel, say_nothing_to_draw
from dynamics.schema import GLOBAL
from dynamics.text import counted, number, percent

_UPDATE, _GRADIENT, _OPTIMIZER = COLOURS[0], COLOURS[5], COLOURS[2]


def concentration(
    data: xr.DataTree | xr.Dataset,
    *,
    show: str = "share",
    block: str = GLOBAL,
    step: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Draw the share of an update in the k leading informative directions with its nulls, or its gain over a gradient.

    Directions from all samples compare the update with a random direction. Directions from half of the groups compare
    it with fresh gradients of the other half, of as many samples as are behind the update, and with these after the
    optimizer's preconditioner, where that is known and does not leave them as they are.

    Args:
        data: The result of one run, or its ``/concentration`` group.
        show: ``"share"``: shares of the squared norm and all nulls. ``"gain"``: the update's share over a fresh
            gradient's, uncentred and centred, with 95 % intervals; filled where both intervals lie above 1. Beside
            them that over a fresh step of the optimizer.
        block: A matrix, or ``"global"``.
        step: By default the last one that has an update.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the block or the step is not in the result, or ``show`` is neither.

    Example: ``plot.concentration(dynamics.open_run("runs/imax"), show="gain")``
    """
    if show not in ("share", "gain"):
        raise ValueError(f"Expected show='share' or show='gain', got {show!r}.")
    variable, name = ("captured", "share of the update") if show == "share" else ("gain", "gain over a fresh gradient")
    shares = chosen(group(data, "concentration"), variable, step=step, block=block)
    title = f"{name} in k leading directions, step {int(shares['step']):,}"
    with panel(ax, title, _description(shares, variable), block=block) as axes:
        if np.isfinite(shares[variable].values).any():
            k = shares["k"].values
            if show == "share":
                _draw_shares(axes, shares)
            else:
                draw_gains(axes, shares, (k * 0.97, k * 1.03, k * 1.09))
            doubling_axis(axes, k.tolist(), "Number k of leading directions of the Fisher")
            legend_below(axes)
        else:
            say_nothing_to_draw(axes)
    return figure_of(axes)


def _draw_shares(axes: Axes, shares: xr.Dataset) -> None:
    k = shares["k"].values
    batch = float(shares["null_batch"])
    of_samples = "" if np.isnan(batch) else f" of {counted(int(batch), 'sample')}"
    nulls = [
        ("null_isotropic", NULL_COLOUR, "random direction", ":"),
        ("null_gradient", _GRADIENT, f"fresh gradient{of_samples}", "--"),
    ]
    if has_optimizer(shares):
        nulls.append(("null_optimizer", _OPTIMIZER, "fresh step of the optimizer", "-."))
    for name, colour, label, line in nulls:
        mean, low, high = (shares[f"{name}{end}"].values for end in ("", "_low", "_high"))
        if np.isfinite(mean).any():
            axes.fill_between(k, low, high, facecolor=colour, edgecolor=colour, alpha=0.25, linewidth=0.8)
            axes.plot(k, mean, color=colour, linestyle=line, label=f"{label}, 95 %")
    axes.plot(k, shares["captured"].values, color=_UPDATE, marker="o", label="update, directions of all samples")
    split = shares["captured_split"].values
    if np.isfinite(split).any():
        label = "update, directions of half"
        axes.plot(k, split, color=_UPDATE, marker="s", markerfacecolor="white", linestyle="--", label=label)
    axes.set_ylabel("Share of the squared norm")
    axes.set_ylim(bottom=0)


def _description(shares: xr.Dataset, variable: str) -> str:
    finite = np.flatnonzero(np.isfinite(shares[variable].values))
    if not finite.size:
        return "No k has a value."
    last = shares.isel(k=int(finite[-1]))
    directions = counted(int(last["k"]), "direction")
    if variable == "captured":
        return (
            f"Lines over k. The update has {percent(float(last['captured']))} of its squared norm in {directions}, "
            f"a random direction {percent(float(last['null_isotropic']))}."
        )
    gain, low, high = (number(float(last[f"gain{end}"])) for end in ("", "_low", "_high"))
    beside = ""
    if has_optimizer(shares):
        beside = f" Over a fresh step of the optimizer it is {number(float(last['gain_optimizer']))}."
    return f"Points over k with intervals. With {directions} the gain is {gain} ({low} to {high}).{beside}"
