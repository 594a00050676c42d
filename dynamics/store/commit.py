"""A finished result takes the place of the one before: all of it, or nothing.

What is replaced is set aside first, and counts as replaced when the list of what was written is. Whatever stops
before that is undone: an exception at once, a killed process by the next one of this machine that comes along. What
another machine left is never undone: its process may be at work, and anybody can forge its name.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from dynamics.store.arrays import read_file
from dynamics.store.ownership import (
    STAGING,
    is_folder,
    is_folder_of_ours,
    is_result,
    reached_plainly,
    read_written,
    refuse_foreign,
    stands_plainly,
    units,
    write_written,
)

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
