"""How well a model does on each task: score, number of items, standard error."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.losses import token_losses
from probes.tasks import ProbeBatch, Task, one_each, require_names
from probes.undisturbed import undisturbed


@dataclass(frozen=True)
class Score:
    """A model's score on one task.

    Args:
        task: Its name.
        score: Mean over the samples; NaN if a sample has no finite value (see ``broken``).
        items: How many samples it is the mean of.
        standard_error: Of the mean, samples of one group not taken as independent; NaN if there is only one group.
        higher_is_better: Which way it points, ``None`` if unknown.
        broken: Names of the samples whose value is not finite.

    >>> score = Score("vqa", score=0.75, items=200, standard_error=0.04, higher_is_better=True)
    >>> f"{score.task}: {score.score:.2f} ± {score.standard_error:.2f}"
    'vqa: 0.75 ± 0.04'
    """

    task: str
    score: float
    items: int
    standard_error: float
    higher_is_better: bool | None = None
    broken: tuple[str, ...] = ()


def evaluate(model: nn.Module, tasks: Sequence[Task], *, device: torch.device | str | None = None) -> list[Score]:
    """Return the scores of a model on each task; the model, its modes and all random states stay as they are.

    The model is in evaluation mode meanwhile, without gradients, outside DDP and ``torch.compile``.

    Args:
        model: The model, in training or not.
        tasks: What to evaluate it on.
        device: Where the model takes its batches; by default where its first parameter is.

    Returns:
        One score a task, in their order. A score is the mean of the task's ``score(model, batch)``, by default of the
        negative mean loss per token, in nats.

    Raises:
        ValueError: If there are no tasks, or a score function returns anything but one number a sample.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> nn.init.ones_(model.weight).shape
    torch.Size([1, 1])
    >>> task = Task("double", [{"x": [1.0]}, {"x": [3.0]}], score=lambda model, batch: 2 * model(batch["x"])[:, 0])
    >>> evaluate(model, [task])
    [Score(task='double', score=4.0, items=2, standard_error=2.0, higher_is_better=None, broken=())]
    """
    device = device_of(model) if device is None else device
    with undisturbed(model) as bare, torch.no_grad():
        require_names(tasks)
        return [
            _score(task, torch.cat([_values(bare, task, batch.to(device)) for batch in task.batches()]))
            for task in tasks
        ]


def mean_and_standard_error(values: Float[Tensor, " sample"], groups: Sequence[str]) -> tuple[float, float]:
    """Return the mean, and its standard error when samples of one group depend on each other.

    With G groups and residuals e = x − mean, the standard error is √(G/(G − 1) · Σ_g (Σ_{i∈g} e_i)²) / N, the
    cluster-robust one of a mean (Liang & Zeger 1986); where every sample is a group of its own it is s/√N. NaN for one
    group.

    Args:
        values: One number a sample.
        groups: The group of each.

    >>> mean_and_standard_error(torch.tensor([1.0, 3.0]), ["a", "b"])
    (2.0, 1.0)
    >>> mean_and_standard_error(torch.tensor([1.0, 1.0, 3.0, 3.0]), ["a", "a", "b", "b"])
    (2.0, 1.0)
    """
    values = values.cpu().double()
    mean = values.mean()
    members = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    count = len(members)
    if count < 2:
        return mean.item(), math.nan
    index = torch.tensor([members[group] for group in groups])
    sums = torch.zeros(count, dtype=torch.float64).index_add_(0, index, values - mean)
    return mean.item(), math.sqrt(count / (count - 1) * sums.square().sum().item()) / len(values)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the host for a model without any.

    >>> device_of(nn.Identity())
    device(type='cpu')
    """
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def _values(model: nn.Module, task: Task, batch: ProbeBatch) -> Float[Tensor, " sample"]:
    if task.score is None:
        values = -token_losses(model, batch, reduction="mean")
    else:
        values = one_each(task.score(model, batch), batch.samples, f"{task}: score(model, batch)")
    return values.detach().cpu().double()


def _score(task: Task, values: Float[Tensor, " sample"]) -> Score:
    higher = True if task.score is None else task.higher_is_better
    finite = values.isfinite().tolist()
    if not all(finite):
        broken = tuple(name for name, good in zip(task.sample_ids(), finite, strict=True) if not good)
        return Score(task.name, math.nan, len(values), math.nan, higher, broken)
    mean, standard_error = mean_and_standard_error(values, task.groups())
    return Score(task.name, mean, len(values), standard_error, higher)
