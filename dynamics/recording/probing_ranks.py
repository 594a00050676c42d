"""Probing of a model in training that FSDP 2 splits over ranks: the first rank probes, the others hand over shards.

Each layer is whole on the first rank while it computes (:mod:`probes.sharded`). Before it is gathered, the first rank
asks the others, which wait for nothing but requests until it has done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from dynamics.recording.meeting import Meeting, RanksApart
from probes.sharded import ShardedModel

#: Requests that end all: what was measured, or why it was not.
_DONE, _FAILED = "done", "failed"
T = TypeVar("T")


class ProbingRanks:
    """Ranks that probe one sharded model together.

    Args:
        shards: Of the model, on this rank.
        meeting: Of all ranks.
    """

    def __init__(self, shards: ShardedModel, meeting: Meeting) -> None:
        self._shards, self._meeting = shards, meeting

    @classmethod
    def of(cls, model: nn.Module, meeting: Meeting) -> ProbingRanks | None:
        """Return the ranks of a model, ``None`` if FSDP 2 has split none of it.

        Raises:
            ValueError: If its layers cannot be gathered.
        """
        shards = ShardedModel.of(model)
        return None if shards is None else cls(shards, meeting)

    def stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the parameter that the first rank probes in the place of a shard."""
        return self._shards.stand_in(parameter)

    def forget(self) -> None:
        """Let go of the values that were at hand."""
        self._shards.forget()

    def together(self, function: Callable[[], T], present: Mapping[int, Tensor] | None = None) -> T | None:
        """Return what a function returns on the first rank, where the model is an ordinary one meanwhile.

        All ranks must call it; the others return ``None``.

        Args:
            function: May run the model as often as it likes.
            present: Whole values of parameters, by identity, as far as they are at hand.

        Raises:
            RanksApart: If a rank does not come, or leaves.
            Exception: What the function raises; a ``RuntimeError`` on the other ranks.
        """
        self._meeting.meet()
        if dist.get_rank() > 0:
            self._follow()
            return None
        try:
            with self._shards.led(self._meeting.ask, present):
                result = function()
        except RanksApart:
            raise
        except Exception as error:
            self._meeting.ask(f"{_FAILED} rank 0: {type(error).__name__}: {error}")
            raise
        self._meeting.ask(_DONE)
        return result

    def _follow(self) -> None:
        while (request := self._meeting.request()) != _DONE:
            kind, _, reason = request.partition(" ")
            if kind == _FAILED:
                raise RuntimeError(reason)
            try:
                self._shards.hand_over(request)
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
                self._meeting.leave(reason)
                raise RanksApart(reason) from error
