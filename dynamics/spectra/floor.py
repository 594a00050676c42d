r"""What of a dense update stands above the rounding of its storage.

The difference of two stored weights carries rounding noise, nearly independent between entries. Rows and columns of
different scale carry noise of different size, so noise alone would have singular values up to the edge

.. math:: \sqrt{\max_i \textstyle\sum_j v_{ij}} + \sqrt{\max_j \textstyle\sum_i v_{ij}}

with v the predicted variance of each entry (:class:`dynamics.spectra.rounding.NoiseProfile`). What is beyond the edge
is counted. Noise of mean variance ν adds about ν·max(out, in) to each σ², so the entropy is that of σ² − ν·max(out, in)
over the σ beyond the edge. The edge is conservative: weak directions can lie below it. Noise is over-predicted where
most entries did not change at all. A product of rounded factors has no such noise, and NaN here.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import xlogy

DEFINITIONS = {
    "rounding_edge": "√(largest row sum of v) + √(largest column sum of v), v = ulp²/12 of the stored weights; of "
    "dense matrices, NaN for factors",
    "rank_above_rounding": "number of σ > rounding_edge; of dense matrices, NaN for factors",
    "entropy_energy_above_rounding": "−Σ p ln p over σ > rounding_edge, p ∝ σ² − mean v·max(out, in); NaN where "
    "nothing is left",
    "effective_rank_energy_above_rounding": "exp(entropy_energy_above_rounding)",
}


def above_rounding(
    values: Float[np.ndarray, "step kind matrix index"],
    edge: Float[np.ndarray, "step kind matrix"],
    noise: Float[np.ndarray, "step kind matrix"],
    shortest: Float[np.ndarray, " matrix"],
) -> dict[str, Float[np.ndarray, "step kind matrix"]]:
    """Return the four numbers by name.

    Args:
        values: Singular values, padded with NaN.
        edge: Largest singular value of the rounding noise alone; NaN where it is unknown, and so is everything else.
        noise: Predicted energy of the rounding.
        shortest: min(out, in).

    >>> above = above_rounding(np.array([[[[5.0, 1.0]]]]), np.full((1, 1, 1), 3.0), np.ones((1, 1, 1)), np.array([2.0]))
    >>> above["rank_above_rounding"].item(), above["entropy_energy_above_rounding"].item()
    (1.0, -0.0)
    """
    known = np.isfinite(values).any(-1) & np.isfinite(edge)
    beyond = values > edge[..., None]
    # ν·max(out, in) = noise/min(out, in)
    energy = np.where(beyond, np.maximum(values**2 - (noise / shortest)[..., None], 0.0), 0.0)
    total = energy.sum(-1)
    share = np.divide(energy, total[..., None], out=np.zeros_like(energy), where=total[..., None] > 0)
    entropy = np.where(known & (total > 0), -xlogy(share, share).sum(-1), np.nan)
    return {
        "rounding_edge": np.where(known, edge, np.nan),
        "rank_above_rounding": np.where(known, beyond.sum(-1), np.nan),
        "entropy_energy_above_rounding": entropy,
        "effective_rank_energy_above_rounding": np.exp(entropy),
    }
