r"""Spectral entropy SE of the Fisher and its variants, each under its own name.

.. math:: SE(F) = -\sum_j p_j \ln p_j, \qquad p_j = \lambda_j / \operatorname{tr} F

in nats: von Neumann's entropy of F/tr F. The plug-in value from N samples lies below the truth in expectation, and
never above ln N; no upper bound without assumptions exists from N ≪ d samples. Compare at equal N (``rarefaction``).
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import xlogy

from dynamics.fisher.ratios import log, ratio
from dynamics.spectra import measures
from dynamics.spectra.aggregate import entropy_of_direct_sum


def spectral_entropy(eigenvalues: Float[np.ndarray, "*batch index"]) -> np.ndarray:
    """SE in nats of each spectrum; NaN for a zero matrix. NaN after the last eigenvalue is padding.

    >>> spectral_entropy(np.array([[1.0, 1.0], [1.0, 0.0]])).round(4).tolist()
    [0.6931, 0.0]
    """
    # Adding 0 makes −0 of a single direction 0.
    return np.asarray(measures.spectral_entropy(torch.from_numpy(np.array(eigenvalues)), "eigenvalue").numpy() + 0.0)


def entropy_error(
    eigenvalues: Float[np.ndarray, "block sample"],
    vectors: Float[np.ndarray, "block sample sample"],
    membership: Float[np.ndarray, "sample group"],
) -> Float[np.ndarray, " block"]:
    """Standard error of the plug-in SE about its own expectation at this N, by the infinitesimal jackknife over groups.

    The derivative of SE with respect to λ_j is −(ln p_j + SE)/tr F, that of λ_j with respect to a sample's weight its
    squared projection. The bias of SE, usually larger, is not part of it.

    Returns:
        NaN for fewer than two groups.
    """
    groups = membership.shape[1]
    if groups < 2:
        return np.full(len(eigenvalues), np.nan)
    shares = ratio(eigenvalues, eigenvalues.sum(-1, keepdims=True))
    slope = -(xlogy(shares, shares) + shares * spectral_entropy(eigenvalues)[:, None])
    influence = (membership.T @ (vectors**2 @ slope[:, :, None]))[:, :, 0]
    return np.sqrt(groups / (groups - 1) * (influence**2).sum(-1))


def normalised_by_sample_rank(entropy: np.ndarray, samples: int, dimension: np.ndarray | float) -> np.ndarray:
    """SE/ln min(N, d): 1 if all directions that N samples can show are equally strong. NaN where that is one direction.

    An unknown d (NaN) counts as larger than N.

    >>> normalised_by_sample_rank(np.log([2.0]), 4, 10.0)
    array([0.5])
    """
    return ratio(entropy, log(np.fmin(samples, dimension)))


def spectral_entropy_block_diagonal(
    trace: Float[np.ndarray, "*batch block"], entropy: Float[np.ndarray, "*batch block"]
) -> Float[np.ndarray, "*batch"] | np.float64:
    """SE of the block-diagonal Fisher, H(w) + Σ w_l SE_l with w_l = tr F_l/Σ tr F, by the exact chain rule.

    An upper bound of the SE of the whole Fisher, and far from it (blocks are correlated): not a substitute.

    Args:
        trace: tr F_l of each block; 0 where it has no gradient.
        entropy: SE of each block in nats; may be NaN where the trace is 0.

    >>> round(float(spectral_entropy_block_diagonal(np.array([1.0, 1.0]), np.array([0.0, 0.0]))), 4)
    0.6931
    """
    return entropy_of_direct_sum(trace, entropy)


def spectral_entropy_diagonal(mean_squares: Float[np.ndarray, "*batch parameter"]) -> np.ndarray:
    """Entropy of the Fisher's diagonal, −Σ p ln p with p = diag F/tr F, in nats.

    It depends on the basis, is at least SE (Schur–Horn), and is no function of K: it needs the mean squared gradient of
    each parameter. Many published "Fisher entropies" of large models are this one.

    >>> spectral_entropy_diagonal(np.array([1.0, 1.0])).round(4).item()
    0.6931
    """
    return spectral_entropy(mean_squares)
