"""From raw datasets to the result: merged, measured, labelled, with where it comes from.

Results made when they are opened: of a training without an analysis, or one that has gone on since.

What there is of a run to analyse: its checkpoints, its records, its log.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.checkpoints import LogEntry, NotARun, Trajectory, open_trajectory
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.logs import log_groups
from dynamics.checkpoints.steps import named_step
from dynamics.checkpoints.trainings import read_training_state
from dynamics.findings import Finding
from dynamics.fisher import measured as measured_fisher
from dynamics.fisher.findings import notes as fisher_notes
from dynamics.spectra import findings as notes
from dynamics.spectra.dataset import measured
from dynamics.spectra.measures import known_quantiles
from dynamics.spectra.null_models import SEED
from dynamics.store import FOLDER, capture_path, encodable_dataset, provenance, read_capture
from dynamics.store.capture import CAPTURE
from dynamics.store.merge import merge, raw_of, translated
from dynamics.store.records import Captured, captured, find_captured, finding_of, is_current, raw_fisher, with_probed
from dynamics.text import encodable

#: Of a gradient, over the steps: its size, and the measures.
_OF_GRADIENTS = ("norm_before_clip", "norm_after_clip", "frobenius_norm", *schema.MEASURES)
_BOUNDS = ("", "_low", "_high")


@dataclass(frozen=True)
class Parts:
    """What a result is made of.

    Args:
        run: The run's name.
        checkpoints: Raw update of the checkpoints, ``None`` if there are none.
        captured: The records of the training, ``None`` if there are none.
        logs: Groups that are in the result as they are: ``training``, ``score``, ``path``, ``base``.
        findings: What was found about the checkpoints; those of the records are their own.
        inputs: Fingerprints of the weight files.
        fisher: K and b of probed checkpoints, ``None`` if none was probed.
        score: Their scores, ``None`` if there are none.
    """

    run: str
    checkpoints: xr.Dataset | None = None
    captured: Captured | None = None
    logs: Mapping[str, xr.Dataset] = field(default_factory=dict)
    findings: Sequence[Finding] = ()
    inputs: Sequence[Mapping[str, Any]] = ()
    fisher: xr.Dataset | None = None
    score: xr.Dataset | None = None


def result_tree(parts: Parts, configuration: Mapping[str, Any]) -> xr.DataTree:
    """The result of one run.

    Where records and checkpoints were merged, ``/checkpoints`` and ``/probed`` keep what the checkpoints alone say, so
    that both can be merged again when the training has gone on.

    Raises:
        ValueError: If there are neither checkpoints nor captured steps.
    """
    checkpoints, captured = parts.checkpoints, parts.captured
    if captured is None:
        raw_update, found = merge(checkpoints, None)
        groups = measured(raw_update)
    else:
        live = None if checkpoints is None else translated(checkpoints, captured.live_names)
        raw_update, found = merge(live, captured.update)
        groups = measured(raw_update, captured.gradient)
        if "gradient" in groups:
            groups["summary_gradient"] = quantiles_of_gradients(groups["gradient"], groups["null_gradient"])
        if checkpoints is not None:
            groups["checkpoints"] = checkpoints
    found += notes.notes(groups["update"])
    groups |= parts.logs
    if captured is not None and "base" in groups:
        groups["base"] = _live(groups["base"], captured.live_names)
    fisher, news = with_probed(None if captured is None else captured.fisher, parts.fisher)
    found += news
    if captured is not None and parts.fisher is not None:
        groups["probed"] = parts.fisher
    if fisher is not None:
        probed = measured_fisher(fisher)
        groups |= probed
        found += fisher_notes(probed)
    scores = [each for each in (captured and captured.score, parts.score, parts.logs.get("score")) if each is not None]
    if scores:
        groups["score"] = reduce(_scores, scores)
    tree = xr.DataTree.from_dict({f"/{name}": encodable_dataset(group) for name, group in groups.items()})
    inputs, own = list(parts.inputs), _own_findings(parts)
    if captured is not None:
        inputs.append(captured.input)
        found = [*captured.findings, *found]
    tree.attrs = provenance(parts.run, configuration, inputs, SEED)
    tree.attrs["findings"] = as_json([*own, *found])
    if captured is not None:
        steps = [] if checkpoints is None else checkpoints["step"].values.tolist()
        tree.attrs["captured"] = json.dumps(encodable({**captured.stamp, "checkpoints": steps}))
        tree.attrs["checkpoint_findings"] = as_json(parts.findings)
    return tree


def _live(group: xr.Dataset, live_names: Mapping[str, str]) -> xr.Dataset:
    """Under the names of the live model."""
    names = group["matrix"].values.tolist()
    return group.assign_coords(matrix=("matrix", [live_names.get(name, name) for name in names], group["matrix"].attrs))


def _scores(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """Scores of both; where both have one, that of the first."""
    return first.combine_first(second).assign_attrs(second.attrs)


def as_json(findings: Sequence[Finding]) -> str:
    """Findings as the root attribute holds them."""
    return json.dumps(encodable([finding.to_dict() for finding in findings]), allow_nan=False)


def _own_findings(parts: Parts) -> list[Finding]:
    """Where the records say what matrices are called on disk, names as on disk need no mention."""
    known = parts.captured is not None and isinstance(parts.captured.attributes.get("disk_names"), dict)
    return [finding for finding in parts.findings if not (known and finding.code == "OD117")]


def quantiles_of_gradients(gradient: xr.Dataset, null: xr.Dataset) -> xr.Dataset:
    """``/summary_gradient``: quartiles over matrices, and medians of the null's mean and band."""
    quartiles = {
        f"{name}_quantile": (
            ("step", "quantile"),
            _over_matrices(gradient[name].values, schema.QUANTILES),
            {"units": schema.GRADIENT[name].units, "long_name": f"{name} of the gradient, quartiles over matrices"},
        )
        for name in _OF_GRADIENTS
    }
    bands = {
        f"{name}_null{bound}": (
            "step",
            _over_matrices(null[f"{name}{bound}"].values, (0.5,))[:, 0],
            {"units": null[f"{name}{bound}"].attrs["units"], "long_name": f"{name} of the null, median over matrices"},
        )
        for name in schema.MEASURES
        for bound in _BOUNDS
        if f"{name}{bound}" in null
    }
    coords = {"step": gradient["step"].variable, "quantile": list(schema.QUANTILES)}
    return xr.Dataset({**quartiles, **bands}, coords=coords)


