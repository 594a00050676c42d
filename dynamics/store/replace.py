"""A new result takes the place of the one before: all of it, or nothing.

A result is one folder, ``OUT/analysis/``. It is made whole in a hidden folder beside it. Then ``analysis`` becomes
``analysis.previous``, the new folder becomes ``analysis``, and the previous one is removed. A process that is killed in
between leaves the result before or the new one, in one of the two places; readers know both, and the next analysis
repairs it.

The output folder may come from somebody else, with links and forged names in it. So a folder is removed only if all
that it holds are regular files of this user under names that an analysis writes, and no link is followed. A folder that
holds anything else is left, and named.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from dynamics.findings import Finding
from dynamics.store.disk import is_folder, lock, read_file

ANALYSIS = "analysis"
PREVIOUS = "analysis.previous"
RESULT = "analysis.zarr"
#: Hidden folders: results in the making, and earlier ones that are being removed.
_STAGE = ".analysis-"
_PLAIN = r"(?!\.)[^/\\\0]+"
_RESULT = re.compile(
    rf"run\.yaml|summary\.json|report\.html|findings\.sarif"
    rf"|(rank_pattern(_by_effect)?|checkpoint_choice)(\.{_PLAIN})?\.json"
    rf"|figures/({_PLAIN}/)?{_PLAIN}\.svg"
    rf"|analysis\.zarr/({_PLAIN}/)*(\.z(group|array|attrs|metadata)|[0-9]+(\.[0-9]+)*)"
)
_NO_ROOM = "Make room, or choose another folder with --out."
_FORBIDDEN = "Make it writable, or choose another folder with --out."
_GONE = "Its file system went away: run again when it is back, or choose another folder with --out."
#: Number of a system's error → what to do about it.
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), _NO_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _FORBIDDEN),
    **dict.fromkeys((errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.ETIMEDOUT), _GONE),
}


class OutputError(OSError):
    """A result that cannot be written; the message is one line with path and remedy.

    >>> str(OutputError("The output folder 'x' cannot be written (Not a directory)."))
    "The output folder 'x' cannot be written (Not a directory)."
    """


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """Make a folder whose content becomes ``out/analysis`` if the block completes.

    On an exception, ^C included, ``out`` keeps what it had. A process that is killed leaves its hidden folder behind,
    which the next call removes.

    Args:
        out: The output folder; made if it is not there, removed again if nothing came of it.

    Raises:
        OutputError: If ``out`` cannot be made or written, or something that no analysis wrote stands in the way.
        KeyboardInterrupt: If ^C came while the result took its place; the message says that it did.
    """
    made = [folder for folder in (out, *out.parents) if not os.path.lexists(folder)]
    stage = out / f"{_STAGE}{secrets.token_hex(8)}"
    descriptor = None
    try:
        with _output_errors(f"The output folder '{out}' cannot be written (", ").", "Choose another with --out."):
            out.mkdir(parents=True, exist_ok=True)
            with _locked(out):
                with uninterrupted():
                    _repair(out)
                _refuse_foreign(out)
                stage.mkdir()
                descriptor = _hold(stage)
        yield stage
        with writing(out), _locked(out):
            strange = first_foreign(stage)
            assert strange is None, strange
            try:
                with uninterrupted():
                    _repair(out)
                    _refuse_foreign(out)
                    _replace(out, stage)
            except KeyboardInterrupt:
                raise KeyboardInterrupt("the new result is complete and in its place") from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        if descriptor is not None:
            os.close(descriptor)
        _remove_if_empty(made)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn errors of the system into one line that says which output, and what to do.

    Raises:
        OutputError: In place of any other ``OSError``.
    """
    with _output_errors("", f" while writing '{out}'; an earlier result is as it was."):
        yield


