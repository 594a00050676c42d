"""Where the records of a training lie, in this format and in the first, and what is in them.

A run may have both: a training that was begun with the first format and resumed with this one. They are joined by step,
and where both have a step, ``records/`` wins.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import xarray as xr

from dynamics.store.capture import (
    CAPTURE,
    capture_attributes,
    capture_record,
    capture_steps,
    is_capture,
    read_capture_record,
)
from dynamics.store.disk import read_json_file
from dynamics.store.record_file import read_record, record_name, record_step
from dynamics.store.results import FOLDER
from dynamics.text import one_line, some

RECORDS = "records"
RECORDS_KIND = "optimization-dynamics records"
RECORDS_FORMAT = 2
#: Beside the records: what is noted about the whole training.
RUN = "run.json"


@dataclass(frozen=True)
class RecordFolders:
    """The folders with the records of one training.

    Args:
        records: ``records/``, ``None`` if there is none.
        capture: ``capture.zarr``, the first format, ``None`` if there is none.
    """

    records: Path | None
    capture: Path | None = None

    @property
    def path(self) -> Path:
        """The folder in which records are to be expected."""
        path = self.records or self.capture
        assert path is not None
        return path

    def attributes(self) -> dict[str, Any]:
        """What is noted about the whole training.

        Raises:
            ValueError: If it cannot be read.
        """
        if self.records is not None and is_records(self.records):
            return records_attributes(self.records)
        assert self.capture is not None, self.path
        return capture_attributes(self.capture)

    def paths(self, attributes: Mapping[str, Any]) -> dict[int, Path]:
        """Return where the record of each step lies, steps ascending.

        Args:
            attributes: Of the training; they say up to which step records of the first format belong to it.
        """
        until = attributes.get("capture_until")
        paths: dict[int, Path] = {}
        if self.capture is not None:
            steps = capture_steps(self.capture)
            paths = {
                step: capture_record(self.capture, step)
                for step in steps
                if self.records is None or not isinstance(until, int) or step <= until
            }
        if self.records is not None:
            paths |= {step: self.records / record_name(step) for step in record_steps(self.records)}
        return dict(sorted(paths.items()))


@dataclass(frozen=True)
class StoredRecords:
    """What the folders of a training hold.

    Args:
        folders: Where it was read.
        attributes: What is noted about the whole training.
        records: Step → name of the group → its numbers, steps ascending; in memory.
        broken: Step → why its record cannot be read.
        paths: Step → its record on the disk.
    """

    folders: RecordFolders
    attributes: Mapping[str, Any]
    records: Mapping[int, Mapping[str, xr.Dataset]]
    broken: Mapping[int, str]
    paths: Mapping[int, Path]


def record_folders(run: Path) -> RecordFolders | None:
    """Return where the records of a run are, ``None`` without any.

    Looked for in ``RUN/dynamics``, in RUN, and as RUN itself. A folder whose attributes are damaged still counts where
    it has records, so that reading it tells. One that was killed before it was complete has none, and holds nothing.
    """
    for folder in (run / FOLDER, run):
        records, capture = (
            path if not path.is_symlink() and test(path) else None
            for path, test in ((folder / RECORDS, is_records), (folder / CAPTURE, is_capture))
        )
        if records is not None or capture is not None:
            return RecordFolders(records, capture)
    if is_records(run):
        return RecordFolders(run)
    return RecordFolders(None, run) if is_capture(run) else None


def records_below(folder: Path) -> str:
    """Return a sentence about subfolders that hold records, such as the trials of a search; ``""`` without any."""
    try:
        inside = [path for path in folder.iterdir() if path.is_dir() and not path.is_symlink()]
    except OSError:
        return ""
    names = [one_line(path.name) for path in inside if record_folders(path) is not None]
    subfolders = some(sorted(names, key=lambda name: (len(name), name)))
    return f" Records are in its subfolders: {subfolders}. Pass one of them." if names else ""


def stored_records(folders: RecordFolders) -> StoredRecords:
    """Read all records of a training, also while it writes them.

    A record that disappears meanwhile is left out. One that cannot be read costs only itself.

    Raises:
        ValueError: If the attributes cannot be read, or are of a later format.
    """
    attributes = folders.attributes()
    paths = folders.paths(attributes)
    records, broken = {}, {}
    for step, path in paths.items():
        try:
            records[step] = read_record(path) if record_step(path.name) is not None else read_capture_record(path)
        except FileNotFoundError:
            continue
        except ValueError as error:
            broken[step] = str(error)
    return StoredRecords(folders, attributes, records, broken, paths)


def records_attributes(path: Path) -> dict[str, Any]:
    """Return what ``run.json`` notes about the whole training.

    Raises:
        ValueError: If the folder has none, or one of a later format.
    """
    try:
        attributes = read_json_file(path / RUN)
        if attributes.get("kind") != RECORDS_KIND:
            raise ValueError(f"the kind in its {RUN} is {str(attributes.get('kind'))[:80]!r}, not {RECORDS_KIND!r}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"Expected the records of a training in '{path}', but cannot read them ({reason}). "
            f"Pass the folder that DynamicsCallback wrote, or restore its {RUN}."
        ) from error
    if attributes.get("format") != RECORDS_FORMAT:
        raise ValueError(
            f"The records in '{path}' are of format {str(attributes.get('format'))[:40]}, and this version reads "
            f"{RECORDS_FORMAT}. Upgrade optimization-dynamics."
        )
    return attributes


def is_records(path: Path) -> bool:
    """Tell whether a folder says that it holds records, of whatever format, or holds some."""
    if record_steps(path):
        return True
    try:
        return read_json_file(path / RUN).get("kind") == RECORDS_KIND
    except (OSError, ValueError):
        return False


def record_steps(path: Path) -> list[int]:
    """Return the steps that have a record in a folder, ascending; none where there is no such folder."""
    try:
        return sorted(step for name in os.listdir(path) if (step := record_step(name)) is not None)
    except OSError:
        return []


def digest(attributes: Mapping[str, Any]) -> str:
    """Return a hash of a training's attributes."""
    return sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()
