"""What is said of ``/loss``: of each task at the last step, and which retained tasks lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from scipy import special

from dynamics.relate.permutations import LEVEL
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
    return [_row(at.sel(task=task), task, int(losses["step"][0])) for task in losses["task"].values.tolist()]


def _row(of_task: xr.Dataset, task: str, start_step: int) -> dict[str, Any]:
    layer, part = None, None
    if "layer_share" in of_task:
        parts = of_task["layer_share"].values * float(of_task["predicted_first"])
        if np.isfinite(parts).all():
            layer, part = str(of_task["layer"].values[parts.argmax()]), float(parts.max())
    return {
        "task": task,
        "retained": bool(of_task["retained"]),
        "step": int(of_task["step"]),
        "start_step": start_step,
        "change": finite(of_task["change"]),
        "low": finite(of_task["change_low"]),
        "high": finite(of_task["change_high"]),
        "predicted_first": finite(of_task["predicted_first"]),
        "predicted_second": finite(of_task["predicted_second"]),
        "worst_layer": layer,
        "worst_layer_first_order": part,
    }


def retained_rises(at: xr.Dataset) -> list[tuple[str, float, float, float]]:
    """Return the retained tasks whose loss rose beyond its interval: name, rise in nats, and the interval's ends.

    Intervals hold with 95 % for all retained tasks together (Bonferroni).

    Args:
        at: ``/loss`` at one step.
    """
    kept = [at.sel(task=task) for task in at["task"].values[at["retained"].values.astype(bool)]]
    rises = []
    for of_task in kept:
        change, low, high = (float(of_task[name]) for name in ("change", "change_low", "change_high"))
        if len(kept) > 1:
            groups = np.unique(at["sample_group"].values[at["sample_task"].values == of_task["task"].item()])
            together, own = special.stdtrit(max(len(groups) - 1, 1), 1 - LEVEL / 2 / np.array([len(kept), 1]))
            low, high = (change + float(together / own) * (end - change) for end in (low, high))
        if low > 0:
            rises.append((str(of_task["task"].item()), change, low, high))
    return rises