def _over_matrices(values: np.ndarray, quantiles: Sequence[float]) -> np.ndarray:
    """Quantiles of the finite numbers of each step, ``(step, quantile)``; NaN where there are none."""
    return known_quantiles(np.where(np.isfinite(values), values, np.nan), quantiles)


#: Groups that the records do not change.
_KEPT = ("training", "score", "path", "base", "weights", "association")
#: Findings that follow from the numbers of ``/update``: they are found anew.
_FROM_NUMBERS = ("OD202", "OD203", "OD204", "OD205", "OD206", "OD208")
#: What findings about ``/association`` begin with: they stay with it.
_OF_RELATIONS = "OD5"


def capture_alone(run: Path, store: Path) -> xr.DataTree:
    """The result of a training of which nothing else is stored.

    Args:
        run: As it was asked for.
        store: Its capture store.

    Raises:
        FileNotFoundError: If no step is captured yet.
        ValueError: If the store does not open.
    """
    records = captured(read_capture(store))
    if records.update is None:
        raise FileNotFoundError(
            f"The capture store '{store}' holds no step that can be used. Wait for the first one, or analyse "
            f"checkpoints with: python -m dynamics.analyze {run}"
        )
    trajectory = without_checkpoints(store)
    parts = Parts(trajectory.name, None, records, log_groups(trajectory), trajectory.findings)
    return result_tree(parts, _mapping(records.attributes.get("configuration")))


def with_capture(stored: xr.DataTree, store: Path) -> xr.DataTree:
    """An analysis with the records as they are now; as it is if it has them already, or is of several runs."""
    if "runs" in stored.children or is_current(_mapping(stored.attrs.get("captured")), store):
        return stored
    attributes = stored.attrs
    configuration = _mapping(attributes["configuration"])
    matrices = configuration.get("matrices")
    records, problems = find_captured(store, matrices if isinstance(matrices, str) else None)
    if records is None or records.update is None:
        earlier = _findings(attributes["findings"])
        news = [*problems, *(records.findings if records else ())]
        attributes["findings"] = as_json([*earlier, *(finding for finding in news if finding not in earlier)])
        return stored
    told = _findings(attributes["checkpoint_findings" if "captured" in attributes else "findings"])
    told += [
        finding
        for finding in _findings(attributes["findings"])
        if finding.code.startswith(_OF_RELATIONS) and finding not in told
    ]
    parts = Parts(
        run=str(attributes["run"]),
        checkpoints=_checkpoints(stored),
        captured=records,
        logs={name: stored[name].to_dataset() for name in _KEPT if name in stored.children},
        findings=[finding for finding in told if finding.code not in _FROM_NUMBERS],
        inputs=[each for each in json.loads(attributes["inputs"]) if "captured_steps" not in each],
        fisher=raw_fisher(stored),
    )
    tree = result_tree(parts, configuration)
    tree.attrs |= {name: attributes[name] for name in ("label",) if name in attributes}
    return tree


