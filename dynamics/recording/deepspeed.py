"""Weights and gradients of a training under DeepSpeed ZeRO, which splits gradients, or weights as well, over its ranks.

They are put together by DeepSpeed's own functions, one batch of matrices at a time: every rank takes part, and the
first one measures. Gradients are read when ZeRO's optimizer is called, which is when they are whole for the first time:
averaged over ranks, accumulated, not yet clipped.

A rank that failed alone, or lagged, would leave the others waiting in a collective operation for ever, and the training
with them. So ranks meet before each gathering, by way of the process group's store: all of them go on, or none does.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

from probes.watched import class_names, is_sharded, shape_of

#: Seconds that the first rank waits for the others, and these for each other.
PATIENCE = 15.0
#: Seconds that the others wait for the first one, which measures and probes in between.
COMPUTING = 600.0
#: What separates the two parts of a verdict in the store.
_TOGETHER, _APART, _FAILED = "together", "apart", "failed"


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

    def meet(self, failure: Exception | None = None) -> None:
        """Wait until every rank is here; all ranks return, or all raise.

        Args:
            failure: What went wrong on this rank before.

        Raises:
            RuntimeError: If something went wrong on a rank.
            RanksApart: If a rank did not come in time, or has left.
        """
        self._number += 1
        arrived, failed = f"{self._number}/arrived", f"{self._number}/failed"
        if failure is not None:
            self._store.set(failed, f"rank {self._rank}: {type(failure).__name__}: {failure}")
        if self._store.add(arrived, 1) == self._ranks:
            reason = self._store.get(failed).decode() if self._store.check([failed]) else ""
            kind, reason = self._decide(_FAILED if reason else _TOGETHER, reason)
            for key in ("arrived", "failed", "verdict"):  # who is here has read the last verdict
                self._store.delete_key(f"{self._number - 1}/{key}")
        else:
            kind, reason = self._wait()
        if kind == _APART:
            raise RanksApart(reason)
        if kind == _FAILED:
            raise RuntimeError(reason) from failure

    def leave(self, reason: str) -> None:
        """Tell the others, at their next meeting, that this rank gathers no more."""
        self._number += 1
        self._decide(_APART, f"rank {self._rank}: {reason}")

    def _wait(self) -> tuple[str, str]:
        verdict, deadline, pause = f"{self._number}/verdict", time.monotonic() + self.patience, 1e-4
        while not self._store.check([verdict]):
            if time.monotonic() > deadline:
                return self._decide(_APART, f"rank {self._rank} waited {self.patience:g} s for another")
            time.sleep(pause)  # the store serves others, too
            pause = min(2 * pause, 0.02)
        return self._read(self._store.get(verdict))

    def _decide(self, kind: str, reason: str) -> tuple[str, str]:
        """Propose a verdict; the first one proposed holds for all."""
        return self._read(self._store.compare_set(f"{self._number}/verdict", "", f"{kind}\n{reason}"))

    def _read(self, verdict: bytes) -> tuple[str, str]:
        kind, _, reason = verdict.decode().partition("\n")
        return kind, reason


class Zero:
    """A model under ZeRO.

    Args:
        optimizer: ZeRO's optimizer, which holds the pieces of gradients and weights.
        meeting: Of its ranks.

    Attributes:
        optimizer: ZeRO's optimizer.
    """

    def __init__(self, optimizer: Any, meeting: Meeting) -> None:
        self.optimizer, self._meeting = optimizer, meeting
        self._deepspeed = importlib.import_module("deepspeed")
        self._utils = importlib.import_module("deepspeed.utils")

    @classmethod
    def of(cls, model: nn.Module, optimizer: Any = None) -> Zero | None:
        """Return the model's ZeRO; ``None`` without one, or where its optimizer is not found or does not tell enough.

        Args:
            model: The model in training, best DeepSpeed's engine.
            optimizer: ZeRO's optimizer, Accelerate's wrapper or not: ZeRO-1 and 2 leave no trace of it on a model.

        Raises:
            ValueError: If its ranks are not all ranks of the training.
        """
        if not (is_zero(model) and dist.is_initialized()):
            return None
        cls._trainings += 1  # alike on all ranks
        ranks, store = dist.get_world_size(), _get_default_store()
        meeting = Meeting(PrefixStore(f"optimization-dynamics/{cls._trainings}", store), dist.get_rank(), ranks)
        zero_optimizer = next(filter(_tells_enough, _optimizers(model, optimizer)), None)
        try:
            meeting.meet(None if zero_optimizer is not None else LookupError("ZeRO's optimizer was not found"))
        except RuntimeError:  # on all ranks alike
            return None
        assert zero_optimizer is not None
        members = dist.get_world_size(zero_optimizer.dp_process_group)
        if members != ranks:
            raise ValueError(
                f"Expected ZeRO over all {ranks} ranks, got groups of {members}: tensor, pipeline and expert "
                "parallelism are not recorded. Analyse checkpoints: python -m dynamics.analyze RUN"
            )
        return cls(zero_optimizer, meeting)

    _trainings = 0

    def begin(self) -> None:
        """From now on the first rank waits for the others no longer than ``PATIENCE``."""
        if dist.get_rank() == 0:
            self._meeting.patience = PATIENCE

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
        self._meeting.meet(failure)

    def values(self, parameters: Iterable[nn.Parameter]) -> dict[int, Tensor]:
        """Return whole weights by the identity of their parameters, of those in half precision ZeRO's own in float32.

        All ranks must call it together.

        Raises:
            RanksApart: If they do not.
        """
        return self._gathered(parameters, self._value)

    def gradients(self, parameters: Iterable[nn.Parameter]) -> dict[int, Tensor]:
        """Return gradients as the optimizer is about to get them, before clipping, with the loss scale taken out.

        Zeros where a parameter has none. All ranks must call it together, from within :meth:`before_step`.

        Raises:
            RanksApart: If they do not.
        """
        return self._gathered(parameters, self._gradient)

    def _gathered(
        self, parameters: Iterable[nn.Parameter], reading: Callable[[nn.Parameter], Tensor]
    ) -> dict[int, Tensor]:
        self._meeting.meet()
        try:
            return {id(parameter): reading(parameter) for parameter in parameters}
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self._meeting.leave(reason)
            raise RanksApart(reason) from error

    @torch.no_grad()
    def _value(self, parameter: nn.Parameter) -> Tensor:
        whole = self._utils.safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
        if whole is not None or not hasattr(parameter, "ds_id"):
            return parameter.detach() if whole is None else whole
        with self._deepspeed.zero.GatheredParameters([parameter]):
            return parameter.detach().clone()

    @torch.no_grad()
    def _gradient(self, parameter: nn.Parameter) -> Tensor:
        whole = self._utils.safe_get_full_grad(parameter) if parameter.requires_grad else None
        if whole is None:
            return torch.zeros(shape_of(parameter), device=parameter.device)
        return whole.to(torch.float32) / self.loss_scale

    @property
    def loss_scale(self) -> float:
        """By how much gradients exceed the loss's own while ZeRO has them; 1 without fp16."""
        return float(self.optimizer.loss_scale)

    def clipping(self) -> float:
        """Return by which factor the last step clipped gradients; NaN if it was skipped (overflow under fp16)."""
        norm, most = self.optimizer._global_grad_norm, float(self.optimizer.clip_grad)
        if getattr(self.optimizer, "overflow", False):
            return float("nan")
        return 1.0 if most <= 0 or norm is None else min(1.0, most / (float(norm) + 1e-6))

    def before_step(self, function: Callable[[], None]) -> Callable[[], None]:
        """Have a function called once, before ZeRO's optimizer takes its next step; what is returned calls it off."""
        # There is no hook for this moment: torch's own runs after clipping, on pieces.
        optimizer, step = self.optimizer, self.optimizer.step
        previous = vars(optimizer).get("step")

        def restore() -> None:
            if vars(optimizer).get("step") is stepping:
                if previous is None:
                    del optimizer.step
                else:
                    optimizer.step = previous

        def stepping(*arguments: Any, **options: Any) -> Any:
            restore()
            function()
            return step(*arguments, **options)

        optimizer.step = stepping
        return restore


