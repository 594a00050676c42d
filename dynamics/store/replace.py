"""All outputs or none: files are made in a hidden folder inside their place and moved when all are complete.

A finished result takes the place of the one before: all of it, or nothing.

What is replaced is set aside first, and counts as replaced when the list of what was written is. Whatever stops
before that is undone: an exception at once, a killed process by the next one of this machine that comes along. What
another machine left is never undone: its process may be at work, and anybody can forge its name.

Which files in an output folder are results of ours: nothing else is ever replaced, moved or removed.

The folder may come from somebody else, with links and forged lists in it. So a name counts only if it is one that an
analysis writes, and only where no link lies between the output folder and the file. The list of what was written can
narrow that down, never widen it.

What must not be disturbed: one writer at a time, and no signal in between.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import signal
import socket
import stat
import threading
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path
from types import FrameType

from dynamics.store.arrays import read_file

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


PARTIAL = "partial-"
OLD = "old-"
_PLAN = "plan.json"
_WAS = "was"
#: Stages of this process. Its number alone does not tell: containers give each process the number 1.
_alive: set[str] = set()


def new_owner() -> str:
    """Return a name for one stage: host, machine, process, and something random for threads and processes."""
    owner = f"{socket.gethostname()}-{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
    _alive.add(owner)
    return owner


def forget(owner: str) -> None:
    """Take note that a stage is over."""
    _alive.discard(owner)


def replace_result(out: Path, partial: Path, owner: str) -> None:
    """Move everything from ``partial`` into ``out`` and remove what an earlier result has beyond it.

    Raises:
        OutputError: If something that no analysis wrote stands in the way.
        OSError: If a file cannot be moved; what was there is then as it was.
    """
    new = units(partial)
    assert all(is_result(name) for name in new), new
    refuse_foreign(out, new)
    stale = sorted(name for name in read_written(out).names - set(new) if stands_plainly(out, name))
    fresh = [name for name in new if not os.path.lexists(out / name)]
    old = out / STAGING / f"{OLD}{owner}"
    old.mkdir()
    try:
        (old / _PLAN).write_text(json.dumps(fresh), encoding="utf-8")
        for name in stale:
            if _set_aside(out / name, old / _WAS / name):
                _remove(out / name)
        for name in new:
            _set_aside(out / name, old / _WAS / name)
            _make_folders(out, name)
            os.replace(partial / name, out / name)
        write_written(out, new, owner, old)
    except BaseException:
        _undo(out, old, fresh)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _remove_empty_folders(out, stale)


def recover(out: Path) -> None:
    """Undo what killed processes of this machine left; leave alone what may still be at work."""
    commit = read_written(out).commit
    for old in _stages(out, OLD):
        if old.name.removeprefix(OLD) == commit:
            shutil.rmtree(old, ignore_errors=True)
        else:
            _undo(out, old, _fresh(old))
    for partial in _stages(out, PARTIAL):
        shutil.rmtree(partial, ignore_errors=True)


def interrupted_elsewhere(out: Path) -> list[str]:
    """Return the names of what other machines left of replacing the result in ``out``, or are at work on."""
    if not is_folder(out / STAGING):
        return []
    names = sorted(name for name in os.listdir(out / STAGING) if name.startswith(OLD))
    return [name for name in names if _process(name.removeprefix(OLD)) is None]


def set_aside(out: Path, name: str) -> Path | None:
    """Return where a store is that was moved and not yet replaced, ``None`` if nowhere."""
    if not is_folder(out / STAGING):
        return None
    stages = sorted(path for path in (out / STAGING).glob(f"{OLD}*") if is_folder(path))
    return next((path / _WAS / name for path in stages if stands_plainly(path, f"{_WAS}/{name}")), None)


def _stages(out: Path, prefix: str) -> Iterator[Path]:
    """Folders of this user, no links to some, whose process was of this machine and is gone."""
    for path in sorted((out / STAGING).glob(f"{prefix}*")):
        if is_folder_of_ours(path) and not _is_at_work(path.name.removeprefix(prefix)):
            yield path


def _set_aside(target: Path, place: Path) -> bool:
    """Keep what is at ``target`` at ``place``; tell whether there was something."""
    if not os.path.lexists(target):
        return False
    place.parent.mkdir(parents=True, exist_ok=True)
    if target.is_file():
        try:
            os.link(target, place)  # so that a reader finds the old file until the new one is there
            return True
        except OSError:
            pass  # no hard links here: a moment without the file has to do
    target.rename(place)
    return True


def _undo(out: Path, old: Path, fresh: list[str]) -> None:
    """Put back what was set aside, and remove what had nothing before it; results alone, and through no link."""
    for name in fresh:
        if stands_plainly(out, name):
            _remove(out / name)
    was = old / _WAS
    for name in units(was) if is_folder(was) else []:
        if is_result(name) and stands_plainly(was, name) and _make_folders(out, name):
            _remove(out / name)
            os.replace(was / name, out / name)
    _remove_empty_folders(out, fresh)
    shutil.rmtree(old, ignore_errors=True)


def _fresh(old: Path) -> list[str]:
    """Return what had nothing before it, so that undoing it is removing it; results alone."""
    try:
        names = json.loads(read_file(old / _PLAN))
    except (OSError, ValueError, RecursionError):
        return []  # killed before the plan was complete: nothing had been moved
    return [name for name in names if isinstance(name, str) and is_result(name)] if isinstance(names, list) else []


def _make_folders(out: Path, name: str) -> bool:
    """Make the folders that a result lies in; tell whether they are there, none of them a link."""
    for parent in reversed(Path(name).parents[:-1]):
        if not os.path.lexists(out / parent):
            (out / parent).mkdir()
        if not is_folder(out / parent):
            return False
    return True


def _remove(path: Path) -> None:
    if is_folder(path):
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty_folders(out: Path, names: list[str]) -> None:
    folders = {parent.as_posix() for name in names for parent in Path(name).parents if parent != Path()}
    for folder in sorted(folders, key=lambda folder: -folder.count("/")):
        if reached_plainly(out, folder) and is_folder(out / folder):
            with suppress(OSError):  # not empty
                (out / folder).rmdir()


def _is_at_work(owner: str) -> bool:
    """Tell whether a stage may be in use. Of another machine nothing is known, so it may."""
    process = _process(owner)
    if process is None:
        return True
    if process == os.getpid():
        return owner in _alive
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _process(owner: str) -> int | None:
    """Return the process number in the name of a stage; ``None`` if it is not of this machine."""
    parts = owner.rsplit("-", 3)
    if len(parts) < 4 or parts[1] != _machine() or not (parts[2].isascii() and parts[2].isdecimal()):
        return None
    return int(parts[2])


@cache
def _machine() -> str:
    """Return a name for this machine since it was started, and for this container on it.

    Host names are not enough: two nodes may both be called localhost, and process numbers of one say nothing of the
    other. Nobody who has not been on this machine since it was started can know it.
    """
    try:
        start = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        identity = (start, os.readlink("/proc/self/ns/pid"))
    except OSError:
        identity = (str(uuid.getnode()), socket.gethostname())
    return sha256("\n".join(identity).encode()).hexdigest()[:12]


#: Hidden folder inside the output folder: the list of what was written, the lock, and what is in the making.
STAGING = ".staging"
_LIST = "written.json"
#: A folder with this ending is one thing; of any other folder only the files are ours.
STORE_SUFFIX = ".zarr"
_FIGURES = "figures"
_PLAIN = r"(?!\.)[^/\\\0]+"
_RESULT = re.compile(
    rf"run\.yaml|analysis\.zarr|summary\.json|report\.html|rank_pattern(\.{_PLAIN})?\.json"
    rf"|{_FIGURES}/({_PLAIN}/)?{_PLAIN}\.svg"
)
_LIST_LIMIT = 2**24  # bytes; ours have a few thousand


class OutputError(OSError):
    """A result that cannot be written; the message is one line with path and remedy.

    >>> str(OutputError("The output folder 'x' cannot be written (Not a directory)."))
    "The output folder 'x' cannot be written (Not a directory)."
    """


@dataclass(frozen=True)
class Written:
    """What the last analysis wrote into an output folder.

    Args:
        names: Relative paths, with ``/``; all of them names that an analysis writes.
        commit: Who wrote it.
        listed: Whether there is a list; without one, a result store of ours says that the folder is ours.
    """

    names: frozenset[str] = frozenset()
    commit: str = ""
    listed: bool = False


def is_result(name: str) -> bool:
    """Tell whether an analysis writes a file, or a store, at this relative path.

    >>> is_result("figures/spectra.svg"), is_result("rank_pattern.imax.json"), is_result("analysis.zarr")
    (True, True, True)
    >>> is_result("figures/../notes.svg"), is_result("../summary.json"), is_result("capture.zarr")
    (False, False, False)
    """
    return bool(_RESULT.fullmatch(name))


def stands_plainly(folder: Path, name: str) -> bool:
    """Tell whether ``folder/name`` is a result of its kind, with no link on the way to it or in its place.

    Args:
        folder: Where the search begins; it may itself be a link.
        name: Relative path, with ``/``.
    """
    kind = stat.S_ISDIR if name.endswith(STORE_SUFFIX) else stat.S_ISREG
    return kind(_mode(folder / name)) and reached_plainly(folder, name)


def reached_plainly(folder: Path, name: str) -> bool:
    """Tell whether everything between ``folder`` and ``folder/name`` is a folder, none of it a link."""
    return all(is_folder(folder / parent) for parent in Path(name).parents if parent != Path())


def is_folder(path: Path) -> bool:
    """Tell whether a path is a folder, and no link to one."""
    return stat.S_ISDIR(_mode(path))


def is_folder_of_ours(path: Path) -> bool:
    """Tell whether a path is a folder, and no link to one, that belongs to this user."""
    return is_folder(path) and (not hasattr(os, "geteuid") or path.lstat().st_uid == os.geteuid())


def read_written(out: Path) -> Written:
    """Return what was written into ``out``; nothing if there is no list that can be read."""
    if not is_folder(out / STAGING):
        return Written()
    try:
        content = json.loads(read_file(out / STAGING / _LIST, _LIST_LIMIT))
        names = [name for name in content["names"] if isinstance(name, str) and is_result(name)]
        return Written(frozenset(names), str(content["commit"]), True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Written()


def write_written(out: Path, names: Iterable[str], commit: str, scratch: Path) -> None:
    """Replace the list, made in the folder ``scratch``; this is the moment at which a new result counts."""
    partial = scratch / _LIST
    partial.write_text(json.dumps({"commit": commit, "names": sorted(names)}), encoding="utf-8")
    os.replace(partial, out / STAGING / _LIST)


def units(folder: Path) -> list[str]:
    """Return the relative paths of the files in a folder, a store being one."""
    names = []
    for parent, folders, files in os.walk(folder):
        top = Path(parent)
        stores = [name for name in folders if top == folder and name.endswith(STORE_SUFFIX)]
        folders[:] = [name for name in folders if name not in stores]
        names += [(top / name).relative_to(folder).as_posix() for name in (*files, *stores)]
    return sorted(names)


def refuse_foreign(out: Path, names: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Refuse to replace what no analysis wrote, and to write through links.

    Args:
        out: The output folder.
        names: Relative paths that are about to be written.
        folders: Folders in it that files are about to be written into.

    Raises:
        OutputError: Names the first path at which something else stands.
    """
    staging = out / STAGING
    if os.path.lexists(staging) and not is_folder(staging):
        raise _foreign(staging)
    written = read_written(out)
    ours = not written.listed and _is_our_store(out / f"analysis{STORE_SUFFIX}")
    names = list(names)
    inner = {parent.as_posix() for name in names for parent in Path(name).parents if parent != Path()}
    for name in sorted({*folders, *inner}):
        if os.path.lexists(out / name) and not is_folder(out / name):
            raise _foreign(out / name)
    for name in sorted(names):
        if os.path.lexists(out / name) and not ((ours or name in written.names) and stands_plainly(out, name)):
            raise _foreign(out / name)


def _mode(path: Path) -> int:
    """Return what kind of thing is at a path, links not followed; 0 if nothing is."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def _foreign(path: Path) -> OutputError:
    return OutputError(
        f"'{path}' stands where a result must go, and no analysis wrote it. "
        "Move it away, or choose another folder with --out."
    )


def _is_our_store(path: Path) -> bool:
    """Whether a result's root attributes are there; other folders of that name are somebody's."""
    try:
        return "findings" in json.loads(read_file(path / ".zattrs"))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


try:
    import fcntl
except ImportError:  # Windows; there, two writers at once are told apart by their folders alone
    fcntl = None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file at ``path``, waiting for it; no lock where the file system has none.

    Raises:
        OSError: If it cannot be made, or is a link.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    try:
        if fcntl is not None:
            with suppress(OSError):  # some network file systems know no locks; a result without one is better than none
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Puts ^C and SIGTERM off until the block is over, where Python lets us: in the main thread.

    Raises:
        KeyboardInterrupt: After the block, if ^C came during it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None: a handler that Python did not set and could not put back.
    handlers = {number: handler for number, handler in handlers.items() if handler is not None}
    for number in handlers:
        signal.signal(number, remember)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)
