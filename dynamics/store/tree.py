"""The result of one run as a tree: from raw datasets, measured, merged and labelled, with where it comes from.

Its parts come from an analysis, from the records of a training alone, or from a stored result and records that have
gone on since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import xarray as xr

from dynamics.checkpoints import LogEntry, NotARun, Trajectory, open_trajectory
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.logs import log_groups
from dynamics.checkpoints.steps import named_step
from dynamics.checkpoints.trainings import read_training_state
from dynamics.findings import Finding, from_json, to_json
from dynamics.fisher import measure_fisher
from dynamics.fisher.findings import findings_of as fisher_findings
from dynamics.intervention.findings import findings_of as intervention_findings
from dynamics.intervention.findings import loss_findings, sharpness_findings
from dynamics.intervention.loss_changes import loss_changes
from dynamics.routing.dataset import measure_routing
from dynamics.routing.findings import routing_findings
from dynamics.spectra.dataset import measure_update
from dynamics.spectra.findings import base_findings, findings_of
from dynamics.spectra.null_models import SEED
from dynamics.spectra.path import renamed_path
from dynamics.store.capture import CAPTURE
from dynamics.store.loss_records import unmeasured_losses, with_probed_losses
from dynamics.store.merge import knows_start, merge, unmeasured, with_live_names
from dynamics.store.record_folders import RECORDS, RecordFolders, record_folders, records_below
from dynamics.store.records import (
    TrainingRecords,
    find_records,
    is_current,
    joined_interventions,
    joined_sharpness,
    read_records,
    unmeasured_effects,
    unmeasured_fisher,
    with_probed,
    with_probed_effects,
    with_retained,
)
from dynamics.store.results import FOLDER, encodable_dataset, provenance
from dynamics.text import encodable


@dataclass(frozen=True)
class Parts:
    """What a result is made of.

    Args:
        run: The run's name.
        checkpoints: Raw update of the checkpoints, ``None`` if there are none.
        records: The records of the training, ``None`` if there are none.
        logs: Groups that are in the result as they are: ``training``, ``score``, ``path``, ``base``.
        findings: What was found about the checkpoints; those of the records are their own.
        inputs: Fingerprints of the weight files.
        fisher: K and b of probed checkpoints, ``None`` if none was probed.
        score: Their scores, ``None`` if there are none.
        intervention: Effects of parts of their increments, ``None`` if there was no intervention.
        loss: Losses of their probe samples, ``None`` if none was probed.
        sharpness: Critical steps along their increments, likewise.
    """

    run: str
    checkpoints: xr.Dataset | None = None
    records: TrainingRecords | None = None
    logs: Mapping[str, xr.Dataset] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    inputs: Sequence[Mapping[str, Any]] = ()
    fisher: xr.Dataset | None = None
    score: xr.Dataset | None = None
    intervention: xr.Dataset | None = None
    loss: xr.Dataset | None = None
    sharpness: xr.Dataset | None = None


def result_tree(parts: Parts, configuration: Mapping[str, Any]) -> xr.DataTree:
    """Return the result of one run.

    Where records and checkpoints were merged, ``/checkpoints`` and ``/probed`` keep what the checkpoints alone say, so
    that both can be merged again when the training has gone on.

    Raises:
        ValueError: If there are neither checkpoints nor captured steps.
    """
    checkpoints, records = parts.checkpoints, parts.records
    if records is None:
        raw_update, findings = merge(checkpoints, None)
        groups = measure_update(raw_update)
    else:
        live = None if checkpoints is None else _live_checkpoints(checkpoints, records)
        raw_update, findings = merge(live, records.update)
        groups = measure_update(raw_update, records.gradient)
        if checkpoints is not None:
            groups["checkpoints"] = checkpoints
    findings += findings_of(groups["update"])
    groups |= parts.logs
    if records is not None and "base" in groups:
        groups["base"] = _live(groups["base"], records.live_names)
    if "base" in groups:
        findings += base_findings(groups["base"])
    fisher, news = with_probed(None if records is None else records.fisher, parts.fisher)
    findings += news
    if records is not None and parts.fisher is not None:
        groups["probed"] = parts.fisher
    if fisher is not None:
        probed = measure_fisher(fisher)
        groups |= probed
        findings += fisher_findings(probed)
    effects = with_probed_effects(records and records.intervention, parts.intervention, joined_interventions)
    if effects is not None:
        groups["intervention"] = effects
        findings += intervention_findings(effects)
    losses = with_probed_losses(records and records.loss, parts.loss)
    if losses is not None:
        groups["loss"] = loss_changes(losses)
        findings += loss_findings(groups["loss"])
    sharpness = with_probed_effects(records and records.sharpness, parts.sharpness, joined_sharpness)
    if sharpness is not None:
        groups["sharpness"] = sharpness
        findings += sharpness_findings(sharpness)
    if records is not None and records.routing is not None:
        groups["routing"] = measure_routing(records.routing, groups["update"], groups.get("gradient"))
        findings += routing_findings(groups["routing"], groups["update"]["matrix"].values.tolist())
    scores = [score for score in (records and records.score, parts.score, parts.logs.get("score")) if score is not None]
    if scores:
        groups["score"] = reduce(_scores, scores)
    tree = xr.DataTree.from_dict({f"/{name}": encodable_dataset(group) for name, group in groups.items()})
    inputs = list(parts.inputs)
    if records is not None:
        inputs.append(records.input)
        findings = [*records.findings, *findings]
    tree.attrs = provenance(parts.run, configuration, inputs, SEED)
    tree.attrs["findings"] = to_json([*_findings_of_checkpoints(parts, raw_update), *findings])
    if records is not None:
        steps = [] if checkpoints is None else checkpoints["step"].values.tolist()
        tree.attrs["captured"] = json.dumps(encodable({**records.stamp, "checkpoints": steps}))
        tree.attrs["checkpoint_findings"] = to_json(parts.findings)
    return tree


def _live_checkpoints(checkpoints: xr.Dataset, records: TrainingRecords) -> xr.Dataset:
    """Return raw checkpoints under live names, without matrices that are parts of a recorded one (``gate_up_proj``)."""
    names = records.attributes.get("disk_names")
    pairs = names.items() if isinstance(names, dict) else ()
    recorded = set() if records.update is None else set(records.update["matrix"].values.tolist())
    several = [disk for live, disk in pairs if live in recorded and isinstance(disk, list) and len(disk) > 1]
    parts = {part for disk in several for part in disk} - recorded
    kept = [name not in parts for name in checkpoints["matrix"].values.tolist()]
    return with_live_names(checkpoints if all(kept) else checkpoints.isel(matrix=kept), records.live_names)


def _live(group: xr.Dataset, live_names: Mapping[str, str]) -> xr.Dataset:
    """Return a group under the names of the live model."""
    names = group["matrix"].values.tolist()
    return group.assign_coords(matrix=("matrix", [live_names.get(name, name) for name in names], group["matrix"].attrs))


def _scores(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """Return the scores of both; where both have one, that of the first."""
    one, other = (scores.drop_vars("retained", errors="ignore") for scores in (first, second))
    return with_retained(one.combine_first(other), first, second).assign_attrs(second.attrs)


def _findings_of_checkpoints(parts: Parts, update: xr.Dataset) -> list[Finding]:
    """Return findings about checkpoints that stay true beside the records.

    Where these say what matrices are called on disk, OD117 is dropped; where they know the start of a training, the
    OD123 that counts its dense updates from the first checkpoint.
    """
    records = parts.records
    if records is None:
        return list(parts.findings)
    mapped = isinstance(records.attributes.get("disk_names"), dict)
    known = set()
    if records.update is not None and knows_start(records.update):
        known = set(update["segment"].sel(step=records.update["step"].values).values.tolist())
    return [
        finding
        for finding in parts.findings
        if not (mapped and finding.code == "OD117")
        and not (finding.code == "OD123" and finding.evidence.get("segment") in known)
    ]


#: Groups that the records do not change.
_KEPT = ("training", "score", "path", "base", "weights", "association", "sensitivity")
#: Findings that follow from the numbers of ``/update``, ``/base``, ``/intervention``, ``/loss`` and ``/sharpness``:
#: found anew.
_FROM_NUMBERS = (
    *("OD202", "OD203", "OD204", "OD205", "OD206", "OD208", "OD211", "OD212"),
    "OD417",
    *("OD701", "OD702", "OD703", "OD704", "OD705", "OD706"),
)
#: What findings about ``/association`` begin with: they stay with it.
_OF_RELATIONS = "OD5"


def records_alone(run: Path, folders: RecordFolders) -> xr.DataTree:
    """Return the result of a training of which only records are stored.

    Args:
        run: As it was asked for.
        folders: Where its records are.

    Raises:
        FileNotFoundError: If no step is captured yet.
        ValueError: If the records cannot be read.
    """
    records = read_records(folders)
    if records.update is None:
        raise FileNotFoundError(
            f"The records in '{folders.path}' hold no step that can be used. Wait for the first one, or analyse "
            f"checkpoints with: python -m dynamics.analyze {run}"
        )
    trajectory = without_checkpoints(folders.path)
    parts = Parts(trajectory.name, None, records, log_groups(trajectory), trajectory.findings)
    return result_tree(parts, _mapping(records.attributes.get("configuration")))


def reopened(stored: xr.DataTree, folders: RecordFolders) -> xr.DataTree:
    """Return an analysis with the records as they are now; as it is if it has them already, or is of several runs."""
    if "runs" in stored.children or is_current(_mapping(stored.attrs.get("captured")), folders):
        return stored
    attributes = stored.attrs
    configuration = _mapping(attributes["configuration"])
    matrices = configuration.get("matrices")
    records, problems = find_records(folders.path, matrices if isinstance(matrices, str) else None, folders)
    if records is None or records.update is None:
        earlier = from_json(attributes["findings"])
        news = [*problems, *(records.findings if records else ())]
        attributes["findings"] = to_json([*earlier, *(finding for finding in news if finding not in earlier)])
        return stored
    kept = from_json(attributes["checkpoint_findings" if "captured" in attributes else "findings"])
    kept += [
        finding
        for finding in from_json(attributes["findings"])
        if finding.code.startswith(_OF_RELATIONS) and finding not in kept
    ]
    parts = Parts(
        run=str(attributes["run"]),
        checkpoints=_checkpoints(stored),
        records=records,
        logs={
            name: renamed_path(stored[name].to_dataset()) if name == "path" else stored[name].to_dataset()
            for name in _KEPT
            if name in stored.children
        },
        findings=[finding for finding in kept if finding.code not in _FROM_NUMBERS],
        inputs=[entry for entry in json.loads(attributes["inputs"]) if "captured_steps" not in entry],
        fisher=unmeasured_fisher(stored),
        intervention=unmeasured_effects(stored, "intervention"),
        loss=unmeasured_losses(stored),
        sharpness=unmeasured_effects(stored, "sharpness"),
    )
    tree = result_tree(parts, configuration)
    tree.attrs |= {name: attributes[name] for name in ("label",) if name in attributes}
    return tree


def _checkpoints(stored: xr.DataTree) -> xr.Dataset | None:
    """Return the raw update of the checkpoints alone."""
    if "captured" not in stored.attrs:
        return unmeasured(stored["update"].to_dataset())
    return stored["checkpoints"].to_dataset().load() if "checkpoints" in stored.children else None


def _mapping(content: Any) -> dict[str, Any]:
    """Return an object from JSON, or the text of one; empty if it is none."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Source:
    """One run as it lies on the disk.

    Args:
        trajectory: Its checkpoints and its log; without checkpoints where it has records only.
        records: Its records, ``None`` if there are none.
    """

    trajectory: Trajectory
    records: TrainingRecords | None = None


