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
6. Where the records know the start of their training, totals of dense weights that are counted from its first
   checkpoint, for want of a base, are left out: they are smaller, and agree with nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Set

import numpy as np
import xarray as xr
from jaxtyping import Bool

from dynamics import schema
from dynamics.findings import Finding
from dynamics.spectra import raw
from dynamics.spectra.dataset import SAME_SPECTRA, Agreement, same_spectra
from dynamics.text import percent, some

_TOTAL, _INCREMENT = range(len(schema.KINDS))
_PER_KIND = ("singular_value", "count", "factor_rank", "decomposition", "noise_energy", "rounding_edge")
_OF_INCREMENTS = ("left_factor_value", "right_factor_value", "left_factor_change", "right_factor_change")


def merge(checkpoints: xr.Dataset | None, records: xr.Dataset | None) -> tuple[xr.Dataset, list[Finding]]:
    """Return both as one raw update, by the rules above.

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
    late = (
        since_first_checkpoint(checkpoints)
        if knows_start(records)
        else np.zeros(checkpoints["inner_product"].shape, bool)
    )
    comparable = _without_totals(checkpoints, late)
    agreements = {step: same_spectra(comparable.sel(step=step), records.sel(step=step)) for step in common}
    segment = _segment(checkpoints, agreements)
    checkpoints = _without_totals(checkpoints, late & (checkpoints["segment"].values == segment)[:, None])
    checkpoints, misplaced = _without_false_start(checkpoints, records, segment)
    segments = dict(zip(checkpoints["step"].values.tolist(), checkpoints["segment"].values.tolist(), strict=True))
    records = records.assign_coords(segment=records["segment"].copy(data=np.full(records.sizes["step"], segment)))
    merged = raw.concatenate([_beside(checkpoints, records), records])
    for step in common:
        # Where nothing can be compared, a step belongs to the records' training or to another one.
        if agreements[step].is_same or (not agreements[step].is_other and segments[step] == segment):
            _add_totals(merged, checkpoints, step)
    _drop_inner_products(merged, checkpoints, set(records["step"].values.tolist()))
    disagreeing = {step: agreement for step, agreement in agreements.items() if agreement.is_other}
    return _without_dangling(merged), [
        *misplaced,
        *([_finding(disagreeing, segment in segments.values())] if disagreeing else []),
    ]


def knows_start(records: xr.Dataset) -> bool:
    """Return whether the totals of captured steps are counted from the start of the training."""
    return 0 in records["from_step"].values and 0 not in records["step"].values


def since_first_checkpoint(checkpoints: xr.Dataset) -> Bool[np.ndarray, "step matrix"]:
    """Return which totals are counted from the first checkpoint of their training: of dense weights without a base.

    Such a matrix has no total at that checkpoint, and at the next one a total that is the increment since.
    """
    steps, segments = checkpoints["step"].values.tolist(), checkpoints["segment"].values
    spectra, counts = checkpoints["singular_value"].values, checkpoints["count"].values
    late = np.zeros(counts.shape[::2], dtype=bool)
    for row, origin in enumerate(checkpoints["from_step"].values.tolist()):
        if origin > 0 and origin in steps:
            first = steps.index(origin)
            same = (spectra[row, _TOTAL] == spectra[row, _INCREMENT]) | np.isnan(spectra[row]).all(0)
            begins = (counts[first, _TOTAL] == 0) & (counts[row, _TOTAL] > 0) & same.all(-1)
            late |= begins & (segments == segments[row])[:, None]
    return late


def _without_totals(checkpoints: xr.Dataset, absent: Bool[np.ndarray, "step matrix"]) -> xr.Dataset:
    """Return the checkpoints without the totals of some matrices at some steps."""
    if not absent.any():
        return checkpoints
    kept = checkpoints.copy(deep=True)
    for name in (*_PER_KIND, *(set(raw.REMAINDER) & set(kept))):
        kept[name].values[:, _TOTAL][absent] = 0 if name in ("count", "factor_rank", "decomposition") else np.nan
    return kept


def with_live_names(checkpoints: xr.Dataset, names: Mapping[str, str]) -> xr.Dataset:
    """Return a raw dataset under the names of the live model.

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
    layers, roles, stacks = zip(*map(schema.layer_and_role, new), strict=True)
    columns = {"matrix": new, "layer": layers, "role": roles, "stack": stacks}
    return checkpoints.assign_coords(
        {name: ("matrix", np.asarray(column), checkpoints[name].attrs) for name, column in columns.items()}
    )


