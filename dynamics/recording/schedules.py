"""Schedules: which optimizer steps are captured. Each is a function ``step -> bool`` of the step alone.

A schedule knows nothing of the past, so that a resumed training captures the same steps. A preset says what a captured
step records, and which steps are captured by default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import TypeAlias, TypeGuard

#: From an optimizer step (``global_step`` after the update, from 1) to whether it is captured.
Schedule: TypeAlias = Callable[[int], bool]


def every(interval: int, start: int = 0) -> Schedule:
    """Return a schedule of every ``interval`` steps, counted from ``start``.

    Raises:
        ValueError: If the interval is not positive.

    >>> [step for step in range(1, 10) if every(4)(step)]
    [4, 8]
    """
    if interval < 1:
        raise ValueError(f"Expected an interval of at least 1 step, got {interval}.")
    return lambda step: step >= start and (step - start) % interval == 0


def at(*steps: int) -> Schedule:
    """Return a schedule of these steps.

    >>> [step for step in range(1, 10) if at(1, 7)(step)]
    [1, 7]
    """
    chosen = frozenset(steps)
    return lambda step: step in chosen


def at_no_step(step: int) -> bool:
    """Capture no step."""
    return False


def geometric(ratio: float | int = 2, first: int = 1) -> Schedule:
    """Return a schedule of ``first`` and then each step ``ratio`` times as far, rounded: many early, few late.

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
        position = float(first)
        while round(position) < step:
            position *= ratio
        return round(position) == step

    return schedule


def logarithmic(start: float | int, end: float | int, count: int) -> Schedule:
    """Return a schedule of ``count`` steps from 10**start to 10**end, equally spaced in the logarithm, as in cockpit.

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
    """Return a schedule of the steps that any of these captures.

    >>> [step for step in range(1, 12) if either(at(1), every(5))(step)]
    [1, 5, 10]
    """
    return lambda step: any(schedule(step) for schedule in schedules)


def chosen_steps(choice: int | Sequence[int] | Schedule) -> Schedule:
    """Return a schedule of every so many steps, of these steps, or the schedule itself.

    Raises:
        ValueError: If it is none of these.

    >>> (
    ...     [step for step in range(1, 10) if chosen_steps(4)(step)],
    ...     [step for step in range(1, 10) if chosen_steps([7])(step)],
    ... )
    ([4, 8], [7])
    """
    if callable(choice):
        return choice
    if _is_whole(choice):
        return every(int(choice))
    if isinstance(choice, Sequence) and all(map(_is_whole, choice)):
        return at(*map(int, choice))
    raise ValueError(f"Expected an interval in steps, a list of steps or a schedule, got {choice!r}.")


def _is_whole(number: object) -> TypeGuard[int]:
    """Return whether it is a whole number, numpy's too, and no truth value."""
    return isinstance(number, Integral) and not isinstance(number, bool)


@dataclass(frozen=True)
class Preset:
    """What a captured step records, and which steps are captured.

    Args:
        name: ``"economy"``, ``"standard"`` or ``"full"``.
        schedule: The captured steps.
        gradient_spectra: Whether each matrix's gradient gets singular values, beside its norms.
        increment_cosines: Whether the cosine of consecutive increments is recorded, which takes a second copy of
            the watched factors.
        predictions: Whether changes of the probe samples' losses are predicted from gradients at the start, which takes
            two forward and backward passes and two forward ones more over the samples.
        sharpness: Whether critical sharpness is recorded, where there are probe samples.
    """

    name: str
    schedule: Schedule
    gradient_spectra: bool = False
    increment_cosines: bool = False
    predictions: bool = False
    sharpness: bool = False


#: Every preset records the spectra of totals and increments, and gradient norms before and after clipping.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("economy", either(geometric(4), every(100))),
        Preset("standard", either(geometric(2), every(50)), gradient_spectra=True),
        Preset(
            "full",
            either(geometric(2), every(10)),
            gradient_spectra=True,
            increment_cosines=True,
            predictions=True,
            sharpness=True,
        ),
    )
}


def preset_named(name: str) -> Preset:
    """Return the preset of this name.

    Raises:
        ValueError: If the name is not one of :data:`PRESETS`.

    >>> preset_named("economy").gradient_spectra
    False
    """
    if name not in PRESETS:
        raise ValueError(f"Expected the preset {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def schedule_of(
    preset: Preset, *, interval: int | None = None, steps: Sequence[int] | None = None, schedule: Schedule | None = None
) -> Schedule:
    """Return the union of the requested steps, or the preset's schedule if none are requested.

    Args:
        preset: Used where no steps are requested.
        interval: Every so many steps.
        steps: These steps.
        schedule: The steps of a schedule.

    >>> chosen = schedule_of(PRESETS["full"], interval=4, steps=[1])
    >>> [step for step in range(1, 10) if chosen(step)]
    [1, 4, 8]
    """
    schedules = [
        *([every(interval)] if interval is not None else []),
        *([at(*steps)] if steps is not None else []),
        *([schedule] if schedule is not None else []),
    ]
    return either(*schedules) if schedules else preset.schedule
