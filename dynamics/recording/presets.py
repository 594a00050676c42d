"""Presets: what a captured step records, and which steps are captured unless the user says otherwise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dynamics.recording.schedules import Schedule, at, either, every, geometric


@dataclass(frozen=True)
class Preset:
    """What to record.

    Args:
        name: ``"economy"``, ``"standard"`` or ``"full"``.
        schedule: The captured steps.
        gradient_spectra: Whether each matrix's gradient gets singular values, beside its norms.
        increment_cosines: Whether the cosine of consecutive increments is recorded, which takes a second copy of
            the watched factors.
    """

    name: str
    schedule: Schedule
    gradient_spectra: bool = False
    increment_cosines: bool = False


#: Every preset records the spectra of totals and increments, and gradient norms before and after clipping.
PRESETS: Mapping[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset("economy", either(geometric(4), every(100))),
        Preset("standard", either(geometric(2), every(50)), gradient_spectra=True),
        Preset("full", either(geometric(2), every(10)), gradient_spectra=True, increment_cosines=True),
    )
}


def preset_named(name: str) -> Preset:
    """The preset of this name.

    Raises:
        ValueError: If there is none.

    >>> preset_named("economy").gradient_spectra
    False
    """
    if name not in PRESETS:
        raise ValueError(f"Expected a preset of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]


def schedule_of(
    preset: Preset, *, interval: int | None = None, steps: Sequence[int] | None = None, schedule: Schedule | None = None
) -> Schedule:
    """What the user asks for instead of the preset's schedule; of several wishes, each is granted.

    Args:
        preset: Its schedule holds where nothing is asked for.
        interval: Every so many steps.
        steps: These steps.
        schedule: A schedule.

    >>> asked = schedule_of(PRESETS["full"], interval=4, steps=[1])
    >>> [step for step in range(1, 10) if asked(step)]
    [1, 4, 8]
    """
    wishes = [
        *([every(interval)] if interval is not None else []),
        *([at(*steps)] if steps is not None else []),
        *([schedule] if schedule is not None else []),
    ]
    return either(*wishes) if wishes else preset.schedule
