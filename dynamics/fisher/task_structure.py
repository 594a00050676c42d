r"""How tasks' gradients and Fishers relate, from the labelled K: every product over pairs of different groups.

With ⟨μ_s, μ_t⟩ the mean of K_ij and tr F_sF_t that of K_ij² over such pairs, noise adds to neither. Means taken over
all pairs, diagonal included, would make norms too large and cosines too small: with 16 samples a task a true cosine of
0.6 typically reads 0.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from dynamics.fisher.pairs import (
    Estimate,
    Labels,
    counted_groups,
    diagonal_means,
    interval,
    jackknife_error,
    jackknifed,
    pair_means,
)
from dynamics.fisher.ratios import log, ratio, root


@dataclass(frozen=True)
class Cosines:
    """Between tasks' mean gradients, ``[block, task, task]``."""

    cosine: Estimate
    raw: np.ndarray
    magnitude_similarity: np.ndarray
    unresolved: np.ndarray


def _pairwise(labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Which groups a pair of tasks depends on, and the smaller number of groups of the two."""
    holds = labels.holds
    return holds[:, :, None] | holds[:, None, :], np.minimum(labels.groups[:, None], labels.groups[None])


def _norms(products: np.ndarray) -> np.ndarray:
    return np.diagonal(products, axis1=-2, axis2=-1)


def _cosine(products: np.ndarray) -> np.ndarray:
    norms = _norms(products)
    return products * root(ratio(1.0, norms))[..., :, None] * root(ratio(1.0, norms))[..., None, :]


def cosines(gram: Float[np.ndarray, "block sample sample"], labels: Labels) -> Cosines:
    """Cosine ⟨μ_s, μ_t⟩/(‖μ_s‖‖μ_t‖) with unbiased products and norms, and what stands beside it.

    A task's mean gradient is resolved if the interval of its ‖μ‖² lies above 0; the cosine of one that is not has no
    bounded interval (Fieller 1954) and is NaN, marked ``unresolved``. Estimate and interval (delete-one-group
    jackknife) are cut at ±1. ``raw`` is the usual cosine of mean gradients, attenuated by noise.
    ``magnitude_similarity`` is 2‖μ_s‖‖μ_t‖/(‖μ_s‖² + ‖μ_t‖²) (Yu et al. 2020), of resolved norms.
    """
    products = pair_means(gram, labels)
    relevant, groups = _pairwise(labels)
    norms, norms_without = _norms(products.mean), _norms(products.left_out)
    lowest, _ = interval(norms, jackknife_error(norms_without, labels.holds), labels.groups)
    resolved = lowest > 0
    both = resolved[:, :, None] & resolved[:, None, :]
    own = np.eye(labels.member.shape[1], dtype=bool)
    found = jackknifed(_cosine(products.mean), _cosine(products.left_out), relevant, groups)
    estimate, low, high = (
        np.where(both, np.where(own, 1.0, np.clip(part, -1, 1)), np.nan)
        for part in (found.estimate, found.low, found.high)
    )
    means = labels.member / labels.samples
    sizes = root(norms)
    similarity = ratio(2 * sizes[:, :, None] * sizes[:, None, :], norms[:, :, None] + norms[:, None, :])
    raw = _cosine(means.T @ gram @ means)
    missing = np.isnan(estimate) | np.isnan(low) | np.isnan(high)
    return Cosines(
        Estimate(np.where(missing, np.nan, estimate), low, high), raw, np.where(both, similarity, np.nan), missing
    )


def conflict_rate(
    low: Float[np.ndarray, "block task task"], high: Float[np.ndarray, "block task task"]
) -> tuple[np.ndarray, np.ndarray]:
    """Share of pairs of tasks in conflict among those that are decided, and how many are decided; each ``[block]``.

    A pair is in conflict if the interval of its cosine lies below 0, in accord if above; otherwise it is not decided,
    and counting signs would bring the rate to one half by noise alone. NaN where no pair is decided.

    >>> conflict_rate(np.array([[[1.0, -0.9], [-0.9, 1.0]]]), np.array([[[1.0, -0.1], [-0.1, 1.0]]]))
    (array([1.]), array([1.]))
    """
    upper = np.triu_indices(low.shape[-1], 1)
    against = (high[:, upper[0], upper[1]] < 0).sum(-1)
    decided = against + (low[:, upper[0], upper[1]] > 0).sum(-1)
    return ratio(against, decided), decided.astype(np.float64)


def overlap(gram: Float[np.ndarray, "block sample sample"], labels: Labels) -> Estimate:
    """Hilbert–Schmidt overlap tr F_sF_t/√(tr F_s² tr F_t²) by U-statistics: 1 if proportional, 0 if orthogonal.

    Its logarithm is corrected for its bias, and the interval made, by the delete-one-group jackknife. The estimate may
    exceed 1.
    """
    squares = pair_means(gram**2, labels)
    relevant, _ = _pairwise(labels)
    counted = counted_groups(gram, labels)
    groups = np.minimum(counted[:, :, None], counted[:, None])
    found = jackknifed(log(_cosine(squares.mean)), log(_cosine(squares.left_out)), relevant, groups)
    own = np.eye(labels.member.shape[1], dtype=bool) & np.isfinite(found.estimate)
    return Estimate(*(np.where(own, 1.0, np.exp(part)) for part in (found.estimate, found.low, found.high)))


def noise_scale(gram: Float[np.ndarray, "block sample sample"], labels: Labels) -> Estimate:
    """Simple noise scale tr Σ/‖μ‖² in samples (McCandlish et al. 2018), mean K_ii over ‖μ‖² minus 1: ``[block, task]``.

    The batch at which noise and mean have equal squared norm. NaN where the interval of ‖μ‖² reaches 0, as there is no
    upper bound then. Interval: delete-one-group jackknife of the logarithm. With heavy-tailed norms it is too short:
    large samples that were not drawn are missing in tr Σ (simulated: 20 to 90 % hold the truth). It is that of the
    training when K is of the parameters as they are trained (factor space).
    """
    products = pair_means(gram, labels)
    squares, squares_without = diagonal_means(np.diagonal(gram, axis1=1, axis2=2), labels)
    norms, norms_without = _norms(products.mean), _norms(products.left_out)
    lowest, _ = interval(norms, jackknife_error(norms_without, labels.holds), labels.groups)
    estimate, left_out = log(ratio(squares, norms) - 1), log(ratio(squares_without, norms_without) - 1)
    found = jackknifed(estimate, left_out, labels.holds, counted_groups(gram, labels))
    return Estimate(*(np.where(lowest > 0, np.exp(part), np.nan) for part in (found.estimate, found.low, found.high)))


def first_order_transfer(
    gram: Float[np.ndarray, "block sample sample"], labels: Labels, losses: Float[np.ndarray, " sample"]
) -> Estimate:
    """⟨μ_s, μ_t⟩/L_t: relative fall of task t's loss per unit of learning rate of a gradient step on task s.

    First order of 1 − L_t(θ − ημ_s)/L_t(θ) in η (Fifty et al. 2021). For plain gradient descent, and for K of the
    parameters as they are trained (factor space); a step by Adam has another Gram. Rows: the task that is trained on.

    Returns:
        ``[block, task, task]``; NaN where the mean loss is not positive.
    """
    products = pair_means(gram, labels)
    relevant, groups = _pairwise(labels)
    mean, without = diagonal_means(losses[None], labels)
    estimate = ratio(1.0, mean)[:, None, :] * products.mean
    left_out = ratio(1.0, without)[:, :, None, :] * products.left_out
    return jackknifed(estimate, left_out, relevant, groups)
