"""What is asked of ZeRO's optimizer; what DeepSpeed's own functions do is in test_deepspeed_training.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dynamics.recording.deepspeed import Zero, gathered_dtype, is_zero, needs_all_ranks
from dynamics.recording.meeting import Meeting, RanksApart


class Optimizer:
    """What is used of ZeRO's."""

    def __init__(self, clip: float, norm: float | None, overflow: bool = False, scale: float = 1.0) -> None:
        self.clip_grad, self._global_grad_norm, self.overflow, self.loss_scale = clip, norm, overflow, scale
        self.calls: list[str] = []

    def step(self, closure: Any = None) -> str:
        self.calls.append("step")
        return "stepped"


class Modules:
    """In the place of DeepSpeed."""


@pytest.fixture
def zero_of(monkeypatch) -> Callable[[Optimizer], Zero]:
    monkeypatch.setattr("dynamics.recording.deepspeed.importlib.import_module", lambda name: Modules())
    return lambda optimizer: Zero(optimizer, Meeting(dist.HashStore(), 0, 1))


@pytest.mark.parametrize(
    ("clip", "norm", "overflow", "factor"),
    [
        (0.0, 3.0, False, 1.0),
        (1.0, 0.5, False, 1.0),
        (1.0, 4.0, False, 0.25),
        (1.0, None, False, 1.0),
        (1.0, float("inf"), True, float("nan")),
    ],
    ids=["not clipped", "below", "above", "norm unknown", "overflow"],
)
def test_the_factor_of_clipping(zero_of, clip, norm, overflow, factor):
    assert zero_of(Optimizer(clip, norm, overflow)).clipping() == pytest.approx(factor, rel=1e-6, nan_ok=True)


def test_before_step_is_called_once_and_leaves_nothing(zero_of):
    optimizer = Optimizer(0.0, 1.0)
    zero_of(optimizer).before_step(lambda: optimizer.calls.append("read"))
    assert optimizer.step() == "stepped"
    assert optimizer.step() == "stepped"
    assert optimizer.calls == ["read", "step", "step"]
    assert "step" not in vars(optimizer)


def test_before_step_can_be_called_off_twice_and_keeps_a_step_that_was_replaced(zero_of):
    optimizer = Optimizer(0.0, 1.0)
    optimizer.step = replaced = lambda: "replaced"
    call_off = zero_of(optimizer).before_step(lambda: optimizer.calls.append("read"))
    call_off()
    call_off()
    assert optimizer.step is replaced
    assert optimizer.step() == "replaced"
    assert optimizer.calls == []


def test_what_raises_while_reading_leaves_and_all_hear_of_it(zero_of):
    zero = zero_of(Optimizer(0.0, 1.0))  # DeepSpeed's functions are not there
    with pytest.raises(RanksApart, match="safe_get_full_fp32_param"):
        zero.values([nn.Parameter(torch.ones(1))])


def test_what_is_zero():
    plain, split, whole = (nn.Linear(2, 2).half() for _ in range(3))
    split.weight.ds_id = 0
    whole.weight._hp_mapping = None  # ZeRO-1 and 2, and its piece is on another rank
    assert [is_zero(model) for model in (plain, split, whole)] == [False, True, True]
    assert [needs_all_ranks(model.weight) for model in (plain, split, whole)] == [False, True, True]
    formats = [gathered_dtype(model.weight) for model in (plain, split, whole)]
    assert formats == [torch.float16, torch.float32, torch.float32]
    assert gathered_dtype(split.weight.requires_grad_(False)) == torch.float16
    assert Zero.of(plain) is None
