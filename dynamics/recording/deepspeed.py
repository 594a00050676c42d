"""Weights and gradients of a training under DeepSpeed ZeRO, which splits gradients, or weights as well, over its ranks.

They are put together by DeepSpeed's own functions, one batch of matrices at a time: every rank takes part, and the
first one measures. Gradients are read when ZeRO's optimizer is called, which is when they are whole for the first time:
averaged over ranks, accumulated, not yet clipped.

Ranks meet before each gathering (:mod:`dynamics.recording.meeting`): all of them go on, or none does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynamics.recording.meeting import Meeting, RanksApart
from probes.watched import class_names, is_sharded, shape_of


class Zero:
    """A model under ZeRO.

    Args:
        optimizer: ZeRO's optimizer, which holds the pieces of gradients and weights.
        meeting: Of its ranks.

    Attributes:
        optimizer: ZeRO's optimizer.
        meeting: Of its ranks.
    """

    def __init__(self, optimizer: Any, meeting: Meeting) -> None:
        self.optimizer, self.meeting = optimizer, meeting
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
        meeting = Meeting.of_all_ranks()
        zero_optimizer = next(filter(_tells_enough, _optimizers(model, optimizer)), None)
        try:
            meeting.meet(None if zero_optimizer is not None else LookupError("ZeRO's optimizer was not found"))
        except RuntimeError:  # on all ranks alike
            return None
        assert zero_optimizer is not None
        members = dist.get_world_size(zero_optimizer.dp_process_group)
        if members != (ranks := dist.get_world_size()):
            raise ValueError(
                f"Expected ZeRO over all {ranks} ranks, got groups of {members}: tensor, pipeline and expert "
                "parallelism are not recorded. Analyse checkpoints: python -m dynamics.analyze RUN"
            )
        return cls(zero_optimizer, meeting)

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
        self.meeting.meet()
        try:
            return {id(parameter): reading(parameter) for parameter in parameters}
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.meeting.leave(reason)
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
