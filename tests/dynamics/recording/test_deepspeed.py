"""Ranks go on together or not at all; what DeepSpeed's own functions do is in test_deepspeed_training.py."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dynamics.recording.deepspeed import Meeting, RanksApart, Zero, gathered_dtype, is_zero, needs_all_ranks


def at_once(*functions: Callable[[], Any]) -> list[Any]:
    """What each gives or raises, each in a thread."""
    results: list[Any] = [None] * len(functions)

    def run(index: int, function: Callable[[], Any]) -> None:
        try:
            results[index] = function()
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=each) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return results


def meetings(patience: float = 20.0, ranks: int = 2) -> list[Meeting]:
    store = dist.HashStore()
    return [Meeting(store, rank, ranks, patience) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_all_go_on_together(ranks):
    def twice(meeting: Meeting) -> str:
        meeting.meet()
        meeting.meet()
        return "on"

    assert at_once(*[lambda each=each: twice(each) for each in meetings(ranks=ranks)]) == ["on"] * ranks


def test_what_fails_on_one_fails_on_all_and_the_next_meeting_is_as_any():
    first, second = meetings()
    errors = at_once(first.meet, lambda: second.meet(ValueError("no memory")))
    assert [type(error) for error in errors] == [RuntimeError, RuntimeError]
    assert {str(error) for error in errors} == {"rank 1: ValueError: no memory"}
    assert at_once(first.meet, second.meet) == [None, None]


def test_who_waited_long_enough_leaves_and_the_late_one_hears_of_it():
    first, second = meetings(patience=0.05)
    with pytest.raises(RanksApart, match=r"^rank 0 waited 0.05 s for another$"):
        first.meet()
    with pytest.raises(RanksApart, match=r"^rank 0 waited 0.05 s for another$"):
        second.meet()


def test_a_rank_that_leaves_is_not_waited_for():
    first, second = meetings()
    second.leave("no memory")
    with pytest.raises(RanksApart, match=r"^rank 1: no memory$"):
        first.meet()


def test_a_verdict_is_the_same_for_all_however_close_the_race():
    for _ in range(30):
        errors = at_once(*[each.meet for each in meetings(patience=1e-4)])
        assert len({str(error) for error in errors}) == 1


def test_keys_of_earlier_meetings_are_deleted():
    store = dist.HashStore()
    meeting = Meeting(store, 0, 1)
    for _ in range(20):
        meeting.meet()
    assert store.num_keys() <= 3


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
