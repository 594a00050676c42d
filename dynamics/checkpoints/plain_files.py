"""Opening files that may be anything: absent, a pointer text, a pipe, forbidden, not JSON."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.text import first_line

_LFS_HEAD = b"version https://git-lfs.github.com/spec/"
_LFS_REMEDY = "Run `git lfs pull` where the files were cloned, then copy the real file."
#: Configurations and training states are small; anything larger is not one of them.
_JSON_LIMIT = 256 * 2**20
#: Objects, lists and values beyond which a JSON file takes more memory than its text by far: a log has one object an
#: entry, so that this is a training of a million entries of ten numbers.
_MOST_OBJECTS = 1_000_000
_MOST_VALUES = 10_000_000


def read_start(path: Path, code: str, count: int = 64) -> tuple[int, bytes]:
    """Size and first bytes of a regular file that is not a Git-LFS pointer.

    Args:
        path: The file; links are followed.
        code: Code of the finding when it cannot be read (a pointer is always ``OD107``).
        count: How many bytes to return.

    Raises:
        UnreadableFile: If it is absent, no regular file, forbidden, empty or a Git-LFS pointer.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile(code, "It is not a regular file.", "Put the file itself there.")
        with path.open("rb") as file:
            start = file.read(max(count, len(_LFS_HEAD)))
    except FileNotFoundError:
        raise UnreadableFile(code, "The file is not there.", "Copy it again.") from None
    except PermissionError:
        raise UnreadableFile(code, "It may not be read.", "Give yourself read permission (chmod u+r).") from None
    except UnreadableFile:
        raise
    except OSError as error:
        raise UnreadableFile(code, f"It cannot be read: {first_line(error)}.", "Copy it again.") from error
    if status.st_size == 0:
        raise UnreadableFile(code, "It is empty (zero bytes).", "Save or copy it again.")
    if start.startswith(_LFS_HEAD):
        problem = f"It is a Git-LFS pointer ({status.st_size} bytes of text), not the file itself."
        raise UnreadableFile("OD107", problem, _LFS_REMEDY)
    return status.st_size, start[:count]


def read_text(path: Path, code: str) -> str:
    """The text of a JSON file, not parsed; a byte-order mark is left out.

    Raises:
        UnreadableFile: With ``code`` if it is too large, not UTF-8 or cannot be read; ``OD107`` for a Git-LFS pointer.
    """
    size, _ = read_start(path, code)
    if size > _JSON_LIMIT:
        raise UnreadableFile(code, f"It has {size} bytes: too large for a JSON file of its kind.", "Check the file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except ValueError as error:
        raise UnreadableFile(code, f"It is not valid JSON: {first_line(error)}.", "Save or copy it again.") from error
    except OSError as error:
        raise UnreadableFile(code, f"It cannot be read: {first_line(error)}.", "Copy it again.") from error
    # Counted before it is parsed; signs within texts count too, of which a log has few.
    objects, values = text.count("{") + text.count("["), text.count(",")
    if objects > _MOST_OBJECTS or values > _MOST_VALUES:
        problem = (
            f"It has about {objects:,} objects and lists and {values:,} values; expected at most {_MOST_OBJECTS:,} and "
            f"{_MOST_VALUES:,}."
        )
        raise UnreadableFile(code, problem, "Check the file.")
    return text


def read_json(path: Path, code: str) -> dict[str, Any]:
    """A JSON object from a file; bare ``NaN`` and ``Infinity``, as Python writes them, are accepted.

    Raises:
        UnreadableFile: With ``code`` if it is not a JSON object, ``OD107`` if it is a Git-LFS pointer.
    """
    text = read_text(path, code)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile(code, f"It is not valid JSON: {first_line(error)}.", "Save or copy it again.") from error
    if not isinstance(content, dict):
        problem = f"Expected a JSON object, got {type(content).__name__}."
        raise UnreadableFile(code, problem, "Save or copy it again.")
    return content
