"""What must touch a model: low-rank matrices, watched parameters, gradients."""

from probes.low_rank import LowRankMatrix

__all__ = ["LowRankMatrix"]
