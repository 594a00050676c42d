"""The records of a training in progress: where they go, what users should hear of them, how a training continues."""

from __future__ import annotations

import secrets
import warnings
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import xarray as xr
from torch import Tensor

from dynamics.findings import Finding, from_json
from dynamics.recording.monitor import TrainingMonitor
from dynamics.spectra.dataset import same_spectra
from dynamics.spectra.null_models import SEED
from dynamics.store.capture import CAPTURE, is_capture
from dynamics.store.record_folders import RECORDS, RecordFolders, StoredRecords, is_records, stored_records
from dynamics.store.record_writer import RecordsExist, RecordWriter
from dynamics.store.results import FOLDER, provenance
from dynamics.text import counted, encodable, percent

#: Findings about a change in the middle of a training: they stay true of it.
CHANGES = ("OD313", "OD314", "OD315", "OD316")


def store_path(run: Path) -> Path:
    """Return where the records of a run go, whatever the run is called."""
    return (run / FOLDER / RECORDS).resolve()


def earlier_records(run: Path) -> StoredRecords | None:
    """Return what is recorded in a run's folder, in this format or the first; ``None`` if nothing is.

    Raises:
        ValueError: If it cannot be read.
    """
    records, capture = (
        path if not path.is_symlink() and test(path) else None
        for path, test in ((run / FOLDER / RECORDS, is_records), (run / FOLDER / CAPTURE, is_capture))
    )
    return None if records is None and capture is None else stored_records(RecordFolders(records, capture))


