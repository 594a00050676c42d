r"""Spectrum of the Fisher F = GᵀG/N from K = GGᵀ, which has the same eigenvalues but for zeros and the factor N.

**Spectral entropy**, in nats: von Neumann's entropy of F/tr F,

.. math:: SE(F) = -\sum_j p_j \ln p_j, \qquad p_j = \lambda_j / \operatorname{tr} F .

From N samples the plug-in value is too small in expectation, and never above ln N; no upper bound without assumptions
exists from N ≪ d samples. Compare at equal N (:mod:`dynamics.fisher.rarefaction`).

**Dominant ratio** ρ = λ_1/tr F. The plug-in is too large, and ρ of directions judged on other samples too small, both
in expectation. In one data set noise moves both the same way: simulated, the two alone hold the truth in 25–99 % of
cases. The interval is therefore widened by the sampling error of the plug-in, and then holds it in at least 95 %.

**Participation ratio** PR = (tr F)²/tr F², from pairs of different groups. ln PR is Rényi's entropy of order 2 and the
primary statistic for comparing conditions: unlike SE and ρ it can be estimated with hardly any bias from few samples,
and SE ≥ ln PR.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Int
from scipy.special import xlogy
from torch import Tensor

from dynamics.fisher.samples import (
    Estimate,
    SampleGroups,
    confidence_interval,
    counted_groups,
    half_splits,
    jackknifed,
    log,
    pair_means,
    pair_means_of_products,
    ratio,
    splits_of,
)
from dynamics.spectra import measures
from dynamics.spectra.measures import entropy_of_direct_sum

#: An eigenvalue may lie below zero by this share of the trace, as rounding in float32 makes it; then it is 0.
_ROUNDING = 1e-4
#: Directions whose eigenvalue is below this share of the largest one are rounding.
RESOLVED = 1e-10
#: Of this many times as many samples, the leading eigenvectors are cheaper by themselves than with all others.
_FEW = 8


def centred(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample sample"]:
    """Return HKH with H = I − 11ᵀ/N, the Gram matrix of the gradients minus their mean ḡ: eig/N are those of F − ḡḡᵀ.

    >>> centred(np.array([[[1.0, 1.0], [1.0, 1.0]]])).tolist()
    [[[0.0, 0.0], [0.0, 0.0]]]
    """
    rows = gram.mean(-1, keepdims=True)
    return gram - rows - rows.swapaxes(1, 2) + gram.mean((1, 2), keepdims=True)


def directional(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample sample"]:
    """Return the cosines K_ij/√(K_ii K_jj), the Gram matrix of gradients g/‖g‖; 0 for a sample without gradient.

    >>> directional(np.array([[[4.0, 1.0], [1.0, 1.0]]]))[0].tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = np.diagonal(gram, axis1=1, axis2=2)
    scale = np.where(norms == 0, 0.0, ratio(1.0, np.sqrt(norms)))
    return gram * scale[:, :, None] * scale[:, None, :]


