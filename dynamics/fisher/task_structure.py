r"""How tasks share or contest directions, from K and the task of each sample.

Products are means over pairs of samples of different groups. With ⟨μ_s, μ_t⟩ the mean of K_ij and tr F_sF_t that of
K_ij² over such pairs, noise adds to neither. Means over all pairs, diagonal included, would make norms too large and
cosines too small: with 16 samples a task a true cosine of 0.6 typically reads 0.1.

**Divergence.** Is a low spectral entropy concentration within tasks, or tasks that share their directions? With
f_s = F_s/tr F_s and w_s = tr K_ss/tr K the pooled Fisher is a mixture, F/tr F = Σ w_s f_s, and

.. math:: SE(F) = \sum_s w_s\, SE(f_s) + χ, \qquad 0 \le χ \le H(w).

χ is Holevo's quantity, the quantum Jensen–Shannon divergence (Briët & Harremoës 2009): 0 if all tasks have the same
normalised Fisher, H(w) if no direction is shared. Plug-in χ is too large at small N. Permuted labels give the band of χ
for equal Fishers, once tasks' gradients are made equally large (:func:`divergence_test`). The band is never subtracted:
it holds for equal Fishers only, and of disjoint tasks it would take two thirds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import xlogy

from dynamics.fisher.samples import (
    MOST_SAMPLES,
    Estimate,
    SampleGroups,
    confidence_interval,
    counted_groups,
    diagonal_means,
    jackknife_error,
    jackknifed,
    log,
    pair_means,
    pair_means_of_products,
    ratio,
    root,
)
from dynamics.fisher.spectrum import fisher_eigenvalues, fisher_entropy


@dataclass(frozen=True)
class Cosines:
    """Cosines of tasks' mean gradients, ``[block, task, task]``.

    Args:
        cosine: Unbiased, with its interval; NaN where unresolved.
        raw: Cosine of the plain means, attenuated by noise.
        magnitude_similarity: 2‖μ_s‖‖μ_t‖/(‖μ_s‖² + ‖μ_t‖²) (Yu et al. 2020), of resolved norms.
        unresolved: Whether the interval of ‖μ‖² of one of the two reaches 0, or does not exist.
    """

    cosine: Estimate
    raw: np.ndarray
    magnitude_similarity: np.ndarray
    unresolved: np.ndarray


def _pairwise(labels: SampleGroups) -> tuple[np.ndarray, np.ndarray]:
    """Return which groups a pair of tasks depends on, and the smaller number of groups of the two."""
    holds = labels.holds
    return holds[:, :, None] | holds[:, None, :], np.minimum(labels.groups[:, None], labels.groups[None])


def _norms(products: np.ndarray) -> np.ndarray:
    return np.diagonal(products, axis1=-2, axis2=-1)


def _cosine(products: np.ndarray) -> np.ndarray:
    norms = _norms(products)
    return products * root(ratio(1.0, norms))[..., :, None] * root(ratio(1.0, norms))[..., None, :]


def cosines(gram: Float[np.ndarray, "block sample sample"], labels: SampleGroups) -> Cosines:
    """Return the cosines ⟨μ_s, μ_t⟩/(‖μ_s‖‖μ_t‖) of mean gradients, with unbiased products and norms.

    A task's mean gradient is resolved if the interval of its ‖μ‖² lies above 0. A cosine with an unresolved mean has no
    bounded interval (Fieller 1954) and is NaN. Estimate and interval (delete-one-group jackknife) are cut at ±1.
    """
    products = pair_means(gram, labels)
    relevant, groups = _pairwise(labels)
    norms, norms_without = _norms(products.mean), _norms(products.left_out)
    lowest, _ = confidence_interval(norms, jackknife_error(norms_without, labels.holds), labels.groups)
    resolved = lowest > 0
    both = resolved[:, :, None] & resolved[:, None, :]
    same = np.eye(labels.member.shape[1], dtype=bool)
    cosine = jackknifed(_cosine(products.mean), _cosine(products.left_out), relevant, groups)
    estimate, low, high = (
        np.where(both, np.where(same, 1.0, np.clip(part, -1, 1)), np.nan)
        for part in (cosine.estimate, cosine.low, cosine.high)
    )
    means = labels.member / labels.samples
    sizes = root(norms)
    similarity = ratio(2 * sizes[:, :, None] * sizes[:, None, :], norms[:, :, None] + norms[:, None, :])
    raw = _cosine(means.T @ gram @ means)
    missing = np.isnan(estimate) | np.isnan(low) | np.isnan(high)
    return Cosines(
        Estimate(np.where(missing, np.nan, estimate), low, high), raw, np.where(both, similarity, np.nan), missing
    )


def simultaneous_interval(cosine: float, low: float, high: float, groups: int, pairs: int) -> tuple[float, float]:
    """Return the ends of a cosine's interval that hold with 95 % for so many pairs of tasks together (Bonferroni).

    Args:
        cosine, low, high: With the ends of its own 95 % interval, of Student's t.
        groups: Smaller number of groups of the two tasks.
        pairs: Pairs whose cosines are compared with 0.

    >>> low, high = simultaneous_interval(0.3, 0.1, 0.5, 20, 6)
    >>> round(low, 3), round(high, 3)
    (0.019, 0.581)
    >>> simultaneous_interval(0.3, 0.1, 0.5, 20, 1)
    (0.1, 0.5)
    """
    (_, own), (_, together) = (
        confidence_interval(np.zeros(1), np.ones(1), groups, level) for level in (0.95, 1 - 0.05 / max(pairs, 1))
    )
    wider = float(together[0] / own[0])
    # An end that was cut at ±1 stays there.
    return max(cosine - wider * (cosine - low), -1.0), min(cosine + wider * (high - cosine), 1.0)


def conflict_rate(
    low: Float[np.ndarray, "block task task"], high: Float[np.ndarray, "block task task"]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of pairs of tasks in conflict among the decided ones, and the number decided; each ``[block]``.

    A pair is in conflict if the interval of its cosine lies below 0, in accord if above. All others are undecided:
    counting their signs would bring the rate to one half by noise alone. NaN where no pair is decided.

    >>> conflict_rate(np.array([[[1.0, -0.9], [-0.9, 1.0]]]), np.array([[[1.0, -0.1], [-0.1, 1.0]]]))
    (array([1.]), array([1.]))
    """
    upper = np.triu_indices(low.shape[-1], 1)
    against = (high[:, upper[0], upper[1]] < 0).sum(-1)
    decided = against + (low[:, upper[0], upper[1]] > 0).sum(-1)
    return ratio(against, decided), decided.astype(np.float64)


