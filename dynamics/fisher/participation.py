r"""Participation ratio PR = (tr F)²/tr F² of the Fisher: from pairs of different groups, and its interval.

ln PR is Rényi's entropy of order 2 and the primary statistic for comparing conditions: unlike SE and ρ it can be
estimated with hardly any bias from few samples, and SE ≥ ln PR.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from dynamics.fisher.pairs import Estimate, Labels, jackknifed, pair_means
from dynamics.fisher.ratios import log, ratio


def participation_ratio_plug_in(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, " block"]:
    """(Σλ)²/Σλ² = (tr K)²/‖K‖_F²: PR of the N samples at hand; far below the truth where N is not far above it.

    >>> participation_ratio_plug_in(np.ones((1, 3)))
    array([3.])
    """
    return ratio(eigenvalues.sum(-1) ** 2, (eigenvalues**2).sum(-1))


def log_participation_ratio(gram: Float[np.ndarray, "block sample sample"], labels: Labels) -> Estimate:
    r"""ln PR_U by U-statistics over pairs of different groups,

    .. math:: PR_U = \sum_{ij} K_{ii} K_{jj} \Big/ \sum_{ij} K_{ij}^2 ,

    whose numerator and denominator are unbiased for (tr F)² and tr F². The bias of O(1/groups) of their ratio is
    removed, and the interval made, by the delete-one-group jackknife of ln PR_U, Student's t with groups − 1 degrees
    of freedom.

    Returns:
        Each ``[block, task]``. NaN where a task has fewer than two groups (interval: three), or all pairs are
        orthogonal.

    >>> labels = Labels(np.arange(3), np.ones((3, 1), dtype=bool))
    >>> gram = np.array([[[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]])
    >>> np.exp(log_participation_ratio(gram, labels).estimate).round(6)
    array([[4.]])
    """
    norms = np.diagonal(gram, axis1=1, axis2=2)
    traces = pair_means(norms[:, :, None] * norms[:, None, :], labels)
    squares = pair_means(gram**2, labels)
    # The relative tolerance is that of sums which cancel when a group is left out.
    least = 1e-13 * traces.mean
    estimate = log(ratio(traces.mean, np.where(squares.mean > least, squares.mean, 0.0)))
    left_out = log(ratio(traces.left_out, np.where(squares.left_out > least[:, None], squares.left_out, 0.0)))
    own = np.arange(labels.member.shape[1])
    estimate, left_out = estimate[:, own, own], left_out[:, :, own, own]
    return jackknifed(estimate, left_out, labels.holds, labels.groups)
