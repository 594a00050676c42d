"""The records of a training as raw datasets: checked, joined over steps, with what must be known about them.

A record that cannot be used costs only itself, and a finding says so.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.findings import Finding, from_json
from dynamics.routing.dataset import joined_routing
from dynamics.schema import WRAPPERS, Variable
from dynamics.spectra import raw
from dynamics.store.capture import CAPTURE, capture_steps
from dynamics.store.disk import is_folder
from dynamics.store.loss_records import joined_losses
from dynamics.store.record_folders import (
    RECORDS,
    RecordFolders,
    StoredRecords,
    digest,
    record_folders,
    record_steps,
    stored_records,
)
from dynamics.store.results import FOLDER
from dynamics.text import some

_REMEDY = "The other records are used; restore it from a copy, or remove it."
#: Groups of a record.
TABLES: Mapping[str, Mapping[str, Variable]] = {
    "update": raw.UPDATE,
    "gradient": raw.GRADIENT,
    "fisher": {**schema.FISHER_RECORD, "momentum": schema.FISHER_MOMENTUM, **schema.OPTIMIZER_RECORD},
    "score": {**schema.SCORE, "direction": schema.SCORE_DIRECTION, "retained": schema.RETAINED},
    "intervention": schema.INTERVENTION,
    "loss": {name: variable for name, variable in schema.LOSS_RECORD.items() if name != "scaled_loss"},
    "sharpness": schema.SHARPNESS,
    "routing": schema.ROUTING_RECORD,
}
#: Variables that a record may lack: those that records of earlier versions do not have, and those not always known.
OPTIONAL = (
    *raw.ADDED,
    *raw.ADDED_TO_GRADIENT,
    *("momentum", "direction", "retained"),
    *schema.OPTIMIZER_RECORD,
    *(schema.INTERVENTION.keys() - {"effect", "norm", "headline"}),
)
#: Groups without which the others can be used.
_PROBED = ("fisher", "score", "intervention", "loss", "sharpness", "routing")
#: What losses have in a result and a recorder does not write.
_OF_RESULTS = ("scaled_loss", "scale", "recorded", "reason")
_COORDINATES = ("step", "block", "evaluated_at_step", *schema.SAMPLE_LABELS)


@dataclass(frozen=True)
class TrainingRecords:
    """The records of a training, joined over steps.

    Args:
        path: The folder they are in.
        update: Raw update of all captured steps, ``None`` if no record can be used.
        gradient: Raw gradient of the steps that have one, ``None`` if none has.
        fisher: K and b of the steps that have them, ``None`` if none has.
        score: Scores of the steps that have some, ``None`` if none has.
        intervention: Effects of parts of the increments that were intervened on, ``None`` if none was.
        loss: Losses of the probe samples, ``None`` if there are none.
        sharpness: Critical steps and sharpness, ``None`` if no step has them.
        routing: Tokens that routers sent to each expert, ``None`` if no step has them.
        live_names: Name on disk → name in the live model, where they differ.
        findings: What was found during the training, and while reading.
        stamp: Tells whether the folder has changed since: run, steps, records that cannot be used, attributes.
        attributes: What was noted about the whole training.
        bytes: Size of the numbers.
    """

    path: Path
    update: xr.Dataset | None
    gradient: xr.Dataset | None
    fisher: xr.Dataset | None
    score: xr.Dataset | None
    intervention: xr.Dataset | None
    loss: xr.Dataset | None
    sharpness: xr.Dataset | None
    routing: xr.Dataset | None
    live_names: Mapping[str, str]
    findings: tuple[Finding, ...]
    stamp: Mapping[str, Any]
    attributes: Mapping[str, Any]
    bytes: int

    @property
    def input(self) -> dict[str, Any]:
        """Their entry among the inputs of a result."""
        steps = self.stamp["steps"]
        return {
            "path": _shown(self.path),
            "bytes": self.bytes,
            "header_sha256": self.stamp["attributes"],
            "step": steps[-1] if steps else None,
            "captured_steps": len(steps),
        }


def find_records(
    run: Path, matrices: str | None = None, folders: RecordFolders | None = None
) -> tuple[TrainingRecords | None, list[Finding]]:
    """Return the records of a run, ``None`` where there are none; and what stands in their place, if something does.

    Args:
        run: A run folder, its ``dynamics`` folder, or the folder of the records.
        matrices: Regular expression; only matrices whose name it finds are kept.
        folders: Where its records are, if that is known.

    Raises:
        ValueError: If ``matrices`` is not a regular expression.
    """
    pattern = _pattern(matrices or "")
    folders = folders or record_folders(run)
    if folders is None:
        paths = [folder / name for folder in (run / FOLDER, run) for name in (RECORDS, CAPTURE)]
        return None, [_foreign(path) for path in paths if _is_occupied(path)]
    try:
        return read_records(folders, pattern), []
    except ValueError as error:
        return None, [Finding("OD309", str(error), file=_shown(folders.path))]


def read_records(folders: RecordFolders, keep: re.Pattern[str] | None = None) -> TrainingRecords:
    """Read the records of a training, check them, and join them.

    Args:
        folders: Where they are.
        keep: Only matrices whose name it finds are kept.

    Raises:
        ValueError: If the folder cannot be read at all.
    """
    stored, pattern = stored_records(folders), keep or re.compile("")
    broken = dict(stored.broken)
    parts: dict[str, list[xr.Dataset]] = {name: [] for name in TABLES}
    unusable: list[Finding] = []
    for step, record in stored.records.items():
        problems = schema.check_record(record, TABLES, OPTIONAL)
        fatal = [f"'{name}' {problem}" for name, problem in problems.items() if name not in _PROBED]
        if fatal or "update" not in record:
            broken[step] = fatal[0] if fatal else "it has no update"
            continue
        unusable += [_broken(stored.paths[step], f"'{name}' {problem}") for name, problem in problems.items()]
        for name, datasets in parts.items():
            if name in record and name not in problems:
                datasets.append(record[name])
    fisher, others = joined_fisher(parts["fisher"], pattern)
    steps = [int(update["step"].values[0]) for update in parts["update"]]
    return TrainingRecords(
        path=folders.path,
        update=_joined(parts["update"], pattern),
        gradient=_joined(parts["gradient"], pattern),
        fisher=fisher,
        score=joined_scores(parts["score"]),
        intervention=joined_interventions(parts["intervention"]),
        loss=joined_losses([part.drop_vars(_OF_RESULTS, errors="ignore") for part in parts["loss"]], pattern),
        sharpness=joined_sharpness(parts["sharpness"]),
        routing=joined_routing(parts["routing"]),
        live_names=_live_names(stored.attributes.get("disk_names"), parts["update"]),
        findings=(
            *_findings_of_training(stored.attributes),
            *_two_formats(stored),
            *(_broken(stored.paths[step], broken[step]) for step in sorted(broken)),
            *unusable,
            *others,
        ),
        stamp={
            "run_id": str(stored.attributes.get("run_id", "")),
            "steps": steps,
            "broken": [_name(step) for step in sorted(broken)],
            "attributes": digest(stored.attributes),
        },
        attributes=stored.attributes,
        bytes=sum(dataset.nbytes for datasets in parts.values() for dataset in datasets),
    )


def is_current(stamp: Any, folders: RecordFolders) -> bool:
    """Tell whether the folders hold what they held when they were stamped.

    Args:
        stamp: As in :class:`TrainingRecords`; anything else is not current.
        folders: Where the records are.
    """
    try:
        then = sorted([*map(_name, stamp["steps"]), *stamp["broken"]])
        attributes = folders.attributes()
        return then == [_name(step) for step in folders.paths(attributes)] and stamp["attributes"] == digest(attributes)
    except (KeyError, TypeError, ValueError):
        return False


def _name(step: int) -> str:
    """Return the name of a step's record without its ending, which the first format's had none of."""
    return f"step-{step:012d}"


def _pattern(matrices: str) -> re.Pattern[str]:
    try:
        return re.compile(matrices)
    except re.error as error:
        raise ValueError(
            f"matrices={matrices!r} is not a regular expression ({error}). Escape it, or leave it out."
        ) from error


def _joined(parts: list[xr.Dataset], keep: re.Pattern[str]) -> xr.Dataset | None:
    if not parts:
        return None
    joined = raw.concatenate(parts)
    joined = joined.isel(matrix=[keep.search(name) is not None for name in joined["matrix"].values.tolist()])
    return joined if joined.sizes["matrix"] else None


def _live_names(disk_names: Any, updates: list[xr.Dataset]) -> dict[str, str]:
    """Invert live → disk; a name on disk that several share, or that is a live one as well, stays as it is."""
    pairs = disk_names.items() if isinstance(disk_names, dict) else ()
    texts = [(disk, live) for live, disk in pairs if isinstance(disk, str) and not live.startswith(WRAPPERS)]
    sharing = Counter(disk for disk, _ in texts)
    taken = {name for update in updates for name in update["matrix"].values.tolist()}
    return {disk: live for disk, live in texts if sharing[disk] == 1 and disk not in taken}


def _findings_of_training(attributes: Mapping[str, Any]) -> Iterator[Finding]:
    findings = from_json(_list(attributes.get("findings")))
    yield from findings
    gaps = [gap for gap in _list(attributes.get("gaps")) if isinstance(gap, dict) and type(gap.get("step")) is int]
    if gaps and all(finding.code != "OD305" for finding in findings):
        steps = [gap["step"] for gap in gaps]
        reasons = list(dict.fromkeys(str(gap.get("reason", "unknown")) for gap in gaps))
        yield Finding(
            "OD305",
            f"Steps that were due could not be captured, or not whole: {some(map(str, steps), 5)} "
            f"({'; '.join(reasons[:2])}).",
            "An increment after such a gap is since the last step that was captured.",
            evidence={"steps": steps, "reasons": reasons},
        )


def _two_formats(stored: StoredRecords) -> Iterator[Finding]:
    records, capture = stored.folders.records, stored.folders.capture
    if records is not None and capture is not None:
        first = [step for step, path in stored.paths.items() if path.parent == capture]
        left_out = len(capture_steps(capture)) - len(first)
        rest = f"; {left_out} later or doubled ones in it are left out" if left_out else ""
        yield Finding(
            "OD319",
            f"The training was begun with the first format of records: {len(first)} steps are read from {CAPTURE}, and "
            f"{len(record_steps(records))} from {RECORDS}{rest}.",
            f"Keep both folders. Remove {CAPTURE} only to drop the steps in it.",
            file=_shown(capture),
            evidence={"steps": first},
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _broken(path: Path, problem: str) -> Finding:
    where = f"{_shown(path.parent)}/{path.name}"
    return Finding("OD309", f"The captured step cannot be used: {problem}.", _REMEDY, file=where)


def _foreign(path: Path) -> Finding:
    return Finding(
        "OD309",
        "It has the name of a folder of records, and no recorder wrote it; it is left out.",
        "Restore its attributes if it is one, or move it away.",
        file=_shown(path),
    )


def _shown(path: Path) -> str:
    """Return a folder of records as it lies in its run."""
    return f"{FOLDER}/{path.name}" if path.absolute().parent.name == FOLDER else path.name


def _is_occupied(path: Path) -> bool:
    """Tell whether there is something that is not the beginning of records."""
    # A folder of that name in the run itself may be anybody's.
    if path.name == RECORDS and path.absolute().parent.name != FOLDER:
        return False
    if path.is_symlink() or path.is_file():
        return True
    try:
        return is_folder(path) and any(not entry.name.startswith(".") for entry in path.iterdir())
    except OSError:
        return True


def joined_fisher(parts: Sequence[xr.Dataset], keep: re.Pattern[str]) -> tuple[xr.Dataset | None, list[Finding]]:
    """Return K and b of all steps; of those that probed the same samples in the same way as the last one.

    Args:
        parts: One step each, ascending.
        keep: Blocks whose name it finds are kept, and ``global``.
    """
    if not parts:
        return None, []
    same = [part for part in parts if _is_alike(part, parts[-1])]
    findings = []
    if len(same) < len(parts):
        steps = [int(part["step"].values[0]) for part in parts if not _is_alike(part, parts[-1])]
        findings.append(_other_samples(f"{len(steps)} steps", "the last one", steps))
    whole = xr.concat(same, "step", data_vars="all", coords="minimal", compat="override", join="outer")
    blocks = whole["block"].values.tolist()
    whole = whole.isel(block=[name == schema.GLOBAL or keep.search(name) is not None for name in blocks])
    return whole.assign_attrs(parts[-1].attrs), findings


def with_probed(recorded: xr.Dataset | None, probed: xr.Dataset | None) -> tuple[xr.Dataset | None, list[Finding]]:
    """Return K and b of records and probed checkpoints; where both have a step, those of the record.

    Probed checkpoints are left out, with a finding, if they were probed in another way than the records.
    """
    if recorded is None or probed is None:
        return (probed if recorded is None else recorded), []
    if not _is_alike(recorded, probed):
        steps = probed["step"].values.tolist()
        return recorded, [_other_samples(f"{len(steps)} probed checkpoints", "the records of the training", steps)]
    new = probed.sel(step=~probed["step"].isin(recorded["step"].values))
    if not new.sizes["step"]:
        return recorded, []
    whole = xr.concat([recorded, new], "step", data_vars="all", coords="minimal", compat="override", join="outer")
    # The order of blocks stays that of the records, which the union of names does not keep.
    names = dict.fromkeys([*recorded["block"].values.tolist(), *probed["block"].values.tolist()])
    return whole.sel(block=list(names)).sortby("step").assign_attrs(recorded.attrs), []


def unmeasured_fisher(tree: xr.DataTree) -> xr.Dataset | None:
    """Return what a stored result keeps of its probed checkpoints, as :data:`dynamics.schema.FISHER_RECORD` has it."""
    if "probed" in tree.children:
        return tree["probed"].to_dataset().load()
    if "captured" in tree.attrs or "fisher" not in tree.children:
        return None
    fisher, shares = tree["fisher"].to_dataset(), tree["concentration"].to_dataset()
    stored = fisher[[name for name in schema.FISHER_RECORD if name in fisher]]
    record = stored.assign(share_outside_space=shares["share_outside_space"])
    return record.drop_vars([name for name in record.coords if name not in _COORDINATES]).load()


def joined_scores(parts: Sequence[xr.Dataset]) -> xr.Dataset | None:
    """Return the scores of all steps; a task is retained if it is at any of them."""
    if not parts:
        return None
    scores = [part.drop_vars("retained", errors="ignore") for part in parts]
    return with_retained(xr.concat(scores, "step", data_vars="all", join="outer"), *parts)


def with_retained(scores: xr.Dataset, *sources: xr.Dataset) -> xr.Dataset:
    """Return scores with the coordinate ``retained`` of the sources, if any of them has it.

    >>> one = xr.Dataset(coords={"task": ["a"], "retained": ("task", [True])})
    >>> with_retained(xr.Dataset(coords={"task": ["a", "b"]}), one)["retained"].values.tolist()
    [True, False]
    """
    known = [source for source in sources if "retained" in source.variables]
    if not known:
        return scores
    names = {name for source in known for name in source["task"].values[source["retained"].values]}
    flags = [name in names for name in scores["task"].values.tolist()]
    return scores.assign_coords(retained=("task", flags, schema.RETAINED.attributes))


def joined_interventions(parts: Sequence[xr.Dataset]) -> xr.Dataset | None:
    """Return the effects of all steps, over the arms, k, scales and tasks of any of them; ``None`` if there is no part.

    Where something was not run, numbers are NaN and flags false. Attributes are those of the last step, deviations the
    largest.

    Args:
        parts: Of one step or several, none of them twice.
    """
    if not parts:
        return None
    parts = sorted((part.isel(step=[row]) for part in parts for row in range(part.sizes["step"])), key=_step)
    axes = {
        name: list(dict.fromkeys(label for part in parts for label in part[name].values.tolist()))
        for name in schema.INTERVENTION_AXES
    }
    axes |= {name: sorted(axes[name]) for name in ("k", "scale")}
    arrays: dict[str, np.ndarray] = {}
    for name, variable in schema.INTERVENTION.items():
        if not any(name in part for part in parts):
            continue
        shape = [len(parts), *(len(axes[dim]) for dim in variable.dims[1:])]
        arrays[name] = np.full(shape, False if name in schema.INTERVENTION_FLAGS else np.nan)
        for row, part in enumerate(parts):
            if name in part:
                cells = [[axes[dim].index(label) for label in part[dim].values.tolist()] for dim in variable.dims[1:]]
                arrays[name][np.ix_([row], *cells)] = part[name].values
    by_step = [name for name in ("from_step", "recorded") if all(name in part.coords for part in parts)]
    coords: dict[str, Any] = {"step": list(map(_step, parts)), **axes}
    coords |= {name: ("step", np.concatenate([part[name].values for part in parts])) for name in by_step}
    deviations = {
        name: max(part.attrs.get(name) or 0.0 for part in parts) for name in ("norm_deviation", "repeat_deviation")
    }
    return xr.Dataset(schema.label_arrays(schema.INTERVENTION, arrays), coords, {**parts[-1].attrs, **deviations})


def joined_sharpness(parts: Sequence[xr.Dataset]) -> xr.Dataset | None:
    """Return the critical steps of all steps, over the tasks of any of them; ``None`` if there is no part.

    >>> joined_sharpness([])
    """
    if not parts:
        return None
    fill = {name: "" if name.endswith("reason") else name != "resolved" and np.nan for name in schema.SHARPNESS}
    return xr.concat(parts, "step", join="outer", fill_value=fill, combine_attrs="override").sortby("step")


def with_probed_effects(
    recorded: xr.Dataset | None,
    probed: xr.Dataset | None,
    joined: Callable[[Sequence[xr.Dataset]], xr.Dataset | None],
) -> xr.Dataset | None:
    """Return the effects of records and of probed checkpoints; where both have a step, those of the record.

    The coordinate ``recorded`` tells which is which.

    Args:
        recorded, probed: ``/intervention`` or ``/sharpness`` of each.
        joined: :func:`joined_interventions` or :func:`joined_sharpness`.
    """
    parts = []
    if recorded is not None:
        parts.append(recorded.assign_coords(recorded=("step", np.ones(recorded.sizes["step"], dtype=bool))))
        probed = None if probed is None else probed.sel(step=~probed["step"].isin(recorded["step"].values))
    if probed is not None and probed.sizes["step"]:
        parts.append(probed.assign_coords(recorded=("step", np.zeros(probed.sizes["step"], dtype=bool))))
    return joined(parts)


def unmeasured_effects(tree: xr.DataTree, name: str) -> xr.Dataset | None:
    """Return what a stored result keeps of its checkpoints in ``/intervention`` or ``/sharpness``, ``None`` if nothing.

    A result of an earlier version may not say that its sharpness is that of checkpoints.
    """
    if name not in tree.children:
        return None
    effects = tree[name].to_dataset().load()
    if "recorded" not in effects:
        return effects
    effects = effects.sel(step=~effects["recorded"])
    return effects if effects.sizes["step"] else None


def _step(part: xr.Dataset) -> int:
    return int(part["step"].values[0])


def _other_samples(what: str, reference: str, steps: Sequence[int]) -> Finding:
    return Finding(
        "OD312",
        f"{what} probed other samples, or another space, than {reference}; their Fisher is left out.",
        "Probe the same samples throughout a training.",
        evidence={"steps": list(steps)},
    )


def _is_alike(one: xr.Dataset, other: xr.Dataset) -> bool:
    labels = all(np.array_equal(one[name].values, other[name].values) for name in schema.SAMPLE_LABELS)
    return labels and all(one.attrs.get(name) == other.attrs.get(name) for name in ("space", "fisher", "reduction"))
