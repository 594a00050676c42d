"""What must touch a model: low-rank matrices, watched parameters, gradients."""

from probes.low_rank import LowRankMatrix
from probes.watched import watched_matrices

__all__ = ["LowRankMatrix", "watched_matrices"]
