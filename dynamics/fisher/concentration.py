r"""How much of an update lies along the informative directions, from K and b = Gδ alone, beside two nulls.

With K u_j = eig_j u_j the unit direction v_j = Gᵀu_j/√eig_j is never formed, but

.. math:: \langle δ, v_j \rangle = u_j^\top b / \sqrt{\mathrm{eig}_j}, \qquad
    δ^\top F δ = \lVert b \rVert^2 / N = \sum_j λ_j \langle δ, v_j \rangle^2 .

The probe samples must not have taken part in the steps that made δ: their own gradients would be found in it.

**The gradient null.** Gradients themselves lie along the Fisher's leading directions, more so the larger the batch:
beside an isotropic null every update looks concentrated. So the groups are split in half. Directions come from half A;
from half B fresh mean gradients of m samples are drawn, and their share in A's directions is compared with the
update's.

A draw is μ̂ + ε. ε is the noise of a batch: m samples resampled from B, minus their mean, of covariance Σ/m; normal of
the same covariance where m is at least the number of groups. The mean ḡ_B contains noise of its own, which would pass
for signal. Its part inside the directions and its part outside are each shrunk by b = ‖μ‖²_U/‖ḡ_B‖², where ‖μ‖²_U comes
from pairs of different groups and has no such noise. The uncertainty of μ is added to ε as variance (b/n_eff)Σ: the
predictive distribution of a fresh batch under a normal prior for μ of the estimated size. So E‖draw‖² is right, m may
exceed B, and a mean that B cannot resolve widens the null instead of shifting it. Checked by simulation for
m = 1 … 512 at N = 64 and 128: the 95 % interval of a fresh gradient's gain contains 1 in 91–100 % of cases; it is
conservative where the mean dominates.

**The optimizer's null.** Adam passes a gradient through a preconditioner P and so flattens it; the plain null does not
know this. The second null asks where fresh gradients would have gone under this optimizer. P g_i are samples like any
others, of mean Pμ and covariance PΣP, so the same draws are made of them: from G P² Gᵀ of half B, and their products
G P Gᵀ with A's directions. P is that of the increment's last step. A fresh gradient has no momentum (which counts in m)
and no weight decay. Adam's P holds the squares of the update's own gradients: below ``LEAST_GRADIENTS`` of them there
is no null. Muon is not linear: a few draws, made beforehand by :func:`predictive_draws`, went through it.

Decoupled weight decay is not taken out of δ: over an increment it adds −Σ η λ θ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from dynamics.fisher.samples import (
    SPLITS,
    Estimate,
    SampleGroups,
    StackedGram,
    counted_groups,
    diagonal_means,
    half_splits,
    jackknifed,
    log,
    ratio,
)
from dynamics.fisher.spectrum import centred, inverse_roots, leading_eigenvectors

#: Null gradients drawn for each half.
DRAWS = 25
#: The same for an optimizer that is not linear: each takes a step of it for every matrix.
DRAWN = 4
#: Leading directions inside which such draws are shrunk by themselves.
DRAWN_DIRECTIONS = 16
#: With fewer gradients in its second moment, an optimizer divides the update's own by itself. Simulated after 10 steps,
#: the flag came by chance in at most 3 %; after one step, in 20 to 56 %.
LEAST_GRADIENTS = 10
#: Fewer groups than this cannot be split into halves that each have pairs.
LEAST_GROUPS = 4
#: The flag "concentrated" needs null gradients of at most so many times the samples they are drawn from: beyond, draws
#: are nearly one vector, that of the samples' own mean. Simulated at 128 times, the flag came by chance in 9 %.
MOST_TIMES = 8


def energy_share(
    eigenvalues: Float[np.ndarray, "block sample"],
    vectors: Float[np.ndarray, "block sample sample"],
    update_product: Float[np.ndarray, "block sample"],
    update_norm: Float[np.ndarray, " block"],
    k: Sequence[int],
) -> Float[np.ndarray, "block k"]:
    """Return the share of ‖δ‖² in the k leading directions, Σ_{j≤k} ⟨δ, v_j⟩²/‖δ‖².

    Directions beyond the rank of K add nothing. Held-out samples estimate directions with error, which lowers the
    share: compare it with the null gradients' share in the same directions, not with 1.

    Args:
        eigenvalues, vectors: Of K/N, as ``fisher_eigenvectors`` returns them.
        update_product: b = Gδ.
        update_norm: ‖δ‖.
        k: Numbers of directions.

    Returns:
        NaN for k above the number of samples, a zero update, or a zero K.

    >>> energy_share(np.array([[2.0, 1.0]]), np.eye(2)[None], np.array([[2.0, 0.0]]), np.array([2.0]), [1, 2])
    array([[0.25, 0.25]])
    """
    samples = eigenvalues.shape[-1]
    along = np.einsum("bnj,bn->bj", vectors, update_product) * inverse_roots(eigenvalues * samples)
    shares = ratio(np.cumsum(along**2, axis=-1), update_norm[:, None] ** 2)
    shares = np.where(eigenvalues[:, :1] > 0, shares, np.nan)
    return np.stack([shares[:, n - 1] if n <= samples else np.full(len(shares), np.nan) for n in k], axis=-1)


def rayleigh_ratio(gram: StackedGram) -> Estimate:
    """Return (δᵀFδ/‖δ‖²)/(tr F/d) with its 95 % interval: 1 for an update of no particular direction, at most d·ρ.

    Numerator and denominator are unbiased for held-out samples; their ratio's logarithm is corrected for its bias, and
    its interval made, by the delete-one-group jackknife.

    Returns:
        Each ``[block]``; NaN where the dimension is unknown or the update is zero.
    """
    labels = SampleGroups.of_one_task(gram.labels.group)
    scale = ratio(gram.dimension, gram.update_norm**2)
    squares, squares_without = diagonal_means(gram.update_product**2, labels)
    norms, norms_without = diagonal_means(gram.norms, labels)
    estimate, groups = log(ratio(squares, norms)), counted_groups(gram.gram, labels)
    logarithm = jackknifed(estimate, log(ratio(squares_without, norms_without)), labels.holds, groups)
    return Estimate(*(np.exp(end[:, 0]) * scale for end in (logarithm.estimate, logarithm.low, logarithm.high)))


def relative_rayleigh_ratio(
    eigenvalues: Float[np.ndarray, "block sample"],
    update_product: Float[np.ndarray, "block sample"],
    update_norm: Float[np.ndarray, " block"],
) -> Float[np.ndarray, " block"]:
    """Return (δᵀFδ/‖δ‖²)/λ_1, from 0 to 1: 1 if the update is the leading direction of these samples.

    >>> relative_rayleigh_ratio(np.array([[2.0, 1.0]]), np.array([[2.0, 0.0]]), np.array([1.0]))
    array([1.])
    """
    return ratio(ratio((update_product**2).mean(-1), update_norm**2), eigenvalues[:, 0])


def isotropic_null(
    dimension: Float[np.ndarray, " block"], k: Sequence[int], level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the share of a random direction in k given ones: mean k/d and band, of Beta(k/2, (d − k)/2).

    Returns:
        Mean, low, high, each ``[block, k]``; 1 where k reaches d, NaN where d is unknown.

    >>> isotropic_null(np.array([100.0]), [10])[0]
    array([[0.1]])
    """
    size, count = np.broadcast_arrays(dimension[:, None], np.asarray(k, dtype=np.float64)[None])
    inside = size > count
    outside = np.where(np.isnan(size), np.nan, 1.0)
    first, second = count / 2, np.where(inside, size - count, 1.0) / 2
    bounds = [
        np.where(inside, special.betaincinv(first, second, q), outside) for q in ((1 - level) / 2, (1 + level) / 2)
    ]
    return np.where(inside, ratio(count, size), outside), bounds[0], bounds[1]


