"""Files that are on the disk, not only in its cache, when the call returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files below ``folder``, then brings them and every folder they made to the disk.

    All are written before the first is synced, so that the disk can take them together.

    Args:
        folder: Where; made if it is not there.
        files: Relative path, with ``/`` -> content.

    Raises:
        OSError: If one cannot be written; what was written until then stays.
    """
    folders = {folder} | {parent for name in files for parent in (folder / name).parents if folder in parent.parents}
    for each in sorted(folders):
        each.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name in files:
        sync(folder / name)
    for each in folders:
        sync(each)


def move(source: Path, target: Path) -> None:
    """Renames within one file system, a file over another one; lasting when the call returns.

    Raises:
        OSError: If it cannot be renamed.
    """
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Brings a file, or the list of names in a folder, to the disk.

    Raises:
        OSError: If the disk did not take it.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders, and keeps their names without being asked
    descriptor = os.open(path, os.O_RDWR if not folder else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
