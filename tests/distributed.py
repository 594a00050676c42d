"""Two processes on this machine that talk by gloo, for tests of what data parallelism does."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

import torch.distributed as dist

RANKS = 2


class Ranks:
    """Two processes in one gloo group; each call runs a function in both and gives what they return, by rank.

    They start with the first call and serve all later ones, since starting takes seconds.

    Args:
        timeout: Seconds for one call. After a failure the processes are replaced by new ones.
    """

    def __init__(self, timeout: float = 60.0) -> None:
        self.timeout = timeout
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __call__(self, function: Callable[..., Any], *arguments: Any, **named: Any) -> list[Any]:
        """``function(*arguments, **named)`` of rank 0 and 1; the function stands at the top level of a module.

        Raises:
            RuntimeError: With the traceback of the rank that raised first, or died.
            TimeoutError: If one of them has not returned in time.
        """
        self._start()
        try:
            for pipe in self._pipes:
                pipe.send((function, arguments, named))
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
        self._processes, self._pipes = [], []

    def _start(self) -> None:
        if self._processes:
            return
        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in range(RANKS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, port, self.timeout, theirs), daemon=True)
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
                results[rank] = _received(pipe, name, rank)
        return [results[rank] for rank in range(RANKS)]


def _received(pipe: Any, name: str, rank: int) -> Any:
    try:
        trace, result = pipe.recv()
    except (EOFError, ConnectionResetError) as error:
        raise RuntimeError(f"The process of rank {rank} died in {name}.") from error
    if trace:
        raise RuntimeError(f"{name} failed on rank {rank}:\n{trace}")
    return result


def _serve(rank: int, port: int, timeout: float, pipe: Connection) -> None:
    """What a process does: functions in, results or tracebacks out, until the pipe closes."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", timeout=timedelta(seconds=timeout))
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


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
