"""Linear models of which the population is known: what a part of an update does to the loss, exactly and as estimated.

y = ⟨x, θ*⟩ + offset + noise, samples in groups of two that share part of their features. The loss ½(y − ⟨x, θ⟩)² is
quadratic, so D of any change is closed, of each sample and in the population.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from dynamics.fisher.samples import Estimate, SampleGroups, half_splits
from dynamics.intervention.effects import effects, part_and_rest
from dynamics.intervention.parts import leading_part


@dataclass(frozen=True)
class Case:
    """A population, where an update starts, and the update.

    Args:
        spectrum: Variance of each feature.
        optimum, start, update: θ*, θ₀ and δ.
        noise: Standard deviation of y about ⟨x, θ*⟩.
        samples: Number of probe samples.
        k: Numbers of directions.
        mean: Of each feature.
        offset: Of y, which nothing is trained to meet.
    """

    spectrum: np.ndarray
    optimum: np.ndarray
    start: np.ndarray
    update: np.ndarray
    noise: float
    samples: int
    k: tuple[int, ...]
    mean: np.ndarray | float = 0.0
    offset: float = 0.0

    @property
    def descent(self) -> np.ndarray:
        """Return −∇L at the start."""
        distance = self.optimum - self.start
        return self.spectrum * distance + self.mean * (self.offset + (self.mean * distance).sum())

    def effect(self, change: np.ndarray) -> np.ndarray:
        """Return D in the population, of changes ``[..., direction]``."""
        return change @ self.descent - (change**2 @ self.spectrum + (change * self.mean).sum(-1) ** 2) / 2


def small_gradient_step(rng: np.random.Generator, k: tuple[int, ...] = (4, 16)) -> Case:
    """A step so small that the loss is linear along it: every part pays its share of the norm, T = 0."""
    spectrum = 1 / np.arange(1, 201.0)
    spectrum /= spectrum.sum()
    optimum = 0.9 * rng.standard_normal(200)
    return Case(spectrum, optimum, np.zeros(200), 0.02 * spectrum * optimum / spectrum[0], 0.5, 256, k)


def agreeing_gradients(rng: np.random.Generator) -> Case:
    """As small a step where nearly all samples' losses fall: what one half owes to the other is largest."""
    spectrum = np.full(200, 1 / 200)
    mean = 0.7 * np.sqrt(spectrum) * rng.standard_normal(200)
    still = Case(spectrum, 0.27 * rng.standard_normal(200), np.zeros(200), np.zeros(200), 0.5, 256, (4, 16), mean, 3.0)
    return replace(still, update=0.001 * still.descent)


def newton_step(rng: np.random.Generator) -> Case:
    """A tenth of the way to the optimum: leading directions pay far more than their share of the norm."""
    spectrum = 1 / np.arange(1, 201.0)
    optimum = 0.5 * rng.standard_normal(200)
    return Case(spectrum / spectrum.sum(), optimum, np.zeros(200), 0.1 * optimum, 0.5, 256, (4, 16))


def bounce(rng: np.random.Generator) -> Case:
    """Three quarters of the squared norm jump along the leading direction to the mirror point, which gains nothing."""
    return _along_the_leading_direction(rng, 0.7)


def landing(rng: np.random.Generator) -> Case:
    """The same update from twice as far: it ends at the minimum along the leading direction."""
    return _along_the_leading_direction(rng, 1.4)


def _along_the_leading_direction(rng: np.random.Generator, distance: float) -> Case:
    tail = rng.standard_normal(60)
    tail /= np.linalg.norm(tail)
    spectrum = np.r_[0.3, np.full(60, 0.7 / 60)]
    return Case(spectrum, np.r_[0, 3 * tail], np.r_[distance, np.zeros(60)], np.r_[-1.4, tail], 0.1, 1024, (1, 4))


#: Cases by name, as the table calls them.
CASES: dict[str, Callable[[np.random.Generator], Case]] = {
    "small gradient step": small_gradient_step,
    "Newton-like step": newton_step,
    "bounce": bounce,
    "landing": landing,
    "small gradient step, gradients that agree": agreeing_gradients,
}


@dataclass(frozen=True)
class Outcome:
    """What each arm does to each sample, and in the population with the same directions.

    Args:
        on, off: ``[split, k, sample]``.
        full: ``[sample]``.
        captured: c, ``[split, k, sample]``.
        first_order: −⟨g_i, on⟩, ``[split, k, sample]``.
        truth: c, D(δ), D_on, D_off in the population, mean over the folds: ``[4, k]``.
    """

    on: np.ndarray
    off: np.ndarray
    full: np.ndarray
    captured: np.ndarray
    first_order: np.ndarray
    truth: np.ndarray

    @property
    def excess(self) -> np.ndarray:
        """T of each sample, ``[split, k, sample]``."""
        return (self.on + self.full - self.off) / 2 - self.captured * self.full


