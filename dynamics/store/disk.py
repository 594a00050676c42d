"""Plain files: read without following links, written whole or not at all, on the disk when the call returns."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from dynamics.text import encodable

try:
    import fcntl
except ImportError:  # Windows; there, nothing keeps two writers apart
    fcntl = None

#: What the name of a file begins with until the file is complete.
PARTIAL = ".partial-"
_JSON_LIMIT = 2**24  # bytes; ours have a few thousand


def read_file(path: Path, limit: int = _JSON_LIMIT) -> bytes:
    """Return the content of a regular file that is no link and no longer than ``limit`` bytes.

    Raises:
        OSError: If it is not there or cannot be read.
        ValueError: If it is something else.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ValueError(f"'{path.name}' is a link, which is not followed") from error
        raise
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
        os.close(descriptor)
        raise ValueError(f"'{path.name}' is not a regular file of at most {limit} bytes")
    with open(descriptor, "rb", buffering=0) as file:
        return file.readall()


def read_json_file(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; text encodable, no number that is not finite.

    Raises:
        OSError: If it is not there or cannot be read.
        ValueError: If it holds anything else.
    """
    where = f"'{path.parent.name}/{path.name}'"
    content = parsed_json(read_file(path), where)
    if not isinstance(content, dict):
        raise ValueError(f"{where} is not a JSON object")
    return content


def parsed_json(text: str | bytes, where: str) -> Any:
    """Return the content of JSON text; text encodable, ``None`` in place of numbers that are not finite.

    Raises:
        ValueError: Names the text as ``where``.
    """
    try:
        return _finite(encodable(json.loads(text, parse_constant=lambda _: None)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is not valid JSON ({error})") from error


def encoded_json(content: Mapping[Any, Any], *, indent: int | None = None) -> str:
    """Return strict JSON: numbers that are not finite are null, arrays are lists.

    Raises:
        ValueError: If JSON cannot hold something.
    """
    with suppress(TypeError, ValueError, RecursionError):  # what is plain already need not be looked through
        text = json.dumps(content, allow_nan=False, indent=indent)
        if "\\ud" not in text:  # no half of a pair of code points
            return text
    try:
        return json.dumps(_finite(encodable(content)), allow_nan=False, indent=indent)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"Expected attributes that JSON can hold ({error}). Turn them into text first.") from error


def _finite(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return _finite(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(content) for key, content in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give the block a hidden name beside ``path`` to write a file under; then sync it, and rename it to ``path``.

    One ``fsync``. A process that is killed leaves the old file or the new one, and at most a file whose name begins
    with ``PARTIAL``.

    Raises:
        OSError: If it cannot be written; the old file is then as it was.
    """
    partial = path.parent / f"{PARTIAL}{secrets.token_hex(8)}"
    try:
        yield partial
        with open(partial, "r+b", buffering=0) as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise


def write_file(path: Path, content: bytes) -> None:
    """Write a file as :func:`replacing` does.

    Raises:
        OSError: If it cannot be written; the old file is then as it was.
    """
    with replacing(path) as partial:
        partial.write_bytes(content)


def sync_folder(path: Path) -> None:
    """Bring the list of names in a folder to the disk, where the system can.

    Raises:
        OSError: If the disk did not take it.
    """
    if os.name == "nt":
        return  # Windows opens no folders, and keeps their names without being asked
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, wait: bool) -> bool | None:
    """Lock an open file or folder for this process.

    Returns:
        Whether it is locked now; ``None`` where the file system has no locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def mode(path: Path) -> int:
    """Return what kind of thing is at a path, links not followed; 0 if nothing is."""
    try:
        return path.lstat().st_mode
    except OSError:
        return 0


def is_folder(path: Path) -> bool:
    """Tell whether a path is a folder, and not a link to one."""
    return stat.S_ISDIR(mode(path))
