"""Whether a training still moves, wanders about, has come to rest, or breaks: from its path and its log.

**Direction.** Increments between checkpoints are drift and noise. The noise of one step does not know that of
another, so in a space of high dimension its increments are orthogonal, with cosines of 0 ± 1/√(effective dimension);
around an optimum they point back, and cosines are negative. A drift gives all of them the same positive cosine. The
mean cosine in the newest half of the training is tested by turning the signs of increments, which is exact for
independent noise of any effective dimension. Neighbours share momentum and are left out.

**Size.** A cosine does not depend on the learning rate, the norm of an increment does. Of n steps it is ∝ ηn for a
drift and ∝ η√n for noise, so both quotients must agree before a norm is called small or large.

**Loss.** Means of blocks of the log are fitted with a line. Its error counts the blocks as fewer where residuals
resemble their neighbours: n(1 − ρ)/(1 + ρ), ρ the lag-1 autocorrelation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int
from scipy import special

from dynamics.relate.permutations import LEVEL, sign_flips

State = Literal["unstable", "overfitting", "moving", "converged", "below_rounding", "wandering", "undecided"]

#: Increments of the newest half are joined to at most so many blocks; fewer cannot be tested: 2⁻⁵ is the smallest p.
MOST_BLOCKS, FEWEST_BLOCKS = 12, 6
#: Blocks of the log, and rows without which it is not judged.
_LOSS_BLOCKS, FEWEST_ROWS = 20, 20
#: An increment's squared norm below this part of the largest squared distance is lost in the rounding of its products.
_RESOLVED = 1e-9
#: Size for its learning rate, relative to the median of the first half, up to which a training is called at rest.
AT_REST = 0.05
#: The same relative to the median of all, from which it is called exploding.
EXPLODING = 5.0
#: Learning rate relative to its peak, up to which a schedule is called ended.
ENDED = 0.05
#: Fall of the loss over the newest half, relative to the whole fall, up to which a training may be at rest.
_SPENT = 0.02
#: A loss that rises by less than this part of its level is not called unstable; of an evaluation, not overfitting.
_RISE, _WORSE = 0.05, 0.02
#: Level of the test of the loss, on either side.
_LOSS_LEVEL = 0.005
#: A spike exceeds the median of its neighbours by so many robust standard deviations, and by this part of it.
_SPIKE, _SPIKE_SHARE = 10.0, 0.2
#: Rows on either side of one that its median is taken over.
_BESIDE = 3
#: Evaluations after the best without which none is called best; the share of pairs of them that must rise, since the
#: noise of a walk rises, too, but with turns; and the rise since then as part of the improvement.
_LATER, _RISING, _WORSE_SHARE = 4, 0.9, 0.1


@dataclass(frozen=True)
class Training:
    """One training as far as it is known; arrays are empty where nothing is.

    Args:
        step: ``(checkpoint,)``, ascending.
        gram: ⟨ΔW_t, ΔW_u⟩ over all matrices, counted from the start; NaN where it is not known.
        moved, moved_step, moved_from: ``(increment,)``, norms of increments, and the steps at which they end and begin;
            NaN where one is not known, −1 where no beginning is.
        rounded: Share of matrices whose newest increment is mostly rounding of the storage; NaN where not known.
        beyond_edge: Whether the critical sharpness of the last step exceeds 2/η.
        faults: What is known to be broken: ``"gradients"``, ``"weights"`` that are not finite.
        log_step, loss, learning_rate: ``(row,)`` of the log; NaN where not logged.
        evaluation_step, evaluation: A loss on held-out samples.
    """

    step: Int[np.ndarray, " checkpoint"]
    gram: Float[np.ndarray, "checkpoint checkpoint"]
    log_step: Int[np.ndarray, " row"]
    loss: Float[np.ndarray, " row"]
    learning_rate: Float[np.ndarray, " row"]
    evaluation_step: Int[np.ndarray, " evaluation"]
    evaluation: Float[np.ndarray, " evaluation"]
    moved: Float[np.ndarray, " increment"]
    moved_step: Int[np.ndarray, " increment"]
    moved_from: Int[np.ndarray, " increment"]
    rounded: float = float("nan")
    beyond_edge: bool = False
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Motion:
    """Whether increments agree in direction.

    Args:
        cosine: Mean cosine of blocks of increments that are not neighbours; ``high`` is its upper 95 % limit.
        p_value: Share of sign patterns with a mean cosine at least as large.
        blocks: Number of blocks.
        first_step: Where the first begins.
    """

    cosine: float
    high: float
    p_value: float
    blocks: int
    first_step: int


@dataclass(frozen=True)
class Trend:
    """How the loss changes over the newest half of its log.

    Args:
        change: Of the fitted line, with the ends of its 99 % interval; negative where the loss falls.
        level: Mean loss.
        before: Fall from the first block of the log to the start of the newest half.
        first_step: Where the newest half begins.
        last: Mean of the newest block.
    """

    change: float
    low: float
    high: float
    level: float
    before: float
    first_step: int
    last: float


@dataclass(frozen=True)
class Course:
    """What a training is doing.

    Args:
        state: The first that holds: ``unstable`` (``reasons``), ``overfitting``, ``converged``, ``moving``,
            ``below_rounding``, ``wandering``, else ``undecided``.
        ended: Whether the learning rate has fallen to at most ``ENDED`` of its peak; ``None`` where it is not known.
        reasons: Of ``unstable``: the faults, ``"loss"`` (infinite), ``"rises"``, ``"spikes"``, ``"explodes"``,
            ``"edge"`` (steps beyond the edge of stability that lead nowhere); of ``moving``: ``"direction"``,
            ``"loss"``.
        motion, trend: ``None`` where there is too little to judge.
        size: The newest increment relative to the median one of the first half, at the same learning rate and number
            of steps.
        rate: The newest learning rate relative to its peak.
        spikes: Number in the newest half of the log.
        best: Position of the best evaluation, of ``overfitting``.
    """

    state: State
    ended: bool | None
    reasons: tuple[str, ...]
    motion: Motion | None
    trend: Trend | None
    size: float
    rate: float
    spikes: int
    best: int | None


def products_of_increments(
    gram: Float[np.ndarray, "checkpoint checkpoint"],
) -> Float[np.ndarray, "checkpoint checkpoint"]:
    """Return inner products of increments between checkpoints, the first from the start.

    >>> products_of_increments(np.array([[1.0, 1.0], [1.0, 2.0]])).tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    points = np.pad(gram, ((1, 0), (1, 0)))
    return np.diff(np.diff(points, axis=0), axis=1)


