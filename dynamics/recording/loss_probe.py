"""Records of the losses of probe samples since the start of a training, and of what gradients at the start say of them.

The model is set back to the weights at the start for the moment: W₀ exactly, of an adapter whose product was zero by a
left factor of zeros. The change since then, δ, is taken in weights: ΔW of each matrix, never of its factors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from dynamics import schema
from dynamics.intervention.loss_changes import NOT_ASKED
from dynamics.intervention.update_vectors import weighted_sum
from dynamics.text import first_line, some
from probes.additions import added
from probes.blocks import find_blocks, trained_parameters
from probes.tasks import Task, probe_batches
from probes.undisturbed import swapped
from probes.update_slopes import losses_of, quadratic, update_slopes
from probes.watched import Dense, Matrix, find

#: Shares of the whole change at which losses are measured beside it: adapters that are scaled down instead of stopped.
SCALES = (0.25, 0.5, 0.75)
#: Why there are no predictions.
LATE = "the weights at the start of the training are unknown"


@dataclass(frozen=True)
class Start:
    """Where a training began.

    Args:
        step: The step.
        values: Parameters with their values there; those of adapters that were zero by one factor alone.
        changes: Block → its change since then.
    """

    step: int
    values: Sequence[tuple[nn.Parameter, Tensor]]
    changes: Mapping[str, Matrix]

    def held(self) -> AbstractContextManager[None]:
        """Set the model to the start, within a ``with`` block."""
        return swapped([parameter for parameter, _ in self.values], [value for _, value in self.values])


class LossProbe:
    """The probe samples of several tasks, and the model in training whose losses they measure.

    Args:
        model: The model in training, in its wrappers.
        tasks: Held-out samples.
        others: Values, at the start of the training, of parameters outside watched matrices (:func:`outside`); ``None``
            if they are unknown.

    Raises:
        ValueError: If the tasks cannot be read.
    """

    def __init__(self, model: nn.Module, tasks: Sequence[Task], others: Mapping[str, Tensor] | None) -> None:
        self._model, self._tasks = model, tuple(tasks)
        _, *labels = probe_batches(tasks)
        self._labels: dict[str, list[str]] = dict(zip(schema.SAMPLE_LABELS, labels, strict=True))
        self._others = others or {}
        self._first: list[Tensor] | None = None  # losses at the start, by task
        self._unknown = LATE if others is None and outside(model) else ""

    def lose(self, reason: str) -> None:
        """Take note of why the start cannot be set again: the first reason stays."""
        self._unknown = self._unknown or reason

    def begin(self) -> None:
        """Measure the losses at the start: the model is there now, and it may not be possible to set it back."""
        self._first = [losses_of(self._model, task) for task in self._tasks]

    def record(
        self,
        step: int,
        start: Callable[[], tuple[Sequence[tuple[nn.Parameter, Tensor]], Mapping[str, Matrix]]],
        *,
        predicts: bool = True,
        scales: Sequence[float] = (),
        start_step: int = 0,
    ) -> xr.Dataset:
        """Return the record of the losses of the model as it is now.

        One forward pass over the samples. At the start of the training, once, one more. With predictions, one forward
        and backward pass; and of tasks with the model's own loss, two forward and one backward.

        Args:
            step: The step.
            start: Returns parameters of watched matrices with their values at the start, and by watched matrix its
                change since then, of those whose start is known; asked where one of them is needed.
            predicts: Whether predictions are made.
            scales: Shares of the change at which losses are measured, too; one forward pass each.
            start_step: The step at which the training began.
        """
        now = [losses_of(self._model, task) for task in self._tasks]
        tables, scaled, problem = Predictions({}, {}, "" if predicts else NOT_ASKED), [], ""
        if predicts or scales or self._first is None:
            begin, reason = self._start(*start(), start_step)
            if begin is None:
                tables = Predictions({}, {}, reason)
            else:
                with begin.held():
                    if predicts:
                        tables = predictions(self._model, self._tasks, begin.changes)
                    if self._first is None:
                        self._first = tables.losses or [losses_of(self._model, task) for task in self._tasks]
                scaled, problem = losses_along(self._model, self._tasks, begin.changes, scales)
        return _dataset(step, self._labels, self._tasks, now, self._first, tables, start_step, scales, scaled, problem)

    def _start(
        self, starts: Sequence[tuple[nn.Parameter, Tensor]], changes: Mapping[str, Matrix], start_step: int
    ) -> tuple[Start | None, str]:
        """Return the start, or why it cannot be set."""
        if self._unknown:
            return None, self._unknown
        trained = trained_parameters(self._model)
        others = {name: trained[name] for name in self._others if name in trained}
        changes = dict(changes) | {
            name: p.detach().double() - self._others[name].to(p.device).double() for name, p in others.items()
        }
        if missing := [block.name for block in find_blocks(self._model, "tangent").chosen if block.name not in changes]:
            return None, f"the start of {some(missing)} is unknown"
        values = [*starts, *((p, self._others[name].to(p.dtype)) for name, p in others.items())]
        return Start(start_step, values, changes), ""


def zero_start(model: nn.Module) -> list[tuple[nn.Parameter, Tensor]]:
    """Return the values that set all adapters of a model to zero: of the left factors alone."""
    products = [term for matrix in find(model).watched if not isinstance(matrix.terms, Dense) for term in matrix.terms]
    lefts = {id(product.left): product.left for product in products}
    return [(left, torch.zeros_like(left, requires_grad=False)) for left in lefts.values()]


def starts_at_zero(model: nn.Module) -> bool:
    """Return whether all that is trained are adapters whose product is zero when a training begins, as far as is said.

    An adapter that PEFT initialises otherwise (PiSSA, LoftQ, at random) says so in its configuration.
    """
    configurations = getattr(model, "peft_config", None) or {}
    starts = [str(getattr(part, "init_lora_weights", True)).lower() for part in configurations.values()]
    watched = [matrix for matrix in find(model).watched if matrix.parameters]
    return (
        bool(watched)
        and not outside(model)
        and not any(matrix.is_dense for matrix in watched)
        and all(start in ("true", "none", "gaussian", "eva", "orthogonal", "mica") for start in starts)
    )


def outside(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return trained parameters outside all watched matrices (biases, norms, parts of other adapters), by name."""
    inside = {id(parameter) for matrix in find(model).watched for parameter in matrix.parameters}
    return {name: p for name, p in trained_parameters(model).items() if id(p) not in inside}