class Records:
    """Write the records of a training and keep the attributes beside them true.

    Args:
        run: The run folder.
        notes: Findings on the whole training.
        attributes: Beside provenance: ``disk_names``, ``covered_share``.
        configuration: How it is recorded, JSON-compatible.
        warmup_steps: See ``TrainingMonitor``.
        resume_from: The step after which the training continues, ``None`` if it begins.
        earlier: What was recorded before, if the training continues.

    Raises:
        RecordsExist: If there are records and the training does not resume.
        OSError: If they cannot be written.
    """

    def __init__(
        self,
        run: Path,
        *,
        notes: Sequence[Finding],
        attributes: Mapping[str, Any],
        configuration: Mapping[str, Any],
        warmup_steps: int,
        resume_from: int | None,
        earlier: StoredRecords | None,
    ) -> None:
        self._notes, self._monitor = list(notes), TrainingMonitor(warmup_steps)
        self._changes: list[Finding] = []
        self._unmeasured: dict[str, tuple[int, str]] = {}  # matrix -> first step, why
        past = earlier.attributes if earlier is not None and resume_from is not None else {}
        kept = [] if earlier is None else [r for step, r in earlier.records.items() if step <= (resume_from or 0)]
        self._gaps = [gap for gap in _dictionaries(past.get("gaps")) if _step_of(gap) <= (resume_from or 0)]
        self._warned: set[str] = set()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        resumptions = _dictionaries(past.get("resumptions"))
        if resume_from is not None:
            resumptions.append({"step": resume_from, "created": now})
        content = {
            **provenance(run.absolute().name, configuration, [], SEED),
            "run_id": past.get("run_id") or secrets.token_hex(8),
            "created": past.get("created") or now,
            "resumptions": resumptions,
            **encodable(dict(attributes)),
        }
        if resume_from is not None:
            self._changes = [
                finding
                for finding in from_json(_dictionaries(past.get("findings")))
                if finding.code in CHANGES and (finding.step or 0) <= resume_from
            ]
        for record in kept:
            self._monitor.observe(record["update"], record.get("gradient"))
        self._noted = self._changing()
        folder = run / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        content |= self._noted
        if resume_from is None:
            self._writer = RecordWriter.create(folder, content)
        else:
            self._writer = RecordWriter.resume(folder, resume_from, content)

    @property
    def steps(self) -> list[int]:
        """The steps with a record."""
        return self._writer.steps

    @property
    def findings(self) -> list[Finding]:
        """The findings that hold now."""
        return [*self._notes, *self._changes, *self._unmeasured_findings(), *self._monitor.findings()]

    @property
    def changes(self) -> list[Finding]:
        """The findings on changes of what is trained, those before the training was resumed included."""
        return [*self._changes]

    def _unmeasured_findings(self) -> list[Finding]:
        if not self._unmeasured:
            return []
        (name, (step, reason)), *_ = self._unmeasured.items()
        return [
            Finding(
                "OD317",
                f"The gradient spectra of {counted(len(self._unmeasured), 'matrix', 'matrices')} could not be "
                f"measured, first at step {step} ({reason}), and are missing. Norms and all other matrices are "
                "recorded.",
                "Leave these matrices out (matrices=), or only record norms (preset='economy').",
                matrix=name if len(self._unmeasured) == 1 else "",
                step=step,
                evidence={"names": list(self._unmeasured)[:20]},
            )
        ]

    def unmeasured_gradients(self, step: int, reasons: Mapping[str, str]) -> None:
        """Note matrices whose gradient has no spectrum at this step, and why."""
        for name, reason in reasons.items():
            self._unmeasured.setdefault(name, (step, encodable(reason)))

    def write_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep the initial weights, for when the training resumes."""
        if tensors:
            self._writer.write_start(tensors)

    def changed(self, findings: Iterable[Finding], start: Mapping[str, Tensor], disk_names: Mapping[str, Any]) -> None:
        """Note a change of what is trained, warn once of each kind, and keep the initial weights of new matrices.

        Args:
            findings: Findings on the change.
            start: Initial weights of new matrices.
            disk_names: Names on disk of new matrices.

        Raises:
            OSError: If it cannot be written.
        """
        for finding in findings:
            self._changes.append(finding)
            self._tell(finding.code, str(finding))
        named = self._writer.attributes.get("disk_names")
        self._writer.annotate(
            {"disk_names": {**(named if isinstance(named, dict) else {}), **encodable(dict(disk_names))}}
        )
        self.annotate()
        if start:
            self._writer.write_start({**self._writer.read_start(), **start})

    def note(self, finding: Finding) -> None:
        """Add a finding on the training up to here, and warn."""
        self._notes.append(finding)
        self._tell(finding.code, str(finding))

    def write(
        self,
        step: int,
        update: xr.Dataset,
        gradient: xr.Dataset | None,
        probed: Mapping[str, xr.Dataset | None] | None = None,
    ) -> None:
        """Add a record; what is ``None`` was not measured.

        Raises:
            OSError: If it cannot be written.
        """
        groups = {"update": update, "gradient": gradient, **(probed or {})}
        self._writer.write(step, {name: group for name, group in groups.items() if group is not None})
        self._monitor.observe(update, gradient)

    def gap(self, step: int, reason: str) -> None:
        """Note once that a step could not be recorded, or not all of it, and warn the first time."""
        gap = {"step": step, "reason": encodable(reason)}
        if gap not in self._gaps[-4:]:  # where several parts of a step fail alike
            self._gaps.append(gap)
        self._tell(
            "OD305",
            f"optimization-dynamics could not record step {step} ({reason}). Training goes on, and so does recording "
            "at the next captured step. This warning appears once.",
        )

    def end(self, step: int, reason: str) -> None:
        """Note that nothing is recorded from this step on, and warn."""
        self._gaps.append({"step": step, "reason": encodable(reason)})
        self._tell(
            "OD305",
            f"optimization-dynamics records nothing from step {step} on, since the ranks were not together ({reason}). "
            "Training goes on.",
        )

    def annotate(self) -> None:
        """Bring the attributes up to date, and warn once of each new finding.

        Raises:
            OSError: If they cannot be written; the next call tries again.
        """
        for finding in (*self._unmeasured_findings(), *self._monitor.findings()):
            self._tell(finding.code, str(finding))
        changing = self._changing()
        if changing != self._noted:
            self._writer.annotate(changing)
            self._noted = changing

    def close(self) -> None:
        """Close the records."""
        self._writer.close()

    def _changing(self) -> dict[str, Any]:
        findings = encodable([finding.to_dict() for finding in self.findings])
        return {"findings": findings, "gaps": list(self._gaps)}

    def _tell(self, code: str, text: str) -> None:
        if code not in self._warned:
            self._warned.add(code)
            warnings.warn(text, UserWarning, stacklevel=2)


def refuse_other_weights(earlier: StoredRecords, step: int, now: xr.Dataset) -> bool:
    """Return whether there is a record of this step; refuse a record of other weights.

    Raises:
        RecordsExist: If the record does not agree with the model.
    """
    record = earlier.records.get(step)
    if record is None:
        return False
    agreement = same_spectra(record["update"], now)
    if agreement.is_other:
        raise RecordsExist(
            f"'{earlier.folders.path}' has a record of step {step} whose spectra differ from the model's by "
            f"{percent(agreement.difference, 0)} ({agreement.matrix}): "
            "it belongs to another training, or the weights come from another checkpoint. "
            "Choose another folder, or move the records away."
        )
    return True


def _dictionaries(value: Any) -> list[dict[str, Any]]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _step_of(gap: Mapping[str, Any]) -> int:
    step = gap.get("step")
    return step if isinstance(step, int) else 0
