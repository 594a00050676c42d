"""All outputs or none: files are made in a hidden folder beside their place and renamed when complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_PARTIAL = ".partial-"
_OLD = ".old-"


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A folder whose entries replace those of the same name under ``out`` if the block completes.

    On an exception, ^C included, ``out`` keeps what it had. A process that is killed leaves a hidden folder behind,
    which the next call removes.

    Args:
        out: The output folder; made if it is not there.

    Raises:
        OSError: If ``out`` cannot be made or written.
    """
    out.mkdir(parents=True, exist_ok=True)
    _recover(out)
    partial = out / f"{_PARTIAL}{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        for entry in sorted(partial.iterdir()):
            _replace(entry, out / entry.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Writes one file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{_PARTIAL}{os.getpid()}-{path.name}")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def complete(path: Path) -> Path:
    """Where the last complete version of an output is: ``path``, unless a process was killed while replacing it."""
    if not path.exists():
        for old in path.parent.glob(f"{_OLD}*-{path.name}"):
            return old
    return path


def _replace(entry: Path, target: Path) -> None:
    if not target.is_dir():
        os.replace(entry, target)
        return
    # A folder that is not empty cannot be replaced in one call; _recover and complete() cover the gap.
    old = target.with_name(f"{_OLD}{os.getpid()}-{target.name}")
    target.rename(old)
    entry.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _recover(out: Path) -> None:
    """Undoes what killed processes left: half-written folders go, a result between two names gets its own back."""
    for partial in out.glob(f"{_PARTIAL}*"):
        if not _is_running(partial.name.removeprefix(_PARTIAL)):
            shutil.rmtree(partial, ignore_errors=True) if partial.is_dir() else partial.unlink(missing_ok=True)
    for old in out.glob(f"{_OLD}*"):
        pid, _, name = old.name.removeprefix(_OLD).partition("-")
        if _is_running(pid):
            continue
        if (out / name).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(out / name)


def _is_running(pid: str) -> bool:
    number = pid.partition("-")[0]
    if not number.isdecimal() or int(number) == os.getpid():
        return False
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
