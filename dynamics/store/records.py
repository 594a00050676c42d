"""What a training recorded of itself: its records as raw datasets, and what must be known about them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import xarray as xr

from dynamics.findings import CATALOGUE, Finding
from dynamics.schema import WRAPPERS
from dynamics.spectra import raw
from dynamics.store import FOLDER, Capture, capture_path, read_capture
from dynamics.store.capture import CAPTURE, capture_attributes, record_name, record_names
from dynamics.store.probed import GROUPS, joined_fisher, joined_scores, probe_problems
from dynamics.store.record_checks import record_problems
from dynamics.text import some

_REMEDY = "The other records are used; restore it from a copy, or remove it."


@dataclass(frozen=True)
class Captured:
    """The records of a training.

    Args:
        path: The capture store.
        update: Raw update of all captured steps, ``None`` if no record is left to use.
        gradient: Raw gradient of the steps that have one, ``None`` if none has.
        fisher: K and b of the steps that have them, ``None`` if none has.
        score: Scores of the steps that have some, ``None`` if none has.
        live_names: Name on disk → name in the live model, where they differ.
        findings: What was found during the training, and while reading.
        stamp: Tells whether the store has changed since: run, steps, records that cannot be used, attributes.
        bytes: Size of the numbers.
    """

    path: Path
    update: xr.Dataset | None
    gradient: xr.Dataset | None
    fisher: xr.Dataset | None
    score: xr.Dataset | None
    live_names: Mapping[str, str]
    findings: tuple[Finding, ...]
    stamp: Mapping[str, Any]
    attributes: Mapping[str, Any]
    bytes: int

    @property
    def input(self) -> dict[str, Any]:
        """Its entry among the inputs of a result."""
        steps = self.stamp["steps"]
        return {
            "path": _shown(self.path),
            "bytes": self.bytes,
            "header_sha256": self.stamp["attributes"],
            "step": steps[-1] if steps else None,
            "captured_steps": len(steps),
        }


def find_captured(run: Path, matrices: str | None = None) -> tuple[Captured | None, list[Finding]]:
    """The records of a run, ``None`` where there are none; and what stands in their place, if something does.

    Args:
        run: A run folder, its ``dynamics`` folder, or the store.
        matrices: Regular expression; only matrices whose name it finds are kept.

    Raises:
        ValueError: If it is not a regular expression.
    """
    path = capture_path(run)
    if path is None:
        return None, [_foreign(place) for place in (run / FOLDER / CAPTURE, run / CAPTURE) if _is_occupied(place)]
    try:
        return captured(read_capture(path), matrices), []
    except ValueError as error:
        if matrices is not None:
            _pattern(matrices)
        return None, [Finding("OD309", str(error), file=_shown(path))]


def captured(capture: Capture, matrices: str | None = None) -> Captured:
    """The content of a capture store, checked and joined.

    Raises:
        ValueError: If ``matrices`` is not a regular expression.
    """
    keep = _pattern(matrices or "")
    broken = dict(capture.broken)
    updates, gradients = [], []
    probed: dict[str, list[xr.Dataset]] = {name: [] for name in GROUPS}
    unusable: list[Finding] = []
    for step, record in capture.records.items():
        if problem := next(record_problems(record), None):
            broken[record_name(step)] = problem
            continue
        updates.append(record["update"])
        if "gradient" in record:
            gradients.append(record["gradient"])
        problems = dict(probe_problems(record))
        unusable += [_broken(capture.path, record_name(step), problem) for problem in problems.values()]
        for name, found in probed.items():
            if name in record and name not in problems:
                found.append(record[name])
    fisher, news = joined_fisher(probed["fisher"], keep)
    steps = [int(update["step"].values[0]) for update in updates]
    bad = sorted(broken)
    return Captured(
        path=capture.path,
        update=_joined(updates, keep),
        gradient=_joined(gradients, keep),
        fisher=fisher,
        score=joined_scores(probed["score"]),
        live_names=_live_names(capture.attributes.get("disk_names"), updates),
        findings=(
            *_findings_of(capture.attributes),
            *(_broken(capture.path, name, broken[name]) for name in bad),
            *unusable,
            *news,
        ),
        stamp={
            "run_id": str(capture.attributes.get("run_id", "")),
            "steps": steps,
            "broken": bad,
            "attributes": _digest(capture.attributes),
        },
        attributes=capture.attributes,
        bytes=sum(part.nbytes for part in (*updates, *gradients, *probed["fisher"], *probed["score"])),
    )


def is_current(stamp: Any, path: Path) -> bool:
    """Whether a capture store holds what it held when it was stamped.

    Args:
        stamp: As in :class:`Captured`; anything else is not current.
        path: The store.
    """
    try:
        then = sorted([*map(record_name, stamp["steps"]), *stamp["broken"]])
        return then == record_names(path) and stamp["attributes"] == _digest(capture_attributes(path))
    except (KeyError, TypeError, ValueError):
        return False


def finding_of(content: Any) -> Finding | None:
    """A finding from its dictionary; ``None`` for what is none of this version's."""
    if not isinstance(content, dict) or not isinstance(content.get("message"), str):
        return None
    code, step, evidence = (content.get(key) for key in ("code", "step", "evidence"))
    if not isinstance(code, str) or code not in CATALOGUE:
        return None
    texts = {key: value for key in ("remedy", "file", "matrix") if isinstance(value := content.get(key), str)}
    return Finding(
        code,
        content["message"],
        **texts,
        step=step if type(step) is int else None,
        evidence=evidence if isinstance(evidence, dict) else {},
    )


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
    """The inverse of live → disk; a name on disk that several share, or that is a live one as well, stays as it is."""
    pairs = disk_names.items() if isinstance(disk_names, dict) else ()
    texts = [(disk, live) for live, disk in pairs if isinstance(disk, str) and not live.startswith(WRAPPERS)]
    sharing = Counter(disk for disk, _ in texts)
    taken = {name for update in updates for name in update["matrix"].values.tolist()}
    return {disk: live for disk, live in texts if sharing[disk] == 1 and disk not in taken}


