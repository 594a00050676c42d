r"""What the parts of an update do to the loss: paired differences of samples, with intervals over groups.

D(x) = mean of ℓ_i(θ) − ℓ_i(θ + x) over held-out samples: an improvement is positive. Of a part *on* and the rest *off*
of an update δ, with c = ‖on‖²/‖δ‖²,

.. math:: I = D(δ) - D_{on} - D_{off}, \qquad φ = \tfrac12 (D_{on} + D(δ) - D_{off}), \qquad
          s = φ/D(δ), \qquad T = φ - c\,D(δ), \qquad η = s/c

φ is the part's Shapley value: the two parts' shares sum to one. The reference c is what any part pays that is random
with respect to δ, and for δ = −η∇L every part exactly: T > 0 says that it pays more than its share of the norm, T < 0
less. T is in units of the loss and takes no ratio, so it exists where shares do not.

Directions must come from other groups than the losses: with the same, a gradient step seems to pay more than its norm
in nearly all cases. So each random split of the groups gives each sample one difference, with directions from the half
that it is not in. Intervals are conditional on the directions; they are Student's, with standard errors in two parts:

* the jackknife over groups, since samples of one group are not independent;
* what it misses, since the halves exchange roles: a sample's difference depends on the other half through the
  directions, and the other half's on that sample. With σ² the variance of d_i between splits, the jackknife counts one
  of two such terms; the other is at most as large, (1 + 1/S) σ²/N with S splits, and needs two of them. In simulated
  gradient steps, where T is 0, intervals of T hold 0 in 84 to 93 % of cases without it, in 96 to 98 % with it;
  docs/interventions.md has the table.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from dynamics.fisher.samples import Estimate, SampleGroups, confidence_interval, ratio

#: Two parts have shares only where their interaction is at most this share of the whole effect.
SEPARABLE = 0.5
#: Random signs of the test over several directions and tasks, and the groups it needs.
SIGNS, LEAST_GROUPS = 9_999, 12
#: Numbers that are held at a time while signs are drawn (8 MiB).
_PART = 2**20
#: Standard errors between 0 and the effect that is found with 80 % power at 5 %: z₀.₉₇₅ + z₀.₈.
_POWER = 2.8


@dataclass(frozen=True)
class Decomposition:
    """What two parts of an update do together and apart; each ``[k, task]``.

    Args:
        captured: c, mean over the folds.
        interaction: I.
        excess: T, without ratios.
        share: s; NaN where the whole effect's interval holds 0. Of a whole that does harm, the share of the harm.
        efficiency: s/c.
        sufficiency: D_on/D(δ).
        necessity: 1 − D_off/D(δ).
        resolved: Whether the whole effect's interval excludes 0.
        separable: Whether |I| ≤ ½|D(δ)|; else the parts work only together, and neither has a share.
    """

    captured: Float[np.ndarray, "k task"]
    interaction: Estimate
    excess: Estimate
    share: Estimate
    efficiency: Estimate
    sufficiency: Estimate
    necessity: Estimate
    resolved: Bool[np.ndarray, "k task"]
    separable: Bool[np.ndarray, "k task"]


def effects(differences: Float[np.ndarray, "*split arm sample"], labels: SampleGroups) -> Estimate:
    """Return the mean effect of each arm on each task, ``[arm, task]``, with its 95 % interval over groups.

    Args:
        differences: ℓ_i(θ) − ℓ_i(θ + x), or what a score per sample gains, of each split of the groups; without that
            axis for an arm that no half of the groups determines.
        labels: Group and tasks of each sample.

    Returns:
        NaN for a task with a sample whose difference is not finite; no interval for fewer than two groups.

    >>> effect = effects(np.array([[1.0, 3.0]]), SampleGroups.of_one_task(np.arange(2)))
    >>> effect.estimate, effect.low.round(1)
    (array([[2.]]), array([[-10.7]]))
    """
    mean, influence = _influence(differences, labels)
    return Estimate(mean, *confidence_interval(mean, _error(influence), labels.groups))


def part_and_rest(
    on: Float[np.ndarray, "*split k sample"],
    off: Float[np.ndarray, "*split k sample"],
    full: Float[np.ndarray, " sample"],
    captured: Float[np.ndarray, "*split k sample"],
    labels: SampleGroups,
) -> Decomposition:
    """Return what a part and the rest do, apart and together.

    Args:
        on, off, full: Effects on each sample, as in :func:`effects`; of parts for each k.
        captured: c of the fold in which a sample is held out.
        labels: Group and tasks of each sample.
    """
    part = (on + full - off) / 2
    of_full = effects(full[None], labels)
    interaction = effects(full - on - off, labels)
    share = ratio_of_means(part, full, labels)
    c = _influence(captured, labels)[0]
    return Decomposition(
        captured=c,
        interaction=interaction,
        excess=effects(part - captured * full, labels),
        share=share,
        efficiency=Estimate(*(ratio(values, c) for values in (share.estimate, share.low, share.high))),
        sufficiency=ratio_of_means(on, full, labels),
        necessity=ratio_of_means(full - off, full, labels),
        resolved=np.broadcast_to((of_full.low > 0) | (of_full.high < 0), c.shape),
        separable=np.abs(interaction.estimate) <= SEPARABLE * np.abs(of_full.estimate),
    )


def ratio_of_means(
    numerator: Float[np.ndarray, "*split k sample"], denominator: Float[np.ndarray, " sample"], labels: SampleGroups
) -> Estimate:
    r"""Return ratios of two means with Fieller's interval, ``[k, task]`` (Fieller 1954).

    It holds each r that the interval of :func:`effects` does not exclude, |mean(top − r·bottom)| ≤ t·error(r): a
    quadratic in r.

    Returns:
        NaN where the denominator's own interval holds 0: then any ratio is possible.
    """
    top, of_top = _influence(numerator, labels)
    bottom, of_bottom = _influence(denominator[None], labels)
    square = special.stdtrit(np.where(labels.groups > 1, labels.groups - 1.0, np.nan), 0.975) ** 2
    a = bottom**2 - square * (of_bottom**2).sum((0, 2))
    b = top * bottom - square * (of_top[:1] * of_bottom[:1]).sum((0, 2))  # the denominator is the same in all splits
    c = top**2 - square * (of_top**2).sum((0, 2))
    a = np.where(a > 0, a, np.nan)
    reach = np.sqrt(np.maximum(b**2 - a * c, 0.0))
    estimate = top / np.where(np.isnan(a), np.nan, bottom)
    return Estimate(estimate, (b - reach) / a, (b + reach) / a)


def adjusted_p(
    values: Float[np.ndarray, "*split test sample"], labels: SampleGroups, *, seed: int = 0
) -> Float[np.ndarray, "test task"]:
    """Return p of each mean being 0, two-sided, adjusted for all tests of all tasks.

    The largest |t| over tests and tasks where the groups' deviations from the mean have random signs, the same in all
    tests (a studentised multiplier bootstrap of max-T; Romano and Wolf 2005). If a task has fewer than 12 groups,
    Bonferroni's, with Student's t.

    Args:
        values: One number for each sample, as in :func:`effects`.
        labels: Group and tasks of each sample.
        seed: Of the signs.

    Returns:
        NaN where there is no t: fewer than two groups, or no variation.
    """
    mean, influence = _influence(values, labels)
    error = _error(influence)
    t = np.abs(np.divide(mean, error, out=np.full(mean.shape, np.nan), where=error > 0))
    size = np.sqrt((influence[0] ** 2).sum(1))
    tested = np.isfinite(t) & (size > 0)
    groups = np.broadcast_to(labels.groups, t.shape)
    if not tested.any():
        return np.full(t.shape, np.nan)
    if groups[tested].min() < LEAST_GROUPS:
        return np.minimum(1.0, tested.sum() * 2 * special.stdtr(np.maximum(groups - 1.0, 1.0), -t))
    deviations = influence[0].swapaxes(1, 2)[tested] / size[tested][:, None]
    largest = _largest(deviations, groups[tested], np.random.default_rng(seed))
    p_value = np.full(t.shape, np.nan)
    p_value[tested] = (1 + (largest[:, None] >= t[tested]).sum(0)) / (1 + SIGNS)
    return p_value


def required_groups(
    differences: Float[np.ndarray, "*split arm sample"], labels: SampleGroups
) -> Float[np.ndarray, "arm task"]:
    """Return how many groups would resolve an effect of the size found with 80 % power, at least two.

    n ≥ (2.8 sd/|D|)², with sd the standard deviation of a group's mean effect.

    Returns:
        NaN without an error, or for an effect of exactly 0.
    """
    mean, influence = _influence(differences, labels)
    return np.maximum(np.ceil(ratio((_POWER * _error(influence)) ** 2 * labels.groups, mean**2)), 2.0)


def _influence(values: np.ndarray, labels: SampleGroups) -> tuple[np.ndarray, np.ndarray]:
    """Return means ``[arm, task]`` and deviations ``[1 + split, arm, group, task]`` whose squares sum to the variance.

    Row 0: the mean without a group, less the mean of these; the others: the same, of each split less the mean split.
    """
    values = values if values.ndim == 3 else values[None]
    splits, member = len(values), labels.member
    values = np.where(np.isfinite(values), values, np.nan)  # an infinite loss has no mean; inf − inf would warn
    totals = labels.membership.T @ np.where(member, values[..., None], 0.0)
    counts = labels.membership.T @ member
    total, count = totals.sum(-2, keepdims=True), counts.sum(0)
    left_out = ratio(total - totals, count - counts)
    mean_left_out = left_out.mean(0, keepdims=True)
    extra = np.sqrt((1 + 1 / splits) / max(splits - 1, 1))
    rows = np.concatenate([mean_left_out, extra * (left_out - mean_left_out)])
    g = labels.groups
    rows = np.where(labels.holds, rows, 0.0)
    rows = np.where(labels.holds, rows - ratio(rows.sum(-2, keepdims=True), g), 0.0)
    return ratio(total[..., 0, :].mean(0), count), np.sqrt(np.where(g > 1, ratio(g - 1, g), np.nan)) * rows


def _error(influence: np.ndarray) -> np.ndarray:
    """Return standard errors ``[arm, task]``."""
    return np.sqrt((influence**2).sum((0, 2)))


def _largest(deviations: np.ndarray, groups: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Return the largest |t| over tests, for each draw of signs; deviations ``[test, group]`` of length 1."""
    largest = np.empty(SIGNS)
    tests, columns = deviations.shape
    size = max(1, _PART // (tests + columns))
    for start in range(0, SIGNS, size):
        rows = min(size, SIGNS - start)
        signs = generator.integers(0, 2, (rows, columns), dtype=np.int8) * 2.0 - 1.0
        squares = (signs @ deviations.T) ** 2
        # t of signed deviations: their mean over their error, Σ²(g − 1)/(g − Σ²); all of one size and sign: infinite.
        rest = np.maximum(groups - squares, 0.0)
        t = np.divide(squares * (groups - 1), rest, out=np.full(rest.shape, np.inf), where=rest > 1e-9 * groups)
        largest[start : start + rows] = np.sqrt(t).max(1)
    return largest