def overlap(gram: Float[np.ndarray, "block sample sample"], labels: SampleGroups) -> Estimate:
    """Return the Hilbert–Schmidt overlap tr F_sF_t/√(tr F_s² tr F_t²): 1 for proportional Fishers, 0 for orthogonal.

    It comes from U-statistics; the delete-one-group jackknife corrects the bias of its logarithm and gives the
    interval. The estimate may exceed 1.
    """
    squares = pair_means(gram**2, labels)
    relevant, _ = _pairwise(labels)
    counted = counted_groups(gram, labels)
    groups = np.minimum(counted[:, :, None], counted[:, None])
    logarithm = jackknifed(log(_cosine(squares.mean)), log(_cosine(squares.left_out)), relevant, groups)
    same = np.eye(labels.member.shape[1], dtype=bool) & np.isfinite(logarithm.estimate)
    ends = (logarithm.estimate, logarithm.low, logarithm.high)
    return Estimate(*(np.where(same, 1.0, np.exp(end)) for end in ends))


def noise_scale(gram: Float[np.ndarray, "block sample sample"], labels: SampleGroups) -> Estimate:
    """Return the simple noise scale tr Σ/‖μ‖² in samples (McCandlish et al. 2018): ``[block, task]``.

    It is the batch at which noise and mean have equal squared norm, and is computed as the mean of K_ii over ‖μ‖²,
    minus 1. NaN where the interval of ‖μ‖² reaches 0, as there is no upper bound then. The interval comes from the
    delete-one-group jackknife of the logarithm. With heavy-tailed norms it is too short: large samples that were not
    drawn are missing in tr Σ (simulated: 20 to 90 % hold the truth). The number is the training's noise scale if K is
    of the parameters as they are trained (factor space).
    """
    products = pair_means(gram, labels)
    squares, squares_without = diagonal_means(np.diagonal(gram, axis1=1, axis2=2), labels)
    norms, norms_without = _norms(products.mean), _norms(products.left_out)
    lowest, _ = confidence_interval(norms, jackknife_error(norms_without, labels.holds), labels.groups)
    estimate, left_out = log(ratio(squares, norms) - 1), log(ratio(squares_without, norms_without) - 1)
    logarithm = jackknifed(estimate, left_out, labels.holds, counted_groups(gram, labels))
    ends = (logarithm.estimate, logarithm.low, logarithm.high)
    return Estimate(*(np.where(lowest > 0, np.exp(end), np.nan) for end in ends))