def _findings_of(attributes: Mapping[str, Any]) -> Iterator[Finding]:
    known = [finding for each in _list(attributes.get("findings")) if (finding := finding_of(each))]
    yield from known
    gaps = [gap for gap in _list(attributes.get("gaps")) if isinstance(gap, dict) and type(gap.get("step")) is int]
    if gaps and all(finding.code != "OD305" for finding in known):
        steps = [gap["step"] for gap in gaps]
        reasons = list(dict.fromkeys(str(gap.get("reason", "unknown")) for gap in gaps))
        yield Finding(
            "OD305",
            f"Steps that were due could not be captured, or not whole: {some(map(str, steps), 5)} "
            f"({'; '.join(reasons[:2])}).",
            "An increment after such a gap is since the last step that was captured.",
            evidence={"steps": steps, "reasons": reasons},
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _broken(path: Path, name: str, problem: str) -> Finding:
    return Finding("OD309", f"The captured step cannot be used: {problem}.", _REMEDY, file=f"{_shown(path)}/{name}")


def _foreign(place: Path) -> Finding:
    return Finding(
        "OD309",
        "It has the name of a capture store, and is none; it is left out.",
        "Restore its .zattrs if it is one, or move it away.",
        file=_shown(place),
    )


def _shown(path: Path) -> str:
    """A capture store as it lies in its run."""
    return f"{FOLDER}/{path.name}" if path.absolute().parent.name == FOLDER else path.name


def _is_occupied(place: Path) -> bool:
    """Whether there is something that is not the beginning of a capture."""
    if place.is_symlink() or place.is_file():
        return True
    try:
        return place.is_dir() and any(not entry.name.startswith(".") for entry in place.iterdir())
    except OSError:
        return True


def _digest(attributes: Mapping[str, Any]) -> str:
    return sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()