def per_sample_gram(
    gram: Float[np.ndarray, "block batch batch"], sizes: Sequence[int] | np.ndarray
) -> Float[np.ndarray, "block batch batch"]:
    """Return K' = TKTᵀ, T = diag(√m)(I − 1wᵀ) + 1wᵀ, w = m/Σm, whose spectrum is that of single samples' gradients.

    The mean ḡ of m independent samples has E ḡḡᵀ = Σ/m + μμᵀ: its centred part is m times too weak. T scales that part
    up and keeps the mean. This holds for means of independent samples, not for gradients that were clipped,
    accumulated, or averaged over processes.

    Args:
        gram: K of the micro-batches' mean gradients.
        sizes: Samples in each.

    Raises:
        ValueError: If there is not one size of at least 1 for each micro-batch.

    >>> per_sample_gram(np.eye(2)[None], [1, 1]).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    counts = np.asarray(sizes, dtype=np.float64)
    if counts.shape != gram.shape[-1:] or (counts < 1).any():
        raise ValueError(f"Expected {gram.shape[-1]} micro-batch sizes of at least 1, got {counts.tolist()}.")
    mean = np.broadcast_to(counts / counts.sum(), gram.shape[1:])
    transform = np.sqrt(counts)[:, None] * (np.eye(len(counts)) - mean) + mean
    return transform @ gram @ transform.T


def fisher_eigenvalues(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample"]:
    """Return eig(K)/N, descending, in squared units of the gradient; values below 0 by rounding are 0.

    This is the plug-in spectrum: N samples give at most N values. The largest are too large in expectation, and the
    entropy of all is too small (Anderson 1963; Miller 1955).

    Returns:
        NaN for a block with NaN.

    Raises:
        ValueError: If a matrix is not positive semi-definite.

    >>> fisher_eigenvalues(np.array([[[4.0, 0.0], [0.0, 2.0]]]))
    array([[2., 1.]])
    """
    broken, finite = _finite(gram)
    values = torch.linalg.eigvalsh(torch.tensor(finite)).numpy()
    return _not_negative(values[:, ::-1] / gram.shape[-1], broken)


def fisher_eigenvectors(
    gram: Float[np.ndarray, "block sample sample"],
) -> tuple[Float[np.ndarray, "block sample"], Float[np.ndarray, "block sample sample"]]:
    """Return :func:`fisher_eigenvalues` and the eigenvectors of K in the same order, one a column.

    Column u_j belongs to the direction v_j = Gᵀu_j/√eig_j of parameter space, which is never formed.
    """
    broken, finite = _finite(gram)
    values, vectors = (part.flip(-1).numpy() for part in torch.linalg.eigh(torch.tensor(finite)))
    vectors[broken] = np.nan
    return _not_negative(values / gram.shape[-1], broken), vectors


def leading_eigenvectors(
    gram: Float[np.ndarray, "block sample sample"], count: int
) -> tuple[Float[np.ndarray, "block index"], Float[np.ndarray, "block sample index"]]:
    """Return the first ``count`` of :func:`fisher_eigenvectors`; of many more samples, without computing the rest.

    >>> leading_eigenvectors(np.diag([1.0, 4.0])[None], 1)[0]
    array([[2.]])
    """
    samples = gram.shape[-1]
    if samples < _FEW * count:
        values, vectors = fisher_eigenvectors(gram)
        return values[:, :count], vectors[:, :, :count]
    broken, finite = _finite(gram)
    pairs = [scipy.linalg.eigh(block, subset_by_index=(samples - count, samples - 1)) for block in finite]
    values, vectors = (np.stack(part)[..., ::-1] for part in zip(*pairs, strict=True))
    values, vectors = np.maximum(values / samples, 0.0), vectors.copy()
    values[broken], vectors[broken] = np.nan, np.nan
    return values, vectors


def inverse_roots(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, "block index"]:
    """Return 1/√λ, which scales u_j to a direction of unit length, and 0 for directions that are rounding.

    >>> inverse_roots(np.array([[4.0, 0.0]]))
    array([[0.5, 0. ]])
    """
    resolved = eigenvalues > RESOLVED * eigenvalues[:, :1]
    roots = np.where(resolved, 1 / np.sqrt(np.where(resolved, eigenvalues, 1.0)), 0.0)
    return np.where(np.isnan(eigenvalues), np.nan, roots)


def shares_by_group(
    vectors: Float[np.ndarray, "block sample index"], labels: SampleGroups
) -> Float[np.ndarray, "block group index"]:
    """Return the share of each group in λ_j, Σ u_ij² over its samples i; over all groups it sums to 1.

    λ_j is the mean over samples of their squared projections on v_j, N λ_j u_ij², which are its derivatives with
    respect to the samples' weights (Hellmann–Feynman). So standard errors by the infinitesimal jackknife over groups
    follow from these shares, without the eigenvalues of any sample left out.

    >>> shares_by_group(np.eye(3)[None], SampleGroups.of_one_task(np.array([0, 1, 0])))[0].tolist()
    [[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    """
    codes, group = np.unique(labels.group, return_inverse=True)
    shares = torch.zeros(len(vectors), len(codes), vectors.shape[-1], dtype=torch.float64)
    return shares.index_add_(1, torch.from_numpy(group), torch.from_numpy(vectors).square()).numpy()


def eigenvalue_errors(
    eigenvalues: Float[np.ndarray, "block index"],
    by_group: Float[np.ndarray, "block group index"],
    weight: Float[np.ndarray, " group"],
) -> Float[np.ndarray, "block index"]:
    """Return the standard error of each ln λ_j, by the infinitesimal jackknife over groups.

    The bias of λ_j is not part of it.

    Args:
        eigenvalues: λ_j.
        by_group: As :func:`shares_by_group` returns them.
        weight: Share of the samples in each group.

    Returns:
        NaN for fewer than two groups and for zero eigenvalues.
    """
    groups = len(weight)
    if groups < 2:
        return np.full(eigenvalues.shape, np.nan)
    error = np.sqrt(groups / (groups - 1) * ((by_group - weight[:, None]) ** 2).sum(1))
    return np.where(eigenvalues > RESOLVED * eigenvalues[:, :1], error, np.nan)


def centred_eigenvalues(
    eigenvalues: Float[np.ndarray, "block sample"], vectors: Float[np.ndarray, "block sample sample"]
) -> Float[np.ndarray, "block sample"]:
    r"""Return :func:`fisher_eigenvalues` of :func:`centred` K from the eigenpairs of K, in O(N²).

    They are 0 and the stationary values μ of uᵀKu/N over unit vectors u with Σu_i = 0 (Golub 1973),

    .. math:: g(μ) = \sum_j \frac{z_j^2}{λ_j - μ} = 0, \qquad z_j = \sum_i u_{ij} / \sqrt{N},

    one between each two eigenvalues, where g rises from −∞ to ∞. Each step solves a + b/(λ_j − μ) + c/(λ_{j+1} − μ) = 0
    with the value and the first two derivatives of g (Borges & Gragg 1993), or halves the bracket where that leads out.

    >>> vectors = np.array([[[1.0, 1.0], [1.0, -1.0]]]) / 2**0.5
    >>> centred_eigenvalues(np.array([[3.0, 2.0]]), vectors)
    array([[2., 0.]])
    """
    values = torch.tensor(eigenvalues)
    weight = torch.from_numpy(vectors.mean(1) ** 2 * vectors.shape[1])[:, :, None]
    least = 4 * torch.finfo(values.dtype).eps * values[:, :1]
    roots = (values[:, :-1] + values[:, 1:]) / 2
    lower, upper = values[:, 1:].clone(), values[:, :-1].clone()
    columns = torch.arange(roots.shape[1])
    while len(columns := columns[(upper - lower > least)[:, columns].any(0)]):
        root, above, below = roots[:, columns], upper[:, columns], lower[:, columns]
        inverse = (values[:, None, :] - root[:, :, None]).reciprocal_()
        at = (inverse @ weight)[:, :, 0]
        squares = inverse * inverse
        slope = (squares @ weight)[:, :, 0]
        curve = (squares.mul_(inverse) @ weight)[:, :, 0]
        step = _root_step(at, slope, curve, values[:, columns] - root, values[:, columns + 1] - root)
        below, above = torch.where(at < 0, root, below), torch.where(at < 0, above, root)
        inside = (root + step > below) & (root + step < above)
        nearest = torch.minimum(values[:, columns] - root, root - values[:, columns + 1])
        done = (step.abs() <= 1e-6 * nearest) & inside | (step.abs() <= least)  # the next step is as its cube
        moved = torch.where(inside | done, root + step, (below + above) / 2)
        lower[:, columns], upper[:, columns] = torch.where(done, moved, below), torch.where(done, moved, above)
        roots[:, columns] = moved
    return torch.cat([roots, 0 * values[:, :1]], dim=1).numpy()


def _root_step(at: Tensor, slope: Tensor, curve: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Return s with a + b/(high − s) + c/(low − s) = 0, of which value, slope and half the curvature at 0 are given."""
    first = high * (low * curve - slope) / (low - high)  # b/high²
    second = slope - first
    constant = at - first * high - second * low
    linear = constant * (high + low) + first * high**2 + second * low**2
    size = (linear**2 - 4 * constant * high * low * at).clamp(min=0).sqrt()
    return torch.where(linear > 0, 2 * high * low * at / (linear + size), (linear - size) / (2 * constant))


def _finite(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which blocks are broken, and K with these as 0."""
    broken = np.logical_not(np.isfinite(gram).all((1, 2)))
    return broken, np.where(broken[:, None, None], 0.0, gram) if broken.any() else gram


def _not_negative(values: np.ndarray, broken: np.ndarray) -> np.ndarray:
    size = np.abs(values).sum(-1)
    lowest = ratio(values.min(-1), size)
    if (lowest < -_ROUNDING).any():
        raise ValueError(
            "Expected a positive semi-definite K = GGᵀ, got one with an eigenvalue of "
            f"{np.nanmin(lowest):.2g} of its trace. Give the Gram matrix of gradients, unchanged."
        )
    return np.where(broken[:, None], np.nan, np.maximum(values, 0.0))


def fisher_entropy(eigenvalues: Float[np.ndarray, "*batch index"]) -> np.ndarray:
    """Return SE of each spectrum in nats; NaN for a zero matrix. NaN after the last eigenvalue is padding.

    >>> fisher_entropy(np.array([[1.0, 1.0], [1.0, 0.0]])).round(4).tolist()
    [0.6931, 0.0]
    """
    # Adding 0 makes −0 of a single direction 0.
    return np.asarray(measures.spectral_entropy(torch.from_numpy(np.array(eigenvalues)), "eigenvalue").numpy() + 0.0)


def entropy_error(
    eigenvalues: Float[np.ndarray, "block index"], by_group: Float[np.ndarray, "block group index"]
) -> Float[np.ndarray, " block"]:
    """Return the standard error of the plug-in SE about its expectation at this N, by the infinitesimal jackknife.

    The derivative of SE with respect to λ_j is −(ln p_j + SE)/tr F. The bias of SE, usually larger, is not part of the
    error.

    Args:
        eigenvalues: λ_j.
        by_group: As :func:`shares_by_group` returns them.

    Returns:
        NaN for fewer than two groups.
    """
    groups = by_group.shape[1]
    if groups < 2:
        return np.full(len(eigenvalues), np.nan)
    shares = ratio(eigenvalues, eigenvalues.sum(-1, keepdims=True))
    slope = -(xlogy(shares, shares) + shares * fisher_entropy(eigenvalues)[:, None])
    influence = (by_group @ slope[:, :, None])[:, :, 0]
    return np.sqrt(groups / (groups - 1) * (influence**2).sum(-1))


def normalised_by_sample_rank(entropy: np.ndarray, samples: int, dimension: np.ndarray | float) -> np.ndarray:
    """Return SE/ln min(N, d): 1 if all directions that N samples can show are equally strong; NaN if that is only one.

    An unknown d (NaN) counts as larger than N.

    >>> normalised_by_sample_rank(np.log([2.0]), 4, 10.0)
    array([0.5])
    """
    return ratio(entropy, log(np.fmin(samples, dimension)))


def spectral_entropy_block_diagonal(
    trace: Float[np.ndarray, "*batch block"], entropy: Float[np.ndarray, "*batch block"]
) -> Float[np.ndarray, "*batch"] | np.float64:
    """Return SE of the block-diagonal Fisher, H(w) + Σ w_l SE_l with w_l = tr F_l/Σ tr F, by the exact chain rule.

    It is an upper bound of the SE of the full Fisher, far above it since blocks are correlated, and no substitute.

    Args:
        trace: tr F_l of each block; 0 where it has no gradient.
        entropy: SE of each block in nats; may be NaN where the trace is 0.

    >>> round(float(spectral_entropy_block_diagonal(np.array([1.0, 1.0]), np.array([0.0, 0.0]))), 4)
    0.6931
    """
    return entropy_of_direct_sum(trace, entropy)


def dominant_ratio_plug_in(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, " block"]:
    """Return λ̂_1/Σλ̂: at least ρ in expectation, up to the noise of the trace.

    >>> dominant_ratio_plug_in(np.array([[3.0, 1.0]]))
    array([0.75])
    """
    return ratio(eigenvalues[:, 0], eigenvalues.sum(-1))


def dominant_ratio_noise_reduced(eigenvalues: Float[np.ndarray, "block sample"]) -> Float[np.ndarray, " block"]:
    """Return (λ̂_1 − (tr − λ̂_1)/(N − 1))/tr, the noise reduction of Yata & Aoshima (2012), uncentred.

    For independent samples of similar norms only: with very different norms, or samples in groups, it is too large.

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
    eigenvalues: Float[np.ndarray, "block index"], by_group: Float[np.ndarray, "block group index"]
) -> Float[np.ndarray, " block"]:
    """Return the standard error of ln ρ, plug-in, about its expectation, by the infinitesimal jackknife over groups.

    Args:
        eigenvalues: λ_j.
        by_group: As :func:`shares_by_group` returns them.

    Returns:
        NaN for fewer than two groups or a zero matrix.
    """
    groups = by_group.shape[1]
    if groups < 2:
        return np.full(len(eigenvalues), np.nan)
    shares = ratio(eigenvalues, eigenvalues.sum(-1, keepdims=True))
    influence = by_group[:, :, 0] - (by_group @ shares[:, :, None])[:, :, 0]
    return np.sqrt(groups / (groups - 1) * (influence**2).sum(-1))


def dominant_ratio_interval(
    split: Float[np.ndarray, " block"],
    plug_in: Float[np.ndarray, " block"],
    error: Float[np.ndarray, " block"],
    groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the 95 % interval of ρ: from the split ratio less its sampling error to the plug-in plus its, at most 1.

    Args:
        split, plug_in: As :func:`dominant_ratio_split` and :func:`dominant_ratio_plug_in` return them.
        error: Standard error of ln ρ, as :func:`dominant_ratio_error` returns it.
        groups: Number of groups.
    """
    down, up = confidence_interval(np.zeros_like(error), error, groups)
    return split * np.exp(down), np.minimum(plug_in * np.exp(up), 1.0)


def dominant_ratio_split(
    gram: Float[np.ndarray, "block sample sample"],
    group: Int[np.ndarray, " sample"],
    splits: int | None = None,
    seed: int = 0,
) -> Float[np.ndarray, " block"]:
    """Return the Rayleigh quotient of one half's first direction on the other half over its trace; mean over splits.

    No direction v has vᵀFv above λ_1, and v does not depend on the half that judges it: at most ρ in expectation, up to
    the noise of the trace. That holds for any v, so power iteration finds it well enough.

    Args:
        gram: K.
        group: Group of each sample; groups are never divided.
        splits: Number of random splits; by default :func:`splits_of` the groups.
        seed: Seed of the splits.

    Returns:
        NaN for fewer than two groups.

    >>> dominant_ratio_split(np.ones((1, 4, 4)), np.arange(4))
    array([1.])
    """
    if len(np.unique(group)) < 2:
        return np.full(len(gram), np.nan)
    norms, ratios = np.diagonal(gram, axis1=1, axis2=2), []
    for first, second in half_splits(group, splits or splits_of(group), seed):
        of_first = gram[:, first[:, None], first]
        weights = _leading_vector(of_first)[:, :, None]
        projections = (gram[:, second[:, None], first] @ weights)[:, :, 0]
        length = (weights * (of_first @ weights)).sum((1, 2))
        ratios.append(ratio(ratio((projections**2).mean(-1), length), norms[:, second].mean(-1)))
    return np.mean(ratios, axis=0)


def _leading_vector(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample"]:
    """Return weights u of the samples for which Gᵀu is nearly the leading direction: the largest column of K⁶⁴."""
    power = torch.tensor(gram)
    for _ in range(5):
        power /= power.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
        power = power @ power
    # The diagonal of K⁶⁴ are the squared norms of the rows of K³².
    largest = power.square().sum(-1).argmax(1)
    return (power @ power[torch.arange(len(power)), :, largest, None])[:, :, 0].numpy()


def participation_ratio_plug_in(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, " block"]:
    """Return (Σλ)²/Σλ² = (tr K)²/‖K‖_F², PR of these N samples: far too small unless N is far above the true PR.

    >>> participation_ratio_plug_in(np.ones((1, 3)))
    array([3.])
    """
    return ratio(eigenvalues.sum(-1) ** 2, (eigenvalues**2).sum(-1))


def without_projection(squares: np.ndarray, traces: np.ndarray, projection: int) -> tuple[np.ndarray, np.ndarray]:
    r"""Return means of K_ij² and K_ii K_jj from those of gradients that were randomly projected to k numbers.

    .. math:: E\,\hat K_{ij}^2 = (1 + 1/k) K_{ij}^2 + K_{ii} K_{jj}/k, \qquad
              E\,\hat K_{ii} \hat K_{jj} = K_{ii} K_{jj} + 2 K_{ij}^2/k

    solved for the two. With k = 0, nothing was projected and the means are returned unchanged.

    >>> without_projection(np.array([1.3]), np.array([4.2]), 10)
    (array([0.81481481]), array([4.03703704]))
    """
    if not projection:
        return squares, traces
    exact = (squares - traces / projection) / (1 + 1 / projection - 2 / projection**2)
    return exact, traces - 2 * exact / projection


def log_participation_ratio(
    gram: Float[np.ndarray, "block sample sample"],
    labels: SampleGroups,
    projection: int = 0,
    dimension: Float[np.ndarray, " block"] | float = np.nan,
) -> Estimate:
    r"""Return ln PR_U, by U-statistics over pairs of different groups,

    .. math:: PR_U = \sum_{ij} K_{ii} K_{jj} \Big/ \sum_{ij} K_{ij}^2 ,

    whose numerator and denominator are unbiased for (tr F)² and tr F². The bias of O(1/groups) of their ratio is
    removed, and the interval made, by the delete-one-group jackknife of ln PR_U, Student's t with
    :func:`counted_groups` − 1 degrees of freedom. The interval is cut at 0 and ln d, between which ln PR of any Fisher
    lies; the estimate is not, and stays nearly unbiased.

    Args:
        gram: K, or its estimate from gradients projected to ``projection`` numbers, whose bias is then removed.
        labels: Groups and tasks of the samples.
        projection: k; 0 if nothing was projected.
        dimension: d of each block's gradients. NaN where it is unknown: then only low ends are cut.

    Returns:
        Each ``[block, task]``. NaN where a task has fewer than two groups (interval: three), or all pairs are
        orthogonal.

    >>> labels = SampleGroups.of_one_task(np.arange(3))
    >>> gram = np.array([[[1.0, 0.5, 0.5], [0.5, 1.0, 0.5], [0.5, 0.5, 1.0]]])
    >>> np.exp(log_participation_ratio(gram, labels).estimate).round(6)
    array([[4.]])
    """
    traces = pair_means_of_products(np.diagonal(gram, axis1=1, axis2=2), labels)
    squares = pair_means(gram**2, labels)
    square, trace = without_projection(squares.mean, traces.mean, projection)
    squares_left_out, traces_left_out = without_projection(squares.left_out, traces.left_out, projection)
    # The relative tolerance is that of sums which cancel when a group is left out.
    least = 1e-13 * trace
    estimate = log(ratio(trace, np.where(square > least, square, 0.0)))
    left_out = log(ratio(traces_left_out, np.where(squares_left_out > least[:, None], squares_left_out, 0.0)))
    task = np.arange(labels.member.shape[1])
    estimate, left_out = estimate[:, task, task], left_out[:, :, task, task]
    logarithm = jackknifed(estimate, left_out, labels.holds, counted_groups(gram, labels))
    largest = log(np.where(np.isnan(dimension), np.inf, dimension))[..., None]
    return Estimate(logarithm.estimate, *(np.clip(end, 0.0, largest) for end in (logarithm.low, logarithm.high)))
