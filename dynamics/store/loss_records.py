"""Losses of probe samples, of records and of probed checkpoints: joined over steps, and taken from a stored result."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.intervention.loss_changes import loss_record


def joined_losses(parts: Sequence[xr.Dataset], keep: re.Pattern[str] | None = None) -> xr.Dataset | None:
    """Return the losses of all steps; of those that probed the same samples as the last one, as K is joined.

    Args:
        parts: Of one step or several, ascending, none of them twice.
        keep: Predictions of matrices whose name it finds are kept.
    """
    if not parts:
        return None
    matching = [part for part in parts if _of_same_samples(part, parts[-1])]
    by_step = [name for name in schema.LOSS_RECORD if name != "scaled_loss"]
    rows = [
        part[by_step].assign_coords(
            {
                name: ("step", [value] * part.sizes["step"])
                for name, value in (("reason", str(part.attrs.get("reason", ""))), ("recorded", True))
                if name not in part.coords
            }
        )
        for part in matching
    ]
    rows = [row.drop_vars("retained") for row in rows]
    losses = xr.concat(rows, "step", data_vars="all", coords="minimal", compat="override", join="outer")
    losses = losses.assign_coords(retained=matching[-1]["retained"])
    names = dict.fromkeys(name for part in matching for name in part["matrix"].values.tolist())
    matrices = [name for name in names if keep is None or keep.search(name)]
    counts = [count for part in matching if type(count := part.attrs.get("of_matrices")) is int]
    reasons = [str(reason) for part in matching if (reason := part.attrs.get("scaled_reason"))]
    losses = losses.sel(matrix=matrices)
    losses.attrs = {"of_matrices": max(counts, default=0), "scaled_reason": "".join(reasons[-1:])}
    scaled = [part for part in matching if "scaled_loss" in part]
    return _with_scaled(losses, scaled[-1]) if scaled else losses


def _with_scaled(losses: xr.Dataset, part: xr.Dataset) -> xr.Dataset:
    """Return losses with those of shares of the update that a part has, if it has some."""
    if "scaled_loss" not in part:
        return losses
    step = part.attrs["scaled_step"] if "scaled_step" in part.attrs else part["step"].values[-1]
    return losses.assign(scaled_loss=part["scaled_loss"]).assign_attrs(scaled_step=int(step))


def with_probed_losses(recorded: xr.Dataset | None, probed: xr.Dataset | None) -> xr.Dataset | None:
    """Return the losses of records and of probed checkpoints; where both have a step, those of the record.

    Probed checkpoints are left out if they probed other samples, of which :func:`with_probed` tells.
    """
    if recorded is None:
        return probed if probed is not None and probed.sizes["step"] else None  # not scales alone
    if probed is None:
        return recorded
    if not _of_same_samples(recorded, probed):
        return recorded
    new = probed.sel(step=~probed["step"].isin(recorded["step"].values))
    losses = joined_losses([part for part in (new, recorded) if part.sizes["step"]])
    assert losses is not None
    return _with_scaled(losses.sortby("step"), probed)


def unmeasured_losses(tree: xr.DataTree) -> xr.Dataset | None:
    """Return what a stored result keeps of losses at its probed checkpoints; ``None`` if there are none."""
    if "loss" not in tree.children:
        return None
    record = loss_record(tree["loss"].to_dataset().load())
    record = record.sel(step=~record["recorded"].astype(bool))
    return record if record.sizes["step"] or "scaled_loss" in record else None


def _of_same_samples(one: xr.Dataset, other: xr.Dataset) -> bool:
    return all(np.array_equal(one[name].values, other[name].values) for name in (*schema.SAMPLE_LABELS, "task"))