@dataclass(frozen=True)
class Gain:
    """The update's share over a null gradient's, for each block and k; all NaN where there is no null.

    Args:
        captured: The update's share, mean over halves.
        null, null_low, null_high: The null gradients' share in the same directions: mean and central 95 %.
        gain, low, high: captured/null, and the central 95 % of update over null gradient.
        ln_gain: Median of ln(update/null gradient), the middle of the interval.
    """

    captured: Float[np.ndarray, "block k"]
    null: Float[np.ndarray, "block k"]
    null_low: Float[np.ndarray, "block k"]
    null_high: Float[np.ndarray, "block k"]
    gain: Float[np.ndarray, "block k"]
    ln_gain: Float[np.ndarray, "block k"]
    low: Float[np.ndarray, "block k"]
    high: Float[np.ndarray, "block k"]


def matched_gains(
    gram: StackedGram,
    k: Sequence[int],
    *,
    centre: bool = False,
    splits: int = SPLITS,
    draws: int = DRAWS,
    seed: int = 0,
    level: float = 0.95,
) -> tuple[Gain, Gain]:
    """Return the update's share in the k leading directions over that of gradients of ``batch_size`` fresh samples.

    Once over the share of these gradients as they are, once over their share after the optimizer's preconditioner. The
    interval is the central ``level`` of update over null gradient, over halves and draws. It covers 1 for an update
    that is itself such a gradient, and its low end exceeds 1 only if the update's share exceeds what such gradients
    reach.

    Args:
        gram: K, b, ‖δ‖, groups and the number of samples behind the update. Groups are never divided.
        k: Numbers of directions; NaN where a half has fewer.
        centre: Take the directions of the centred Fisher F − ḡḡᵀ, without the mean gradient.
        splits, draws: Number of random splits, and of null gradients for each half.
        seed: Seed of both.
        level: Level of the interval.

    Returns:
        NaN where the batch size is 0, there are fewer than four groups, or K or the update is zero; the second also
        where the preconditioner is unknown.
    """
    products, group = gram.gram, gram.labels.group
    missing = Gain(*[np.full((len(products), len(k)), np.nan)] * 8)
    if gram.batch_size < 1 or len(np.unique(group)) < LEAST_GROUPS:
        return missing, missing
    generator = np.random.default_rng(seed)
    halves = list(half_splits(group, splits, seed))
    columns, exists = _columns(k, min(len(first) for first, _ in halves))
    young = gram.optimizer_gradients < LEAST_GRADIENTS
    preconditioned = None if young or gram.is_plain else gram.preconditioned
    of_drawn = None if young or seed else _drawn_by_half(gram.drawn, halves)
    updates, nulls, passed = [], [], []
    for number, (first, second) in enumerate(halves):
        directions = _directions(products[:, first[:, None], first], int(columns.max()) + 1, centre)
        along = np.einsum("bn,bnj->bj", gram.update_product[:, first], directions)
        updates.append(ratio(np.cumsum(along**2, -1)[:, columns], gram.update_norm[:, None] ** 2))
        noise = _batch_noise(generator, gram.batch_size, group[second], draws)
        sampling = group[second], gram.batch_size, noise, columns
        crossing, within = (second[:, None], first), (second[:, None], second)
        nulls.append(_null_shares(products[:, *within], products[:, *crossing] @ directions, *sampling))
        if preconditioned is not None:
            # P g is a gradient like any other: of its own mean and covariance, in the same directions.
            product, of_second = preconditioned[0][:, *crossing], preconditioned[1][:, *within]
            passed.append(_null_shares(of_second, product @ directions, *sampling))
        elif of_drawn is not None:
            product, norm = (part[number] for part in of_drawn)
            inside = np.cumsum(np.einsum("bnd,bnj->bdj", product[:, first], directions) ** 2, -1)[..., columns]
            passed.append(ratio(inside, norm[..., None]))
    update = np.where(exists, np.stack(updates, 1), np.nan)  # block, half, k
    plain = _gain(update, np.where(exists, np.stack(nulls, 1), np.nan), level)
    if not passed:
        return plain, plain if gram.is_plain else missing
    return plain, _gain(update, np.where(exists, np.stack(passed, 1), np.nan), level)


