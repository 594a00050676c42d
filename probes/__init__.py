"""What must touch a model: its matrices, its gradients, and what is measured of it on probe samples."""

from probes.gram import Gram, gradient_gram
from probes.low_rank import LowRankMatrix
from probes.scores import Score, evaluate
from probes.tasks import Task, probe_batches, probe_loss
from probes.transfer import Transfer, transfer
from probes.undisturbed import swapped
from probes.watched import watched_matrices

__all__ = [
    "Gram",
    "LowRankMatrix",
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
