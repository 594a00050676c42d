"""Inner products of per-sample gradients: what every statistic of a Fisher matrix is a function of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

#: Name of the block of all trainable parameters together.
GLOBAL = "global"


@dataclass(frozen=True)
class Gram:
    """K = GGᵀ of per-sample gradients G ``(N, d)``, unnormalised: the Fisher's eigenvalues are eig(K)/N.

    Args:
        gram: Block → K ``(N, N)``, float64, on the host. Blocks are the watched matrices by name, every other trainable
            parameter by name, and ``global``, their sum.
        update_product: Block → b = Gδ ``(N,)``; empty without an update.
        update_norm_squared: Block → ‖δ‖² of the part inside the space; empty without an update.
        share_outside_space: Block → share of ‖δ‖² that the space does not hold; NaN where nothing was changed.
        dimension: Block → d, the dimension of the space.
        losses: ``(N,)``, of each sample, in nats.
        covered_share: Share of the trainable numbers that belong to a block: 1, unless blocks were chosen.
        uncovered: Names of trainable parameters that belong to none.
        space: ``"tangent"``, ``"factor"`` or ``"weight"``.
        fisher: ``"empirical"`` or ``"sampled"``.
        one_by_one: Names of parameters whose gradients took a backward pass for each sample.
        projection: k, if gradients were randomly projected to so many numbers: K is an estimate then. 0 if not.
        left_out: Numbers of samples that were left out, because their loss or gradient was not finite.
    """

    gram: Mapping[str, Float[Tensor, "n n"]]
    update_product: Mapping[str, Float[Tensor, " n"]]
    update_norm_squared: Mapping[str, float]
    share_outside_space: Mapping[str, float]
    dimension: Mapping[str, int]
    losses: Float[Tensor, " n"]
    covered_share: float
    uncovered: tuple[str, ...]
    space: str
    fisher: str
    one_by_one: tuple[str, ...] = ()
    left_out: tuple[int, ...] = field(default=())
    projection: int = 0