def groups_of_two(samples: int) -> SampleGroups:
    return SampleGroups.of_one_task(np.repeat(np.arange(samples // 2), 2))


def outcome(
    case: Case, labels: SampleGroups, rng: np.random.Generator, *, splits: int = 2, cross_fitted: bool = True
) -> Outcome:
    """Draw probe samples; score the parts of the update along the leading directions of one half on the other half.

    Args:
        cross_fitted: Else on the same half, as must not be done.
    """
    groups, d = labels.membership.shape[1], len(case.spectrum)
    common = rng.standard_normal((groups, d))[labels.group]
    features = np.sqrt(0.3) * common + np.sqrt(0.7) * rng.standard_normal((case.samples, d))
    features = features * np.sqrt(case.spectrum) + case.mean
    residuals = features @ (case.optimum - case.start) + case.offset + case.noise * rng.standard_normal(case.samples)
    gradients = -residuals[:, None] * features
    product, squared_norm = gradients @ case.update, case.update @ case.update

    def effect(samples: np.ndarray, change: np.ndarray) -> np.ndarray:
        moved = change @ features[samples].T
        return residuals[samples] * moved - moved**2 / 2

    values = np.zeros((4, splits, len(case.k), case.samples))
    truths = []
    for fold, (fit, held_out) in enumerate(half_splits(labels.group, splits, seed=int(rng.integers(1 << 30)))):
        scored = held_out if cross_fitted else fit
        gram = gradients[fit] @ gradients[fit].T
        parts = [leading_part(gram, product[fit], k) for k in case.k]
        on = np.stack([part.weights for part in parts]) @ gradients[fit]
        off = case.update - on
        share = np.array([part.energy for part in parts]) / squared_norm
        for kind, numbers in enumerate(
            (effect(scored, on), effect(scored, off), share[:, None], -on @ gradients[scored].T)
        ):
            values[kind, fold // 2][:, scored] = numbers
        whole = np.full(len(share), case.effect(case.update))
        truths.append(np.stack([share, whole, case.effect(on), case.effect(off)]))
    full = effect(np.arange(case.samples), case.update)
    on, off, captured, first_order = values
    return Outcome(on, off, full, captured, first_order, np.mean(truths, axis=0))


@dataclass(frozen=True)
class Tally:
    """What is said of many draws, each ``[draw, k]``.

    Args:
        captured, true_share, share, first_order_share: c, s in the population, its estimate, and that of first order.
        holds_on, holds_off, holds_excess, holds_share: Whether an interval holds the truth; NaN where s has none.
        more, less: Whether T's interval lies above, or below, 0.
        lowers: Whether D_on's interval lies above 0.
    """

    captured: np.ndarray
    true_share: np.ndarray
    share: np.ndarray
    first_order_share: np.ndarray
    holds_on: np.ndarray
    holds_off: np.ndarray
    holds_excess: np.ndarray
    holds_share: np.ndarray
    more: np.ndarray
    less: np.ndarray
    lowers: np.ndarray


def tally(
    case: Callable[[np.random.Generator], Case], draws: int, seed: int, *, splits: int = 2, cross_fitted: bool = True
) -> Tally:
    """Draw populations and probe samples, and note what is said of each."""
    rng = np.random.default_rng(seed)
    labels = groups_of_two(case(rng).samples)
    rows = []
    for _ in range(draws):
        drawn = outcome(case(rng), labels, rng, splits=splits, cross_fitted=cross_fitted)
        parts = part_and_rest(drawn.on, drawn.off, drawn.full, drawn.captured, labels)
        on, off = effects(drawn.on, labels), effects(drawn.off, labels)
        c, whole, true_on, true_off = drawn.truth
        contribution = (true_on + whole - true_off) / 2
        rows.append(
            (
                c,
                contribution / whole,
                parts.share.estimate[:, 0],
                drawn.first_order.mean((0, 2)) / drawn.full.mean(),
                _holds(on, true_on),
                _holds(off, true_off),
                _holds(parts.excess, contribution - c * whole),
                np.where(np.isnan(parts.share.low[:, 0]), np.nan, _holds(parts.share, contribution / whole)),
                parts.excess.low[:, 0] > 0,
                parts.excess.high[:, 0] < 0,
                on.low[:, 0] > 0,
            )
        )
    return Tally(*(np.array(column, dtype=np.float64) for column in zip(*rows, strict=True)))


def _holds(interval: Estimate, truth: np.ndarray) -> np.ndarray:
    return (interval.low[:, 0] <= truth) & (truth <= interval.high[:, 0])
