r"""How far a step can go before the loss is where it began: critical sharpness, from forward passes alone.

Along a direction δ that lowers the loss at first, the critical step is

.. math:: t_c = \min\{t > 0 : L(θ + tδ) > L(θ)\}, \qquad λ_c = 2/(η\,t_c),

with η the learning rate that made δ = −ηD. On a quadratic λ_c = DᵀHD/Dᵀg, for D = g the curvature along the gradient;
gradient descent with η > 2/λ_c raises the loss, which is t_c < 1 (Kalra et al. 2026, arXiv 2601.16979).

**Search.** Steps lie on the grid t = 2^(n/16). From the step where it starts, the search doubles (or halves) until the
mean loss is lower than at θ at one step and higher at the next, then halves the interval of ln t four times: to 4.4 %.
Losses are those of the same samples in the same batches. Between the last two steps, (L(θ + tδ) − L(θ))/t is taken as
linear, which makes t_c exact on a quadratic.

**Interval.** With d_i(t) = (ℓ_i(θ + tδ) − ℓ_i(θ))/t for each sample, t_c is the root of mean d(t). Near it d_i is a
line: of the value between the last two steps, and of the slope between steps 19 % apart. So t_c is a ratio of two means
over samples, and has Fieller's interval with the jackknife over groups: all t at which the mean difference cannot be
told from 0. It is conditional on the direction. Where it is not bounded, or holds 0, t_c is not resolved.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from dynamics import schema
from dynamics.fisher.samples import SampleGroups, codes_of
from dynamics.intervention.effects import ratio_of_means
from dynamics.intervention.update_vectors import Change, energy, weighted_sum
from dynamics.schema import ALL, label_arrays
from probes.additions import added
from probes.blocks import trained_parameters
from probes.scores import device_of
from probes.tasks import Task, require_names
from probes.transfer import mean_loss_and_gradient
from probes.undisturbed import undisturbed
from probes.watched import Matrix, find

#: Steps of the grid in a factor of two: the last two steps are 4.4 % apart.
PER_DOUBLING = 16
#: Doublings, or halvings, until the search gives up: 29 passes at most, two at the start and four after it.
MOST_DOUBLINGS = 22
#: Passes of a usual search, for estimates.
_USUAL = 10
#: Steps of the grid between which slopes are taken, 19 % apart: nearer ones would lose them in rounding, and a slope
#: over the whole doubling is not the one at the critical step (intervals held it in 89 % of simulated cases).
_OF_SLOPE = 4

NOT_FINITE = "the loss at the start is not finite"
NO_DIRECTION = "the direction is zero"
NO_GRADIENT = "the gradient is not finite"
AT_ONCE = "the loss rises at once"
NEVER = f"the loss does not rise within {MOST_DOUBLINGS} doublings"
OVERFLOWS = "the loss is not finite beyond this step"
UNRESOLVED = "the changes of the loss cannot be told from noise"


def critical_sharpness(
    model: nn.Module,
    tasks: Sequence[Task],
    direction: Mapping[str, Matrix] | None = None,
    *,
    lr: float | None = None,
    start: float | xr.Dataset | None = None,
    relative: bool = True,
    step: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> xr.Dataset:
    r"""Return how far the model can go along a direction before each task's loss is higher than where it stands.

    Changes are added to the layers' outputs in single precision at least; weights, ``.grad``, modes and random states
    are as before afterwards. A rise between two steps of the search that both lower the loss is not seen.

    Costs, for each task and for all samples together, at most 10 forward passes where ``start`` is within a factor of
    15, and at most 29 anywhere; the relative table as many again for each pair of tasks, and one forward and backward
    pass. With several tasks, passes over all samples serve each task's search too.

    Args:
        model: At the weights θ where the step begins.
        tasks: The samples whose loss is measured.
        direction: δ, the step itself: each matrix's (or parameter's) change, as for :func:`dynamics.counterfactuals`.
            By default −η times the gradient of the mean loss of all samples; of low-rank matrices, their change along
            the gradients of the factors, to first order.
        lr: η, if δ is a step of plain gradient descent. Leave it out for other optimizers: then η = 1, and λ_c is in
            units of this step, 2 where it is exactly the longest that does not raise the loss.
        start: Where the search starts, in units of δ; or the result of an earlier step, for its critical steps and
            relative sharpness. By default 1, and along a gradient the step that would lower the loss to 0 if it were
            linear.
        relative: Measure each task's loss along each task's gradient, too.
        step: Of the training, for the result's coordinate.
        progress: Called with the number of forward passes over samples made, and of all, an estimate: ten a search.

    Returns:
        The group ``/sharpness``, see ``schema.SHARPNESS``: ``critical_step(step, task)``, ``critical_sharpness(step,
        task)`` and ``relative_sharpness(step, task, task_)``, with intervals. ``reason`` says why one is missing.

    Raises:
        ValueError: If there are no tasks, a direction has no matrix in the model or is not finite, or ``lr`` or
            ``start`` is not positive.

    >>> layer = nn.Linear(1, 1, bias=False).double()
    >>> _ = nn.init.ones_(layer.weight)
    >>> squares = lambda model, batch: 3 * model(batch["x"].double())[:, 0] ** 2 / 2
    >>> task = Task("square", [{"x": [1.0]}] * 2, loss=squares)
    >>> result = critical_sharpness(layer, [task], lr=0.5)  # L = 3w²/2, of curvature 3
    >>> round(result["critical_sharpness"].sel(task="square").item(), 6)
    3.0
    >>> round(result["critical_step"].sel(task="square").item(), 6)  # in steps of 0.5: 2/(3 · 0.5)
    1.333333
    """
    if lr is not None and not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"Expected a positive learning rate as lr, got {lr}.")
    if isinstance(start, int | float) and not (math.isfinite(start) and start > 0):
        raise ValueError(f"Expected a positive step to start from, got {start}.")
    for name, matrix in () if direction is None else direction.items():
        if not math.isfinite(energy({name: matrix})):
            raise ValueError(f"Expected a finite direction, got numbers that are not in {name!r}.")
    with undisturbed(model) as quiet, torch.no_grad():
        require_names(tasks)
        gradients = _gradients(quiet, tasks) if relative or direction is None else {}
        eta = 1.0 if lr is None else lr
        lines = 1 + (len(tasks) + (direction is not None) if relative else 0)
        counter = _Counter(progress, _USUAL * lines * sum(map(len, tasks)))
        change = weighted_sum([(eta, gradients[ALL].change)]) if direction is None else direction
        along = _Line.of(quiet, tasks, change, counter)
        polyak = gradients[ALL].polyak / eta if direction is None else 1.0
        critical_steps = {name: along.critical(name, _start(start, name, polyak)) for name in along.tasks}
        critical_steps[ALL] = along.critical(ALL, _of_all(critical_steps, _start(start, ALL, polyak)), base=0)
        pairs = {}
        if relative and direction is None:
            pairs = {(ALL, name): critical_steps[name].stretched(eta) for name in along.tasks}
        for name, gradient in gradients.items() if relative else ():
            if name != ALL and len(tasks) == 1:
                pairs[name, name] = pairs[ALL, name].stretched(1.0)
            elif name != ALL or direction is not None:
                pairs |= _of_gradient(along, name, gradient, start)
    counter.end()
    return _dataset(along, critical_steps, pairs, lr=lr, step=step).assign_attrs(
        direction="gradient" if direction is None else "step"
    )


@dataclass(frozen=True)
class Critical:
    """A critical step.

    Args:
        step: t_c; NaN with a reason.
        low, high: Ends of its 95 % interval, NaN where it has none; ``low`` is 0 where it reaches below.
        reason: Why there is no step, or none that is resolved.
        passes: Forward passes over the samples that the search made.
    """

    step: float = math.nan
    low: float = math.nan
    high: float = math.nan
    reason: str = ""
    passes: int = 0

    def sharpness(self, lr: float = 1.0) -> tuple[float, float, float]:
        """Return λ_c = 2/(η t_c) with the ends of its interval; no upper end where a step of 0 is possible."""
        value, high, low = (2 / (lr * t) if t > 0 else math.nan for t in (self.step, self.low, self.high))
        return value, low, high

    def stretched(self, factor: float) -> Critical:
        """Return the same in another unit, without passes of its own."""
        return Critical(self.step * factor, self.low * factor, self.high * factor, self.reason)


@dataclass
class Search:
    """The search for a critical step along one direction.

    Args:
        difference: From n to ℓ_i(θ + 2^(n/16) δ) − ℓ_i(θ), ``[sample]``.
        rounding: Mean differences up to this size are no differences.
        points: Differences by n, those of the search.
    """

    difference: Callable[[int], Float[np.ndarray, " sample"]]
    rounding: float = 0.0
    points: dict[int, Float[np.ndarray, " sample"]] = field(default_factory=dict)

    def critical(self, start: float, labels: SampleGroups) -> Critical:
        """Return the critical step.

        Args:
            start: Where to start, above 0.
            labels: Groups of the samples, which belong to one task.
        """
        bracket = self._doubling(round(PER_DOUBLING * math.log2(start)))
        if isinstance(bracket, str):
            return Critical(reason=bracket)
        low, high = bracket
        while high - low > 1:
            bracket = (low, high) if high - low >= _OF_SLOPE else bracket
            middle = (low + high) // 2
            low, high = (low, middle) if self._raises(middle) else (middle, high)
        if not math.isfinite(self._mean(high)):
            return Critical(math.sqrt(_length(low) * _length(high)), reason=OVERFLOWS)
        return self._interpolated(low, high, bracket, labels)

    def _mean(self, n: int) -> float:
        if n not in self.points:
            self.points[n] = self.difference(n)
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is not finite, and a rise
            return float(self.points[n].mean())

    def _raises(self, n: int) -> bool:
        return not self._mean(n) <= self.rounding  # a loss that is not finite is none to go to

    def _lowers(self, n: int) -> bool:
        return self._mean(n) < -self.rounding

    def _doubling(self, start: int) -> tuple[int, int] | str:
        """Return two steps, one twice the other, of which only the longer raises the loss; or why there are none."""
        reach = PER_DOUBLING * MOST_DOUBLINGS
        if not self._raises(start):
            longer = range(start + PER_DOUBLING, start + reach + 1, PER_DOUBLING)
            last = next((n for n in longer if self._raises(n)), None)
            if last is None:
                return NEVER
            # Rounding may hide a start that is the critical step itself.
            return (
                (last - PER_DOUBLING, last) if any(map(self._lowers, [*self.points, start - PER_DOUBLING])) else AT_ONCE
            )
        for n in range(start - PER_DOUBLING, start - reach - 1, -PER_DOUBLING):
            if self._lowers(n):
                last = min(m for m in self.points if self._raises(m))
                return last - PER_DOUBLING, last
            if not self._raises(n) and not self._raises(n + PER_DOUBLING):
                break  # shorter ones are lost in rounding, too
        return AT_ONCE

    def _interpolated(self, low: int, high: int, around: tuple[int, int], labels: SampleGroups) -> Critical:
        """Return the root between two steps of the grid, with its interval from slopes around them."""
        slope_low, slope_high = (self.points[n] / _length(n) for n in (low, high))
        below, above = slope_low.mean(), slope_high.mean()
        weight = min(max(-below / (above - below), 0.0), 1.0)
        step = _length(low) + weight * (_length(high) - _length(low))
        at_step = (1 - weight) * slope_low + weight * slope_high
        first, last = around
        while not math.isfinite(self._mean(last)):
            last = max(n for n in self.points if n < last)
        rise = self.points[last] / _length(last) - self.points[first] / _length(first)
        slope = rise / (_length(last) - _length(first))
        unit = np.abs(slope).max() * step  # squares of large numbers overflow
        ends = ratio_of_means(((slope * step - at_step) / unit)[None], slope * step / unit, labels)
        lower, upper = (step * float(end[0, 0]) for end in (ends.low, ends.high))
        return Critical(step, max(lower, 0.0), upper, "" if lower > 0 else UNRESOLVED)


def _length(n: int) -> float:
    return 2.0 ** (n / PER_DOUBLING)


@dataclass(frozen=True)
class _Gradient:
    """A step of gradient descent of learning rate 1 on a mean loss.

    Args:
        change: −∇L, of matrices.
        polyak: L/‖∇L‖², the step that would lower the loss to 0 if it were linear.
    """

    change: Change
    polyak: float


def _gradients(model: nn.Module, tasks: Sequence[Task]) -> dict[str, _Gradient]:
    """Return the gradient of all samples, and of each task; of one task they are the same."""
    parameters = trained_parameters(model)
    if not parameters:
        raise ValueError("Expected a model with trainable parameters, got one whose parameters are all frozen.")
    means = {task.name: mean_loss_and_gradient(model, task, [*parameters.values()]) for task in tasks}
    samples = sum(map(len, tasks))
    share = {task.name: len(task) / samples for task in tasks}
    pooled = [sum(share[name] * means[name][1][n] for name in means) for n in range(len(parameters))]
    means = {ALL: (sum(share[name] * means[name][0] for name in means), pooled), **means}
    return {name: _gradient(model, parameters, loss, gradient) for name, (loss, gradient) in means.items()}


def _gradient(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], loss: float, gradient: list[Tensor]
) -> _Gradient:
    by_parameter = {id(p): part for p, part in zip(parameters.values(), gradient, strict=True)}

    def of(parameter: nn.Parameter) -> Tensor:
        part = by_parameter.get(id(parameter))
        return torch.zeros_like(parameter, dtype=torch.float64) if part is None else part

    trained = [matrix for matrix in find(model).watched if not matrix.part_of and matrix.parameters]
    inside = {id(parameter) for matrix in trained for parameter in matrix.parameters}
    change: dict[str, Matrix] = {matrix.name: matrix.gradient(of, lambda p: p.detach().double()) for matrix in trained}
    change |= {name: of(p) for name, p in parameters.items() if id(p) not in inside}
    square = sum(float(part.square().sum()) for part in gradient)
    polyak = abs(loss) / square if square > 0 else math.nan
    return _Gradient(weighted_sum([(-1.0, change)]), polyak if math.isfinite(polyak) and polyak > 0 else 1.0)


@dataclass
class _Counter:
    """Counts forward passes over samples, of which there may be more than estimated.

    Args:
        progress: Called with those made, and all.
        total: How many there usually are.
    """

    progress: Callable[[int, int], None]
    total: int
    done: int = 0

    def add(self, samples: int) -> None:
        """Count a pass over so many samples."""
        self.done += samples
        self.progress(self.done, max(self.done, self.total))

    def end(self) -> None:
        """Have made all."""
        self.progress(max(self.done, 1), max(self.done, 1))


@dataclass
class _Line:
    """Losses of all tasks along one direction.

    Args:
        model: In evaluation mode.
        tasks: Their samples.
        direction: δ.
        starts: Losses at θ, by task.
        rounding: Of a task's mean loss.
        counter: Counts passes.
        losses: By task and n.
    """

    model: nn.Module
    tasks: Mapping[str, Task]
    direction: Change
    starts: Mapping[str, Float[np.ndarray, " sample"]]
    rounding: Mapping[str, float]
    counter: _Counter
    losses: dict[tuple[str, int], Float[np.ndarray, " sample"]] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, tasks: Sequence[Task], direction: Change, counter: _Counter) -> _Line:
        """Return the line that starts at the model's weights."""
        starts, rounding = {}, {}
        for task in tasks:
            losses = _losses(model, task)
            starts[task.name] = losses.double().cpu().numpy()
            eps = torch.finfo(losses.dtype).eps if losses.dtype.is_floating_point else 0.0
            rounding[task.name] = 2 * eps * float(np.abs(starts[task.name]).mean())
        return cls(model, {task.name: task for task in tasks}, direction, starts, rounding, counter)

    def along(self, direction: Change) -> _Line:
        """Return another line from the same start."""
        return _Line(self.model, self.tasks, direction, self.starts, self.rounding, self.counter)

    def parts(self, name: str) -> list[str]:
        """Return the tasks of which a loss is the mean."""
        return [*self.tasks] if name == ALL else [name]

    def at_start(self, name: str) -> Float[np.ndarray, " sample"]:
        """Return the losses at θ of a task, or of all."""
        return np.concatenate([self.starts[part] for part in self.parts(name)])

    def labels(self, name: str) -> SampleGroups:
        """Return the groups of the samples of a task, or of all."""
        groups = [group for part in self.parts(name) for group in self.tasks[part].groups()]
        return SampleGroups.of_one_task(codes_of(groups, len(groups), "group"))

    def critical(self, name: str, start: float, base: int = 1) -> Critical:
        """Return the critical step of a task's loss, or of all samples'.

        Args:
            name: The task.
            start: Where the search starts.
            base: Passes that the losses at the start took.
        """
        before, made = self.at_start(name), 0

        def difference(n: int) -> Float[np.ndarray, " sample"]:
            nonlocal made
            missing = [part for part in self.parts(name) if (part, n) not in self.losses]
            if missing:
                made += 1
                with added(self.model, weighted_sum([(_length(n), self.direction)])):
                    for part in missing:
                        self.losses[part, n] = _losses(self.model, self.tasks[part]).double().cpu().numpy()
                        self.counter.add(len(self.tasks[part]))
            return np.concatenate([self.losses[part, n] for part in self.parts(name)]) - before

        if not np.isfinite(before).all():
            return Critical(reason=NOT_FINITE, passes=base)
        if not (size := energy(self.direction)) or not math.isfinite(size):
            return Critical(reason=NO_DIRECTION if size == 0 else NO_GRADIENT, passes=base)
        rounding = float(np.mean([self.rounding[part] for part in self.parts(name)]))
        critical = Search(difference, rounding).critical(start, self.labels(name))
        return Critical(critical.step, critical.low, critical.high, critical.reason, base + made)


