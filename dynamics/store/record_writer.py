"""The records of a training, written while it runs: ``records/``, one file a step, one writer at a time.

Beside them lie ``run.json``, what is noted about the whole training, and ``start.safetensors``, what the watched
matrices were at its start. Each file is written under a hidden name, synced and renamed, so whatever ends a process
ends at most the record in flight.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamics.store.capture import CAPTURE, CAPTURE_START, capture_attributes, is_capture
from dynamics.store.disk import PARTIAL, encoded_json, lock, replacing, sync_folder, write_file
from dynamics.store.record_file import encoded_record, record_name, record_step
from dynamics.store.record_folders import (
    RECORDS,
    RECORDS_FORMAT,
    RECORDS_KIND,
    RUN,
    RecordFolders,
    is_records,
    record_steps,
    records_attributes,
)

START = "start.safetensors"
#: Made once, held by the writer, never replaced or removed.
_LOCK = ".lock"
_ELSEWHERE = "Choose another folder, or move it away."


class RecordsExist(OSError):
    """A folder that a new training may not record into; the message is one line with path and remedy.

    >>> str(RecordsExist("'runs/a/dynamics/records' holds 3 records."))
    "'runs/a/dynamics/records' holds 3 records."
    """


class RecordWriter:
    """Write the records of one training; made by ``create`` or ``resume``, given back by ``close`` or ``with``.

    Example::

        with RecordWriter.create(Path("runs/a/dynamics"), {"preset": "standard"}) as writer:
            writer.write(50, {"update": update, "gradient": gradient})
    """

    def __init__(self, folder: Path, attributes: Mapping[str, Any]) -> None:
        self.path = folder / RECORDS
        self._folders = RecordFolders(self.path, folder / CAPTURE if is_capture(folder / CAPTURE) else None)
        self._lock = _Lock(self.path)
        self._attributes = dict(attributes)
        if self._lock.exclusive:  # otherwise what is left over may belong to somebody who is at work
            for left in self.path.glob(f"{PARTIAL}*"):
                with suppress(OSError):
                    left.unlink()

    @classmethod
    def create(cls, folder: Path, attributes: Mapping[str, Any]) -> RecordWriter:
        """Begin the records of a training in ``folder/records``.

        A folder without records, which a killed start leaves, is begun anew.

        Args:
            folder: ``RUN/dynamics``; made if it is not there.
            attributes: About the whole training; JSON-compatible.

        Raises:
            RecordsExist: If there are records, somebody is writing some, or something else stands there.
            OSError: If it cannot be written.
        """
        _refuse_foreign(folder / RECORDS)
        _refuse_recorded(folder)
        encoded_json(attributes)  # refused before anything is made
        writer = cls(folder, {})
        try:
            _refuse_recorded(folder)  # again: another may have written and gone since
            (writer.path / START).unlink(missing_ok=True)
            writer.annotate(attributes)
            for path in (writer.path, folder, folder.parent):
                sync_folder(path)
        except BaseException:
            writer.close()
            raise
        return writer

    @classmethod
    def resume(cls, folder: Path, step: int, attributes: Mapping[str, Any]) -> RecordWriter:
        """Go on after a step; begin where there is nothing.

        Where there are only records of the first format, they stay as they are, and those up to ``step`` count.

        Args:
            folder: ``RUN/dynamics``.
            step: The last step of the checkpoint that the training resumes from. Later records are removed, the last
                one first.
            attributes: Replace those of the same name.

        Raises:
            RecordsExist: If somebody is writing them, or something else stands there.
            ValueError: If they are of a later format.
            OSError: If they cannot be written.
        """
        path, capture = folder / RECORDS, folder / CAPTURE
        _refuse_foreign(path)
        if not is_records(path) and not is_capture(capture):
            return cls.create(folder, attributes)
        # Of a later format: refused before anything is touched.
        earlier = records_attributes(path) if is_records(path) else capture_attributes(capture)
        writer = cls(folder, earlier)
        try:
            if is_records(path):
                earlier = records_attributes(path)
                for later in reversed(record_steps(path)):
                    if later > step:
                        (path / record_name(later)).unlink()
            elif start := read_tensors(capture / CAPTURE_START):
                writer.write_start(start)
            if is_capture(capture):
                until = earlier.get("capture_until")
                earlier["capture_until"] = min(step, until) if isinstance(until, int) else step
            writer._attributes = earlier
            writer.annotate(attributes)
            sync_folder(path)
        except BaseException:
            writer.close()
            raise
        return writer

    @property
    def attributes(self) -> dict[str, Any]:
        """What is noted about the whole training; a copy."""
        return dict(self._attributes)

    @property
    def steps(self) -> list[int]:
        """The steps that have a record, of either format, ascending."""
        return sorted(self._folders.paths(self._attributes))

    def write(self, step: int, groups: Mapping[str, xr.Dataset]) -> None:
        """Add the record of one step; when the call returns it is on the disk, whole.

        Args:
            step: ``global_step`` after the update.
            groups: Name → numbers, booleans and text; a coordinate ``step`` must be this step alone.

        Raises:
            ValueError: If the step has a record, or a name or an array cannot be stored.
            OSError: If it cannot be written; all that was there stays.
        """
        self._refuse_closed()
        content = encoded_record(step, groups)
        if os.path.lexists(self.path / record_name(step)):
            raise ValueError(f"Expected a step without a record, but step {step} is in '{self.path}' already.")
        write_file(self.path / record_name(step), content)

    def annotate(self, attributes: Mapping[str, Any]) -> None:
        """Add to the attributes of the whole training, replacing those of the same name.

        Raises:
            ValueError: If JSON cannot hold something.
            OSError: If they cannot be written; those that were there stay.
        """
        self._refuse_closed()
        content = {**self._attributes, **attributes, "kind": RECORDS_KIND, "format": RECORDS_FORMAT}
        write_file(self.path / RUN, encoded_json(content, indent=1).encode())
        self._attributes = records_attributes(self.path)

    def write_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Keep what the watched matrices were at the start, in place of what was kept before.

        Raises:
            OSError: If it cannot be written; what was kept before stays.
        """
        self._refuse_closed()
        with replacing(self.path / START) as partial:
            try:
                save_file(_separate(tensors), partial)
            except SafetensorError as error:
                raise OSError(f"'{self.path / START}' cannot be written ({error}).") from error

    def read_start(self) -> dict[str, Tensor]:
        """Return what ``write_start`` kept; empty if nothing.

        Raises:
            ValueError: If it cannot be read.
        """
        return read_tensors(self.path / START)

    def close(self) -> None:
        """Let another writer in; once is enough, twice does no harm."""
        self._lock.release()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _refuse_closed(self) -> None:
        if not self._lock.held:
            raise ValueError(f"The records in '{self.path}' are closed. Open them again with resume().")


