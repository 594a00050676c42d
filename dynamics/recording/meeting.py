"""Ranks that go on together or not at all, by way of their process group's store.

A rank that failed alone, or lagged, would leave the others waiting in a collective operation for ever, and the training
with them. So ranks meet before they begin one; and where one rank alone knows what comes next, it asks the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

#: Seconds that the first rank waits for the others, and these for each other.
PATIENCE = 15.0
#: Seconds that the others wait for the first one, which measures and probes in between.
COMPUTING = 600.0
#: What separates the two parts of a verdict in the store.
_TOGETHER, _APART, _FAILED, _ASKED = "together", "apart", "failed", "asked"


class RanksApart(Exception):
    """A rank is missing: nothing is gathered from now on, on any rank."""


class Meeting:
    """Ranks that go on together or not at all.

    Args:
        store: What all ranks can write to.
        rank, ranks: This rank, and how many there are.
        patience: Seconds to wait.

    >>> Meeting(dist.HashStore(), 0, 1).meet()
    """

    def __init__(self, store: Any, rank: int, ranks: int, patience: float = COMPUTING) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self.patience = patience
        self._number = 0
        self._read_by_all: list[str] = []  # keys, once all ranks have come to the next meeting
        self._apart = ""  # why, once they are

    @classmethod
    def of_all_ranks(cls) -> Meeting:
        """Return a meeting of its own for each training; all ranks must call it together."""
        cls._trainings += 1
        store = PrefixStore(f"optimization-dynamics/{cls._trainings}", _get_default_store())
        return cls(store, dist.get_rank(), dist.get_world_size())

    _trainings = 0

    def begin(self) -> None:
        """From now on the first rank waits for the others no longer than ``PATIENCE``."""
        if self._rank == 0:
            self.patience = PATIENCE

    def meet(self, failure: Exception | None = None) -> None:
        """Wait until every rank is here; all ranks return, or all raise.

        Args:
            failure: What went wrong on this rank before.

        Raises:
            RuntimeError: If something went wrong on a rank.
            RanksApart: If a rank did not come in time, or has left.
        """
        self._require_together()
        self._number += 1
        arrived, failed = f"{self._number}/arrived", f"{self._number}/failed"
        if failure is not None:
            self._store.set(failed, f"rank {self._rank}: {type(failure).__name__}: {failure}")
        if self._store.add(arrived, 1) == self._ranks:
            reason = self._store.get(failed).decode() if self._store.check([failed]) else ""
            kind, reason = self._decide(_FAILED if reason else _TOGETHER, reason)
            for key in self._read_by_all:
                self._store.delete_key(key)
        else:
            kind, reason = self._wait()
        self._read_by_all = [arrived, failed, self._verdict]
        self._refuse(kind, reason)
        if kind == _FAILED:
            raise RuntimeError(reason) from failure

    @contextmanager
    def agreed(self) -> Iterator[None]:
        """Let what goes wrong inside on one rank go wrong on all.

        Raises:
            RuntimeError: On all ranks, if something was raised inside on one.
            RanksApart: If a rank did not get here.
        """
        failure = None
        try:
            yield
        except RanksApart:
            raise
        except Exception as error:
            failure = error
        self.meet(failure)

    def ask(self, request: str) -> None:
        """Tell the other ranks what to do next, which they wait for in :meth:`request`.

        Raises:
            RanksApart: If one of them has left.
        """
        self._require_together()
        self._number += 1
        self._read_by_all.append(self._verdict)
        self._refuse(*self._decide(_ASKED, request))

    def request(self) -> str:
        """Return what the first rank asks for next.

        Raises:
            RanksApart: If it asks for nothing in time.
        """
        self._require_together()
        self._number += 1
        self._read_by_all.append(self._verdict)
        kind, request = self._wait(longest_pause=0.005)
        self._refuse(kind, request)
        return request

    def leave(self, reason: str) -> None:
        """Tell the others, at their next meeting, that this rank gathers no more."""
        self._require_together()
        self._number += 1
        _, self._apart = self._decide(_APART, f"rank {self._rank}: {reason}")

    def _require_together(self) -> None:
        if self._apart:
            raise RanksApart(self._apart)

    def _refuse(self, kind: str, reason: str) -> None:
        if kind == _APART:
            self._apart = reason
            raise RanksApart(reason)

    @property
    def _verdict(self) -> str:
        return f"{self._number}/verdict"

    def _wait(self, longest_pause: float = 0.02) -> tuple[str, str]:
        deadline, pause = time.monotonic() + self.patience, 1e-4
        while not self._store.check([self._verdict]):
            if time.monotonic() > deadline:
                return self._decide(_APART, f"rank {self._rank} waited {self.patience:g} s for another")
            time.sleep(pause)  # the store serves others, too
            pause = min(2 * pause, longest_pause)
        return self._read(self._store.get(self._verdict))

    def _decide(self, kind: str, reason: str) -> tuple[str, str]:
        """Propose a verdict; the first one proposed holds for all."""
        return self._read(self._store.compare_set(self._verdict, "", f"{kind}\n{reason}"))

    def _read(self, verdict: bytes) -> tuple[str, str]:
        kind, _, reason = verdict.decode().partition("\n")
        return kind, reason
