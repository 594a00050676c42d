r"""Eigenvalues of the Fisher matrix F = GᵀG/N from K = GGᵀ: both have the same, but for zeros and the factor N.

Spectral entropy SE of the Fisher and its variants, each under its own name.

.. math:: SE(F) = -\sum_j p_j \ln p_j, \qquad p_j = \lambda_j / \operatorname{tr} F

in nats: von Neumann's entropy of F/tr F. The plug-in value from N samples lies below the truth in expectation, and
never above ln N; no upper bound without assumptions exists from N ≪ d samples. Compare at equal N (``rarefaction``).

The dominant ratio ρ = λ_1/tr F: an interval that holds, and a point estimate for independent samples.

Plug-in ρ is too large and ρ of directions judged on other samples too small, both in expectation. In one data set noise
moves both the same way: simulated, the two alone hold the truth in 25–99 % of cases. The interval is therefore widened
by the sampling error of the plug-in, and then holds it in at least 95 %.

Participation ratio PR = (tr F)²/tr F² of the Fisher: from pairs of different groups, and its interval.

ln PR is Rényi's entropy of order 2 and the primary statistic for comparing conditions: unlike SE and ρ it can be
estimated with hardly any bias from few samples, and SE ≥ ln PR.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.special import xlogy

from dynamics.fisher.samples import (
    SPLITS,
    Estimate,
    Labels,
    counted_groups,
    half_splits,
    interval,
    jackknifed,
    log,
    pair_means,
    ratio,
)
from dynamics.spectra import measures
from dynamics.spectra.measures import entropy_of_direct_sum

#: An eigenvalue may lie below zero by this share of the trace, as rounding in float32 makes it; then it is 0.
_ROUNDING = 1e-4
#: Directions whose eigenvalue is below this share of the largest one are rounding.
RESOLVED = 1e-10


def centred(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample sample"]:
    """HKH with H = I − 11ᵀ/N: the Gram matrix of the gradients minus their mean, so that eig/N are those of F − ḡḡᵀ.

    >>> centred(np.array([[[1.0, 1.0], [1.0, 1.0]]])).tolist()
    [[[0.0, 0.0], [0.0, 0.0]]]
    """
    rows = gram.mean(-1, keepdims=True)
    return gram - rows - rows.swapaxes(1, 2) + gram.mean((1, 2), keepdims=True)


def directional(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample sample"]:
    """K_ij/√(K_ii K_jj), the cosines: the Gram matrix of gradients g/‖g‖. A sample without gradient stays without.

    >>> directional(np.array([[[4.0, 1.0], [1.0, 1.0]]]))[0].tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = np.diagonal(gram, axis1=1, axis2=2)
    scale = np.where(norms == 0, 0.0, ratio(1.0, np.sqrt(norms)))
    return gram * scale[:, :, None] * scale[:, None, :]


