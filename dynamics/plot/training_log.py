"""A logged number over the steps: the training's own account, beside what the weights did."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.select import group
from dynamics.plot.style import (
    COLOURS,
    canvas,
    describe,
    figure_of,
    say_nothing_to_draw,
    step_axis,
    without_mathematics,
)


def training_log(data: xr.DataTree | xr.Dataset, *, variable: str = "loss", ax: Axes | None = None) -> Figure:
    """One scalar of the training log as it was logged.

    Args:
        data: The result of one run, or its ``/training`` group.
        variable: ``loss``, ``learning_rate``, ``grad_norm`` or whatever else was logged.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If there is no log, or the variable is not in it.

    Example: ``plot.training_log(dynamics.open_run("runs/imax"), variable="grad_norm")``
    """
    log = group(data, "training")
    logged = logged_number(log, variable)
    if logged is None:
        known = ", ".join(sorted(map(str, log["metric"].values)))
        raise ValueError(f"Expected the name of a number in the training log, got {variable!r}. There are: {known}.")
    name = variable
    segments = log["log_segment"].values
    known = np.isfinite(logged.values)
    with canvas(ax) as axes:
        for number, segment in enumerate(np.unique(segments)):
            here = known & (segments == segment)
            axes.plot(
                log["log_step"].values[here],
                logged.values[here],
                color=COLOURS[number % len(COLOURS)],
                marker="o" if here.sum() < 30 else "",
                label=f"training {segment}",
            )
        title, label = axes.set_title(f"training log: {name}"), axes.set_ylabel(f"{name} (as logged)")
        without_mathematics([title, label])
        if known.any():
            step_axis(axes, np.unique(log["log_step"].values[known]).tolist())
        else:
            say_nothing_to_draw(axes, "no finite value was logged")
        if len(np.unique(segments)) > 1:
            axes.legend()
    figure = figure_of(axes)
    if ax is None:
        finite = logged.values[known]
        ends = f"from {finite[0]:.3g} to {finite[-1]:.3g}" if finite.size else "without a finite value"
        describe(figure, f"training log: {name}", f"Line over optimizer steps of what was logged, {ends}.")
    return figure


def logged_number(log: xr.Dataset, name: str) -> xr.DataArray | None:
    """One scalar of the ``/training`` group over ``log``, ``None`` if it was never logged."""
    found = np.flatnonzero(log["metric"].values == name)
    return log["value"].isel(metric=int(found[0])) if found.size else None