@dataclass(frozen=True)
class Predictions:
    """What gradients at the start say of the change of the losses.

    Args:
        slopes: Task → block → ⟨∇ℓ_i(θ₀), ΔW⟩ of each sample.
        quadratics: Task → N·δᵀFδ by sample.
        reason: Why there are none.
        losses: At the start, by task.
        blocks: How many blocks changed; those of which no slope can be taken included.
    """

    slopes: Mapping[str, Mapping[str, Tensor]]
    quadratics: Mapping[str, Tensor]
    reason: str = ""
    losses: list[Tensor] | None = None
    blocks: int = 0


def predictions(model: nn.Module, tasks: Sequence[Task], changes: Mapping[str, Matrix]) -> Predictions:
    """Return slopes along a change, and quadratics of tasks with the model's own loss, at the present weights.

    Args:
        model: At the start of the change.
        tasks: Their samples.
        changes: Block → its change.
    """
    slopes: dict[str, Mapping[str, Tensor]] = {}
    quadratics: dict[str, Tensor] = {}
    losses = []
    try:
        for task in tasks:
            of_update = update_slopes(model, task, changes)
            losses.append(of_update.losses)
            slopes[task.name] = of_update.slopes
            if not callable(task.loss):
                quadratics[task.name] = quadratic(model, task, changes)
    except (ValueError, RuntimeError) as error:  # a layer that computes in another way; no room
        return Predictions({}, {}, f"{type(error).__name__}: {first_line(error, 200)}")
    return Predictions(slopes, quadratics, losses=losses, blocks=len(changes))


def losses_along(
    model: nn.Module, tasks: Sequence[Task], changes: Mapping[str, Matrix], scales: Sequence[float]
) -> tuple[list[Tensor], str]:
    """Return the losses of all samples at θ₀ + λδ for each scale λ, or none and why.

    Args:
        model: At θ₀ + δ.
        tasks: Their samples.
        changes: δ, by block.
        scales: λ.
    """
    rows = []
    try:
        for scale in scales:
            with torch.no_grad(), added(model, weighted_sum([(scale - 1.0, changes)])):
                rows.append(torch.cat([losses_of(model, task) for task in tasks]))
    except (ValueError, RuntimeError) as error:  # a weight whose use no layer's output says; no room
        return [], f"{type(error).__name__}: {first_line(error, 200)}"
    return rows, ""


def _dataset(
    step: int,
    labels: Mapping[str, Sequence[str]],
    tasks: Sequence[Task],
    now: Sequence[Tensor],
    first: Sequence[Tensor] | None,
    tables: Predictions,
    start_step: int,
    scales: Sequence[float],
    scaled: Sequence[Tensor],
    problem: str,
) -> xr.Dataset:
    losses = _numbers(now)
    at_start = np.full(len(losses), math.nan) if first is None else _numbers(first)
    matrices = list(dict.fromkeys(name for slopes in tables.slopes.values() for name in slopes))
    slopes, curvature = np.full((len(matrices), len(tasks)), math.nan), np.full(len(tasks), math.nan)
    sizes = np.cumsum([0, *map(len, tasks)])
    for column, task in enumerate(tasks):
        usable = np.isfinite(at_start[sizes[column] : sizes[column + 1]])
        if task.name in tables.slopes and usable.any():
            means = [tables.slopes[task.name][name].numpy()[usable].mean() for name in matrices]
            slopes[:, column] = means if np.isfinite(means).all() else math.nan  # a sum of the others would mislead
        if task.name in tables.quadratics and usable.any():
            curvature[column] = tables.quadratics[task.name].numpy()[usable].mean()
    arrays = {
        "sample_loss": losses[None],
        "start_loss": at_start[None],
        "first_order": slopes[None],
        "curvature": curvature[None],
        **({"scaled_loss": np.stack([_numbers([row]) for row in scaled])} if scaled else {}),
    }
    coordinates = {
        "step": np.array([step], dtype=np.int64),
        "matrix": np.array(matrices, dtype=str),
        "task": np.array([task.name for task in tasks], dtype=str),
        **({"scale": np.array(scales, dtype=np.float64)} if scaled else {}),
        **{name: ("sample", np.asarray(labels[name], dtype=str)) for name in schema.SAMPLE_LABELS},
        "start_step": ("step", np.array([start_step], dtype=np.int64)),
        "retained": ("task", np.array([task.retained for task in tasks], dtype=bool)),
    }
    attributes = {"of_matrices": tables.blocks, "reason": tables.reason, "scaled_reason": problem}
    return xr.Dataset(schema.label_arrays(schema.LOSS_RECORD, arrays), coordinates, attributes)


def _numbers(losses: Sequence[Tensor]) -> np.ndarray:
    """Return losses as one array, NaN where they are not finite."""
    numbers = torch.cat(list(losses)).double().cpu().numpy()
    return np.where(np.isfinite(numbers), numbers, math.nan)