def first_order_transfer(
    gram: Float[np.ndarray, "block sample sample"], labels: SampleGroups, losses: Float[np.ndarray, " sample"]
) -> Estimate:
    """Return ⟨μ_s, μ_t⟩/L_t: the relative fall of task t's loss per unit of learning rate of a gradient step on task s.

    It is the first order of 1 − L_t(θ − ημ_s)/L_t(θ) in η (Fifty et al. 2021), for plain gradient descent and K of the
    parameters as they are trained (factor space); a step by Adam has another Gram matrix.

    Returns:
        ``[block, task, task]``, first the task that is trained on; NaN where the mean loss is not positive.
    """
    products = pair_means(gram, labels)
    relevant, groups = _pairwise(labels)
    mean, without = diagonal_means(losses[None], labels)
    estimate = ratio(1.0, mean)[:, None, :] * products.mean
    left_out = ratio(1.0, without)[:, :, None, :] * products.left_out
    return jackknifed(estimate, left_out, relevant, groups)


#: Permutations of the labels behind the band.
PERMUTATIONS = 99
#: Gram matrices of permutations that are held at a time, in bytes.
_MOST_BYTES = 2**24


@dataclass(frozen=True)
class EntropyDecomposition:
    """Parts of SE of the pooled Fisher, in nats.

    Args:
        mixture: SE(F).
        within: Σ w_s SE(f_s).
        divergence: χ.
        largest: H(w), the largest possible χ.
    """

    mixture: Float[np.ndarray, "*batch"]
    within: Float[np.ndarray, "*batch"]
    divergence: Float[np.ndarray, "*batch"]
    largest: Float[np.ndarray, "*batch"]


def decomposition(
    mixture: Float[np.ndarray, "*batch"],
    entropies: Float[np.ndarray, "*batch task"],
    traces: Float[np.ndarray, "*batch task"],
) -> EntropyDecomposition:
    """Return the parts of SE(F) = Σ w_s SE(f_s) + χ, for tasks that have no samples in common.

    Args:
        mixture: SE of the Fisher of all samples.
        entropies: SE of each task's Fisher; may be NaN where its trace is 0.
        traces: tr K_ss, not divided by the number of samples: w is its share.

    >>> parts = decomposition(np.log([2.0]), np.zeros((1, 2)), np.ones((1, 2)))  # two orthogonal directions
    >>> bool(parts.divergence[0] == parts.largest[0])
    True
    """
    weights = ratio(traces, traces.sum(-1, keepdims=True))
    within = np.where(weights == 0, 0.0, weights * entropies).sum(-1)
    # Rounding may leave −1e-16 where all tasks are the same.
    return EntropyDecomposition(mixture, within, np.maximum(mixture - within, 0.0), -xlogy(weights, weights).sum(-1))


def decompose(
    gram: Float[np.ndarray, "assignment block sample sample"], task: Int[np.ndarray, "assignment sample"]
) -> EntropyDecomposition:
    """Return the :func:`decomposition` of K for assignments of samples to tasks: ``[assignment, block]``.

    The eigenvalues of all matrices of one size come from one call: of few samples, a call costs more than they do.

    Args:
        gram: K, which may depend on the assignment.
        task: Number of each sample's task, from 0.
    """
    member = task[:, :, None] == np.arange(task.max() + 1)
    traces = np.diagonal(gram, axis1=2, axis2=3) @ member.astype(np.float64)
    sizes = member.sum(1)
    order, ends = np.argsort(task, axis=1, kind="stable"), sizes.cumsum(1)
    entropies = np.full(traces.shape, np.nan)
    blocks = np.arange(gram.shape[1])[:, None, None]
    for size in np.unique(sizes[sizes > 0]):
        assignment, code = np.nonzero(sizes == size)
        samples = order[assignment[:, None], ends[assignment, code][:, None] + np.arange(-size, 0)]
        rows, columns = samples[:, None, :, None], samples[:, None, None, :]
        entropies[assignment, :, code] = _entropy(gram[assignment[:, None, None, None], blocks, rows, columns])
    return decomposition(_entropy(gram), entropies, traces)


