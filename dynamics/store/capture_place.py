"""Which folder a capture may take, and who is at work in it."""

from __future__ import annotations

import os
import shutil
import weakref
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from dynamics.store.arrays import GROUP
from dynamics.store.capture import is_capture, record_names, record_step
from dynamics.store.durable import sync

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
