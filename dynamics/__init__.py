"""What training did to the weights: exact update spectra, with a null model beside each number.

Importing the package is cheap: a name brings in torch or matplotlib when it is first used.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from typing import TYPE_CHECKING, Any

from dynamics._version import __version__ as __version__

if TYPE_CHECKING:
    from dynamics import plot as plot
    from dynamics.checkpoints import NotARun as NotARun
    from dynamics.checkpoints import open_trajectory as open_trajectory
    from dynamics.fisher import concentration as concentration
    from dynamics.fisher import fisher_measures as fisher_measures
    from dynamics.fisher import task_structure as task_structure
    from dynamics.intervention.counterfactuals import counterfactuals as counterfactuals
    from dynamics.intervention.dataset import intervene as intervene
    from dynamics.intervention.sensitivity import sensitivity as sensitivity
    from dynamics.intervention.sharpness import critical_sharpness as critical_sharpness
    from dynamics.pipeline import analyze_run as analyze_run
    from dynamics.recording.callback import DynamicsCallback as DynamicsCallback
    from dynamics.recording.callback import ProjectedUpdates as ProjectedUpdates
    from dynamics.recording.recorder import Recorder as Recorder
    from dynamics.relate import associate as associate
    from dynamics.relate import choose_checkpoint as choose_checkpoint
    from dynamics.relate import compare as compare
    from dynamics.relate import compare_scores as compare_scores
    from dynamics.spectra.measures import dominant_ratio as dominant_ratio
    from dynamics.spectra.measures import effective_rank as effective_rank
    from dynamics.spectra.measures import participation_ratio as participation_ratio
    from dynamics.spectra.measures import spectral_entropy as spectral_entropy
    from dynamics.spectra.measures import stable_rank as stable_rank
    from dynamics.spectra.singular_values import singular_values as singular_values
    from dynamics.store import open_run as open_run

#: Public name -> the module that it comes from.
_HOME = {
    "DynamicsCallback": "dynamics.recording.callback",
    "NotARun": "dynamics.checkpoints",
    "ProjectedUpdates": "dynamics.recording.callback",
    "Recorder": "dynamics.recording.recorder",
    "analyze_run": "dynamics.pipeline",
    "associate": "dynamics.relate",
    "choose_checkpoint": "dynamics.relate",
    "compare": "dynamics.relate",
    "compare_scores": "dynamics.relate",
    "concentration": "dynamics.fisher",
    "counterfactuals": "dynamics.intervention.counterfactuals",
    "critical_sharpness": "dynamics.intervention.sharpness",
    "dominant_ratio": "dynamics.spectra.measures",
    "effective_rank": "dynamics.spectra.measures",
    "fisher_measures": "dynamics.fisher",
    "intervene": "dynamics.intervention.dataset",
    "open_run": "dynamics.store",
    "open_trajectory": "dynamics.checkpoints",
    "participation_ratio": "dynamics.spectra.measures",
    "sensitivity": "dynamics.intervention.sensitivity",
    "singular_values": "dynamics.spectra.singular_values",
    "spectral_entropy": "dynamics.spectra.measures",
    "stable_rank": "dynamics.spectra.measures",
    "task_structure": "dynamics.fisher",
}

__all__ = ["__version__", "plot", *_HOME]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "plot":
        return import_module("dynamics.plot")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    if name == "Options":
        message = (
            "dynamics.Options is deprecated and will be removed in the next release; pass keywords to analyze_run."
        )
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return import_module("dynamics.pipeline").Options
    raise AttributeError(f"module 'dynamics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