def open_source(run: Path, matrices: str | None = None, base: str | None = None) -> Source:
    """Open what there is of a run; reads records, but no weights.

    Args:
        run: A run folder, one checkpoint, or a folder of records.
        matrices: Regular expression; only matrices whose name it finds are watched.
        base: Folder of the weights before training.

    Raises:
        NotARun: If there are neither checkpoints nor captured steps that can be analysed.
        ValueError: If ``matrices`` is not a regular expression.
    """
    records, problems = find_records(run, matrices)
    usable = records is not None and records.update is not None
    if records is None and _is_folder_of_records(run):  # whose files are not checkpoints
        raise NotARun(" ".join(problem.message for problem in problems), problems)
    if records is not None and records.path == run:
        if not usable:
            raise NotARun(_nothing_recorded(records, matrices), records.findings)
        return Source(without_checkpoints(run), records)
    try:
        trajectory = open_trajectory(run, matrices, base)
    except NotARun as error:
        if not usable:
            beside = records_below(run) if records is None else f" {_nothing_recorded(records, matrices)}"
            findings = () if records is None else records.findings
            raise NotARun(f"{error}{beside}", [*error.findings, *problems, *findings]) from error
        trajectory = without_checkpoints(run, error.findings)
    return Source(replace(trajectory, findings=(*trajectory.findings, *problems)), records)


