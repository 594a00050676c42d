"""What a step on one task does to the loss of another: to first order, and by making the step.

The step is made on half of each task's samples and its effect measured on the other half; a group is in the same half
for all tasks. On the same samples a task would seem to help itself by the noise in its own gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.scores import device_of
from probes.tasks import Task, require_names, split_by_group, subset
from probes.undisturbed import swapped, undisturbed


@dataclass(frozen=True)
class Transfer:
    """Transfer between tasks, row: the task stepped on, column: the task measured.

    Args:
        tasks: Their names.
        first_order: η ⟨μ_i, D⁻¹ μ_j⟩ / L_j, the relative decrease of task j's loss to first order in η.
        look_ahead: Z_{i→j} = 1 − L_j(θ − η D⁻¹ μ_i) / L_j(θ), its real decrease. Positive: the step on i helps j.
        loss: L_j(θ), mean loss of a sample in the half that is measured.
        step_kept: Share of each step that the weights' format kept, ⟨made, meant⟩/‖meant‖². Far from 1 in half
            precision, where a step that rounds away shows no transfer; NaN where the gradient is 0.

    >>> ones = torch.ones(2, 2)
    >>> transfer = Transfer(("report", "vqa"), 0.01 * ones, 0.02 * ones, loss=ones[0], step_kept=ones[0])
    >>> round(float(transfer.look_ahead[transfer.tasks.index("report"), transfer.tasks.index("vqa")]), 2)
    0.02
    """

    tasks: tuple[str, ...]
    first_order: Float[Tensor, "task task"]
    look_ahead: Float[Tensor, "task task"]
    loss: Float[Tensor, " task"]
    step_kept: Float[Tensor, " task"]


def transfer(
    model: nn.Module, tasks: Sequence[Task], *, lr: float, optimizer: str | torch.optim.Optimizer = "sgd"
) -> Transfer:
    """Return the transfer between all pairs of tasks that one step of size ``lr`` at the current weights would cause.

    First-order transfer and the look-ahead affinity of Fifty et al. 2021 ("Efficiently Identifying Task Groupings for
    Multi-Task Learning", TAG). Gradients are those of the trainable parameters as they are, LoRA's factors for LoRA:
    they are what an optimizer steps along. The model is in evaluation mode; weights, ``.grad``, modes and random states
    are as before afterwards, bit for bit.

    Costs one forward and backward pass over all samples and T forward passes over half of them. Holds T + 2 gradients
    in float64 and two copies of the trainable parameters.

    Args:
        model: The model, in training or not.
        tasks: At least one, each with samples of at least two groups.
        lr: Step size η.
        optimizer: ``"sgd"`` (D = 1), or the ``torch.optim.Adam`` or ``AdamW`` of the training, whose second moments v
            are read: D = √(v/(1 − β₂ᵗ)) + ε, without momentum and weight decay.

    Raises:
        ValueError: If a task cannot be split, a loss is zero or not finite, nothing is trainable, or the optimizer is
            another one or has not stepped yet.

    >>> model = nn.Linear(1, 1, bias=False)
    >>> nn.init.ones_(model.weight).shape
    torch.Size([1, 1])
    >>> square = lambda model, batch: model(batch["x"])[:, 0] ** 2
    >>> task = Task("square", [{"x": [1.0]}, {"x": [1.0]}], loss=square)
    >>> result = transfer(model, [task], lr=0.25)
    >>> result.first_order.item(), result.look_ahead.item()  # L = w², gradient 2: 1 − (1 − 0.5)²
    (1.0, 0.75)
    """
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"Expected a positive step size lr, got {lr}.")
    with undisturbed(model) as bare:
        require_names(tasks)
        parameters = [parameter for parameter in bare.parameters() if parameter.requires_grad]
        if not parameters:
            raise ValueError("Expected a model with trainable parameters, got one whose parameters are all frozen.")
        inverse = _inverse_preconditioner(parameters, optimizer)
        halves = split_by_group({task.name: task.groups() for task in tasks})
        stepped, held_out = ([subset(task, halves[task.name][half]) for task in tasks] for half in (0, 1))
        means = [mean_loss_and_gradient(bare, task, parameters) for task in held_out]
        loss = _shareable([value for value, _ in means], tasks)
        first_order, look_ahead, kept = [], [], []
        for task in stepped:
            _, gradient = mean_loss_and_gradient(bare, task, parameters)
            step = [lr * factor * part for factor, part in zip(inverse, gradient, strict=True)]
            values = [(p.detach().double() - s).to(p.dtype) for p, s in zip(parameters, step, strict=True)]
            kept.append(_kept(parameters, values, step))
            first_order.append([_inner(step, other) for _, other in means])
            with swapped(parameters, values), torch.no_grad():
                look_ahead.append([_mean_loss(bare, other) for other in held_out])
        names = tuple(task.name for task in tasks)
        first, after, share = (torch.tensor(rows, dtype=torch.float64) for rows in (first_order, look_ahead, kept))
        return Transfer(names, first / loss, (loss - after) / loss, loss, share)


def _mean_loss(model: nn.Module, task: Task) -> float:
    device = device_of(model)
    return sum(task.losses(model, batch.to(device)).double().sum().item() for batch in task.batches()) / len(task)


def mean_loss_and_gradient(
    model: nn.Module, task: Task, parameters: Sequence[nn.Parameter]
) -> tuple[float, list[Tensor]]:
    """Return the mean loss of a sample and its gradient by each parameter, accumulated over batches in float64.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> task = Task("x", [{"x": [1.0]}, {"x": [2.0]}], loss=lambda model, batch: model(batch["x"])[:, 0])
    >>> mean_loss_and_gradient(layer, task, [layer.weight])[1]
    [tensor([[1.5000]], dtype=torch.float64)]
    """
    device = device_of(model)
    total, gradient = 0.0, [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    for batch in task.batches():
        with torch.enable_grad():
            loss = task.losses(model, batch.to(device)).double().sum()
        parts = torch.autograd.grad(loss, parameters, allow_unused=True)
        total += loss.item()
        for whole, part in zip(gradient, parts, strict=True):
            if part is not None:
                whole += part.detach() / len(task)
    return total / len(task), gradient


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(torch.sum(a * b).item() for a, b in zip(left, right, strict=True))


def _kept(parameters: Sequence[nn.Parameter], values: Sequence[Tensor], step: Sequence[Tensor]) -> float:
    made = [p.detach().double() - value.double() for p, value in zip(parameters, values, strict=True)]
    length = _inner(step, step)
    return _inner(made, step) / length if length > 0 else math.nan


def _inverse_preconditioner(
    parameters: Sequence[nn.Parameter], optimizer: str | torch.optim.Optimizer
) -> list[Tensor | float]:
    """Return D⁻¹ of each parameter."""
    if optimizer == "sgd":
        return [1.0] * len(parameters)
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        raise ValueError(
            f"Expected optimizer 'sgd' or a torch.optim.Adam or AdamW, got {optimizer!r}. Pass 'sgd' for plain "
            "gradients."
        )
    group_of = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    result: list[Tensor | float] = []
    for number, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        if "exp_avg_sq" not in state:
            raise ValueError(
                f"Expected an optimizer that has stepped on all trainable parameters, got none of its moments for "
                f"parameter {number} {tuple(parameter.shape)}. Let it step once, or pass 'sgd'."
            )
        group = group_of[id(parameter)]
        # AMSGrad divides by the largest second moment so far.
        moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"].double()
        unbiased = moment / (1 - group["betas"][1] ** float(state["step"]))
        result.append(1 / (unbiased.sqrt() + group["eps"]))
    return result


def _shareable(losses: Sequence[float], tasks: Sequence[Task]) -> Float[Tensor, " task"]:
    """Return the losses, if a share of each can be taken."""
    for task, value in zip(tasks, losses, strict=True):
        if not math.isfinite(value) or value == 0:
            raise ValueError(f"{task}: expected a finite loss other than zero, of which to take a share, got {value}.")
    return torch.tensor(losses, dtype=torch.float64)
