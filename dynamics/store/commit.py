"""A finished result takes the place of the one before: all of it, or nothing.

What is replaced is set aside first, and counts as replaced when the list of what was written is. Whatever stops
before that is undone: an exception at once, a killed process by the next one that comes along.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
from pathlib import Path

from dynamics.store.ownership import STAGING, read_written, refuse_foreign, units, write_written

PARTIAL = "partial-"
OLD = "old-"
_PLAN = "plan.json"
#: Stages of this process. Its number alone does not tell: containers give each process the number 1.
_alive: set[str] = set()


def new_owner() -> str:
    """A name for one stage: host, process, and something random for threads and processes of one number."""
    owner = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
    _alive.add(owner)
    return owner


def forget(owner: str) -> None:
    """The stage is over."""
    _alive.discard(owner)


def replace_result(out: Path, partial: Path, owner: str) -> None:
    """Moves everything from ``partial`` into ``out`` and removes what an earlier result has beyond it.

    Raises:
        OutputError: If something that no analysis wrote stands in the way.
        OSError: If a file cannot be moved; what was there is then as it was.
    """
    new = units(partial)
    refuse_foreign(out, new)
    stale = sorted(read_written(out).names - set(new))
    old = out / STAGING / f"{OLD}{owner}"
    old.mkdir()
    try:
        fresh = [name for name in new if not os.path.lexists(out / name)]
        (old / _PLAN).write_text(json.dumps(fresh), encoding="utf-8")
        for name in stale:
            if _set_aside(out / name, old / "was" / name):
                _remove(out / name)
        for name in new:
            _set_aside(out / name, old / "was" / name)
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / name, out / name)
        write_written(out, new, owner, old)
    except BaseException:
        _undo(out, old)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _remove_empty_folders(out, stale)


def recover(out: Path) -> None:
    """Undoes what killed processes of this host left; what may still be at work is left alone."""
    commit = read_written(out).commit
    for old in (out / STAGING).glob(f"{OLD}*"):
        owner = old.name.removeprefix(OLD)
        if not _is_at_work(owner):
            if owner == commit:
                shutil.rmtree(old, ignore_errors=True)
            else:
                _undo(out, old)
    for partial in (out / STAGING).glob(f"{PARTIAL}*"):
        if not _is_at_work(partial.name.removeprefix(PARTIAL)):
            shutil.rmtree(partial, ignore_errors=True)


def set_aside_by_others(path: Path) -> Path | None:
    """Where something is that was moved and not yet replaced, if anywhere."""
    return next(iter((path.parent / STAGING).glob(f"{OLD}*/was/{path.name}")), None)


def _set_aside(target: Path, place: Path) -> bool:
    """Keeps what is at ``target`` at ``place``; whether there was something."""
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


def _undo(out: Path, old: Path) -> None:
    fresh, was = _fresh(old), old / "was"
    for name in fresh:
        _remove(out / name)
    for name in units(was):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        _remove(out / name)
        os.replace(was / name, out / name)
    _remove_empty_folders(out, fresh)
    shutil.rmtree(old, ignore_errors=True)


def _fresh(old: Path) -> list[str]:
    """What had nothing before it, so that undoing it is removing it."""
    try:
        return json.loads((old / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []  # killed before the plan was whole: nothing had been moved


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _remove_empty_folders(out: Path, names: list[str]) -> None:
    folders = {parent for name in names for parent in Path(name).parents if parent != Path()}
    for folder in sorted(folders, key=lambda folder: -len(folder.parts)):
        if (out / folder).is_dir() and not any((out / folder).iterdir()):
            (out / folder).rmdir()


def _is_at_work(owner: str) -> bool:
    """Whether a stage may be in use. Of another host nothing is known, so it is."""
    host, _, rest = owner.rpartition("-")[0].rpartition("-")
    if host != socket.gethostname() or not rest.isdecimal():
        return True
    if int(rest) == os.getpid():
        return owner in _alive
    try:
        os.kill(int(rest), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