def _entropy(gram: np.ndarray) -> np.ndarray:
    return fisher_entropy(fisher_eigenvalues(gram.reshape(-1, *gram.shape[-2:]))).reshape(gram.shape[:-2])


def with_equal_traces(
    gram: Float[np.ndarray, "block sample sample"], task: Int[np.ndarray, "assignment sample"]
) -> Float[np.ndarray, "assignment block sample sample"]:
    """Return K̃ = DKD, each sample divided by √(tr K_ss/n_s) of its task, so that every task has tr F_s = 1.

    >>> with_equal_traces(np.diag([9.0, 1.0])[None], np.array([[0, 1]]))[0, 0].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    member = task[:, :, None] == np.arange(task.max() + 1)
    traces = np.diagonal(gram, axis1=1, axis2=2) @ member.astype(np.float64)
    return _divided(gram, ratio(traces, member.sum(1)[:, None]), task)


def _with_equal_medians(gram: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Divide samples by the root of their task's median squared norm, or of the mean where that is 0."""
    norms = np.diagonal(gram, axis1=1, axis2=2)
    codes, task = np.unique(task, return_inverse=True)
    of_task = [norms[:, task == code] for code in range(len(codes))]
    medians, means = (np.stack([size(part, axis=-1) for part in of_task], axis=1) for size in (np.median, np.mean))
    return _divided(gram, np.where(medians > 0, medians, means), task)


def _divided(gram: np.ndarray, squared: np.ndarray, task: np.ndarray) -> np.ndarray:
    """Divide samples by the root of their task's ``squared``, ``[..., block, task]``; by nothing where that is 0."""
    scale = np.take_along_axis(np.nan_to_num(np.sqrt(ratio(1.0, squared))), task[..., None, :], axis=-1)
    divided = gram * scale[..., :, None]
    divided *= scale[..., None, :]
    return divided


@dataclass(frozen=True)
class DivergenceTest:
    """χ of tasks whose gradients were made equally large, beside χ of permuted labels; nats, ``[block]``.

    Args:
        divergence: χ of K̃.
        largest: The largest possible χ, H(n/N).
        low, high: Central band of χ of permuted labels.
        p_value: (b + 1)/(B + 1), the chance of a χ this large.
    """

    divergence: Float[np.ndarray, " block"]
    largest: Float[np.ndarray, " block"]
    low: Float[np.ndarray, " block"]
    high: Float[np.ndarray, " block"]
    p_value: Float[np.ndarray, " block"]