def fisher_eigenvalues(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample"]:
    """eig(K)/N, descending, in squared units of the gradient; negative rounding is 0.

    The plug-in spectrum: of N samples, at most N values. The largest are too large in expectation and the entropy of
    all is too small (Anderson 1963; Miller 1955).

    Returns:
        NaN for a block with NaN.

    Raises:
        ValueError: If a matrix is not positive semi-definite.

    >>> fisher_eigenvalues(np.array([[[4.0, 0.0], [0.0, 2.0]]]))
    array([[2., 1.]])
    """
    broken, whole = _whole(gram)
    return _not_negative(np.linalg.eigvalsh(whole)[:, ::-1] / gram.shape[-1], broken)


def fisher_eigenvectors(
    gram: Float[np.ndarray, "block sample sample"],
) -> tuple[Float[np.ndarray, "block sample"], Float[np.ndarray, "block sample sample"]]:
    """:func:`fisher_eigenvalues` and the eigenvectors of K, one a column, in the same order.

    Column u_j belongs to the direction v_j = Gᵀu_j/√eig_j of parameter space, which is never formed.
    """
    broken, whole = _whole(gram)
    values, vectors = np.linalg.eigh(whole)
    vectors = np.where(broken[:, None, None], np.nan, vectors[:, :, ::-1])
    return _not_negative(values[:, ::-1] / gram.shape[-1], broken), vectors


def inverse_roots(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, "block index"]:
    """1/√λ, and 0 for directions that are rounding: what scales u_j to a direction of unit length.

    >>> inverse_roots(np.array([[4.0, 0.0]]))
    array([[0.5, 0. ]])
    """
    kept = eigenvalues > RESOLVED * eigenvalues[:, :1]
    roots = np.where(kept, 1 / np.sqrt(np.where(kept, eigenvalues, 1.0)), 0.0)
    return np.where(np.isnan(eigenvalues), np.nan, roots)


def eigenvalue_errors(
    eigenvalues: Float[np.ndarray, "block sample"],
    vectors: Float[np.ndarray, "block sample sample"],
    membership: Float[np.ndarray, "sample group"],
) -> Float[np.ndarray, "block sample"]:
    """Standard error of each ln λ_j, by the infinitesimal jackknife over groups.

    λ_j is the mean over samples of their squared projections on v_j, N λ_j u_ij²; its derivative with respect to a
    sample's weight is that projection (Hellmann–Feynman). The bias of λ_j is not part of it.

    Returns:
        NaN for fewer than two groups and for zero eigenvalues.
    """
    groups = membership.shape[1]
    if groups < 2:
        return np.full(eigenvalues.shape, np.nan)
    share = membership.T @ vectors**2  # of λ_j, by group; they sum to 1
    weight = membership.sum(0) / len(membership)
    error = np.sqrt(groups / (groups - 1) * ((share - weight[:, None]) ** 2).sum(1))
    return np.where(eigenvalues > RESOLVED * eigenvalues[:, :1], error, np.nan)


def _whole(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    broken = np.array([not np.isfinite(block).all() for block in gram])
    return broken, np.where(broken[:, None, None], 0.0, gram)


def _not_negative(values: np.ndarray, broken: np.ndarray) -> np.ndarray:
    size = np.abs(values).sum(-1)
    lowest = ratio(values.min(-1), size)
    if (lowest < -_ROUNDING).any():
        raise ValueError(
            "Expected a positive semi-definite K = GGᵀ, got one with an eigenvalue of "
            f"{np.nanmin(lowest):.2g} of its trace. Give the Gram matrix of gradients, unchanged."
        )
    return np.where(broken[:, None], np.nan, np.maximum(values, 0.0))


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


def dominant_ratio_plug_in(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, " block"]:
    """λ̂_1/Σλ̂: at least ρ in expectation, up to the noise of the trace.

    >>> dominant_ratio_plug_in(np.array([[3.0, 1.0]]))
    array([0.75])
    """
    return ratio(eigenvalues[:, 0], eigenvalues.sum(-1))


def dominant_ratio_noise_reduced(eigenvalues: Float[np.ndarray, "block sample"]) -> Float[np.ndarray, " block"]:
    """(λ̂_1 − (tr − λ̂_1)/(N − 1))/tr: noise reduction of Yata & Aoshima (2012), uncentred.

    For independent samples of similar norms only: with norms that vary much or samples in groups it is too large.

    Returns:
        NaN for fewer than two samples.

    >>> dominant_ratio_noise_reduced(np.array([[4.0, 1.0, 1.0]]))
    array([0.5])
    """
    samples, total = eigenvalues.shape[-1], eigenvalues.sum(-1)
    if samples < 2:
        return np.full(len(eigenvalues), np.nan)
    return ratio(eigenvalues[:, 0] - (total - eigenvalues[:, 0]) / (samples - 1), total)


def dominant_ratio_error(
    eigenvalues: Float[np.ndarray, "block sample"],
    vectors: Float[np.ndarray, "block sample sample"],
    membership: Float[np.ndarray, "sample group"],
) -> Float[np.ndarray, " block"]:
    """Standard error of ln of the plug-in ρ about its own expectation, by the infinitesimal jackknife over groups.

    Returns:
        NaN for fewer than two groups or a zero matrix.
    """
    groups = membership.shape[1]
    if groups < 2:
        return np.full(len(eigenvalues), np.nan)
    shares = ratio(eigenvalues, eigenvalues.sum(-1, keepdims=True))
    by_group = membership.T @ vectors**2  # of each λ_j
    influence = by_group[:, :, 0] - (by_group @ shares[:, :, None])[:, :, 0]
    return np.sqrt(groups / (groups - 1) * (influence**2).sum(-1))


def dominant_ratio_interval(
    split: Float[np.ndarray, " block"],
    plug_in: Float[np.ndarray, " block"],
    error: Float[np.ndarray, " block"],
    groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of ρ: from the split ratio less its sampling error to the plug-in ratio plus its, at most 1.

    Args:
        split, plug_in: As :func:`dominant_ratio_split` and :func:`dominant_ratio_plug_in` return them.
        error: Standard error of ln ρ, as :func:`dominant_ratio_error` returns it.
        groups: Number of groups.
    """
    down, up = interval(np.zeros_like(error), error, groups)
    return split * np.exp(down), np.minimum(plug_in * np.exp(up), 1.0)


def dominant_ratio_split(
    gram: Float[np.ndarray, "block sample sample"],
    group: Int[np.ndarray, " sample"],
    splits: int = SPLITS,
    seed: int = 0,
) -> Float[np.ndarray, " block"]:
    """Rayleigh quotient of one half's first direction on the other half, over that half's trace; mean over splits.

    No direction v has vᵀFv above λ_1, and v does not depend on the half that judges it: at most ρ in expectation, up to
    the noise of the trace. That holds for any v, so power iteration finds it well enough.

    Returns:
        NaN for fewer than two groups.

    >>> dominant_ratio_split(np.ones((1, 4, 4)), np.arange(4))
    array([1.])
    """
    if len(np.unique(group)) < 2:
        return np.full(len(gram), np.nan)
    found = []
    for first, second in half_splits(group, splits, seed):
        weights = _leading_vector(gram[:, first[:, None], first])
        projections = gram[:, second[:, None], first] @ weights[:, :, None]
        length = (weights[:, None, :] @ gram[:, first[:, None], first] @ weights[:, :, None])[:, 0, 0]
        along = ratio((projections[:, :, 0] ** 2).mean(-1), length)
        trace = np.trace(gram[:, second[:, None], second], axis1=1, axis2=2) / len(second)
        found.append(ratio(along, trace))
    return np.mean(found, axis=0)


def _leading_vector(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample"]:
    """Weights u of the samples for which Gᵀu is nearly the leading direction: the largest column of K⁶⁴."""
    power = gram
    for _ in range(6):
        size = np.trace(power, axis1=1, axis2=2)[:, None, None]
        power = ratio(power, size)
        power = power @ power
    largest = np.diagonal(power, axis1=1, axis2=2).argmax(1)
    return power[np.arange(len(power)), :, largest]


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
