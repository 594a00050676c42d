r"""Participation ratio PR = (tr F)²/tr F² of the Fisher: from pairs of different groups, and its interval.

ln PR is Rényi's entropy of order 2 and the primary statistic for comparing conditions: unlike SE and ρ it can be
estimated with hardly any bias from few samples, and SE ≥ ln PR.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from dynamics.fisher.pairs import Estimate, Labels, counted_groups, jackknifed, pair_means
from dynamics.fisher.ratios import log, ratio


def participation_ratio_plug_in(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, " block"]:
    """(Σλ)²/Σλ² = (tr K)²/‖K‖_F²: PR of the N samples at hand; far below the truth where N is not far above it.

    >>> participation_ratio_plug_in(np.ones((1, 3)))
    array([3.])
    """
    return ratio(eigenvalues.sum(-1) ** 2, (eigenvalues**2).sum(-1))


def without_projection(squares: np.ndarray, traces: np.ndarray, projection: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Means of K_ij² and K_ii K_jj from those of gradients that were randomly projected to k numbers.

    .. math:: E\,\hat K_{ij}^2 = (1 + 1/k) K_{ij}^2 + K_{ii} K_{jj}/k, \qquad
              E\,\hat K_{ii} \hat K_{jj} = K_{ii} K_{jj} + 2 K_{ij}^2/k

    solved for the two. As they are where k is 0: nothing was projected.

    >>> without_projection(np.array([1.3]), np.array([4.2]), 10)
    (array([0.81481481]), array([4.03703704]))
    """
    if not projection:
        return squares, traces
    own = (squares - traces / projection) / (1 + 1 / projection - 2 / projection**2)
    return own, traces - 2 * own / projection


def log_participation_ratio(
    gram: Float[np.ndarray, "block sample sample"], labels: Labels, projection: int = 0
) -> Estimate:
    r"""ln PR_U by U-statistics over pairs of different groups,

    .. math:: PR_U = \sum_{ij} K_{ii} K_{jj} \Big/ \sum_{ij} K_{ij}^2 ,

    whose numerator and denominator are unbiased for (tr F)² and tr F². The bias of O(1/groups) of their ratio is
    removed, and the interval made, by the delete-one-group jackknife of ln PR_U, Student's t with
    :func:`counted_groups` − 1 degrees of freedom.

    Args:
        gram: K, or its estimate from gradients projected to ``projection`` numbers, whose bias is then taken out.
        labels: Tasks and groups.
        projection: k; 0 if nothing was projected.

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
    mean, whole = without_projection(squares.mean, traces.mean, projection)
    mean_left_out, whole_left_out = without_projection(squares.left_out, traces.left_out, projection)
    # The relative tolerance is that of sums which cancel when a group is left out.
    least = 1e-13 * whole
    estimate = log(ratio(whole, np.where(mean > least, mean, 0.0)))
    left_out = log(ratio(whole_left_out, np.where(mean_left_out > least[:, None], mean_left_out, 0.0)))
    own = np.arange(labels.member.shape[1])
    estimate, left_out = estimate[:, own, own], left_out[:, :, own, own]
    return jackknifed(estimate, left_out, labels.holds, counted_groups(gram, labels))
