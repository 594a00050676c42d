"""Which files in an output folder are results of ours: nothing else is ever replaced or removed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

#: Hidden folder inside the output folder: the list of what was written, the lock, and what is in the making.
STAGING = ".staging"
_LIST = "written.json"
#: A folder with this ending is one thing; of any other folder only the files are ours.
STORE_SUFFIX = ".zarr"


class OutputError(OSError):
    """A result that cannot be written; the message is one line with path and remedy.

    >>> str(OutputError("The output folder 'x' cannot be written (Not a directory)."))
    "The output folder 'x' cannot be written (Not a directory)."
    """


@dataclass(frozen=True)
class Written:
    """What the last analysis wrote into an output folder.

    Args:
        names: Relative paths, with ``/``.
        commit: Who wrote it.
        listed: Whether there is a list; without one, a result store of ours says that the folder is ours.
    """

    names: frozenset[str] = frozenset()
    commit: str = ""
    listed: bool = False


def read_written(out: Path) -> Written:
    """What was written into ``out``; nothing if there is no list that can be read."""
    try:
        content = json.loads((out / STAGING / _LIST).read_text(encoding="utf-8"))
        names = [name for name in content["names"] if isinstance(name, str) and _stays_inside(name)]
        return Written(frozenset(names), str(content["commit"]), True)
    except (OSError, ValueError, KeyError, TypeError):
        return Written()


def write_written(out: Path, names: Iterable[str], commit: str, scratch: Path) -> None:
    """Replaces the list, made in the folder ``scratch``; this is the moment at which a new result counts."""
    partial = scratch / _LIST
    partial.write_text(json.dumps({"commit": commit, "names": sorted(names)}), encoding="utf-8")
    os.replace(partial, out / STAGING / _LIST)


def units(folder: Path) -> list[str]:
    """Relative paths of the files in a folder, a store being one."""
    found = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        stores = [name for name in folders if here == folder and name.endswith(STORE_SUFFIX)]
        folders[:] = [name for name in folders if name not in stores]
        found += [(here / name).relative_to(folder).as_posix() for name in (*files, *stores)]
    return sorted(found)


def refuse_foreign(out: Path, names: Iterable[str], folders: Iterable[str] = ()) -> None:
    """Refuses to replace what no analysis wrote.

    Args:
        out: The output folder.
        names: Relative paths that are about to be written.
        folders: Folders in it that files are about to be written into.

    Raises:
        OutputError: Names the first path at which something else stands.
    """
    written = read_written(out)
    ours = not written.listed and _is_our_store(out / f"analysis{STORE_SUFFIX}")
    names = list(names)
    inner = {parent.as_posix() for name in names for parent in Path(name).parents if parent != Path()}
    for name in sorted({*folders, *inner}):
        if os.path.lexists(out / name) and (not (out / name).is_dir() or (out / name).is_symlink()):
            raise _foreign(out / name)
    for name in sorted(names):
        path = out / name
        if os.path.lexists(path) and not ((ours or name in written.names) and _has_kind(path, name)):
            raise _foreign(path)


def _foreign(path: Path) -> OutputError:
    return OutputError(
        f"'{path}' stands where a result must go, and no analysis wrote it. "
        "Move it away, or choose another folder with --out."
    )


def _has_kind(path: Path, name: str) -> bool:
    return not path.is_symlink() and (path.is_dir() if name.endswith(STORE_SUFFIX) else path.is_file())


def _is_our_store(path: Path) -> bool:
    """Whether a result's root attributes are there; other folders of that name are somebody's."""
    try:
        return "findings" in json.loads((path / ".zattrs").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        return False


def _stays_inside(name: str) -> bool:
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts
