r"""Is a low spectral entropy concentration within tasks, or tasks that share their directions?

With f_s = F_s/tr F_s and w_s = tr K_ss/tr K the pooled Fisher is a mixture, F/tr F = Σ w_s f_s, and

.. math:: SE(F) = \sum_s w_s\, SE(f_s) + χ, \qquad 0 \le χ \le H(w).

χ is Holevo's quantity, the quantum Jensen–Shannon divergence (Briët & Harremoës 2009): 0 if all tasks have the same
Fisher, H(w) if no direction is shared. Plug-in χ is too large at small N. Permuted labels give a band that χ of equal
Fishers would have; it is never subtracted, for it belongs to another truth: of disjoint tasks it would take two thirds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy.special import xlogy

from dynamics.fisher.eigenvalues import fisher_eigenvalues
from dynamics.fisher.entropy import spectral_entropy
from dynamics.fisher.pairs import Estimate, Labels, jackknifed, pair_means
from dynamics.fisher.ratios import ratio, root

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


def permutation_band(
    gram: Float[np.ndarray, "block sample sample"],
    parts: Decomposition,
    labels: Labels,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """χ under labels that mean nothing: low and high end of its central ``level``, and p = (b + 1)/(B + 1).

    Where each group has samples of one task, whole groups exchange their labels; where groups hold several tasks,
    labels are exchanged within groups. Either way the resemblance within groups stays. p is the chance of a χ this
    large if tasks have the same Fisher.

    Args:
        gram: K.
        parts: What :func:`decomposition` makes of the observed labels.
        labels: The observed labels; tasks divide the samples, without ``"all"``.

    Returns:
        Low, high, p, each ``[block]``; NaN where no exchange changes anything.
    """
    missing = np.full(len(gram), np.nan)
    generator = np.random.default_rng(seed)
    tasks = labels.member.argmax(1)
    shuffled = np.stack([_exchanged(tasks, labels.group, generator) for _ in range(permutations)])
    if (shuffled == tasks).all():
        return missing, missing, missing
    null = parts.mixture - _within_permuted(gram, shuffled, labels.member.shape[1])
    low, high = np.quantile(null, ((1 - level) / 2, (1 + level) / 2), axis=0)
    # Relative to rounding: a permutation that changes nothing must count as equal.
    exceeding = (null >= parts.mixture - parts.within - 1e-12).sum(0)
    return low, high, np.where(np.isnan(parts.mixture), np.nan, (exceeding + 1) / (permutations + 1))


def _within_permuted(
    gram: Float[np.ndarray, "block sample sample"], labels: Int[np.ndarray, "permutation sample"], tasks: int
) -> Float[np.ndarray, "permutation block"]:
    """Σ w_s SE(f_s) under many labellings at once: samples of other tasks are replaced by one without gradient."""
    nothing = gram.shape[-1]
    padded = np.pad(gram, ((0, 0), (0, 1), (0, 1)))
    norms = np.diagonal(gram, axis1=1, axis2=2)
    within = np.zeros((len(labels), len(gram)))
    for task in range(tasks):
        chosen = labels == task
        most = int(chosen.sum(1).max())
        # Own samples first, each permutation's list filled up to the longest.
        places = np.where(np.sort(~chosen, axis=1), nothing, np.argsort(~chosen, axis=1, kind="stable"))[:, :most]
        parts = padded[:, places[:, :, None], places[:, None, :]].reshape(-1, most, most)
        entropy = spectral_entropy(fisher_eigenvalues(parts)).reshape(len(gram), len(labels)).T
        weight = ratio(chosen @ norms.T, norms.sum(-1))
        within += np.where(weight == 0, 0.0, weight * entropy)
    return within


def _exchanged(labels: np.ndarray, group: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    codes, first = np.unique(group, return_index=True)
    if (labels == labels[first][np.searchsorted(codes, group)]).all():
        return generator.permutation(labels[first])[np.searchsorted(codes, group)]
    order, shuffled = np.argsort(group, kind="stable"), np.lexsort((generator.random(len(group)), group))
    exchanged = labels.copy()
    exchanged[order] = labels[shuffled]
    return exchanged


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
