"""A number of the training log over the steps."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.select import group
from dynamics.plot.style import COLOURS, figure_of, panel, say_nothing_to_draw, step_axis, without_mathematics
from dynamics.text import number

#: Points of one line that get a marker each.
_FEW = 30


def training_log(data: xr.DataTree | xr.Dataset, *, variable: str = "loss", ax: Axes | None = None) -> Figure:
    """Draw one scalar of the training log as it was logged.

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
        names = ", ".join(sorted(map(str, log["metric"].values)))
        raise ValueError(f"Expected the name of a number in the training log, got {variable!r}. There are: {names}.")
    steps, values, segments = log["log_step"].values, logged.values, log["log_segment"].values
    finite = np.isfinite(values)
    trainings = np.unique(segments)
    with panel(ax, f"training log: {variable}", _description(values[finite])) as axes:
        without_mathematics([axes.set_ylabel(f"{variable} (as logged)")])
        if not finite.any():
            say_nothing_to_draw(axes, "No finite value was logged")
            return figure_of(axes)
        for position, training in enumerate(trainings):
            rows = finite & (segments == training)
            marker = "o" if rows.sum() < _FEW else ""
            colour = COLOURS[position % len(COLOURS)]
            axes.plot(steps[rows], values[rows], color=colour, marker=marker, label=f"training {training}")
        step_axis(axes, np.unique(steps[finite]).tolist())
        if len(trainings) > 1:
            axes.legend()
    return figure_of(axes)


def logged_number(log: xr.Dataset, name: str) -> xr.DataArray | None:
    """Return one scalar of the ``/training`` group over ``log``, ``None`` if it was never logged."""
    positions = np.flatnonzero(log["metric"].values == name)
    return log["value"].isel(metric=int(positions[0])) if positions.size else None


def _description(finite: np.ndarray) -> str:
    if not finite.size:
        return "No finite value was logged."
    return f"Line over optimizer steps of the logged value, from {number(finite[0])} to {number(finite[-1])}."
