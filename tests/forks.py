"""Processes that fork from that of the tests, which has imported everything already, and are killed or interrupted."""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess

from dynamics.store.record_folders import StoredRecords, record_folders, stored_records

ROUNDS = 20
SECONDS = 300


def forked(work: Callable[[], object]) -> int:
    """Return the identifier of a child process that does the work and ends.

    It ends after :data:`SECONDS` at the latest. Its exit status is that of ``SystemExit``, 0 after work that raises
    nothing, and 1 after an exception, which is written to stderr.
    """
    child = os.fork()
    if child:
        return child
    status = 1
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    try:
        work()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def finished(work: Callable[[], object]) -> CompletedProcess[str]:
    """Return how a child process ended that did the work, and what it wrote to its stdout and stderr."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as errors:

        def written() -> None:
            for number, file in ((1, out), (2, errors)):
                os.dup2(file.fileno(), number)
            sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, encoding="utf-8") for number in (1, 2))
            try:
                work()
            finally:
                sys.stdout.flush()

        status = os.waitstatus_to_exitcode(os.waitpid(forked(written), 0)[1])
        texts = []
        for file in (out, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return CompletedProcess([], status, *texts)


def killed_twenty_times(
    run: Path, train: Callable[[int, Callable[[int], object]], None], longest: float
) -> Iterator[tuple[list[int], StoredRecords | None]]:
    """Kill a training that records each step, resume it two steps back, as from a checkpoint, and so on.

    Each time the step in flight is lost, and no other: each record whose step was reported is there and whole.

    Args:
        run: The run folder.
        train: Records each step after the given one until it is killed, and reports the steps that are recorded.
        longest: Seconds from the last report that is awaited to the kill, at most.

    Returns:
        After each kill: the steps reported since the resumption, and what is recorded (None before the first step).
    """
    moments, last, count = random.Random(0), 0, 0
    for _ in range(ROUNDS):
        after = max(0, last - 2)
        receiver, sender = os.pipe()
        child = forked(lambda after=after, pipe=sender: train(after, lambda step: os.write(pipe, f"{step}\n".encode())))
        os.close(sender)
        with os.fdopen(receiver) as reports:
            lines = [reports.readline() for _ in range(moments.randint(0, 4))]
            time.sleep(moments.uniform(0, longest))
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
            reported = [int(line) for line in lines + reports.readlines()]
        folders = record_folders(run)
        left = stored_records(folders) if folders else None
        steps = list(left.records) if left else []
        finished = reported[-1] if reported else after
        assert left is None or left.broken == {}
        assert reported == list(range(after + 1, finished + 1))
        assert steps == list(range(1, len(steps) + 1))
        # A record may be whole when its step has not been reported yet; records that resuming drops go one by one.
        assert finished <= len(steps) <= finished + (1 if reported else 2)
        yield reported, left
        last, count = max(steps, default=0), count + len(reported)
    assert count >= ROUNDS
