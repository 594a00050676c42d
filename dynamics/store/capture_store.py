"""What is captured during a training, on disk: a Zarr group of complete sub-groups, one a step.

Each record is written under a hidden name, synced and renamed, so whatever ends a process ends at most the record in
flight. Arrays are never grown. One writer at a time holds a lock on ``.zgroup``, which is made once and never replaced.

What the watched matrices were at the start of a training, beside its records.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import xarray as xr
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamics.store.arrays import encoded_attributes, encoded_groups, move, sync, write_files
from dynamics.store.capture import (
    CAPTURE,
    FORMAT,
    KIND,
    PARTIAL,
    START,
    Lock,
    capture_attributes,
    check_step,
    is_capture,
    read_record,
    record_name,
    record_names,
    record_step,
    refuse_captured,
    refuse_foreign,
    remove,
)
from dynamics.store.replace import forget, new_owner

_NEW = "record"


class CaptureStore:
    """Writes the records of one training; made by ``create`` or ``resume``, given back by ``close`` or ``with``.

    Example::

        with CaptureStore.create(Path("runs/a/dynamics"), {"preset": "standard"}) as store:
            store.write(50, {"update": update, "gradient": gradient})
    """

    def __init__(self, path: Path, lock: Lock, attributes: dict[str, Any]) -> None:
        self.path = path
        self._lock = lock
        self._attributes = attributes
        self._owner = new_owner()
        if lock.exclusive:  # otherwise a left-over may be somebody's who is at work
            for left in path.glob(f"{PARTIAL}*"):
                remove(left)

    @classmethod
    def create(cls, folder: Path, attributes: Mapping[str, Any]) -> CaptureStore:
        """Begins a store in ``folder/capture.zarr``.

        One without records, which a killed start leaves, is begun anew.

        Args:
            folder: ``RUN/dynamics``; made if it is not there.
            attributes: About the whole training; JSON-compatible.

        Raises:
            CaptureExists: If a capture is there, somebody is writing it, or something else stands there.
            OSError: If it cannot be written.
        """
        path = folder / CAPTURE
        refuse_foreign(path)
        refuse_captured(path)
        content = {**attributes, "kind": KIND, "format": FORMAT}
        encoded_attributes(content)  # refused before anything is made
        lock = Lock(path)
        try:
            refuse_captured(path)  # again: another may have written and gone since
            store = cls(path, lock, {})
            (path / START).unlink(missing_ok=True)
            store._replace_attributes(content)
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def resume(cls, folder: Path, step: int, attributes: Mapping[str, Any]) -> CaptureStore:
        """Continues the store in ``folder/capture.zarr`` after a step; begins one where there is none.

        Args:
            folder: ``RUN/dynamics``.
            step: The last step of the checkpoint that the training resumes from. Records of later steps are dropped,
                the last one first.
            attributes: Replace those of the same name.

        Raises:
            CaptureExists: If somebody is writing it, or something else stands there.
            ValueError: If it is of a later format.
            OSError: If it cannot be written.
        """
        path = folder / CAPTURE
        refuse_foreign(path)
        if not is_capture(path):
            return cls.create(folder, attributes)
        capture_attributes(path)  # of a later format: refused before anything is touched
        lock = Lock(path)
        try:
            store = cls(path, lock, capture_attributes(path))
            for name in reversed(record_names(path)):
                if record_step(name) > step:
                    store._drop(name)
            store.annotate(attributes)
        except BaseException:
            lock.release()
            raise
        return store

    @property
    def attributes(self) -> dict[str, Any]:
        """What is noted about the whole training; a copy."""
        return dict(self._attributes)

    @property
    def steps(self) -> list[int]:
        """The steps that have a record, ascending."""
        return [record_step(name) for name in record_names(self.path)]

    def write(self, step: int, groups: Mapping[str, xr.Dataset], *, replace: bool = False) -> None:
        """Adds the record of one step; when the call returns it is on the disk, whole.

        Args:
            step: ``global_step`` after the update.
            groups: Name -> numbers, booleans and texts; a coordinate ``step`` must be this step alone.
            replace: Whether a record of this step gives way. A process killed in between loses both.

        Raises:
            ValueError: If the step has a record, or a name or an array has no place in a store.
            OSError: If it cannot be written; all that was there stays.
        """
        name = record_name(step)
        check_step(dict(groups), step)
        files = encoded_groups(groups)
        there = os.path.lexists(self.path / name)
        if there and not replace:
            raise ValueError(f"Step {step} is in '{self.path}' already. Pass replace=True to replace it.")
        with self._scratch() as scratch:
            new, old, place = scratch / _NEW, scratch / name, self.path / name
            write_files(new, files)
            try:
                if there:
                    os.replace(place, old)
                move(new, place)
            except BaseException:
                _put_back(new, old, place)
                raise

    def annotate(self, attributes: Mapping[str, Any]) -> None:
        """Adds to the attributes of the whole training, replacing those of the same name.

        Raises:
            ValueError: If something has no place in JSON.
            OSError: If they cannot be written; those that were there stay.
        """
        self._replace_attributes({**self._attributes, **attributes, "kind": KIND, "format": FORMAT})

    def write_start(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps what the watched matrices were at the start, in place of what was kept before.

        Raises:
            OSError: If it cannot be written; what was kept before stays.
        """
        with self._scratch() as scratch:
            write_tensors(scratch / START, tensors)
            move(scratch / START, self.path / START)

    def read_start(self) -> dict[str, Tensor]:
        """What ``write_start`` kept; empty if nothing.

        Raises:
            ValueError: If it cannot be read.
        """
        return read_tensors(self.path / START)

    def read(self, step: int) -> dict[str, xr.Dataset]:
        """The record of one step, in memory.

        Raises:
            FileNotFoundError: If there is none, or a part of it is missing.
            ValueError: If it cannot be read.
        """
        return read_record(self.path / record_name(step))

    def close(self) -> None:
        """Lets another writer in; once is enough, twice does no harm."""
        self._lock.release()
        forget(self._owner)

    def __enter__(self) -> CaptureStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _replace_attributes(self, attributes: Mapping[str, Any]) -> None:
        content = encoded_attributes(attributes)
        with self._scratch() as scratch:
            write_files(scratch, {"attributes": content})
            move(scratch / "attributes", self.path / ".zattrs")
        self._attributes = capture_attributes(self.path)

    def _drop(self, name: str) -> None:
        """Removes a record; to every reader it is there whole or not at all."""
        with self._scratch() as scratch:
            os.replace(self.path / name, scratch / name)
            sync(self.path)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """A hidden folder that is gone afterwards, with what is left in it."""
        if not self._lock.held:
            raise ValueError(f"The capture store '{self.path}' is closed. Open it again with resume().")
        scratch = self.path / f"{PARTIAL}{self._owner}"
        remove(scratch)
        try:
            scratch.mkdir()
            yield scratch
        finally:
            remove(scratch)


def _put_back(new: Path, old: Path, place: Path) -> None:
    """Undoes what was done of replacing ``place`` by ``new``, which set aside ``old``."""
    if not new.exists():
        os.replace(place, new)
    if os.path.lexists(old):
        os.replace(old, place)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of any device as one safetensors file, on the disk when the call returns.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        save_file(_separate(tensors), path)
    except SafetensorError as error:
        raise OSError(f"'{path}' cannot be written ({error}).") from error
    sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What ``write_tensors`` wrote, on the CPU; empty if nothing is there.

    Raises:
        ValueError: If it cannot be read.
    """
    if not os.path.lexists(path):
        return {}
    try:
        if path.is_symlink() or not path.is_file():
            raise OSError("it is no plain file")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Expected the start of the training in '{path}', but it does not open ({error}). "
            "Remove it, and increments begin at the next captured step."
        ) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in memory that no two share, as safetensors asks."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        found[name] = tensor.clone() if shared else tensor
    return found
