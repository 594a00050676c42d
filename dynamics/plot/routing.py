"""How evenly routers spread tokens over experts, over the steps."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dynamics.plot.marks import first_and_last, legend_below
from dynamics.plot.select import axis_label, group, long_name, variable_of
from dynamics.plot.style import COLOURS, NULL_COLOUR, figure_of, panel, say_nothing_to_draw, shorten, step_axis
from dynamics.text import counted

#: Variables of the figures, and whether a larger value is worse.
OF_ROUTING = {"effective_experts": False, "largest_share": True, "dead": True}


def routing(data: xr.DataTree | xr.Dataset, *, variable: str = "effective_experts", ax: Axes | None = None) -> Figure:
    """Draw one number of each layer with experts over the steps; the worst layer at the last step stands out.

    Dashed: what uniform routing gives in that layer, where it is known: the largest load of 95 % of cases, or the
    expected number of experts without a token.

    Args:
        data: The result of one run, or its ``/routing`` group.
        variable: ``"effective_experts"``, ``"largest_share"``, ``"dead"``, ``"entropy"`` or ``"margin"``.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the result has no routing, or the variable is not one of layers and steps.

    Example: ``plot.routing(dynamics.open_run("runs/imax"), variable="largest_share")``
    """
    table = group(data, "routing")
    values = variable_of(table, variable)
    if set(values.dims) != {"step", "layer"}:
        raise ValueError(f"Expected a variable of step and layer, got {variable!r} with {values.dims}.")
    steps, lines = table["step"].values, values.transpose("layer", "step")
    worst = _worst(lines.values, table["experts"].values, variable)
    description = _description(lines, worst)
    with panel(ax, long_name(values), description) as axes:
        axes.set_ylabel(axis_label(values))
        if worst is None:
            say_nothing_to_draw(axes, "No step has a value")
            return figure_of(axes)
        marker = "o" if np.isfinite(lines.values).sum(1).max() == 1 else ""
        for row, line in enumerate(lines.values):
            if row != worst:
                label = "other layers" if row == (worst == 0) else "_"
                axes.plot(steps, line, color=COLOURS[0], alpha=0.35, linewidth=0.9, marker=marker, label=label)
        name = f" {shorten(str(lines['layer'].values[worst]))}"
        axes.plot(steps, lines.values[worst], color=COLOURS[1], marker=marker, label=name, zorder=3)
        if f"{variable}_chance" in table:
            chance = table[f"{variable}_chance"].transpose("layer", "step").values[worst]
            axes.plot(steps, chance, color=NULL_COLOUR, linestyle="--", marker=marker, label="uniform routing")
        if variable == "dead":
            axes.set_ylim(-0.05 * (top := max(axes.get_ylim()[1], 1.0)), top)  # without any, the null is 1e-20
            axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        step_axis(axes, steps.tolist())
        legend_below(axes)
    return figure_of(axes)


def _worst(lines: np.ndarray, experts: np.ndarray, variable: str) -> int | None:
    """Return the row that is worst at its last step, relative to its number of experts; ``None`` without a value."""
    last = np.array([line[np.isfinite(line)][-1] if np.isfinite(line).any() else np.nan for line in lines])
    if not np.isfinite(last).any():
        return None
    if variable == "margin":
        return int(np.nanargmin(last))
    relative = last * experts if variable == "largest_share" else last / experts
    return int(np.nanargmax(relative) if OF_ROUTING.get(variable, False) else np.nanargmin(relative))


def _description(lines: xr.DataArray, worst: int | None) -> str:
    if worst is None:
        return "There is no value."
    layers, name = counted(lines.sizes["layer"], "layer"), lines["layer"].values[worst]
    return f"Lines of {layers} over optimizer steps; {name}: {first_and_last(lines[worst])}."
