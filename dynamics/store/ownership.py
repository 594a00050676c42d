"""Which files in an output folder are results of ours: nothing else is ever replaced, moved or removed.

The folder may come from somebody else, with links and forged lists in it. So a name counts only if it is one that an
analysis writes, and only where no link lies between the output folder and the file. The list of what was written can
narrow that down, never widen it.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dynamics.store.arrays import read_file

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