def _gain(
    update: Float[np.ndarray, "block half k"], null: Float[np.ndarray, "block half draw k"], level: float
) -> Gain:
    """Return the gain of the update's shares over the null gradients'."""
    blocks, _, _, k = null.shape
    ratios = (log(update)[:, :, None] - log(null)).reshape(blocks, -1, k)
    tails = ((1 - level) / 2, (1 + level) / 2)
    low, middle, high = np.quantile(ratios, (tails[0], 0.5, tails[1]), axis=1)
    null_low, null_high = np.quantile(null.reshape(ratios.shape), tails, axis=1)
    mean, share = null.mean((1, 2)), update.mean(1)
    return Gain(share, mean, null_low, null_high, ratio(share, mean), middle, np.exp(low), np.exp(high))


def predictive_draws(
    gram: Float[np.ndarray, "sample sample"],
    group: Int[np.ndarray, " sample"],
    batch_size: int,
    *,
    splits: int = SPLITS,
) -> Float[np.ndarray, "draw sample"]:
    """Return weights of samples whose gradients' sums are null gradients, for an optimizer that is not linear.

    They are drawn as in :func:`matched_gains` for its default seed, ``DRAWN`` for each half, one half after the other.
    Mean and noise are shrunk inside and outside of the ``DRAWN_DIRECTIONS`` leading directions, whatever number of
    directions the draws are then compared in.

    Args:
        gram: K of one block.
        group: Number of each sample's group.
        batch_size: Samples behind the update.
        splits: Number of random splits.

    Returns:
        No draws where :func:`matched_gains` has no null.
    """
    samples = len(group)
    if batch_size < 1 or len(np.unique(group)) < LEAST_GROUPS:
        return np.zeros((0, samples))
    generator = np.random.default_rng(0)
    weights = []
    for first, second in half_splits(group, splits, 0):
        count = min(DRAWN_DIRECTIONS, len(first))
        directions = _directions(gram[None, first[:, None], first], count, centre=False)
        projections = gram[None, second[:, None], first] @ directions
        noise = _batch_noise(generator, batch_size, group[second], DRAWN)
        moments = _moments(gram[None, second[:, None], second], projections, group[second], np.array([count - 1]))
        inside, outside = ([float(part[0, 0, 0]) for part in _predictive(*where, batch_size)] for where in moments)
        drawn = np.zeros((DRAWN, samples))
        drawn[:, second] = outside[0] / len(second) + outside[1] * noise
        # What the inside has more than the outside, as a sum of the directions v_j = Gᵀu_j/√eig_j.
        more = (inside[0] - outside[0]) * projections[0].mean(0) + (inside[1] - outside[1]) * noise @ projections[0]
        drawn[:, first] = more @ directions[0].T
        weights.append(drawn)
    return np.concatenate(weights)


