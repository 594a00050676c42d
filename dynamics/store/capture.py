"""What was captured during a training, read back: one record a step, each complete in itself."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dynamics.store.arrays import read_attributes, read_groups
from dynamics.store.places import FOLDER

CAPTURE = "capture.zarr"
KIND = "optimization-dynamics capture"
FORMAT = 1
_RECORD = re.compile(r"step-([0-9]{12})")
_ATTEMPTS = 5  # at a record that is replaced while it is read


@dataclass(frozen=True)
class Capture:
    """What a capture store holds.

    Args:
        path: The store.
        attributes: What was noted about the whole training.
        records: Step -> name of the group -> its numbers, steps ascending; in memory.
        broken: Name of a record's folder -> why it cannot be read.
    """

    path: Path
    attributes: dict[str, Any]
    records: dict[int, dict[str, xr.Dataset]]
    broken: dict[str, str]


def capture_path(run: Path) -> Path | None:
    """Where a run's capture store is; None without one.

    Looked for in ``RUN/dynamics/capture.zarr``, ``RUN/capture.zarr`` and RUN itself. A store whose attributes are
    damaged still counts where it has records, so that reading it tells. One that was killed before it was complete has
    none, and holds nothing.
    """
    for place in (run / FOLDER / CAPTURE, run / CAPTURE):
        if not place.is_symlink() and (is_capture(place) or record_names(place)):
            return place
    return run if is_capture(run) or record_names(run) else None


def read_capture(path: Path) -> Capture:
    """Reads a whole capture store, also while a training writes it.

    A record that disappears meanwhile is left out. One that cannot be read costs only itself.

    Args:
        path: The store, as ``capture_path`` finds it.

    Raises:
        ValueError: If it is no capture store, or one of a later format.
    """
    attributes = capture_attributes(path)
    records, broken = {}, {}
    for name in record_names(path):
        try:
            record = _read_while_written(path / name)
        except ValueError as error:
            broken[name] = str(error)
        else:
            if record is not None:
                records[record_step(name)] = record
    return Capture(path, attributes, records, broken)


def read_record(path: Path) -> dict[str, xr.Dataset]:
    """The groups of one record, in memory.

    Raises:
        FileNotFoundError: If it, or a part of it, is not there.
        ValueError: Says in one line what is wrong with it.
    """
    try:
        if path.is_symlink():
            raise ValueError("it is a link")
        groups, step = read_groups(path), record_step(path.name)
        check_step(groups, step)
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        raise ValueError(getattr(error, "strerror", None) or type(error).__name__) from error
    return groups


def check_step(groups: dict[str, xr.Dataset], step: int) -> None:
    """Refuses numbers of another step.

    Raises:
        ValueError: Names the group and the steps.
    """
    for name, dataset in groups.items():
        if "step" in dataset.coords and (steps := np.ravel(dataset["step"].values).tolist()) != [step]:
            raise ValueError(f"'{name}' is of the steps {str(steps)[:40]}, and was to be of step {step} alone")


def capture_attributes(path: Path) -> dict[str, Any]:
    """The root attributes of a capture store.

    Raises:
        ValueError: If it is no capture store, or one of a later format.
    """
    try:
        attributes = read_attributes(path / ".zattrs")
        if attributes.get("kind") != KIND:
            raise ValueError(f"its .zattrs says the kind {str(attributes.get('kind'))[:80]!r}, not {KIND!r}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"Expected a capture store at '{path}', but it is none ({reason}). "
            f"Pass the folder that DynamicsCallback wrote, or restore its .zattrs."
        ) from error
    if attributes.get("format") != FORMAT:
        raise ValueError(
            f"The capture store '{path}' is of format {str(attributes.get('format'))[:40]}, and this version reads "
            f"{FORMAT}. Upgrade optimization-dynamics."
        )
    return attributes


def is_capture(path: Path) -> bool:
    """Whether a folder says that it is a capture store, of whatever format."""
    try:
        return read_attributes(path / ".zattrs").get("kind") == KIND
    except (OSError, ValueError):
        return False


def record_name(step: int) -> str:
    """Name of a step's record; sorted by name is sorted by step.

    Raises:
        ValueError: If no training has that step.

    >>> record_name(50)
    'step-000000000050'
    """
    if not 0 <= step < 10**12:
        raise ValueError(f"Expected a step from 0 to {10**12 - 1}, got {step}.")
    return f"step-{step:012d}"


def record_step(name: str) -> int:
    """The inverse of ``record_name``."""
    match = _RECORD.fullmatch(name)
    assert match, name
    return int(match[1])


def record_names(path: Path) -> list[str]:
    """Names of the records in a store, steps ascending; none where there is no such folder."""
    try:
        return sorted(name for name in os.listdir(path) if _RECORD.fullmatch(name))
    except OSError:
        return []


def _read_while_written(path: Path) -> dict[str, xr.Dataset] | None:
    """One record, none of it from a later version; None if it is not there any more."""
    for _ in range(_ATTEMPTS):
        before = _identity(path)
        if before is None:
            return None
        try:
            record, problem = read_record(path), None
        except (FileNotFoundError, ValueError) as error:
            record, problem = None, error
        if _identity(path) != before:
            continue
        if isinstance(problem, FileNotFoundError):
            place = Path(problem.filename or path)
            raise ValueError(f"'{place.parent.name}/{place.name}' is missing") from problem
        if problem is not None:
            raise problem
        return record
    raise ValueError("it was replaced again and again while it was read; read it again later")


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a folder from another one that took its name; None if nothing is there."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
