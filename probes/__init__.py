"""What must touch a model: its matrices, its gradients, and what is measured of it on probe samples."""

import warnings
from typing import Any

from probes.gram import ProbeGram, gradient_gram
from probes.low_rank import LowRankMatrix
from probes.scores import Score, evaluate
from probes.tasks import Task, probe_batches, probe_loss
from probes.transfer import Transfer, transfer
from probes.undisturbed import swapped
from probes.watched import watched_matrices

__all__ = [
    "LowRankMatrix",
    "ProbeGram",
    "Score",
    "Task",
    "Transfer",
    "evaluate",
    "gradient_gram",
    "probe_batches",
    "probe_loss",
    "swapped",
    "transfer",
    "watched_matrices",
]


def __getattr__(name: str) -> Any:
    if name == "Gram":
        warnings.warn("probes.Gram is deprecated; it is called probes.ProbeGram.", DeprecationWarning, stacklevel=2)
        return ProbeGram
    raise AttributeError(f"module 'probes' has no attribute {name!r}")
