r"""Is a low spectral entropy concentration within tasks, or tasks that share their directions?

With f_s = F_s/tr F_s and w_s = tr K_ss/tr K the pooled Fisher is a mixture, F/tr F = Σ w_s f_s, and

.. math:: SE(F) = \sum_s w_s\, SE(f_s) + χ, \qquad 0 \le χ \le H(w).

χ is Holevo's quantity, the quantum Jensen–Shannon divergence (Briët & Harremoës 2009): 0 if all tasks have the same
normalised Fisher, H(w) if no direction is shared. Plug-in χ is too large at small N. Permuted labels give a band that χ
of equal Fishers would have, once tasks' gradients are made equally large (:func:`divergence_test`); it is never
subtracted, for it belongs to another truth: of disjoint tasks it would take two thirds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import xlogy

from dynamics.fisher.entropy import spectral_entropy
from dynamics.fisher.pairs import Estimate, Labels, jackknifed, pair_means
from dynamics.fisher.ratios import ratio, root
from dynamics.fisher.spectrum import fisher_eigenvalues

#: Permutations of the labels behind the band.
PERMUTATIONS = 99


@dataclass(frozen=True)
class Decomposition:
    """SE of the pooled Fisher in its parts, nats, ``[block]``; ``largest`` is H(w)."""

    mixture: Float[np.ndarray, " block"]
    within: Float[np.ndarray, " block"]
    divergence: Float[np.ndarray, " block"]
    largest: Float[np.ndarray, " block"]


def decomposition(
    mixture: Float[np.ndarray, " block"],
    entropies: Float[np.ndarray, "block task"],
    traces: Float[np.ndarray, "block task"],
) -> Decomposition:
    """SE(F) = Σ w_s SE(f_s) + χ for tasks that divide the samples among them.

    Args:
        mixture: SE of the Fisher of all samples.
        entropies: SE of each task's Fisher; may be NaN where its trace is 0.
        traces: tr K_ss, not divided by the number of samples: w is its share.

    >>> found = decomposition(np.log([2.0]), np.zeros((1, 2)), np.ones((1, 2)))  # two orthogonal directions
    >>> bool(found.divergence[0] == found.largest[0])
    True
    """
    weights = ratio(traces, traces.sum(-1, keepdims=True))
    within = np.where(weights == 0, 0.0, weights * entropies).sum(-1)
    # Rounding may leave −1e-16 where all tasks are the same.
    return Decomposition(mixture, within, np.maximum(mixture - within, 0.0), -xlogy(weights, weights).sum(-1))


def decompose(gram: Float[np.ndarray, "block sample sample"], task: Int[np.ndarray, " sample"]) -> Decomposition:
    """:func:`decomposition` of K under one labelling of its samples.

    Args:
        gram: K.
        task: Number of each sample's task, from 0.
    """
    chosen = [np.flatnonzero(task == code) for code in range(int(task.max()) + 1)]
    entropies = [_entropy(gram[:, samples[:, None], samples]) for samples in chosen]
    norms = np.diagonal(gram, axis1=1, axis2=2)
    traces = np.stack([norms[:, samples].sum(-1) for samples in chosen], axis=1)
    return decomposition(_entropy(gram), np.stack(entropies, axis=1), traces)


def _entropy(gram: np.ndarray) -> np.ndarray:
    return spectral_entropy(fisher_eigenvalues(gram)) if gram.shape[-1] else np.full(len(gram), np.nan)


def with_equal_traces(
    gram: Float[np.ndarray, "block sample sample"], task: Int[np.ndarray, " sample"]
) -> Float[np.ndarray, "block sample sample"]:
    """Return K̃ = DKD, each sample divided by √(tr K_ss/n_s) of its task, so that every task has tr F_s = 1.

    >>> with_equal_traces(np.diag([9.0, 1.0])[None], np.array([0, 1]))[0].tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    return _rescaled(gram, task, np.mean)


def _rescaled(gram: np.ndarray, task: np.ndarray, size: Callable[..., np.ndarray]) -> np.ndarray:
    """Samples over the root of their task's ``size`` of squared norms; over that of its mean where that is 0."""
    norms = np.diagonal(gram, axis1=1, axis2=2)
    scale = np.zeros_like(norms)
    for code in np.unique(task):
        of_task = norms[:, task == code]
        typical = size(of_task, axis=-1)
        squared = np.where(typical > 0, typical, of_task.mean(-1))
        scale[:, task == code] = np.nan_to_num(np.sqrt(ratio(1.0, squared)))[:, None]
    return gram * scale[:, :, None] * scale[:, None, :]


@dataclass(frozen=True)
class DivergenceTest:
    """χ of tasks whose gradients were made equally large, beside labels that mean nothing; nats, ``[block]``."""

    divergence: Float[np.ndarray, " block"]
    largest: Float[np.ndarray, " block"]
    low: Float[np.ndarray, " block"]
    high: Float[np.ndarray, " block"]
    p_value: Float[np.ndarray, " block"]


