"""Schedules: which optimizer steps are captured. Each is a function ``step -> bool`` of the step alone.

A schedule knows nothing of the past, so that a resumed training captures the steps that it would have captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

#: From an optimizer step (``global_step`` after the update, from 1) to whether it is captured.
Schedule: TypeAlias = Callable[[int], bool]


def every(interval: int, start: int = 0) -> Schedule:
    """Every ``interval`` steps, counted from ``start``.

    Raises:
        ValueError: If the interval is not positive.

    >>> [step for step in range(1, 10) if every(4)(step)]
    [4, 8]
    """
    if interval < 1:
        raise ValueError(f"Expected an interval of at least 1 step, got {interval}.")
    return lambda step: step >= start and (step - start) % interval == 0


def at(*steps: int) -> Schedule:
    """These steps.

    >>> [step for step in range(1, 10) if at(1, 7)(step)]
    [1, 7]
    """
    chosen = frozenset(steps)
    return lambda step: step in chosen


def at_no_step(step: int) -> bool:
    """Never."""
    return False


def geometric(ratio: float | int = 2, first: int = 1) -> Schedule:
    """``first``, and then each step ``ratio`` times as far as the one before, rounded: many early, few late.

    Raises:
        ValueError: If the ratio is not above 1 or the first step not positive.

    >>> [step for step in range(1, 40) if geometric(2)(step)]
    [1, 2, 4, 8, 16, 32]
    >>> [step for step in range(1, 12) if geometric(1.5)(step)]
    [1, 2, 3, 5, 8, 11]
    """
    if not ratio > 1 or first < 1:
        raise ValueError(f"Expected a ratio above 1 and a first step of at least 1, got {ratio} and {first}.")

    def schedule(step: int) -> bool:
        place = float(first)
        while round(place) < step:
            place *= ratio
        return round(place) == step

    return schedule


def logarithmic(start: float | int, end: float | int, count: int) -> Schedule:
    """``count`` steps equally spaced in the logarithm between 10**start and 10**end, as cockpit has it.

    Raises:
        ValueError: If there are no steps, or the end lies before the start.

    >>> [step for step in range(1, 1001) if logarithmic(0, 3, 4)(step)]
    [1, 10, 100, 1000]
    """
    if count < 1 or end < start:
        raise ValueError(f"Expected a count of at least 1 and start <= end, got {count}, {start} and {end}.")
    gap = (end - start) / max(1, count - 1)
    return at(*(round(10 ** (start + gap * index)) for index in range(count)))


def either(*schedules: Schedule) -> Schedule:
    """Whatever one of these captures.

    >>> [step for step in range(1, 12) if either(at(1), every(5))(step)]
    [1, 5, 10]
    """
    return lambda step: any(schedule(step) for schedule in schedules)