def divergence_test(
    gram: Float[np.ndarray, "block sample sample"],
    labels: SampleGroups,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    level: float = 0.95,
) -> DivergenceTest:
    """Test by permutations whether tasks have the same normalised Fisher f_s = F_s/tr F_s; the statistic is χ of K̃.

    K̃ is :func:`with_equal_traces` for every assignment of labels, the observed one included, so that H(w) is the same
    for all: χ of K itself is bounded by H(w) of the observed w, which permuted labels do not have. Before labels are
    permuted, tasks are scaled to the same median squared norm. That does not change the observed χ of K̃, and keeps the
    strong samples of one task from dominating the other. Simulated for two tasks of 12 to 32 samples whose norms differ
    by factors of 1, 3 and 30, with equal or lognormal sizes, p ≤ 0.05 comes in 3 to 7 % of cases; in fewer if only one
    task has heavy-tailed norms.

    Groups whose samples are all of one task exchange their labels as a whole; within the others, samples do. Either
    way the resemblance within groups is kept. Of more than 256 samples, random whole groups with at most 256 are
    tested: each permutation costs O(N³), and plug-in χ depends on N. The test is exact for them.

    Args:
        gram: K.
        labels: The observed labels. Tasks have no samples in common; ``"all"`` is not among them.
        permutations: Number of permutations.
        seed: Seed of the permutations.
        level: Level of the band.

    Returns:
        Band and p are NaN where no exchange changes anything.
    """
    generator = np.random.default_rng(seed)
    chosen = _some_groups(labels.group, generator)
    gram, labels = gram[:, chosen[:, None], chosen], SampleGroups(labels.group[chosen], labels.member[chosen])
    task = labels.member.argmax(1)
    observed = decompose(with_equal_traces(gram, task[None]), task[None])
    divergence, largest = observed.divergence[0], observed.largest[0]
    shuffled = _exchanged(task, labels.group, permutations, generator)
    if (shuffled == task).all():
        return DivergenceTest(divergence, largest, *[np.full(len(gram), np.nan)] * 3)
    aligned = _with_equal_medians(gram, task)
    parts = np.array_split(shuffled, min(permutations, 1 + permutations * aligned.nbytes // _MOST_BYTES))
    null = np.concatenate([decompose(with_equal_traces(aligned, part), part).divergence for part in parts])
    low, high = np.quantile(null, ((1 - level) / 2, (1 + level) / 2), axis=0)
    # Up to rounding: a permutation that changes nothing must count as equal.
    exceeding = (null >= divergence - 1e-12).sum(0)
    p = np.where(np.isnan(divergence), np.nan, (exceeding + 1) / (permutations + 1))
    return DivergenceTest(divergence, largest, low, high, p)


def _some_groups(group: np.ndarray, generator: np.random.Generator) -> Int[np.ndarray, " chosen"]:
    """Return the samples of random groups, at most ``MOST_SAMPLES``; all samples where there are no more."""
    if len(group) <= MOST_SAMPLES:
        return np.arange(len(group))
    codes, sizes = np.unique(group, return_counts=True)
    order = generator.permutation(len(codes))
    fits = max(int(np.searchsorted(np.cumsum(sizes[order]), MOST_SAMPLES, side="right")), 1)
    return np.flatnonzero(np.isin(group, codes[order[:fits]]))


def _exchanged(
    task: np.ndarray, group: np.ndarray, permutations: int, generator: np.random.Generator
) -> Int[np.ndarray, "permutation sample"]:
    """Permute the labels of whole groups of one task among these groups, and of samples within each other group."""
    codes, first, index = np.unique(group, return_index=True, return_inverse=True)
    mixed = np.bincount(index, task != task[first][index], len(codes)) > 0
    order, of_group = np.argsort(group, kind="stable"), task[first]
    exchanged = np.empty((permutations, len(task)), dtype=task.dtype)
    for labels in exchanged:
        of_group[~mixed] = generator.permutation(task[first][~mixed])
        labels[order] = task[np.lexsort((generator.random(len(group)), group))]
        labels[:] = np.where(mixed[index], labels, of_group[index])
    return exchanged


@dataclass(frozen=True)
class PurityGap:
    """Purity lost by mixing tasks, ``[block]``.

    Args:
        gap: With its 95 % interval, which may reach below 0.
        sharing: 1 − gap/largest gap: 1 for the same Fisher, 0 for disjoint ones.
    """

    gap: Estimate
    sharing: Float[np.ndarray, " block"]


def purity_gap(gram: Float[np.ndarray, "block sample sample"], labels: SampleGroups) -> PurityGap:
    """Return the purity gap Σ w tr f_s² − tr(Σ w f_s)² ≥ 0, by U-statistics, and the sharing of directions.

    The gap is the order-2 twin of χ, nearly without bias: 0 if all tasks have the same Fisher, Σ w(1 − w) tr f_s² if no
    direction is shared. The delete-one-group jackknife, with fixed weights, corrects the bias and gives the interval.

    Args:
        gram: K.
        labels: Labels of the tasks only, without ``"all"``.
    """
    norms = np.diagonal(gram, axis1=1, axis2=2)
    weights = ratio(norms @ labels.member, norms.sum(-1, keepdims=True))
    squares = pair_means(gram**2, labels)
    traces = pair_means_of_products(norms, labels)
    gap, largest = _gap(squares.mean, traces.mean, weights)
    without, _ = _gap(squares.left_out, traces.left_out, weights[:, None])
    relevant = np.ones(len(labels.holds), dtype=bool)
    corrected = jackknifed(gap, without, relevant, labels.groups.min())
    return PurityGap(corrected, 1 - ratio(corrected.estimate, largest))


def _gap(squares: np.ndarray, traces: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # tr f_s f_t; tr F_s tr F_t of s ≠ t from the tasks' own traces, whose pairs are of different groups too.
    sizes = root(np.diagonal(traces, axis1=-2, axis2=-1))
    products = ratio(squares, sizes[..., :, None] * sizes[..., None, :])
    purity = np.diagonal(products, axis1=-2, axis2=-1)
    if weights.shape[-1] < 2:  # 1 − w is rounding alone
        missing = np.full(purity.shape[:-1], np.nan)
        return missing, missing
    gap = (weights * purity).sum(-1) - (weights[..., :, None] * weights[..., None, :] * products).sum((-2, -1))
    return gap, (weights * (1 - weights) * purity).sum(-1)