def motion_of(training: Training) -> Motion | None:
    """Return whether the newest half of the increments agree in direction; ``None`` for too few."""
    products = products_of_increments(training.gram)
    if not np.isfinite(products).all() or not len(products):
        return None
    moved = np.flatnonzero(np.diag(products) > _RESOLVED * np.diag(training.gram).max())
    newest = moved[-max(FEWEST_BLOCKS, (len(moved) + 1) // 2) :]
    if len(newest) < FEWEST_BLOCKS:
        return None
    blocks = np.array_split(newest, min(len(newest), MOST_BLOCKS))
    member = np.array([np.isin(np.arange(len(products)), block) for block in blocks], dtype=np.float64)
    # Each increment counts alike, however long: a learning rate that falls makes the later ones shorter.
    length = np.sqrt(np.diag(products).clip(0))
    unit = np.divide(
        products, np.outer(length, length), out=np.zeros_like(products), where=np.outer(length, length) > 0
    )
    joined = member @ unit @ member.T
    sizes = np.sqrt(np.diag(joined).clip(0))
    if not (sizes > 0).all():
        return None
    first, second = np.triu_indices(len(blocks), 2)
    cosines = (joined / np.outer(sizes, sizes))[first, second]
    mean = float(cosines.mean())
    signs = sign_flips(len(blocks))
    flipped = (signs[:, first] * signs[:, second]) @ cosines
    p_value = float(np.mean(flipped >= cosines.sum() - 1e-9))
    error = float(np.sqrt((cosines**2).sum()) / len(cosines))
    high = mean + float(special.ndtri(1 - LEVEL)) * error
    return Motion(mean, high, p_value, len(blocks), int(training.step[max(newest[0] - 1, 0)]))


def trend_of(training: Training) -> Trend | None:
    """Return how the loss changes over the newest half of its log; ``None`` for too few rows."""
    logged = np.flatnonzero(np.isfinite(training.loss))
    if len(logged) < FEWEST_ROWS:
        return None
    step, loss = training.log_step[logged], training.loss[logged]
    newest = step > (step[0] + step[-1]) / 2
    count = min(int(newest.sum()), _LOSS_BLOCKS)
    if count < FEWEST_ROWS // 2:
        return None
    means = np.array([block.mean() for block in np.array_split(loss[newest], count)])
    low, change, high = _change(means)
    before = float(loss[: max(len(loss) // 20, 1)].mean() - means[0])
    return Trend(change, low, high, float(means.mean()), before, int(step[newest][0]), float(means[-1]))


def _change(values: Float[np.ndarray, " row"]) -> tuple[float, float, float]:
    """Return the change of a fitted line from first to last value, between the ends of its 99 % interval."""
    count = len(values)
    position = np.arange(count) - (count - 1) / 2
    slope = float(position @ values / (position @ position))
    residual = values - values.mean() - slope * position
    spread = float(residual @ residual)
    likeness = float(residual[1:] @ residual[:-1]) / spread if spread > 0 else 0.0
    # Residuals of a line resemble each other less than errors do (Marriott & Pope 1954).
    likeness = float(np.clip((count * likeness + 2) / (count - 4), 0, 0.95))
    independent = count * (1 - likeness) / (1 + likeness)
    error = np.sqrt(spread / (count - 2) * count / independent / (position @ position))
    reach = float(special.stdtrit(max(independent - 2, 1.0), 1 - _LOSS_LEVEL) * error)
    return (count - 1) * (slope - reach), (count - 1) * slope, (count - 1) * (slope + reach)


def spikes_of(training: Training) -> int:
    """Return how often the newest half of the log exceeds the median of its neighbours by far."""
    loss = training.loss[np.isfinite(training.loss)]
    if len(loss) < FEWEST_ROWS:
        return 0
    padded = np.pad(loss, _BESIDE, mode="reflect")
    middle = np.median(np.lib.stride_tricks.sliding_window_view(padded, 2 * _BESIDE + 1), axis=-1)
    excess = loss - middle
    spread = 1.4826 * np.median(np.abs(excess))
    high = (excess > _SPIKE * spread) & (excess > _SPIKE_SHARE * np.abs(middle))
    begins = high & ~np.pad(high, (1, 0))[:-1]
    return int(begins[len(loss) // 2 :].sum())


def _rates(training: Training) -> Float[np.ndarray, " increment"]:
    """Return the mean learning rate of each increment's steps; 1 where none is logged."""
    logged = np.isfinite(training.learning_rate)
    if not logged.any():
        return np.ones(len(training.moved))
    within = np.linspace(training.moved_from + 1, training.moved_step, 16)
    return np.interp(within, training.log_step[logged], training.learning_rate[logged]).mean(0)


def sizes_of(training: Training) -> tuple[Float[np.ndarray, " increment"], Float[np.ndarray, " increment"]]:
    """Return norms of increments over η n and over η√n, of n steps; η = 1 where no learning rate is logged.

    NaN where the beginning is not known, and where the learning rate is 0.
    """
    steps = (training.moved_step - training.moved_from).astype(np.float64)
    rates = np.where(training.moved_from >= 0, _rates(training), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        drift, noise = (np.where(rates > 0, training.moved / (rates * steps**power), np.nan) for power in (1.0, 0.5))
    return drift, noise


def _first_half(sizes: Float[np.ndarray, " increment"]) -> float:
    """Return the median of the first half of those that are known, NaN where it is 0."""
    logged = sizes[np.isfinite(sizes)]
    return float(np.median(logged[: (len(logged) + 1) // 2])) or np.nan


def best_evaluation(values: Float[np.ndarray, " evaluation"]) -> int | None:
    """Return the position of the smallest evaluation if all that follow have risen since, else ``None``.

    >>> best_evaluation(np.array([3.0, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0])), best_evaluation(np.array([3.0, 2.0, 1.0]))
    (1, None)
    """
    values = values[np.isfinite(values)]
    best = int(np.argmin(values)) if len(values) else 0
    if len(values) - 1 - best < _LATER:
        return None
    later = values[best:]
    first, second = np.triu_indices(len(later), 1)
    rising = float(np.mean(later[second] > later[first]))
    least = max(_WORSE_SHARE * (values[0] - values[best]), _WORSE * abs(values[best]))
    return best if rising >= _RISING and later[-1] - values[best] > least else None


def course_of(training: Training) -> Course:
    """Return what a training is doing; see :class:`Course`.

    Directions are tested at 5 %, the loss at 0.5 % on either side.
    """
    motion, trend, spikes = motion_of(training), trend_of(training), spikes_of(training)
    rates = training.learning_rate[np.isfinite(training.learning_rate)]
    rate = float(rates[-1] / rates.max()) if len(rates) and rates.max() > 0 else np.nan
    ended = None if np.isnan(rate) else rate <= ENDED
    sizes = [one for one in sizes_of(training) if np.isfinite(one).sum() > 1 and np.nanmedian(one) > 0]
    size = max((float(one[-1] / _first_half(one)) for one in sizes), default=np.nan)
    exploding = min((float(one[-1] / np.nanmedian(one)) for one in sizes), default=np.nan)
    # A cosine below 1 over their number is that of a drift which moves the increments less than their noise.
    diffuses = motion is not None and motion.high <= 1 / motion.blocks
    direction = motion is not None and motion.p_value <= LEVEL and not diffuses
    # While a learning rate falls to 0 noise dies away, and the loss falls with it wherever the training is.
    falls = trend is not None and trend.high < 0 and not ended
    rises = trend is not None and trend.low > 0 and trend.change > _RISE * abs(trend.level)
    spent = trend is None or -trend.change <= _SPENT * max(trend.before - trend.change, 0.0)
    unstable = {
        "loss": bool(np.isinf(training.loss).any()),
        "rises": rises,
        "spikes": spikes > 0,
        "explodes": exploding >= EXPLODING,
        "edge": training.beyond_edge and not falls and not direction,
    }
    reasons = (*training.faults, *(reason for reason, holds in unstable.items() if holds))
    best = best_evaluation(training.evaluation)
    state: State = "undecided"
    if reasons:
        state = "unstable"
    elif best is not None and (trend is None or trend.change < 0):
        state = "overfitting"
    elif size <= AT_REST and spent:
        state = "converged"
    elif direction or falls:
        state = "moving"
        reasons = tuple(reason for reason, holds in (("direction", direction), ("loss", falls)) if holds)
    elif training.rounded >= 0.5:
        state = "below_rounding"
    elif diffuses:
        state = "wandering"
    return Course(state, ended, reasons, motion, trend, size, rate, spikes, best)
