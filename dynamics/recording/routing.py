"""The routing of mixtures of experts at captured steps: counted on every rank, summed on the first.

Ranks that do not write leave their counts in the process group's store and go on, whatever the first one does. It waits
for them for a while; if one is missing, there is no routing from then on, and the training does not notice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import torch.distributed as dist
import xarray as xr
from safetensors import torch as safetensors_torch
from torch import nn
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from dynamics.findings import Finding
from dynamics.recording.changes import ModelState
from dynamics.routing.dataset import CHOSEN, SOFT, routing_record
from dynamics.text import counted, some
from probes.router_choices import Sums
from probes.routers import Routing

#: Seconds that the first rank waits for the counts of the others.
PATIENCE = 15.0
#: What a rank leaves in the store: its counts, or why it has none.
_COUNTS, _FAILED = b"c", b"f"
#: Key that the first rank sets once it receives nothing any more.
_ENDED = "ended"
_NAMED = 5


class RoutingRecorder:
    """Count at captured steps what the routers of a model in training choose.

    Args:
        model: In any wrapper.
        exchange: Between ranks, ``None`` for a single process.
    """

    def __init__(self, model: nn.Module, exchange: Exchange | None = None) -> None:
        self._model, self._exchange = model, exchange
        self._look()
        self._told: set[str] = set()
        self._armed: int | None = None
        self._is_closed = False

    def _look(self) -> None:
        self._routing, self._state = Routing(self._model), ModelState(self._model)
        #: Whether the model has no block that may be a mixture of experts.
        self.is_empty = not self._routing.mixtures

    def arm(self, step: int) -> None:
        """Count the forward passes of this step."""
        if self._is_closed:
            return
        if self._state.has_changed():  # an adapter was added or switched, say
            self._routing.disarm()
            self._look()
        # One rank may learn before another that no block is a mixture: all go on to hand over what they have.
        if self.is_empty or (self._exchange is None and not self._routing.mixtures):
            return
        self._armed = step
        self._routing.arm()

    def disarm(self) -> None:
        """Remove all hooks."""
        self._routing.disarm()

    def close(self) -> None:
        """Remove all hooks; nothing is counted any more."""
        self.disarm()
        self._armed, self._is_closed = None, True

    def send(self) -> None:
        """On a rank that does not write: hand over what was counted since :meth:`arm`. Raises nothing."""
        step, self._armed = self._armed, None
        if step is not None and self._exchange is not None:
            self._routing.disarm()
            self._exchange.send(step, lambda: _packed(self._routing.take()))

    def record(self) -> xr.Dataset | None:
        """Return the counts of all ranks since :meth:`arm`, ``None`` if no router was called.

        Raises:
            RuntimeError: If counting failed on a rank; or if a rank did not come, after which nothing is counted.
        """
        step, self._armed = self._armed, None
        if step is None:
            return None
        self._routing.disarm()
        try:
            sums = self._routing.take()
        finally:  # what the others have sent is taken in any case
            others = self._received(step)
        for rank in others:
            for name, theirs in _unpacked(rank).items():
                sums[name] = sums[name] + theirs if name in sums else theirs
        if not sums:
            return None
        order = [mixture.name for mixture in self._routing.mixtures]
        names = sorted(sums, key=lambda name: order.index(name) if name in order else len(order))
        layers = {name: (sums[name].assigned.numpy(), *_tokens_and_margin(sums[name])) for name in names}
        about = {
            "routing": [SOFT if self._routing.is_soft(name) else CHOSEN for name in names],
            "held_in": [",".join(self._routing.held_in(name)) for name in names],
        }
        return routing_record(step, layers, about)

    def _received(self, step: int) -> list[bytes]:
        if self._exchange is None:
            return []
        try:
            return self._exchange.receive(step)
        finally:
            if self._exchange.has_ended:
                self.close()

    def findings(self) -> list[Finding]:
        """Return findings on routers that a captured step could not read; each block is told once."""
        unread = {name: why for name, why in self._routing.unread().items() if name not in self._told}
        self._told |= unread.keys()
        by_reason: dict[str, list[str]] = {}
        for name, why in unread.items():
            by_reason.setdefault(why, []).append(name or "the model")
        return [
            Finding(
                "OD332",
                f"The routing of {counted(len(names), 'block')} with experts is not recorded: {some(names, _NAMED)}; "
                f"{why}.",
                "Updates and gradients of the experts are recorded as usual.",
                matrix=names[0] if len(names) == 1 else "",
                evidence={"names": names[:20]},
            )
            for why, names in by_reason.items()
        ]


def exchange_of_ranks() -> Exchange | None:
    """Return the exchange of this training's ranks, ``None`` for one rank; every rank makes one at the same time."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    Exchange.trainings += 1  # alike on all ranks
    store = PrefixStore(f"optimization-dynamics/routing/{Exchange.trainings}", _get_default_store())
    return Exchange(store, dist.get_rank(), dist.get_world_size())


