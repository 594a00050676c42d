r"""How the losses of probe samples changed since a training began, what gradients at its start say of it, and where.

With ℓ_i(θ₀) the loss of a sample when training began, the change of a task is the mean of ℓ_i(θ_t) − ℓ_i(θ₀): paired by
sample, so that what makes samples differ cancels. Beside it, with δ = θ_t − θ₀,

.. math:: \langle ∇L(θ_0), δ \rangle, \qquad \langle ∇L(θ_0), δ \rangle + \tfrac12 δ^\top F δ

The first holds for small δ. Its parts by layer say where a change of the loss comes from; the second puts the Fisher in
the place of the Hessian, which is near where the model predicts its labels well. Neither has an interval: they say what
the gradients of the same samples imply.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from dynamics.fisher.samples import SampleGroups, codes_of
from dynamics.intervention.effects import effects
from dynamics.schema import LOSS, SAMPLE_LABELS, label_arrays, layer_and_role
from dynamics.text import percent

#: Why a record has no predictions, if nobody asked for them.
NOT_ASKED = "the preset “full” and --probe measure them"
#: Layers are compared only where the first order is between half and twice the change that it stands for.
_NEAR = 2.0


def loss_changes(record: xr.Dataset) -> xr.Dataset:
    """Return the group ``/loss``: what the losses of one training's probe samples did since it began.

    Args:
        record: Losses of all steps, see ``schema.LOSS_RECORD``, ascending. Where no step knows the losses at the start,
            those of the first step stand for them.

    Returns:
        As ``schema.LOSS`` has it, its first row the start. Without predictions there is no ``layer_share``. Attributes:
        ``start_step``; ``samples`` and ``groups`` with a loss at the start; ``matrices`` and ``of_matrices``, how many
        of those that changed the predictions cover; ``scaled_step``, the step whose change was scaled.
    """
    record = record.sortby("step")
    start_step, start_loss, rows = _from_start(record)
    losses = np.concatenate([start_loss[None], rows["sample_loss"].values])
    tasks = record["task"].values.tolist()
    usable = np.isfinite(start_loss)
    member = (record["sample_task"].values[:, None] == np.array(tasks, dtype=str)[None]) & usable[:, None]
    groups = codes_of(record["sample_group"].values, len(start_loss), "group")
    change = effects(losses - np.where(usable, start_loss, 0.0), SampleGroups(groups, member))
    slopes = _with_start(rows["first_order"].values)
    curvature = _with_start(rows["curvature"].values)
    if "start_step" in rows.coords:
        elsewhere = np.append(False, rows["start_step"].values != start_step)
        slopes[elsewhere], curvature[elsewhere] = np.nan, np.nan
    first = _sum(slopes, 1)
    arrays = {
        "sample_loss": losses,
        "change": _zero_first(change.estimate),
        "change_low": _zero_first(change.low),
        "change_high": _zero_first(change.high),
        "predicted_first": first,
        "predicted_second": first + curvature / 2,
    }
    coords = {
        "step": np.append(start_step, rows["step"].values).astype(np.int64),
        "task": np.array(tasks, dtype=str),
        **{name: ("sample", record[name].values.astype(str)) for name in SAMPLE_LABELS},
        "retained": ("task", record["retained"].values.astype(bool)),
        "recorded": ("step", np.append(False, rows["recorded"].values.astype(bool))),
        "reason": ("step", np.append("", rows["reason"].values.astype(str)).astype(str)),
    }
    names = record["matrix"].values.tolist()
    if names:
        arrays["first_order"] = slopes
        coords["matrix"] = np.array(names, dtype=str)
        layers, of_matrix = _layers(names)
        by_layer = np.stack([_sum(slopes[:, of_matrix == number], 1) for number in range(len(layers))], 1)
        arrays["layer_share"] = np.divide(
            by_layer, first[:, None], out=np.full_like(by_layer, np.nan), where=first[:, None] != 0
        )
        coords["layer"] = np.array(layers, dtype=str)
    if "scaled_loss" in record:
        arrays["scaled_loss"] = record["scaled_loss"].values
        coords["scale"] = record["scale"].values
    attributes = {
        "start_step": int(start_step),
        "samples": int(usable.sum()),
        "groups": len(np.unique(groups[usable])),
        "matrices": int(np.isfinite(slopes[1:]).any((0, 2)).sum()) if len(rows["step"]) else 0,
        "of_matrices": int(record.attrs.get("of_matrices", 0)),
        "scaled_reason": str(record.attrs.get("scaled_reason", "")),
        **({"scaled_step": int(record.attrs["scaled_step"])} if "scaled_step" in record.attrs else {}),
    }
    return xr.Dataset(label_arrays(LOSS, arrays), coords, attributes)


def loss_record(losses: xr.Dataset) -> xr.Dataset:
    """Return the record of all steps that :func:`loss_changes` made the group of; it gives the same again."""
    rows = losses.isel(step=slice(1, None))
    steps, tasks = rows.sizes["step"], rows.sizes["task"]
    nothing = xr.DataArray(np.empty((steps, 0, tasks)), {"matrix": np.array([], dtype=str)}, ("step", "matrix", "task"))
    record = xr.Dataset(
        {
            "sample_loss": rows["sample_loss"],
            "start_loss": (("step", "sample"), np.repeat(losses["sample_loss"].values[:1], steps, 0)),
            "first_order": rows.get("first_order", nothing),
            "curvature": 2 * (rows["predicted_second"] - rows["predicted_first"]),
            **{name: rows[name] for name in ("scaled_loss",) if name in rows},
        },
        {"retained": rows["retained"], "start_step": ("step", np.full(steps, losses.attrs["start_step"]))},
        losses.attrs,
    )
    return record.drop_vars("layer", errors="ignore")


class CostliestLayer(NamedTuple):
    """The layer whose share of what a retained task lost is most above its share of what a new task gained.

    Args:
        layer: Its name.
        retained, new: The tasks.
        of_rise: Its share of the rise of the retained task's loss, to first order.
        of_fall: Its share of the fall of the new task's.
    """

    layer: str
    retained: str
    new: str
    of_rise: float
    of_fall: float


def costliest_layer(losses: xr.Dataset) -> CostliestLayer | None:
    """Return the layer that costs most retained loss for what it gains, at the last step that has predictions.

    Of retained tasks it takes the one whose loss rose most, of new ones the one whose loss fell most, each beyond its
    interval and with a first order of half to twice the change. ``None`` where there is no such pair, or one layer.

    Args:
        losses: The group ``/loss``.
    """
    if "layer_share" not in losses or losses.sizes["layer"] < 2:
        return None
    predicted = np.flatnonzero(np.isfinite(losses["predicted_first"].values).any(1))
    if not predicted.any():  # but for the start
        return None
    at = losses.isel(step=int(predicted[-1]))
    change, first = at["change"].values, at["predicted_first"].values
    ratio = np.divide(first, change, out=np.zeros_like(first), where=change != 0)
    near = (ratio >= 1 / _NEAR) & (ratio <= _NEAR) & np.isfinite(at["layer_share"].values).all(0)
    retained = at["retained"].values.astype(bool)
    rose = np.where(retained & near & (at["change_low"].values > 0), change, np.nan)
    fell = np.where(~retained & near & (at["change_high"].values < 0), -change, np.nan)
    if np.isnan(rose).all() or np.isnan(fell).all():
        return None
    old, new = int(np.nanargmax(rose)), int(np.nanargmax(fell))
    shares = at["layer_share"].values
    layer = int(np.argmax(shares[:, old] - shares[:, new]))
    task = at["task"].values
    return CostliestLayer(
        str(at["layer"].values[layer]),
        str(task[old]),
        str(task[new]),
        float(shares[layer, old]),
        float(shares[layer, new]),
    )


def costliest_layer_sentence(losses: xr.Dataset) -> str:
    """Return what :func:`costliest_layer` is in words, ``""`` for none."""
    part = costliest_layer(losses)
    if part is None:
        return ""
    name = f"Layer {part.layer}" if part.layer else "What lies outside layers"
    fall = f"{percent(part.of_fall, 0)} of the fall of {part.new}"
    if part.of_fall < 0:
        fall = f"a rise of {part.new} of {percent(-part.of_fall, 0)} of its fall"
    return (
        f"{name} costs the most retained loss for its gain: {percent(part.of_rise, 0)} of the rise of {part.retained}, "
        f"{fall} (first order)."
    )


def _from_start(record: xr.Dataset) -> tuple[int, Float[np.ndarray, " sample"], xr.Dataset]:
    """Return the step of the start, the losses there, and the later steps."""
    has_start = np.isfinite(record["start_loss"].values).any(1)
    if not has_start.any():
        first = int(record["step"].values[0])
        return first, record["sample_loss"].values[0], record.isel(step=slice(1, None))
    start_step = int(record["start_step"].values[has_start].min())
    row = np.flatnonzero(has_start & (record["start_step"].values == start_step))[0]
    later = record["step"].values > start_step
    return start_step, record["start_loss"].values[row], record.isel(step=later)


def _with_start(values: np.ndarray) -> np.ndarray:
    """Return predictions with those of the start before them: 0 where there are any."""
    start = np.where(np.isfinite(values).any(0), 0.0, np.nan)[None]
    return np.concatenate([start, values])


def _zero_first(part: np.ndarray) -> np.ndarray:
    """Return changes, with 0 at the start of tasks that have a loss there."""
    return np.concatenate([np.where(np.isnan(part[:1]), part[:1], 0.0), part[1:]])


def _sum(values: np.ndarray, axis: int) -> np.ndarray:
    """Return sums over what there is, NaN where there is nothing."""
    return np.where(np.isfinite(values).any(axis), np.nansum(values, axis), np.nan)


def _layers(names: list[str]) -> tuple[list[str], np.ndarray]:
    """Return the names of layers in their order, and the position of each matrix's layer.

    Numbers; beside their stack where there are several; "" for matrices in none, first.
    """
    positions = [layer_and_role(name) for name in names]
    stacks = {stack for number, _, stack in positions if number >= 0}
    labels = [
        "" if number < 0 else str(number) if len(stacks) == 1 else f"{stack}.{number}" for number, _, stack in positions
    ]
    order = {label: (stack, number) for label, (number, _, stack) in zip(labels, positions, strict=True)}
    layers = sorted(order, key=lambda label: ("", -1) if not label else order[label])
    return layers, np.array([layers.index(label) for label in labels])