def _losses(model: nn.Module, task: Task) -> Float[Tensor, " sample"]:
    device = device_of(model)
    return torch.cat([task.losses(model, batch.to(device)) for batch in task.batches()])


def _start(start: float | xr.Dataset | None, name: str, default: float) -> float:
    """Return where the search of a task starts."""
    if isinstance(start, xr.Dataset):
        steps = start["critical_step"].isel(step=-1)
        earlier = float(steps.sel(task=name)) if name in steps["task"] else math.nan
        return earlier if math.isfinite(earlier) else default
    return default if start is None else float(start)


def _of_all(critical_steps: Mapping[str, Critical], default: float) -> float:
    """Return where the search of all samples together starts: of several tasks, in their midst."""
    steps = [part.step for part in critical_steps.values() if math.isfinite(part.step)]
    return float(np.median(steps)) if len(critical_steps) > 1 and steps else default


def _of_gradient(
    along: _Line, name: str, gradient: _Gradient, start: float | xr.Dataset | None
) -> dict[tuple[str, str], Critical]:
    """Return the critical steps of all tasks along one task's gradient, in units of the learning rate."""
    line = along.along(gradient.change)
    stepped, others = [task for task in line.tasks if task == name], [task for task in line.tasks if task != name]
    critical_steps: dict[tuple[str, str], Critical] = {}
    guess = gradient.polyak
    for task in (*stepped, *others):
        first = guess
        if isinstance(start, xr.Dataset) and {name, task} <= {*start["task"].values, *start["task_"].values}:
            earlier = float(start["relative_sharpness"].isel(step=-1).sel(task=name, task_=task))
            first = 2 / earlier if earlier > 0 else guess
        critical_steps[name, task] = line.critical(task, first, base=0)
        if math.isfinite(critical_steps[name, task].step):
            guess = critical_steps[name, task].step
    return critical_steps


