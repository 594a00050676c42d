"""What is recorded of a training, and when."""

from dynamics.recording.schedules import (
    PRESETS,
    Preset,
    Schedule,
    at,
    at_no_step,
    either,
    every,
    geometric,
    logarithmic,
    preset_named,
)

__all__ = [
    "PRESETS",
    "Preset",
    "Schedule",
    "at",
    "at_no_step",
    "either",
    "every",
    "geometric",
    "logarithmic",
    "preset_named",
]