def _drawn_by_half(
    drawn: tuple[np.ndarray, np.ndarray] | None, halves: Sequence[tuple[np.ndarray, np.ndarray]]
) -> tuple[list[np.ndarray], list[np.ndarray]] | None:
    """Return the products and norms of :func:`predictive_draws` half by half; ``None`` if they are of other halves."""
    if drawn is None or drawn[1].shape[-1] != DRAWN * len(halves):
        return None
    return np.split(drawn[0], len(halves), -1), np.split(drawn[1], len(halves), -1)


def effective_batches(steps: int, before: int, momentum: float) -> float:
    r"""Return how many equally weighted batches have a mean as noisy as an increment, :math:`(\sum w_j)^2/\sum w_j^2`.

    With momentum each step is an average of past gradients, v_t = β v_{t−1} + g_t, so that batch j has the weight
    w_j = Σ_t β^{t−j} over the increment's steps t ≥ j: a single step stands for up to (1 + β)/(1 − β) batches, many
    steps for hardly more than their number, and none for more than were taken. The result is at least the number of
    steps, which early in a training is on the safe side. The learning rate is taken as constant, Nesterov's variant and
    Adam's bias correction as plain momentum.

    Args:
        steps: Steps of the increment.
        before: Steps before the increment.
        momentum: β of SGD, β₁ of Adam.

    >>> round(effective_batches(1, 10_000, 0.9), 6), effective_batches(1, 0, 0.9), effective_batches(20, 100, 0.0)
    (19.0, 1.0, 20.0)
    """
    if not 0 < momentum < 1:
        return float(steps)
    before = min(before, int(40 / (1 - momentum)))  # older batches weigh less than e⁻⁴⁰
    batch, last = np.arange(1, before + steps + 1), before + steps
    first = np.maximum(batch, before + 1)
    weight = momentum ** (first - batch) - momentum ** (last - batch + 1.0)
    return max(float(steps), float(weight.sum() ** 2 / (weight**2).sum()))


def _directions(gram: np.ndarray, most: int, centre: bool) -> np.ndarray:
    """Return U/√eig, by which K_BA and b_A become projections on the half's leading directions: [block, sample, j]."""
    values, vectors = leading_eigenvectors(centred(gram) if centre else gram, most)
    leading = vectors * inverse_roots(values * gram.shape[-1])[:, None]
    # The direction is (HG)ᵀu/√eig = Gᵀ(Hu)/√eig.
    return leading - leading.mean(1, keepdims=True) if centre else leading


