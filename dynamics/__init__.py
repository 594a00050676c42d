"""What training did to the weights: exact update spectra, a null model beside each number.

Importing the package is cheap: a name brings in torch or matplotlib when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynamics._version import __version__

if TYPE_CHECKING:
    from dynamics import plot
    from dynamics.checkpoints import NotARun, open_trajectory
    from dynamics.fisher import concentration, fisher_measures, task_structure
    from dynamics.pipeline import Options, analyze_run
    from dynamics.recording.callback import DynamicsCallback
    from dynamics.recording.recorder import Recorder
    from dynamics.relate import associate, compare
    from dynamics.spectra.measures import (
        dominant_ratio,
        effective_rank,
        participation_ratio,
        spectral_entropy,
        stable_rank,
    )
    from dynamics.spectra.singular_values import singular_values
    from dynamics.store import open_run

_HOME = {
    "DynamicsCallback": "dynamics.recording.callback",
    "NotARun": "dynamics.checkpoints",
    "Options": "dynamics.pipeline",
    "Recorder": "dynamics.recording.recorder",
    "analyze_run": "dynamics.pipeline",
    "open_run": "dynamics.store",
    "open_trajectory": "dynamics.checkpoints",
    "singular_values": "dynamics.spectra.singular_values",
    "effective_rank": "dynamics.spectra.measures",
    "stable_rank": "dynamics.spectra.measures",
    "participation_ratio": "dynamics.spectra.measures",
    "spectral_entropy": "dynamics.spectra.measures",
    "dominant_ratio": "dynamics.spectra.measures",
    "fisher_measures": "dynamics.fisher",
    "associate": "dynamics.relate",
    "compare": "dynamics.relate",
    "concentration": "dynamics.fisher",
    "task_structure": "dynamics.fisher",
}

__all__ = [
    "DynamicsCallback",
    "NotARun",
    "Options",
    "Recorder",
    "__version__",
    "analyze_run",
    "associate",
    "compare",
    "concentration",
    "dominant_ratio",
    "effective_rank",
    "fisher_measures",
    "open_run",
    "open_trajectory",
    "participation_ratio",
    "plot",
    "singular_values",
    "spectral_entropy",
    "stable_rank",
    "task_structure",
]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("dynamics.plot")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'dynamics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