def run_folder(run: Path) -> Path:
    """Return the run that a folder of records, or the folder that it lies in, is of; any other folder is itself."""
    inside = run.name in (RECORDS, CAPTURE) and _is_folder_of_records(run)
    folder = run.absolute().parent if inside else run
    return folder.absolute().parent if folder.name == FOLDER and _holds_records(folder) else folder


def results_folder(run: Path) -> Path:
    """Return where results of a run go: beside its records where these, or the folder they are in, are given."""
    if _is_folder_of_records(run):
        return run.parent
    return run if run.name == FOLDER and _holds_records(run) else run / FOLDER


def without_checkpoints(run: Path, findings: Sequence[Finding] = ()) -> Trajectory:
    """Return a run of which only records can be analysed, with the log that its training left, if it left one."""
    folder = run_folder(run)
    log: tuple[LogEntry, ...] = ()
    problems = []
    for path in _states(folder):
        try:
            log = tuple(LogEntry(0, step, name, value) for step, name, value in read_training_state(path).log)
            break
        except UnreadableFile as error:
            problems.append(error.to_finding(path.relative_to(folder).as_posix()))
    return Trajectory(folder, (), log, (*findings, *problems))


def _states(folder: Path) -> list[Path]:
    """Return training states, that of the run first, then those of checkpoints, the newest first."""
    try:
        steps = [(named_step(entry.name), entry) for entry in folder.iterdir()]
    except OSError:
        return []
    numbered = {step.number: entry for step, entry in steps if step is not None and step.is_plain}
    parents = [folder, *(numbered[step] for step in sorted(numbered, reverse=True))]
    return [parent / _STATE for parent in parents if (parent / _STATE).is_file()]


def _is_folder_of_records(folder: Path) -> bool:
    folders = record_folders(folder)
    return folders is not None and folders.path == folder


def _holds_records(folder: Path) -> bool:
    folders = record_folders(folder)
    return folders is not None and folders.path.parent == folder


def _nothing_recorded(records: TrainingRecords, matrices: str | None) -> str:
    steps = len(records.stamp["steps"])
    if steps and matrices is not None:
        return f"matrices={matrices!r} matches none of the matrices recorded in '{records.path}'."
    return f"The records in '{records.path}' hold no step that can be used; wait for the first, or train on."
