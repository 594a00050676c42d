"""Numbers, names and lines as text."""

from __future__ import annotations

import math

import pytest

from dynamics.text import counted, encodable, finite, first_line, interval, number, one_line, percent, some, visible


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1234, "1,234"), (0.5, "0.500"), (123456.7, "123,457"), (1e-9, "1.00e-09"), (2e8, "2.00e+08")],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert number(value) == text


def test_what_is_unknown_is_a_dash() -> None:
    assert (number(None), percent(None)) == ("–", "–")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_json_has_no_such_number(value: float) -> None:
    assert finite(value) is None


def test_a_long_list_of_names_is_cut() -> None:
    assert some("abcdef") == "a, b, c and 3 more"
    assert some("abc") == "a, b, c"


def test_one_thing_and_several() -> None:
    assert [counted(count, "step") for count in (0, 1, 1000)] == ["0 steps", "1 step", "1,000 steps"]


def test_what_a_terminal_would_obey_is_written_out() -> None:
    assert one_line("a\nb\x1b[2J") == "a b\\x1b[2J"
    assert visible("a\nb\u202ec") == "a\nb\\u202ec"


def test_names_that_no_file_can_hold_are_escaped_everywhere() -> None:
    assert encodable({"a\ud800": ["b\udce9", 1, None]}) == {"a\\ud800": ["b\\udce9", 1, None]}


def test_errors_of_other_libraries_are_one_line() -> None:
    assert first_line(ValueError("bad\n" * 5)) == "bad"
    assert len(first_line(ValueError("x" * 1000))) == 160
    assert first_line(KeyError()) == "KeyError"


def test_an_interval_without_ends() -> None:
    assert interval(math.nan, 1.0) == "no interval"