class Exchange:
    """Counts of all ranks, by way of the process group's store: the first rank waits, the others do not.

    Args:
        store: What all ranks can write to.
        rank, ranks: This rank, and how many there are.
        patience: Seconds that the first rank waits.
    """

    trainings = 0

    def __init__(self, store: Any, rank: int, ranks: int, patience: float | None = None) -> None:
        self._store, self._rank, self._ranks = store, rank, ranks
        self._patience = patience
        self._missing = ""

    @property
    def has_ended(self) -> bool:
        """Whether a rank did not come, so that nothing is received any more."""
        return bool(self._missing)

    def send(self, step: int, counts: Callable[[], bytes]) -> None:
        """Leave this rank's counts for the first; what goes wrong is left in their place. Raises nothing."""
        try:
            message = _COUNTS + counts()
        except Exception as error:  # the first rank tells
            message = _FAILED + f"rank {self._rank}: {error}".encode(errors="replace")
        with suppress(Exception):  # without its store the first rank misses this one, and tells
            if not self._store.check([_ENDED]):
                self._store.set(f"{step}/{self._rank}", message)

    def receive(self, step: int) -> list[bytes]:
        """Return the counts of the other ranks.

        Raises:
            RuntimeError: If a rank has none, or did not send them in time; from then on nothing is received.
        """
        if self._missing:
            raise RuntimeError(self._missing)
        keys = [f"{step}/{rank}" for rank in range(self._ranks) if rank != self._rank]
        patience = PATIENCE if self._patience is None else self._patience
        deadline, pause = time.monotonic() + patience, 1e-4
        while not self._store.check(keys):
            if time.monotonic() > deadline:
                self._missing = f"a rank did not send what its routers chose within {patience:g} s"
                self._store.set(_ENDED, b"")  # so that the others leave nothing that nobody takes
                raise RuntimeError(self._missing)
            time.sleep(pause)  # the store serves others, too
            pause = min(2 * pause, 0.02)
        messages = [self._store.get(key) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        failures = [message[1:].decode(errors="replace") for message in messages if message[:1] == _FAILED]
        if failures:
            raise RuntimeError(failures[0])
        return [message[1:] for message in messages]


def _packed(sums: Mapping[str, Sums]) -> bytes:
    tensors = {f"{part}/{name}": getattr(one, part) for name, one in sums.items() for part in ("assigned", "others")}
    return safetensors_torch.save({name: tensor.contiguous() for name, tensor in tensors.items()})


def _unpacked(content: bytes) -> dict[str, Sums]:
    tensors = safetensors_torch.load(content)
    names = [key.removeprefix("assigned/") for key in tensors if key.startswith("assigned/")]
    return {name: Sums(tensors[f"assigned/{name}"], tensors[f"others/{name}"]) for name in names}


def _tokens_and_margin(sums: Sums) -> tuple[float, float]:
    tokens, margin, with_margin = sums.others.tolist()
    mean = margin / with_margin if with_margin else math.nan
    return tokens, mean if math.isfinite(mean) else math.nan


def routing_numbers(record: xr.Dataset | None) -> dict[str, float]:
    """Return at most 8 numbers for the training log, whatever the number of layers; unknown ones are left out.

    Args:
        record: The group ``routing`` of one step; ``None`` gives no numbers.

    Returns:
        ``routing/…``: ``effective_experts_share`` (mean over layers of exp(entropy)/experts) and
        ``effective_experts_share_worst``; ``largest_load`` (mean over layers, in uniform loads) and
        ``largest_load_worst``; ``dead_experts`` (of all layers) and ``dead_experts_worst`` (of one); ``margin`` and
        ``margin_worst``.
    """
    if record is None:
        return {}
    assigned, experts = record["assigned"].values[0], record["experts"].values
    total = np.nansum(assigned, -1)
    called = total > 0
    if not called.any():
        return {}
    load = np.nan_to_num(assigned[called] / total[called, None])
    entropy = np.exp(-(load * np.log(np.where(load > 0, load, 1.0))).sum(-1)) / experts[called]
    largest = load.max(-1) * experts[called]
    dead = (assigned[called] == 0).sum(-1)
    margin = record["margin"].values[0]
    margin = margin[np.isfinite(margin)]
    numbers = {
        "effective_experts_share": float(entropy.mean()),
        "effective_experts_share_worst": float(entropy.min()),
        "largest_load": float(largest.mean()),
        "largest_load_worst": float(largest.max()),
        "dead_experts": float(dead.sum()),
        "dead_experts_worst": float(dead.max()),
        **({"margin": float(margin.mean()), "margin_worst": float(margin.min())} if len(margin) else {}),
    }
    return {f"routing/{name}": number for name, number in numbers.items()}