def unmeasured(update: xr.Dataset) -> xr.Dataset:
    """Return the raw dataset that a finished ``/update`` was measured from; ``measure_update`` gives the same again.

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
    if set(schema.BOUNDS) <= set(update):
        alone = update["decomposition"].values == schema.DECOMPOSITIONS.index("lanczos")
        arrays |= {name: np.where(alone, update[name].values, np.nan) for name in raw.REMAINDER}
    kept = update[["singular_value", "count", "factor_rank", "decomposition"]]
    kept = kept.assign(schema.label_arrays({**raw.UPDATE, **raw.REMAINDER}, arrays))
    return raw.completed(kept)


def _segment(checkpoints: xr.Dataset, agreements: Mapping[int, Agreement]) -> int:
    """Return the number of the training that the records belong to."""
    segments = dict(zip(checkpoints["step"].values.tolist(), checkpoints["segment"].values.tolist(), strict=True))
    votes = Counter(segments[step] for step, agreement in agreements.items() if agreement.is_same)
    if votes:
        return max(sorted(votes), key=votes.__getitem__)
    newest = max(segments.values(), default=0)
    return newest + 1 if any(agreement.is_other for agreement in agreements.values()) else newest


def _without_false_start(
    checkpoints: xr.Dataset, records: xr.Dataset, segment: int
) -> tuple[xr.Dataset, list[Finding]]:
    """Rule 5."""
    false = (checkpoints["step"].values == 0) & (checkpoints["segment"].values == segment)
    if not knows_start(records) or not np.nan_to_num(checkpoints["singular_value"].values[false, _TOTAL]).any():
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
    """Return the steps that only checkpoints have; without any, no step, so that their matrices have a column."""
    return checkpoints.isel(step=~np.isin(checkpoints["step"].values, records["step"].values))


def _add_totals(merged: xr.Dataset, checkpoints: xr.Dataset, step: int) -> None:
    """Add, at a recorded step, the totals of matrices that only the checkpoint has there."""
    row, from_row = (dataset.indexes["step"].get_loc(step) for dataset in (merged, checkpoints))
    column = {name: position for position, name in enumerate(merged["matrix"].values.tolist())}
    for position, name in enumerate(checkpoints["matrix"].values.tolist()):
        if checkpoints["count"].values[from_row, _TOTAL, position] and name in column:
            cell = (row, _TOTAL, column[name])
            if not merged["count"].values[cell]:
                for variable in (*_PER_KIND, *(name for name in raw.REMAINDER if name in checkpoints)):
                    values = checkpoints[variable].values[from_row, _TOTAL, position]
                    target = merged[variable].values
                    target[(*cell, slice(np.size(values))) if np.ndim(values) else cell] = values


def _drop_inner_products(merged: xr.Dataset, checkpoints: xr.Dataset, captured: Set[int]) -> None:
    """Drop inner products of checkpoints where the increment before is another one now than when they were formed."""
    before, now = _origins(checkpoints), _origins(merged)
    for row, (step, origin) in enumerate(now.items()):
        if (
            step not in captured
            and before.get(step) == origin
            and origin in before
            and now.get(origin) != before[origin]
        ):
            merged["inner_product"].values[row] = np.nan


def _origins(dataset: xr.Dataset) -> dict[int, int]:
    return dict(zip(dataset["step"].values.tolist(), dataset["from_step"].values.tolist(), strict=True))


def _without_dangling(update: xr.Dataset) -> xr.Dataset:
    """Leave out increments since a step that is not there; changes ``update``."""
    segment = dict(zip(update["step"].values.tolist(), update["segment"].values.tolist(), strict=True))
    origins = update["from_step"].values.copy()
    for row, (step, origin) in enumerate(_origins(update).items()):
        if origin > 0 and not (origin < step and segment.get(origin) == segment[step]):
            origins[row] = -1
            for name in ("count", "factor_rank", "decomposition"):
                update[name].values[row, _INCREMENT] = 0
            for name in ("singular_value", "noise_energy", "rounding_edge", *(set(raw.REMAINDER) & set(update))):
                update[name].values[row, _INCREMENT] = np.nan
            for name in ("inner_product", *_OF_INCREMENTS):
                update[name].values[row] = np.nan
    return update.assign_coords(from_step=update["from_step"].copy(data=origins))


def _finding(disagreeing: Mapping[int, Agreement], has_agreeing: bool) -> Finding:
    steps = list(disagreeing)
    worst = max(disagreeing, key=lambda step: disagreeing[step].difference)
    size, matrix = disagreeing[worst].difference, disagreeing[worst].matrix
    where = f"step{'s' if len(steps) > 1 else ''} {some(map(str, steps), 5)}"
    kept = (
        "" if has_agreeing else " No common step agrees, so the captured steps are numbered as a training of their own."
    )
    return Finding(
        "OD308",
        f"At {where} the update captured during training is not the one in the checkpoint: spectra differ by up to "
        f"{percent(size)} of the update's norm ({matrix}, step {worst}). The captured numbers stand there in place of "
        f"the checkpoint's.{kept}",
        "Keep each training in a folder of its own, with its checkpoints and its capture.",
        matrix=matrix if len(steps) == 1 else "",
        step=steps[0] if len(steps) == 1 else None,
        evidence={"steps": steps, "largest_difference": size, "matrix": matrix, "threshold": SAME_SPECTRA},
    )