def _batch_noise(generator: np.random.Generator, batch_size: int, group: np.ndarray, draws: int) -> np.ndarray:
    """Return weights of B's samples that make noise of covariance Σ: [draw, sample], rows sum to 0.

    A batch smaller than the number of groups looks like its few samples, so its noise comes from drawn samples. That of
    a larger batch is normal: a draw could take equally many of each group, and the noise would be 0.
    """
    samples = len(group)
    if batch_size >= len(np.unique(group)):
        normal = generator.standard_normal((draws, samples))
        return (normal - normal.mean(1, keepdims=True)) / np.sqrt(samples - 1)
    counts = generator.multinomial(batch_size, np.full(samples, 1 / samples), size=draws)
    return np.sqrt(batch_size * samples / (samples - 1)) * (counts / batch_size - 1 / samples)


def _null_shares(
    gram: np.ndarray,
    projections: np.ndarray,
    group: np.ndarray,
    batch_size: int,
    noise: np.ndarray,
    columns: np.ndarray,
) -> np.ndarray:
    """Return the share of each drawn gradient in the directions up to each of ``columns``: [block, draw, k]."""
    mean = projections.mean(1)
    inner, outer = _moments(gram, projections, group, columns)
    (mean_inside, *_), (mean_outside, *_) = inner, outer
    shrunk_in, scale_in = _predictive(*inner, batch_size)
    shrunk_out, scale_out = _predictive(*outer, batch_size)
    # The draws' noise: its projections, its squared norm, its product with ḡ.
    projected = noise @ projections
    weighted = noise @ gram
    norm = (weighted * noise).sum(-1)[..., None]
    cross = weighted.mean(-1)[..., None]
    cross_inside = np.cumsum(mean[:, None] * projected, -1)[..., columns]
    norm_inside = np.cumsum(projected**2, -1)[..., columns]
    inside = shrunk_in**2 * mean_inside[:, None] + 2 * shrunk_in * scale_in * cross_inside + scale_in**2 * norm_inside
    outside = (
        shrunk_out**2 * mean_outside[:, None]
        + 2 * shrunk_out * scale_out * (cross - cross_inside)
        + scale_out**2 * (norm - norm_inside)
    )
    inside = np.maximum(inside, 0.0)
    return ratio(inside, inside + np.maximum(outside, 0.0))


def _moments(
    gram: np.ndarray, projections: np.ndarray, group: np.ndarray, columns: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return ‖ḡ‖², unbiased ‖μ‖², and tr Σ inside the directions up to each of ``columns``, then outside."""
    samples = len(group)
    apart = group[:, None] != group[None]
    pairs = apart.sum()
    membership = (group[:, None] == np.unique(group)[None]).astype(np.float64)
    mean = projections.mean(1)
    by_group = membership.T @ projections
    mean_inside = np.cumsum(mean**2, -1)[..., columns]
    signal_inside = np.cumsum(((samples * mean) ** 2 - (by_group**2).sum(1)) / pairs, -1)[..., columns]
    spread_inside = np.cumsum(projections.var(1, ddof=1), -1)[..., columns]
    mean_norm = gram.mean((1, 2))[:, None]
    signal_norm = np.where(apart, gram, 0.0).sum((1, 2))[:, None] / pairs
    spread_norm = (np.trace(gram, axis1=1, axis2=2)[:, None] - samples * mean_norm) / (samples - 1)
    mean_outside = np.maximum(mean_norm - mean_inside, 0.0)
    inside = mean_inside, signal_inside, spread_inside
    return inside, (mean_outside, signal_norm - signal_inside, spread_norm - spread_inside)


def _predictive(
    mean: np.ndarray, signal: np.ndarray, spread: np.ndarray, batch_size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the factor b of ḡ and the scale √(1/m + b/n_eff) of the noise, each [block, 1, k].

    1/n_eff is the noise in ‖ḡ‖² over tr Σ.
    """
    shrunk = np.clip(np.nan_to_num(ratio(signal, mean)), 0.0, 1.0)
    unknown = np.nan_to_num(ratio(np.maximum(mean - signal, 0.0), spread))
    return shrunk[:, None], np.sqrt(1 / batch_size + shrunk * unknown)[:, None]


def _columns(k: Sequence[int], directions: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of each k among cumulated shares, and whether every half has so many directions."""
    counts = np.asarray(k)
    return np.minimum(counts, directions) - 1, counts <= directions
