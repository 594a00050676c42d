"""What was captured during a training, read back: one record a step, each complete in itself.

Which folder a capture may take, and who is at work in it.
"""

from __future__ import annotations

import os
import re
import shutil
import weakref
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xarray as xr

from dynamics.store.arrays import GROUP, read_attributes, read_groups, sync
from dynamics.store.results import FOLDER

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


try:
    import fcntl
except ImportError:  # Windows; there, nothing keeps two writers apart
    fcntl = None

#: Beside the records: the watched matrices at the start. Hidden, so that no Zarr reader takes it for an array.
START = ".start.safetensors"
#: Folders in the making; for want of a ``.zgroup`` of their own no group to a Zarr reader.
PARTIAL = ".partial-"
_OTHER_FOLDER = "Choose another folder, or move it away."


class CaptureExists(OSError):
    """A place that a new capture may not take; the message is one line with path and remedy.

    >>> str(CaptureExists("'runs/a/dynamics/capture.zarr' holds 3 captured steps."))
    "'runs/a/dynamics/capture.zarr' holds 3 captured steps."
    """


class Lock:
    """Held by the one writer of a store, on its ``.zgroup``, which is made once and never replaced.

    Args:
        path: The store; made if it is not there.

    Attributes:
        exclusive: Whether no other writer can be at work; unknown, so False, where the file system has no locks.

    Raises:
        CaptureExists: If somebody holds it.
        OSError: If the store cannot be made.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        self._file: BinaryIO = open(os.open(path / ".zgroup", flags, 0o666), "r+b", buffering=0)  # noqa: SIM115
        try:
            self.exclusive = self._acquire(path)
            if self._file.read() != GROUP:
                self._file.seek(0)
                self._file.write(GROUP)
                self._file.truncate()
            for each in (path / ".zgroup", path, path.parent, path.parent.parent):
                sync(each)
        except BaseException:
            self.release()
            raise
        _held.add(self._file)

    @property
    def held(self) -> bool:
        """Whether it has not been released, nor inherited: a forked process is not the writer."""
        return not self._file.closed

    def release(self) -> None:
        """Lets another writer in; twice does no harm."""
        if self.held:
            if fcntl is not None:
                with suppress(OSError):
                    fcntl.flock(self._file, fcntl.LOCK_UN)
            self._file.close()

    def _acquire(self, path: Path) -> bool:
        if fcntl is None:
            return False
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CaptureExists(
                f"'{path}' is being written by another recorder. Close that one first, or choose another folder."
            ) from None
        except OSError:
            return False  # some network file systems know no locks; a capture without one is better than none
        return True


def refuse_foreign(path: Path) -> None:
    """Refuse what is neither a capture store nor the beginning of one, and a folder for it that is a link.

    Raises:
        CaptureExists: Names it.
    """
    if path.parent.is_symlink():
        raise CaptureExists(f"'{path.parent}' is a link, and no capture is written through one. {_OTHER_FOLDER}")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise CaptureExists(f"'{path}' stands where the capture must go, and is no folder. {_OTHER_FOLDER}")
    if not is_capture(path) and (strange := _not_of_a_start(path)):
        raise CaptureExists(
            f"'{path}' stands where the capture must go, and no capture wrote it: it holds '{strange[0]}', "
            f"and no .zattrs of a capture. {_OTHER_FOLDER}"
        )


def refuse_captured(path: Path) -> None:
    """Refuses a capture store that a new training must not take.

    Raises:
        CaptureExists: Says how many steps it holds.
    """
    if names := record_names(path):
        steps = f"{len(names)} captured step{'s' * (len(names) > 1)}, the last of them {record_step(names[-1])}"
        raise CaptureExists(f"'{path}' holds {steps}. Resume that training, or choose another folder.")
    if path.is_dir() and (strange := _not_of_a_start(path)):
        raise CaptureExists(f"'{path}' holds '{strange[0]}', which a capture does not begin with. {_OTHER_FOLDER}")


def remove(path: Path) -> None:
    """Removes a file, a link or a folder as far as that is possible; what is left is hidden and swept later."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _not_of_a_start(path: Path) -> list[str]:
    """What is in a folder beyond what a start that was killed leaves there."""
    ours = {".zgroup", START, *([".zattrs"] if is_capture(path) else [])}
    return sorted(name for name in os.listdir(path) if name not in ours and not name.startswith(PARTIAL))


_held: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def _close_inherited() -> None:
    for file in list(_held):
        file.close()  # the parent's lock stays, and ends with the parent, not with its last data loader


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)