def divergence_test(
    gram: Float[np.ndarray, "block sample sample"],
    labels: Labels,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    level: float = 0.95,
) -> DivergenceTest:
    """Permutation test of tasks that have the same normalised Fisher f_s = F_s/tr F_s, by χ of K̃.

    K̃ is :func:`with_equal_traces` under every labelling, the observed one included, so that H(w) is the same for
    all of them: χ of K itself is bounded by H(w) of the observed w, which permuted labels do not have. Before labels
    are exchanged, tasks are brought to the same median squared norm. That leaves the observed χ of K̃ as it is, and
    keeps the strong samples of one task from standing alone in the other. Simulated for two tasks of 12 to 32 samples
    whose norms differ by factors of 1, 3 and 30, of equal or lognormal sizes, p ≤ 0.05 comes in 3 to 7 % of cases.
    Where only the norms of one task are heavy-tailed, it comes in fewer.

    Groups whose samples are all of one task exchange their labels as a whole; within the others, samples do. Either
    way the resemblance within groups stays.

    Args:
        gram: K.
        labels: The observed labels; tasks divide the samples, without ``"all"``.
        permutations: Of the labels.
        level: Of the band.

    Returns:
        χ of K̃ and the largest it can be, H(n/N); the central ``level`` of χ of permuted labels, at most ln of the
        number of tasks; p = (b + 1)/(B + 1), the chance of a χ this large. Band and p are NaN where no exchange
        changes anything.
    """
    generator = np.random.default_rng(seed)
    task = labels.member.argmax(1)
    observed = decompose(with_equal_traces(gram, task), task)
    shuffled = [_exchanged(task, labels.group, generator) for _ in range(permutations)]
    if all((other == task).all() for other in shuffled):
        return DivergenceTest(observed.divergence, observed.largest, *[np.full(len(gram), np.nan)] * 3)
    aligned = _rescaled(gram, task, np.median)
    null = np.stack([decompose(with_equal_traces(aligned, other), other).divergence for other in shuffled])
    low, high = np.quantile(null, ((1 - level) / 2, (1 + level) / 2), axis=0)
    # Relative to rounding: a permutation that changes nothing must count as equal.
    exceeding = (null >= observed.divergence - 1e-12).sum(0)
    p = np.where(np.isnan(observed.mixture), np.nan, (exceeding + 1) / (permutations + 1))
    return DivergenceTest(observed.divergence, observed.largest, low, high, p)


def _exchanged(task: np.ndarray, group: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """One permutation of the labels: of whole groups that have one task, and of samples within the others."""
    codes, first, index = np.unique(group, return_index=True, return_inverse=True)
    mixed = np.bincount(index, task != task[first][index], len(codes)) > 0
    of_group = task[first]
    of_group[~mixed] = generator.permutation(of_group[~mixed])
    order, shuffled = np.argsort(group, kind="stable"), np.lexsort((generator.random(len(group)), group))
    within = task.copy()
    within[order] = task[shuffled]
    return np.where(mixed[index], within, of_group[index])


@dataclass(frozen=True)
class PurityGap:
    """The gap with its 95 % interval, which may reach below 0, and sharing = 1 − gap/largest gap; each ``[block]``."""

    gap: Estimate
    sharing: Float[np.ndarray, " block"]


def purity_gap(gram: Float[np.ndarray, "block sample sample"], labels: Labels) -> PurityGap:
    """Σ w tr f_s² − tr(Σ w f_s)² ≥ 0 by U-statistics, and the share of it that tasks keep by overlapping.

    The order-2 twin of χ, nearly without bias: 0 if all tasks have the same Fisher, Σ w(1 − w) tr f_s² if none is
    shared. ``labels`` must hold the tasks only, without ``"all"``.
    Sharing is 1 for the same Fisher and 0 for disjoint ones. Bias and interval: delete-one-group jackknife,
    weights held.
    """
    norms = np.diagonal(gram, axis1=1, axis2=2)
    weights = ratio(norms @ labels.member, norms.sum(-1, keepdims=True))
    squares = pair_means(gram**2, labels)
    traces = pair_means(norms[:, :, None] * norms[:, None, :], labels)
    gap, largest = _gap(squares.mean, traces.mean, weights)
    without, _ = _gap(squares.left_out, traces.left_out, weights[:, None])
    every = np.ones(len(labels.holds), dtype=bool)
    found = jackknifed(gap, without, every, labels.groups.min())
    return PurityGap(found, 1 - ratio(found.estimate, largest))


def _gap(squares: np.ndarray, traces: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # tr f_s f_t: traces of s ≠ t from each task's own, whose pairs are of different groups too.
    sizes = root(np.diagonal(traces, axis1=-2, axis2=-1))
    products = ratio(squares, sizes[..., :, None] * sizes[..., None, :])
    own = np.diagonal(products, axis1=-2, axis2=-1)
    if weights.shape[-1] < 2:  # 1 − w is rounding alone
        nothing = np.full(own.shape[:-1], np.nan)
        return nothing, nothing
    gap = (weights * own).sum(-1) - (weights[..., :, None] * weights[..., None, :] * products).sum((-2, -1))
    return gap, (weights * (1 - weights) * own).sum(-1)
