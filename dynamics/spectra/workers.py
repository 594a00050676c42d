"""Threads that work side by side, one core each.

Small decompositions gain nothing from threads of their own, and a BLAS that starts some inside every worker makes them
wait for each other. Results do not depend on the number of workers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def single_threaded(threads: int = 1) -> Iterator[None]:
    """Keep torch and BLAS to one thread, or to some, in this thread and in those of :func:`single_threaded_workers`."""
    before = torch.get_num_threads()
    try:
        with threadpool_limits(threads):
            torch.set_num_threads(threads)
            yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def single_threaded_workers(workers: int | None = None, threads: int = 1) -> Iterator[Executor]:
    """Start threads that use one core each.

    Args:
        workers: How many; by default one for each core this process may use.
        threads: Threads of torch and BLAS in each, more than one where memory allows fewer workers than cores.
    """
    count = workers or available_cores()
    with (
        single_threaded(threads),
        ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(threads,)) as executor,
    ):
        try:
            yield executor
        except BaseException:
            executor.shutdown(cancel_futures=True)  # ^C must not wait for what has not begun
            raise


def mapped(
    executor: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """Yield what a function gives for each item, in order; unlike ``Executor.map`` no more than ``ahead`` are pending.

    Items are made in this thread, so that random numbers come in the same order whatever the number of workers.
    """
    pending: deque[Future[_Result]] = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
