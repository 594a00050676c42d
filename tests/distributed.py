"""Two processes on this machine that talk by gloo, for tests of what data parallelism does."""

from __future__ import annotations

import faulthandler
import gc
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

RANKS = 2
#: Imported before the processes are forked. None of these starts a thread, as a fork needs.
_PRELOADED = ["torch.distributed.fsdp", "transformers.trainer", "peft", __name__]
#: Characters of what a process wrote to its standard error that a failure shows.
_SHOWN = 12_000


class Ranks:
    """Two processes in one gloo group; each call runs a function in both and gives what they return, by rank.

    They start with the first call and serve all later ones, since starting takes seconds. They meet in a store that
    this process opens on a port that the system chooses, and keeps open: a port that is free now and is taken a moment
    later would end them. Both talk over the loopback interface, whatever the name of the host stands for.

    Args:
        timeout: Seconds for one call. After a failure the processes are replaced by new ones.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._store: TCPStore | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """``function(*arguments, **named)`` of rank 0 and 1; the function stands at the top level of a module.

        Raises:
            RuntimeError: With the traceback of the rank that raised first, or how it died and what it wrote last.
            TimeoutError: If one of them has not returned in time.
        """
        self._start()
        try:
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send((function, arguments, named))
                except OSError as error:
                    raise self._death(function.__name__, rank) from error
            return self._results(function.__name__)
        except BaseException:
            self.close()  # the other one may wait for ever
            raise

    def close(self) -> None:
        """Ends the processes."""
        for process in self._processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._store, self._folder = [], [], None, None

    def _start(self) -> None:
        if self._processes:
            return
        context = multiprocessing.get_context("forkserver")  # imports once for all processes
        context.set_forkserver_preload(_PRELOADED)
        limit = timedelta(seconds=self.timeout)
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=limit)
        self._folder = tempfile.TemporaryDirectory()
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            arguments = (rank, self._store.port, self.timeout, theirs, self._errors_of(rank))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()  # so that its death is seen as the end of the pipe
            self._processes.append(process)
            self._pipes.append(ours)

    def _results(self, name: str) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < RANKS:
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = wait(waiting, self.timeout)
            if not ready:
                late = [rank for rank in range(RANKS) if rank not in results]
                raise TimeoutError(f"{name} did not return within {self.timeout:g} s on ranks {late}.")
            for pipe in ready:
                rank = self._pipes.index(pipe)  # pyright: ignore[reportArgumentType]
                results[rank] = self._received(rank, name)
        return [results[rank] for rank in range(RANKS)]

    def _received(self, rank: int, name: str) -> Any:
        try:
            trace, result = self._pipes[rank].recv()
        except (EOFError, ConnectionResetError) as error:
            raise self._death(name, rank) from error
        if trace:
            raise RuntimeError(f"{name} failed on rank {rank}:\n{trace}")
        return result

    def _death(self, name: str, rank: int) -> RuntimeError:
        """What there is to say of a process that has ended by itself."""
        process = self._processes[rank]
        process.join(10)
        code = process.exitcode
        how = "with an unknown status" if code is None else f"with status {code}"
        if code is not None and code < 0:
            how = f"by {signal.Signals(-code).name}"
        try:
            written = Path(self._errors_of(rank)).read_text(errors="replace")
        except OSError:
            written = ""
        return RuntimeError(f"The process of rank {rank} died {how} in {name}. It wrote last:\n{written[-_SHOWN:]}")

    def _errors_of(self, rank: int) -> str:
        assert self._folder is not None
        return os.path.join(self._folder.name, f"rank-{rank}.txt")


def _serve(rank: int, port: int, timeout: float, pipe: Connection, errors: str) -> None:
    """What a process does: functions in, results or tracebacks out, until the pipe closes.

    What it writes to its standard error, be it from C++, goes to a file.
    """
    with open(errors, "wb", buffering=0) as file:
        os.dup2(file.fileno(), sys.stderr.fileno() if sys.stderr is not None else 2)
    faulthandler.enable()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": _loopback()}
    limit = timedelta(seconds=timeout)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=limit)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=RANKS, timeout=limit)
    gc.freeze()  # what the imports made stays: a test that collects at each gather would walk it hundreds of times
    while True:
        try:
            function, arguments, named = pipe.recv()
        except EOFError:
            return
        try:
            answer = ("", function(*arguments, **named))
        except Exception:
            answer = (traceback.format_exc(), None)
        pipe.send(answer)


def _loopback() -> str:
    """Name of the loopback interface: lo on Linux, lo0 on macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), names[0])
