"""What the summary says of ``/loss``: of each task, at the last step."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from dynamics.text import finite


def loss_summary(tree: xr.DataTree) -> list[dict[str, Any]]:
    """Return how the loss of each task changed since the newest training began, at its last step.

    Args:
        tree: A result of one run.

    Returns:
        A row for each task; none without losses of probe samples, or with one step alone. With missing numbers as
        ``None``:

        - ``task``, ``retained``, ``step``, ``start_step``;
        - ``change`` with its interval ``low`` to ``high``, in nats: positive, the loss rose;
        - ``predicted_first``, ``predicted_second``;
        - ``worst_layer``: the layer whose part raises the loss most, or lowers it least, to first order;
          ``worst_layer_first_order``: that part.
    """
    if "loss" not in tree.children:
        return []
    losses = tree["loss"].to_dataset().load()
    if losses.sizes["step"] < 2:
        return []
    at = losses.isel(step=-1)
    return [_row(at.sel(task=task), task) for task in losses["task"].values.tolist()]


def _row(of_task: xr.Dataset, task: str) -> dict[str, Any]:
    layer, part = None, None
    if "layer_share" in of_task:
        parts = of_task["layer_share"].values * float(of_task["predicted_first"])
        if np.isfinite(parts).all():
            layer, part = str(of_task["layer"].values[parts.argmax()]), float(parts.max())
    return {
        "task": task,
        "retained": bool(of_task["retained"]),
        "step": int(of_task["step"]),
        "start_step": int(of_task.attrs["start_step"]),
        "change": finite(of_task["change"]),
        "low": finite(of_task["change_low"]),
        "high": finite(of_task["change_high"]),
        "predicted_first": finite(of_task["predicted_first"]),
        "predicted_second": finite(of_task["predicted_second"]),
        "worst_layer": layer,
        "worst_layer_first_order": part,
    }
