"""Ranks go on together or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from dynamics.recording.meeting import Meeting, RanksApart


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


def test_who_has_heard_that_ranks_are_apart_waits_for_nobody():
    first, second = meetings(patience=0.05)
    for _ in range(2):
        with pytest.raises(RanksApart, match=r"^rank 0 waited 0.05 s for another$"):
            first.meet()
    first.patience = second.patience = 20.0
    for act in (second.meet, second.request, lambda: second.ask("more"), lambda: second.leave("late")):
        with pytest.raises(RanksApart, match=r"^rank 0 waited 0.05 s for another$"):
            act()


def test_what_goes_wrong_inside_on_one_goes_wrong_on_all():
    first, second = meetings()

    def inside(meeting: Meeting, problem: Exception | None) -> None:
        with meeting.agreed():
            if problem is not None:
                raise problem

    errors = at_once(lambda: inside(first, None), lambda: inside(second, ValueError("no memory")))
    assert [f"{type(error).__name__}: {error}" for error in errors] == [
        "RuntimeError: rank 1: ValueError: no memory"
    ] * 2


def test_the_others_do_what_the_first_rank_asks_for():
    first, *others = meetings(ranks=3)

    def lead() -> None:
        first.meet()
        for request in ("layer 0", "layer 1", "done"):
            first.ask(request)
        first.meet()

    def follow(meeting: Meeting) -> list[str]:
        meeting.meet()
        requests = [meeting.request() for _ in range(3)]
        meeting.meet()
        return requests

    answers = at_once(lead, *[lambda each=each: follow(each) for each in others])
    assert answers == [None, ["layer 0", "layer 1", "done"], ["layer 0", "layer 1", "done"]]


def test_a_rank_that_leaves_is_asked_for_nothing():
    first, second = meetings()
    second.leave("no memory")
    with pytest.raises(RanksApart, match=r"^rank 1: no memory$"):
        first.ask("layer 0")


def test_the_others_wait_for_a_request_no_longer_than_they_are_patient():
    first, second = meetings(patience=0.05)
    for act in (second.request, lambda: first.ask("layer 0")):
        with pytest.raises(RanksApart, match=r"^rank 1 waited 0.05 s for another$"):
            act()


def test_a_verdict_is_the_same_for_all_however_close_the_race():
    for _ in range(30):
        errors = at_once(*[each.meet for each in meetings(patience=1e-4)])
        assert len({str(error) for error in errors}) == 1


def test_keys_of_earlier_meetings_are_deleted():
    store = dist.HashStore()
    meeting = Meeting(store, 0, 1)
    for _ in range(20):
        meeting.meet()
        meeting.ask("layer 0")
    meeting.meet()
    assert store.num_keys() <= 3
