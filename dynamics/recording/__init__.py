"""What is recorded of a training, and when."""

from dynamics.recording.presets import PRESETS, Preset, preset_named
from dynamics.recording.schedules import Schedule, at, at_no_step, either, every, geometric, logarithmic

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
