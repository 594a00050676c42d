r"""What of a dense update stands above the rounding of its storage.

The difference of two stored weights carries rounding noise, nearly independent between entries, of variance ν (its
predicted energy over out·in). Noise alone would have singular values up to

.. math:: \sqrt{\nu}\,(\sqrt{out} + \sqrt{in})

(Marchenko & Pastur 1967; the edge), and adds about ν·max(out, in) to each σ². What is beyond the edge is counted, and
entropies are those of σ² − ν·max(out, in), cut at 0. Noise is over-predicted where most entries did not change at all.
A product of rounded factors has no such noise, and NaN here.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import xlogy

DEFINITIONS = {
    "rounding_edge": "√ν(√out + √in), ν = predicted rounding energy/(out·in); of dense matrices, NaN for factors",
    "rank_above_rounding": "number of σ > rounding_edge; of dense matrices, NaN for factors",
    "entropy_energy_above_rounding": "−Σ p ln p, p ∝ max(σ² − ν·max(out, in), 0); NaN where nothing is left",
    "effective_rank_energy_above_rounding": "exp(entropy_energy_above_rounding)",
}


def above_rounding(
    values: Float[np.ndarray, "step kind matrix index"],
    noise: Float[np.ndarray, "step kind matrix"],
    out: Float[np.ndarray, " matrix"],
    in_: Float[np.ndarray, " matrix"],
) -> dict[str, Float[np.ndarray, "step kind matrix"]]:
    """The four numbers by name.

    Args:
        values: Singular values, padded with NaN.
        noise: Predicted energy of the rounding; NaN where there is no prediction, and nothing is said.
        out, in_: Dimensions.

    >>> found = above_rounding(np.array([[[[5.0, 1.0]]]]), np.array([[[4.0]]]), np.array([2.0]), np.array([2.0]))
    >>> found["rounding_edge"].item().__round__(3), found["rank_above_rounding"].item()
    (2.828, 1.0)
    """
    variance = noise / (out * in_)
    edge = np.sqrt(variance) * (np.sqrt(out) + np.sqrt(in_))
    known = np.isfinite(values).any(-1) & np.isfinite(edge)
    count = (values > edge[..., None]).sum(-1)
    energy = np.nan_to_num(np.maximum(values**2 - (variance * np.maximum(out, in_))[..., None], 0.0))
    total = energy.sum(-1)
    share = np.divide(energy, total[..., None], out=np.zeros_like(energy), where=total[..., None] > 0)
    entropy = np.where(known & (total > 0), -xlogy(share, share).sum(-1), np.nan)
    return {
        "rounding_edge": np.where(known, edge, np.nan),
        "rank_above_rounding": np.where(known, count, np.nan),
        "entropy_energy_above_rounding": entropy,
        "effective_rank_energy_above_rounding": np.exp(entropy),
    }
