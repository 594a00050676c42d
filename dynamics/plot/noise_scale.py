"""How noisy the gradients of a training are, beside its batch size."""

from __future__ import annotations

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.plot.marks import first_and_last, legend_below
from dynamics.plot.select import group, variable_of
from dynamics.plot.style import COLOURS, figure_of, logarithmic, panel, say_nothing_to_draw, step_axis


def noise_scale(data: xr.DataTree | xr.Dataset, *, ax: Axes | None = None) -> Figure:
    """Draw the noise scale of the training's gradients over the steps, in samples, with the batch size.

    Where the batch is far below the noise scale, a larger one takes away noise almost in proportion; where it is far
    above, a larger one hardly helps. Where the batch size is unknown, the unit is one batch, and the line is at 1.

    Args:
        data: The result of one run, or its ``/gradient`` group.
        ax: Draw here, in the style of these axes; a new figure by default.

    Raises:
        ValueError: If the result has no gradients, or is of a version that did not measure their noise.

    Example: ``plot.noise_scale(dynamics.open_run("runs/imax"))``
    """
    gradient = group(data, "gradient")
    ratio = variable_of(gradient, "noise_to_signal")
    steps, batch = gradient["step"].values, gradient["batch_size"].values
    has_batch = bool(np.isfinite(batch).all())
    values = gradient["noise_scale"] if has_batch else ratio
    unit = "samples" if has_batch else "batches"
    words = first_and_last(values)
    description = (
        f"Line over optimizer steps of the noise scale in {unit}; {words}." if words else "No step has a value."
    )
    with panel(ax, "noise scale of the gradients", description) as axes:
        axes.set_ylabel(f"Noise scale ({unit})")
        if np.isfinite(values).any():
            marker = "o" if np.isfinite(values).sum() == 1 else ""
            axes.plot(steps, values, color=COLOURS[0], marker=marker, label="tr Σ/‖μ‖², ten steps together")
            edge = batch if has_batch else np.ones(len(steps))
            axes.plot(
                steps, edge, color="#444444", linestyle="--", linewidth=1.2, label="batch of the optimizer's step"
            )
            step_axis(axes, steps.tolist())
            logarithmic(axes)
            legend_below(axes)
        else:
            say_nothing_to_draw(axes, "No step has a noise scale")
    return figure_of(axes)