def read_start(folder: Path) -> dict[str, Tensor]:
    """Return what the watched matrices were at the start of the training in ``RUN/dynamics``; empty if not kept.

    Raises:
        ValueError: If it cannot be read.
    """
    candidates = ((folder / RECORDS, START), (folder / CAPTURE, CAPTURE_START))
    starts = (read_tensors(path / name) for path, name in candidates if not path.is_symlink())
    return next(filter(None, starts), {})


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file, on the CPU; empty if nothing is there.

    Raises:
        ValueError: If it cannot be read.
    """
    if not os.path.lexists(path):
        return {}
    try:
        if path.is_symlink() or not path.is_file():
            raise OSError("it is not a regular file")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Expected the start of the training in '{path}', but it does not open ({error}). "
            "Remove it, and increments begin at the next captured step."
        ) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same numbers in memory that no two share, as safetensors asks."""
    separate, storages = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in storages or storage.nbytes() != tensor.nbytes
        storages.add(storage.data_ptr())
        separate[name] = tensor.clone() if shared else tensor
    return separate


class _Lock:
    """Held by the one writer of a folder of records, on a hidden file in it.

    Attributes:
        exclusive: Whether no other writer can be at work; unknown, so False, where the file system has no locks.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        self._file: BinaryIO = open(os.open(folder / _LOCK, flags, 0o666), "r+b", buffering=0)  # noqa: SIM115
        locked = lock(self._file.fileno(), wait=False)
        if locked is False:
            self._file.close()
            raise RecordsExist(
                f"'{folder}' is being written by another recorder. Close that one first, or choose another folder."
            )
        self.exclusive = locked is True
        _open_locks.add(self._file)

    @property
    def held(self) -> bool:
        """Whether it has not been released, nor inherited: a forked process is not the writer."""
        return not self._file.closed

    def release(self) -> None:
        self._file.close()


_open_locks: weakref.WeakSet[BinaryIO] = weakref.WeakSet()


def _close_inherited() -> None:
    for file in list(_open_locks):
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


def _refuse_foreign(path: Path) -> None:
    """Refuse what is neither a folder of records nor the beginning of one, and a folder for it that is a link.

    Raises:
        RecordsExist: Names it.
    """
    if path.parent.is_symlink():
        raise RecordsExist(f"'{path.parent}' is a link, and no records are written through one. {_ELSEWHERE}")
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        raise RecordsExist(f"'{path}' stands where the records must go, and is not a folder. {_ELSEWHERE}")
    if not is_records(path):
        names = [name for name in os.listdir(path) if name not in (_LOCK, START) and not name.startswith(PARTIAL)]
        if names:
            raise RecordsExist(
                f"'{path}' stands where the records must go, and no recorder wrote it: it holds '{min(names)}', "
                f"and no {RUN} of a recorder. {_ELSEWHERE}"
            )


def _refuse_recorded(folder: Path) -> None:
    """Refuse records, of either format, that a new training must not add to.

    Raises:
        RecordsExist: Says how many there are.
    """
    path, capture = folder / RECORDS, folder / CAPTURE
    folders = RecordFolders(path, capture if is_capture(capture) else None)
    if steps := sorted(folders.paths({})):
        where = path if record_steps(path) else capture
        count = f"{len(steps)} captured step{'s' * (len(steps) > 1)}, the last of them {steps[-1]}"
        raise RecordsExist(f"'{where}' holds {count}. Resume that training, or choose another folder.")
    strange = [
        name
        for name in (os.listdir(path) if path.is_dir() else ())
        if name not in (_LOCK, START, RUN) and not name.startswith(PARTIAL) and record_step(name) is None
    ]
    if strange:
        raise RecordsExist(f"'{path}' holds '{min(strange)}', which no recorder wrote. {_ELSEWHERE}")