def is_zero(model: nn.Module) -> bool:
    """Return whether a model's parameters, or their gradients, are split by ZeRO, or the model is DeepSpeed's engine.

    >>> is_zero(nn.Linear(2, 2))
    False
    """
    return "DeepSpeedEngine" in class_names(model) or any(
        hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping") for parameter in model.parameters()
    )


def needs_all_ranks(parameter: nn.Parameter) -> bool:
    """Return whether a parameter is put together from pieces: a DTensor, or one whose own weight ZeRO keeps."""
    return is_sharded(parameter) or hasattr(parameter, "_hp_mapping")


def gathered_dtype(parameter: nn.Parameter) -> torch.dtype:
    """Return the format in which a parameter is put together: ZeRO's own weight is in float32."""
    is_owned = parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"))
    return torch.float32 if is_owned else parameter.dtype


def _optimizers(model: nn.Module, optimizer: Any) -> Iterator[Any]:
    """Yield what may be ZeRO's optimizer."""
    yield from (optimizer, getattr(optimizer, "optimizer", None))
    if "DeepSpeedEngine" in class_names(model):
        yield model.optimizer
    for parameter in model.parameters():
        yield getattr(parameter, "_z3_optimizer", None)


def _tells_enough(optimizer: Any) -> bool:
    """Return whether an optimizer is ZeRO's, and says what is needed of it."""
    needed = ("step", "loss_scale", "clip_grad", "_global_grad_norm", "dp_process_group")
    return all(hasattr(optimizer, name) for name in needed)