def write_text(path: Path, text: str) -> None:
    """Write one file of a stage, its folder with it; what is not Unicode (half a surrogate pair) is escaped."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def is_result(name: str) -> bool:
    """Tell whether an analysis writes a file at this path, relative to ``analysis/``.

    >>> is_result("figures/spectra.svg"), is_result("rank_pattern.imax.json"), is_result("analysis.zarr/update/.zgroup")
    (True, True, True)
    >>> is_result("figures/../notes.svg"), is_result("../summary.json"), is_result("notes.txt")
    (False, False, False)
    """
    return bool(_RESULT.fullmatch(name))


def holds_result(folder: Path) -> bool:
    """Tell whether a result is in a folder, neither of them a link: its root attributes say so."""
    path = folder / RESULT
    if not (is_folder(folder) and is_folder(path)):
        return False
    try:
        return "findings" in json.loads(read_file(path / ".zattrs", 2**28))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def first_foreign(folder: Path) -> Path | None:
    """Return the first thing in a folder that is not a regular file of this user under a name of a result."""
    for parent, folders, files in os.walk(folder):
        inner = parent[len(os.fspath(folder)) :].replace(os.sep, "/").lstrip("/")
        for name in sorted((*folders, *files)):
            status = os.lstat(os.path.join(parent, name))
            path = f"{inner}/{name}" if inner else name
            plain = stat.S_ISDIR(status.st_mode) or (stat.S_ISREG(status.st_mode) and is_result(path))
            if not plain or (hasattr(os, "geteuid") and status.st_uid != os.geteuid()):
                return Path(parent, name)
    return None


def notes_before(out: Path) -> list[Finding]:
    """Return findings about what lies in an output folder already, and will lie there beside or after a new result."""
    findings = []
    names = sorted(os.listdir(out)) if is_folder(out) else []
    first = [name for name in names if name == RESULT or name == "figures" or is_result(name)]
    if holds_result(out):
        findings.append(
            Finding(
                "OD602",
                f"The folder also holds a result of an earlier version, which nothing reads any more: "
                f"{', '.join(first[:6])}{' and more' if len(first) > 6 else ''}. The new one is in {ANALYSIS}/.",
                "Remove those files when they are not needed any more.",
                evidence={"names": first},
            )
        )
    for folder in (out / ANALYSIS, out / PREVIOUS):
        if is_folder(folder) and (strange := first_foreign(folder)) is not None:
            name = strange.relative_to(folder).as_posix()
            findings.append(
                Finding(
                    "OD603",
                    f"The result before this one is kept in {PREVIOUS}/: '{name}' in it is not one of its files.",
                    f"Move '{name}' to another place, and remove {PREVIOUS}/.",
                    file=f"{PREVIOUS}/{name}",
                )
            )
    return findings


def _replace(out: Path, stage: Path) -> None:
    """Put a complete stage in the place of the result; where that fails, the result is as it was."""
    analysis, previous = out / ANALYSIS, out / PREVIOUS
    replaces = is_folder(analysis)
    if replaces:
        os.rename(analysis, previous)
    try:
        os.rename(stage, analysis)
    except BaseException:
        if replaces:
            os.rename(previous, analysis)
        raise
    if replaces and first_foreign(previous) is None:
        with suppress(OSError):  # the new result counts; the next analysis tries again
            _remove(out, previous)


def _repair(out: Path) -> None:
    """Finish or undo what killed processes left; leave alone what may still be at work, and what is not ours."""
    analysis, previous = out / ANALYSIS, out / PREVIOUS
    if holds_result(previous) and first_foreign(previous) is None:
        if os.path.lexists(analysis):
            _remove(out, previous)
        else:
            os.rename(previous, analysis)
    for stage in sorted(out.glob(f"{_STAGE}*")):
        if is_folder(stage) and (descriptor := _hold(stage)) is not None:
            with suppress(OSError):
                if first_foreign(stage) is None:
                    shutil.rmtree(stage)
            os.close(descriptor)


def _remove(out: Path, folder: Path) -> None:
    """Remove a folder of results under a hidden name, so that no reader finds half of it."""
    hidden = out / f"{_STAGE}{secrets.token_hex(8)}"
    os.rename(folder, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _refuse_foreign(out: Path) -> None:
    """Refuse to move what no analysis wrote.

    Raises:
        OutputError: Names it.
    """
    analysis, previous = out / ANALYSIS, out / PREVIOUS
    if os.path.lexists(analysis) and not holds_result(analysis):
        what = "is a link, which is not followed" if analysis.is_symlink() else "was not written by an analysis"
        raise OutputError(
            f"'{analysis}' stands where the result must go, and {what}. "
            "Move it away, or choose another folder with --out."
        )
    if os.path.lexists(analysis) and os.path.lexists(previous):
        strange = first_foreign(previous) if is_folder(previous) else None
        raise OutputError(
            f"'{strange or previous}' is not a result file of this user, and '{PREVIOUS}' is needed for the result "
            "that is replaced. Move it away, or choose another folder with --out."
        )


def _hold(stage: Path) -> int | None:
    """Open a stage and lock it: whoever holds it is at work on it. ``None`` if somebody else is, or may be."""
    if os.name == "nt":
        return None  # Windows opens no folders; what is left over there stays
    descriptor = os.open(stage, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_DIRECTORY", 0))
    if lock(descriptor, wait=False) is True:
        return descriptor
    os.close(descriptor)
    return None


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold the output folder, waiting for it; where the file system has no locks, renaming tells two writers apart."""
    if os.name == "nt":
        yield
        return
    descriptor = os.open(out, os.O_RDONLY)
    try:
        lock(descriptor, wait=True)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put ^C and SIGTERM off until the block is over, where Python lets us: in the main thread.

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
