r"""What the parts of an update do to the loss: paired differences of samples, with intervals over groups.

D(x) = mean of ℓ_i(θ) − ℓ_i(θ + x) over held-out samples: an improvement is positive. Of a part *on* and the rest *off*
of an update δ, with c = ‖on‖²/‖δ‖²,

.. math:: I = D(δ) - D_{on} - D_{off}, \qquad φ = \tfrac12 (D_{on} + D(δ) - D_{off}), \qquad
          s = φ/D(δ), \qquad T = φ - c\,D(δ), \qquad η = s/c

φ is the part's Shapley value: the two parts' shares sum to one. The reference c is what any part pays that is random
with respect to δ, and for δ = −η∇L every part exactly: T > 0 says that it pays more than its share of the norm, T < 0
less. T is in units of the loss and takes no ratio, so it exists where shares do not.

Samples of one group are not independent: standard errors are jackknives over groups, intervals Student's. They are
conditional on the directions. Directions must come from other groups than the losses: with the same, a gradient step
seems to pay more than its norm in nearly all cases (tests/dynamics/intervention).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from dynamics.fisher.samples import Estimate, SampleGroups, confidence_interval, diagonal_means, jackknife_error, ratio

#: Two parts have shares only where their interaction is at most this share of the whole effect.
SEPARABLE = 0.5
#: Random signs of the test over several directions and tasks, and the groups it needs.
SIGNS, LEAST_GROUPS = 9_999, 12
#: Standard errors between 0 and the effect that is found with 80 % power at 5 %: z₀.₉₇₅ + z₀.₈.
_POWER = 2.8


@dataclass(frozen=True)
class Decomposition:
    """What two parts of an update do together and apart; each ``[k, task]``.

    Args:
        interaction: I.
        excess: T, without ratios.
        share: s, by Fieller; NaN where the whole effect's interval holds 0.
        efficiency: s/c.
        sufficiency: D_on/D(δ).
        necessity: 1 − D_off/D(δ).
        is_resolved: Whether the whole effect's interval excludes 0.
        is_separable: Whether |I| ≤ ½|D(δ)|; else the parts work only together, and neither has a share.
    """

    interaction: Estimate
    excess: Estimate
    share: Estimate
    efficiency: Estimate
    sufficiency: Estimate
    necessity: Estimate
    is_resolved: Bool[np.ndarray, "k task"]
    is_separable: Bool[np.ndarray, "k task"]


def effects(differences: Float[np.ndarray, "arm sample"], labels: SampleGroups) -> Estimate:
    """Return the mean effect of each arm on each task, ``[arm, task]``, with its 95 % interval over groups.

    Args:
        differences: ℓ_i(θ) − ℓ_i(θ + x), mean over the folds in which sample i is held out.
        labels: Group and tasks of each sample.

    Returns:
        No interval for fewer than two groups.

    >>> effect = effects(np.array([[1.0, 3.0]]), SampleGroups.of_one_task(np.arange(2)))
    >>> effect.estimate, effect.low.round(1)
    (array([[2.]]), array([[-10.7]]))
    """
    mean, left_out = diagonal_means(differences, labels)
    error = jackknife_error(left_out, labels.holds)
    return Estimate(mean, *confidence_interval(mean, error, labels.groups))


def decompose(
    on: Float[np.ndarray, "k sample"],
    off: Float[np.ndarray, "k sample"],
    full: Float[np.ndarray, " sample"],
    captured: Float[np.ndarray, "k sample"],
    labels: SampleGroups,
) -> Decomposition:
    """Return what a part and the rest do, apart and together.

    Args:
        on, off, full: Effects on each sample, as in :func:`effects`; of parts for each k.
        captured: c of the fold or folds in which a sample is held out.
        labels: Group and tasks of each sample.
    """
    part = (on + full - off) / 2
    whole = effects(full[None], labels)
    is_resolved = (whole.low > 0) | (whole.high < 0)
    interaction, excess = effects(full - on - off, labels), effects(part - captured * full, labels)
    is_separable = np.abs(interaction.estimate) <= SEPARABLE * np.abs(whole.estimate)
    share, sufficiency = (ratio_of_means(values, full, labels) for values in (part, on))
    necessity = ratio_of_means(full - off, full, labels)
    c = diagonal_means(captured, labels)[0]
    efficiency = Estimate(*(ratio(values, c) for values in (share.estimate, share.low, share.high)))
    return Decomposition(
        interaction,
        excess,
        share,
        efficiency,
        sufficiency,
        necessity,
        np.broadcast_to(is_resolved, is_separable.shape),
        is_separable,
    )


def ratio_of_means(
    numerator: Float[np.ndarray, "k sample"], denominator: Float[np.ndarray, " sample"], labels: SampleGroups
) -> Estimate:
    """Return ratios of two means with Fieller's interval over group totals, ``[k, task]`` (Fieller 1954).

    Returns:
        NaN where the denominator's own interval holds 0: then any ratio is possible.
    """
    member, membership = labels.member.astype(np.float64), labels.membership
    holds = labels.holds
    g = holds.sum(0).astype(np.float64)
    tops = np.einsum("kn,nt,ng->kgt", numerator, member, membership)
    bottoms = np.einsum("n,nt,ng->gt", denominator, member, membership)
    top, bottom = ratio(tops.sum(1), g), ratio(bottoms.sum(0), g)
    tops, bottoms = np.where(holds, tops - top[:, None], 0.0), np.where(holds, bottoms - bottom, 0.0)
    scale = ratio(special.stdtrit(np.where(g > 1, g - 1, np.nan), 0.975) ** 2, g * (g - 1))
    variance, other = scale * (tops**2).sum(1), scale * (bottoms**2).sum(0)
    covariance = scale * (tops * bottoms).sum(1)
    # (top − r·bottom)² ≤ t²·var(top − r·bottom)
    a, b, c = bottom**2 - other, top * bottom - covariance, top**2 - variance
    resolved = a > 0
    a = np.where(resolved, a, np.nan)
    reach = np.sqrt(np.maximum(b**2 - a * c, 0.0))
    estimate = np.where(resolved, top / np.where(bottom == 0, np.nan, bottom), np.nan)
    return Estimate(estimate, (b - reach) / a, (b + reach) / a)


def adjusted_p(values: Float[np.ndarray, "test sample"], labels: SampleGroups, *, seed: int = 0) -> np.ndarray:
    """Return p of each mean being 0, two-sided, adjusted for all tests of all tasks, ``[test, task]``.

    The largest |t| over tests and tasks under random signs of the centred group means (a multiplier bootstrap of
    max-T); with fewer than 12 groups Bonferroni's, with Student's t.

    Args:
        values: One number for each sample.
        labels: Group and tasks of each sample.
        seed: Of the signs.
    """
    mean, left_out = diagonal_means(values, labels)
    error = jackknife_error(left_out, labels.holds)
    t = np.abs(np.divide(mean, error, out=np.full(mean.shape, np.nan), where=error > 0))
    count = np.isfinite(t).sum()
    if not count:
        return np.full(t.shape, np.nan)
    if labels.groups.min() < LEAST_GROUPS:
        return np.minimum(1.0, count * 2 * special.stdtr(np.maximum(labels.groups - 1.0, 1.0), -t))
    influence = np.where(labels.holds, mean[:, None] - left_out, 0.0)  # of each group, up to a factor
    influence = np.nan_to_num(influence - ratio(influence.sum(1), labels.groups)[:, None] * labels.holds)
    size = np.sqrt((influence**2).sum(1))
    generator = np.random.default_rng(seed)
    signs = generator.integers(0, 2, (SIGNS, influence.shape[1])) * 2 - 1
    drawn = np.einsum("sg,kgt->skt", signs.astype(np.float64), influence)
    largest = np.nan_to_num(np.abs(np.divide(drawn, size, out=np.zeros(drawn.shape), where=size > 0))).max((1, 2))
    return np.where(np.isfinite(t), (1 + (largest[:, None, None] >= t).sum(0)) / (1 + SIGNS), np.nan)


def required_groups(differences: Float[np.ndarray, "arm sample"], labels: SampleGroups) -> np.ndarray:
    """Return how many groups would resolve an effect of the size found with 80 % power, ``[arm, task]``.

    n ≥ (2.8 sd/|D|)², with sd the standard deviation of a group's mean effect.
    """
    mean, left_out = diagonal_means(differences, labels)
    error = jackknife_error(left_out, labels.holds)
    return np.ceil(ratio((_POWER * error) ** 2 * labels.groups, mean**2))
