"""What must not be disturbed: one writer at a time, and no signal in between."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

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
