import re

import pytest

from dynamics.recording import at, at_no_step, either, every, geometric, logarithmic


def captured(schedule, last: int = 200) -> list[int]:
    return [step for step in range(1, last + 1) if schedule(step)]


def test_every_counts_from_its_start():
    assert captured(every(50)) == [50, 100, 150, 200]
    assert captured(every(50, start=10), 120) == [10, 60, 110]


def test_geometric_has_each_of_its_steps_once():
    assert captured(geometric(2)) == [1, 2, 4, 8, 16, 32, 64, 128]
    assert captured(geometric(4, first=3)) == [3, 12, 48, 192]


@pytest.mark.parametrize("ratio", [1.01, 1.1, 1.5, 3])
def test_geometric_is_the_rounded_powers(ratio):
    powers, place = set(), 1.0
    while round(place) <= 200:
        powers.add(round(place))
        place *= ratio
    assert captured(geometric(ratio)) == sorted(powers)


def test_logarithmic_is_cockpits():
    assert captured(logarithmic(0, 2, 5)) == [1, 3, 10, 32, 100]


def test_either_grants_each_wish():
    assert captured(either(at(7), every(100), at_no_step)) == [7, 100, 200]
    assert captured(either()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: every(0), "Expected an interval of at least 1 step, got 0."),
        (lambda: geometric(1), "Expected a ratio above 1 and a first step of at least 1, got 1 and 1."),
        (lambda: geometric(2, first=0), "Expected a ratio above 1 and a first step of at least 1, got 2 and 0."),
        (lambda: logarithmic(2, 1, 5), "Expected a count of at least 1 and start <= end, got 5, 2 and 1."),
    ],
)
def test_what_is_no_schedule_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()