def _checkpoints(stored: xr.DataTree) -> xr.Dataset | None:
    """The raw update of the checkpoints alone."""
    if "captured" not in stored.attrs:
        return raw_of(stored["update"].to_dataset())
    return stored["checkpoints"].to_dataset().load() if "checkpoints" in stored.children else None


def _mapping(content: Any) -> dict[str, Any]:
    """An object from JSON, or the text of one; empty if it is none."""
    try:
        value = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _findings(text: str) -> list[Finding]:
    return [finding for each in json.loads(text) if (finding := finding_of(each))]


_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Source:
    """One run as it lies on the disk.

    Args:
        trajectory: Its checkpoints and its log; without checkpoints where it has records only.
        captured: Its records, ``None`` if there are none.
    """

    trajectory: Trajectory
    captured: Captured | None = None


def open_source(run: Path, matrices: str | None = None, base: str | None = None) -> Source:
    """Opens what there is of a run; reads records, but no weights.

    Args:
        run: A run folder, one checkpoint, or a capture store.
        matrices: Regular expression; only matrices whose name it finds are watched.
        base: Folder of the weights before training.

    Raises:
        NotARun: If there are neither checkpoints nor captured steps that can be analysed.
        ValueError: If ``matrices`` is not a regular expression.
    """
    captured, problems = find_captured(run, matrices)
    usable = captured is not None and captured.update is not None
    if captured is not None and captured.path == run:
        if not usable:
            raise NotARun(_nothing_captured(captured, matrices), captured.findings)
        return Source(without_checkpoints(run), captured)
    try:
        trajectory = open_trajectory(run, matrices, base)
    except NotARun as error:
        if not usable:
            beside = "" if captured is None else f" {_nothing_captured(captured, matrices)}"
            found = () if captured is None else captured.findings
            raise NotARun(f"{error}{beside}", [*error.findings, *problems, *found]) from error
        trajectory = without_checkpoints(run, error.findings)
    return Source(replace(trajectory, findings=(*trajectory.findings, *problems)), captured)


def run_folder(run: Path) -> Path:
    """The run that a capture store, or the folder it lies in, is of; any other folder is itself."""
    folder = run.absolute().parent if run.name == CAPTURE else run
    return folder.absolute().parent if folder.name == FOLDER and _holds_results(folder) else folder


def results_folder(run: Path) -> Path:
    """Where results of a run go: beside its capture store where that, or the folder it lies in, is given as the run."""
    if capture_path(run) == run:
        return run.parent
    return run if run.name == FOLDER and _holds_results(run) else run / FOLDER


def without_checkpoints(run: Path, findings: Sequence[Finding] = ()) -> Trajectory:
    """A run of which only records can be analysed, with the log that its training left, if it left one."""
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
    """Training states, that of the run first, then those of checkpoints, the newest first."""
    try:
        steps = [(named_step(entry.name), entry) for entry in folder.iterdir()]
    except OSError:
        return []
    numbered = {step.number: entry for step, entry in steps if step is not None and step.is_plain}
    places = [folder, *(numbered[step] for step in sorted(numbered, reverse=True))]
    return [place / _STATE for place in places if (place / _STATE).is_file()]


def _holds_results(folder: Path) -> bool:
    return capture_path(folder) == folder / CAPTURE


def _nothing_captured(captured: Captured, matrices: str | None) -> str:
    steps = len(captured.stamp["steps"])
    if steps and matrices is not None:
        return f"matrices={matrices!r} is found in none of the matrices captured in '{captured.path}'."
    return f"The capture store '{captured.path}' holds no step that can be used; wait for the first, or train on."
