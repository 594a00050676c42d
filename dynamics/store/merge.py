"""What a training recorded of itself and what its checkpoints say, as one: raw datasets in, a raw dataset out.

The rules:

1. Where both have a step, the record wins, with its own ``from_step``. A matrix that only the checkpoint has there
   keeps its total; its increment is since another step, and is left out.
2. A step that only a checkpoint has stays as it is, with the previous checkpoint as its ``from_step``.
3. The records belong to the training (segment) whose checkpoints agree with them: same step, same spectra of the
   totals. If there are common steps and none agrees they are a training of their own. Without a common step they go
   with the newest training. Wherever a step does not agree, a finding says so, and nothing of the checkpoint is kept.
4. An increment whose ``from_step`` is no longer an earlier step of its training is left out.
5. Where the records know the start of their training, a checkpoint of step 0 that has moved is not it, and is left out
   with a finding: an adapter whose folder does not say its step counts as step 0, and is usually the last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.findings import Finding
from dynamics.spectra import raw
from dynamics.text import some

#: Spectra of one update that differ by more than this share of its norm are not of one training.
AGREEMENT = 1e-3
_TOTAL, _INCREMENT = range(len(schema.KINDS))
_PER_KIND = ("singular_value", "count", "factor_rank", "decomposition", "noise_energy", "rounding_edge")
_OF_INCREMENTS = ("left_factor_value", "right_factor_value", "left_factor_change", "right_factor_change")


@dataclass(frozen=True)
class _Difference:
    """By how much record and checkpoint differ at one step, and in which matrix most."""

    size: float
    matrix: str


def merge(checkpoints: xr.Dataset | None, records: xr.Dataset | None) -> tuple[xr.Dataset, list[Finding]]:
    """Both as one raw update, by the rules above.

    Args:
        checkpoints: Raw update of the checkpoints, under the names of the live model; ``None`` if there are none.
        records: Raw update of all captured steps, likewise.

    Raises:
        ValueError: If there is neither.
    """
    if checkpoints is None or records is None:
        one = records if checkpoints is None else checkpoints
        if one is None:
            raise ValueError("Expected checkpoints or captured steps, got neither.")
        return _without_dangling(raw.completed(one.copy(deep=True))), []
    common = np.intersect1d(checkpoints["step"].values, records["step"].values).tolist()
    found = {step: _difference(checkpoints.sel(step=step), records.sel(step=step)) for step in common}
    differences = {step: difference for step, difference in found.items() if difference is not None}
    segment = _segment(checkpoints, differences)
    checkpoints, misplaced = _without_false_start(checkpoints, records, segment)
    own = dict(zip(checkpoints["step"].values.tolist(), checkpoints["segment"].values.tolist(), strict=True))
    records = records.assign_coords(segment=records["segment"].copy(data=np.full(records.sizes["step"], segment)))
    merged = raw.concatenate([_beside(checkpoints, records), records])
    for step in common:
        if differences[step].size <= AGREEMENT if step in differences else own[step] == segment:
            _add_totals(merged, checkpoints, step)
    _drop_inner_products(merged, checkpoints)
    disagreeing = {step: each for step, each in differences.items() if each.size > AGREEMENT}
    return _without_dangling(merged), [
        *misplaced,
        *([_finding(disagreeing, segment in own.values())] if disagreeing else []),
    ]


def translated(checkpoints: xr.Dataset, names: Mapping[str, str]) -> xr.Dataset:
    """A raw dataset under the names of the live model.

    Args:
        checkpoints: Under names as on disk.
        names: Name on disk → name in the live model, for those that differ. Two matrices never get one name: those
            whose new name is another's as well keep their own.
    """
    old = checkpoints["matrix"].values.tolist()
    new = [names.get(name, name) for name in old]
    # A name that is kept may be the one that yet another matrix was to get: until all differ.
    while len(taken := Counter(new)) < len(new):
        new = [live if taken[live] == 1 else name for name, live in zip(old, new, strict=True)]
    if new == old:
        return checkpoints
    where = [schema.layer_and_role(name) for name in new]
    columns = {
        "matrix": new,
        **{name: [each[i] for each in where] for i, name in enumerate(("layer", "role", "stack"))},
    }
    return checkpoints.assign_coords(
        {name: ("matrix", np.asarray(column), checkpoints[name].attrs) for name, column in columns.items()}
    )


def raw_of(update: xr.Dataset) -> xr.Dataset:
    """The raw dataset from which a finished ``/update`` was measured; ``measured`` makes the same of it again.

    Args:
        update: The ``/update`` group of a result.
    """
    update = update.load()
    norm, cosine = update["frobenius_norm"].values, update["increment_cosine"].values
    steps, origins = update["step"].values.tolist(), update["from_step"].values.tolist()
    inner = np.full(cosine.shape, np.nan)
    for row, origin in enumerate(origins):
        if origin in steps:
            inner[row] = cosine[row] * norm[row, _INCREMENT] * norm[steps.index(origin), _INCREMENT]
    arrays = {"noise_energy": update["quantisation_noise_share"].values * norm * norm, "inner_product": inner}
    # The rounding_edge of an earlier version is another quantity; the others are not there then.
    if set(raw.ADDED) <= set(update):
        arrays |= {name: update[name].values for name in raw.ADDED}
    kept = update[["singular_value", "count", "factor_rank", "decomposition"]]
    kept = kept.assign(
        {name: (raw.UPDATE[name].dims, array, schema.attributes(raw.UPDATE[name])) for name, array in arrays.items()}
    )
    return raw.completed(kept)


def _difference(checkpoint: xr.Dataset, record: xr.Dataset) -> _Difference | None:
    """Of the totals at one step; ``None`` where no matrix is known in both."""
    names, here, there = np.intersect1d(checkpoint["matrix"].values, record["matrix"].values, return_indices=True)
    one, other = (
        np.nan_to_num(each["singular_value"].values[_TOTAL, at]) for each, at in ((checkpoint, here), (record, there))
    )
    known = np.ones(len(names), dtype=bool)
    for each, at in ((checkpoint, here), (record, there)):
        known &= np.isfinite(each["singular_value"].values[_TOTAL, at]).any(-1)
    if not known.any():
        return None
    longest = max(one.shape[-1], other.shape[-1])
    one, other = (np.pad(each, ((0, 0), (0, longest - each.shape[-1]))) for each in (one, other))
    largest = np.maximum(one.max(-1), other.max(-1))[:, None]
    one, other = (np.divide(each, largest, out=np.zeros_like(each), where=largest > 0) for each in (one, other))
    size = np.maximum(np.linalg.norm(one, axis=-1), np.linalg.norm(other, axis=-1))
    distance = np.linalg.norm(one - other, axis=-1)
    relative = np.where(known, np.divide(distance, size, out=np.zeros_like(size), where=size > 0), -1.0)
    worst = int(relative.argmax())
    return _Difference(float(relative[worst]), str(names[worst]))


def _segment(checkpoints: xr.Dataset, differences: Mapping[int, _Difference]) -> int:
    """Number of the training that the records belong to."""
    own = dict(zip(checkpoints["step"].values.tolist(), checkpoints["segment"].values.tolist(), strict=True))
    votes = Counter(own[step] for step, difference in differences.items() if difference.size <= AGREEMENT)
    if votes:
        return max(sorted(votes), key=votes.__getitem__)
    newest = max(own.values(), default=0)
    return newest + 1 if differences else newest


def _without_false_start(
    checkpoints: xr.Dataset, records: xr.Dataset, segment: int
) -> tuple[xr.Dataset, list[Finding]]:
    """Rule 5."""
    false = (checkpoints["step"].values == 0) & (checkpoints["segment"].values == segment)
    known = 0 in records["from_step"].values and 0 not in records["step"].values
    if not known or not np.nan_to_num(checkpoints["singular_value"].values[false, _TOTAL]).any():
        return checkpoints, []
    return checkpoints.isel(step=~false), [
        Finding(
            "OD308",
            "A checkpoint whose folder does not say its step, which counts as step 0, has an update, and the captured "
            "training began there without one. The checkpoint is left out; it may be what was saved at the end.",
            "Keep trainer_state.json beside it (trainer.save_state() writes one), or move it out of the folder.",
            step=0,
        )
    ]


def _beside(checkpoints: xr.Dataset, records: xr.Dataset) -> xr.Dataset:
    """The steps that only checkpoints have; without any, a part of no step, so that their matrices have a place."""
    return checkpoints.isel(step=~np.isin(checkpoints["step"].values, records["step"].values))


def _add_totals(merged: xr.Dataset, checkpoints: xr.Dataset, step: int) -> None:
    """At a step that is captured: the totals of matrices that only the checkpoint has there."""
    row, from_row = (each.indexes["step"].get_loc(step) for each in (merged, checkpoints))
    column = {name: position for position, name in enumerate(merged["matrix"].values.tolist())}
    for position, name in enumerate(checkpoints["matrix"].values.tolist()):
        if checkpoints["count"].values[from_row, _TOTAL, position] and name in column:
            place = (row, _TOTAL, column[name])
            if not merged["count"].values[place]:
                for variable in _PER_KIND:
                    values = checkpoints[variable].values[from_row, _TOTAL, position]
                    target = merged[variable].values
                    target[(*place, slice(np.size(values))) if np.ndim(values) else place] = values


def _drop_inner_products(merged: xr.Dataset, checkpoints: xr.Dataset) -> None:
    """Where the increment before is another one now than the one they were formed with."""
    before, now = _origins(checkpoints), _origins(merged)
    for row, (step, origin) in enumerate(now.items()):
        if before.get(step) == origin and origin in before and now.get(origin) != before[origin]:
            merged["inner_product"].values[row] = np.nan


def _origins(dataset: xr.Dataset) -> dict[int, int]:
    return dict(zip(dataset["step"].values.tolist(), dataset["from_step"].values.tolist(), strict=True))


def _without_dangling(update: xr.Dataset) -> xr.Dataset:
    """Increments since a step that is not there are left out; changes ``update``."""
    segment = dict(zip(update["step"].values.tolist(), update["segment"].values.tolist(), strict=True))
    origins = update["from_step"].values.copy()
    for row, (step, origin) in enumerate(_origins(update).items()):
        if origin > 0 and not (origin < step and segment.get(origin) == segment[step]):
            origins[row] = -1
            for name in ("count", "factor_rank", "decomposition"):
                update[name].values[row, _INCREMENT] = 0
            for name in ("singular_value", "noise_energy", "rounding_edge"):
                update[name].values[row, _INCREMENT] = np.nan
            for name in ("inner_product", *_OF_INCREMENTS):
                update[name].values[row] = np.nan
    return update.assign_coords(from_step=update["from_step"].copy(data=origins))


def _finding(differences: Mapping[int, _Difference], has_agreeing: bool) -> Finding:
    steps = list(differences)
    worst = max(differences, key=lambda step: differences[step].size)
    size, matrix = differences[worst].size, differences[worst].matrix
    where = f"step{'s' if len(steps) > 1 else ''} {some(map(str, steps), 5)}"
    kept = (
        "" if has_agreeing else " No common step agrees, so the captured steps are numbered as a training of their own."
    )
    return Finding(
        "OD308",
        f"At {where} the update captured during training is not the one in the checkpoint: spectra differ by up to "
        f"{size:.1%} of the update's norm ({matrix}, step {worst}). The captured numbers stand there in place of the "
        f"checkpoint's.{kept}",
        "Keep each training in a folder of its own, with its checkpoints and its capture.",
        matrix=matrix if len(steps) == 1 else "",
        step=steps[0] if len(steps) == 1 else None,
        evidence={"steps": steps, "largest_difference": size, "matrix": matrix, "threshold": AGREEMENT},
    )
