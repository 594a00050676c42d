"""All outputs or none: files are made in a hidden folder inside their place and moved when all are complete."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dynamics.store.locking import locked, uninterrupted
from dynamics.store.commit import PARTIAL, forget, new_owner, recover, replace_result, set_aside
from dynamics.store.ownership import STAGING, OutputError, refuse_foreign

_LOCK = "lock"
_NO_ROOM = "Make room, or choose another folder with --out."
_FORBIDDEN = "Make it writable, or choose another folder with --out."
_GONE = "Its file system went away: run again when it is back, or choose another folder with --out."
#: Number of a system's error -> what to do about it.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT), _GONE),
}


@contextmanager
def staged(out: Path, names: Iterable[str] = (), folders: Iterable[str] = ()) -> Iterator[Path]:
    """Make a folder whose content becomes the result in ``out`` if the block completes.

    Files are replaced one by one, a ``*.zarr`` as one. What an earlier result has beyond the new one is removed; what
    no analysis wrote is never touched, and no link below ``out`` is followed. On an exception, ^C included, ``out``
    keeps what it had. A process that is killed leaves its stage behind, which the next call on this machine removes.

    Args:
        out: The output folder; made if it is not there, removed again if nothing came of it.
        names: Relative paths that will be written, as far as known: checked before the block begins.
        folders: Folders that files will be written into, likewise.

    Raises:
        OutputError: If ``out`` cannot be made or written, or something that no analysis wrote stands in the way.
        KeyboardInterrupt: If ^C came while the result took its place; the message says that it did.
    """
    made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    owner = new_owner()
    partial = out / STAGING / f"{PARTIAL}{owner}"
    try:
        with _output_errors(f"The output folder '{out}' cannot be written (", ").", "Choose another with --out."):
            (out / STAGING).mkdir(parents=True, exist_ok=True)
            refuse_foreign(out, ())
            if any((out / STAGING).glob("*-*")):
                with locked(out / STAGING / _LOCK), uninterrupted():
                    recover(out)
            refuse_foreign(out, names, folders)
            partial.mkdir()
        yield partial
        with writing(out), locked(out / STAGING / _LOCK):
            try:
                with uninterrupted():
                    recover(out)
                    replace_result(out, partial, owner)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the new result is complete and in its place") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        forget(owner)
        _remove_if_empty([out / STAGING, *made])


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn errors of the system into one line that says which output, and what to do.

    Raises:
        OutputError: In place of any other ``OSError``.
    """
    with _output_errors("", f" while writing '{out}'; an earlier result is as it was."):
        yield


def write_text(path: Path, text: str) -> None:
    """Writes one file of a stage, its folder with it; what is no Unicode (half a surrogate pair) is escaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def complete(path: Path) -> Path:
    """Return where the last complete store is: ``path``, unless a process was killed while replacing it."""
    return path if os.path.lexists(path) else set_aside(path.parent, path.name) or path


@contextmanager
def _output_errors(before: str, after: str, remedy: str = "") -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        number = error.errno or 0  # an error that Python raised itself has none
        reason = os.strerror(number) if number in errno.errorcode else str(error)
        remedy = remedy or _REMEDIES.get(number, "Check the folder, or choose another with --out.")
        raise OutputError(f"{before}{reason}{after} {remedy}") from error


def _remove_if_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return  # not empty, so in use; or never made