def _dataset(
    along: _Line,
    critical_steps: Mapping[str, Critical],
    pairs: Mapping[tuple[str, str], Critical],
    *,
    lr: float | None,
    step: int,
) -> xr.Dataset:
    tasks = [*along.tasks]
    rows = [ALL, *tasks]
    of_tasks = [critical_steps[name] for name in rows]
    sharpness = np.array([part.sharpness(1.0 if lr is None else lr) for part in of_tasks])
    table = [[pairs.get((row, column), Critical()) for column in tasks] for row in rows]
    relative = np.array([[part.sharpness() for part in row] for row in table])
    low, high = (np.array([getattr(part, end) for part in of_tasks]) for end in ("low", "high"))
    arrays = {
        "critical_step": np.array([part.step for part in of_tasks]),
        "critical_step_low": low,
        "critical_step_high": high,
        **{f"critical_sharpness{end}": sharpness[:, n] for n, end in enumerate(("", "_low", "_high"))},
        "resolved": (low > 0) & np.isfinite(high),
        "reason": np.array([part.reason for part in of_tasks], dtype=str),
        "passes": np.array([float(part.passes) for part in of_tasks]),
        **{f"relative_sharpness{end}": relative[..., n] for n, end in enumerate(("", "_low", "_high"))},
        "relative_reason": np.array([[part.reason for part in row] for row in table], dtype=str),
        "relative_passes": np.array([[float(part.passes) for part in row] for row in table]),
        "loss": np.array([along.at_start(name).mean() for name in rows]),
        "groups": np.array([float(along.labels(name).groups[0]) for name in rows]),
        "learning_rate": np.array(math.nan if lr is None else lr),
    }
    coordinates = {
        "step": np.array([step], dtype=np.int64),
        "task": np.array(rows, dtype=str),
        "task_": np.array(tasks, dtype=str),
    }
    return xr.Dataset(
        label_arrays(schema.SHARPNESS, {name: array[None] for name, array in arrays.items()}), coords=coordinates
    )
