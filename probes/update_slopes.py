r"""Slopes of the losses along an update: how fast each sample's loss rises as the weights move by δ.

.. math:: b_i = \langle ∇_W ℓ_i(θ), δ \rangle, \qquad
          δ^\top F δ = \frac{1}{N} \sum_i \mathbb{E}_{y \sim p_θ(y|x_i)} \langle ∇_W ℓ_i(θ; y), δ \rangle^2

Gradients are those of the weights themselves, so that mean b is the derivative of the mean loss at θ + λδ by λ, exact
for any δ: from LoRA's start, where B = 0, the gradients of the factors would not say what A's own change does. Products
with δ are taken batch by batch and no gradient is kept: the memory is that of one forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.blocks import Block, Blocks, blocks_in_weight_space, find_blocks
from probes.gram import Measurement
from probes.losses import IGNORED, predicts_next
from probes.sample_gradients import SampleGradient
from probes.scores import device_of
from probes.tasks import ProbeBatch, Task
from probes.undisturbed import undisturbed
from probes.watched import Matrix


@dataclass(frozen=True)
class UpdateSlopes:
    """Losses of a task's samples, and their slopes along an update.

    Args:
        losses: ℓ_i(θ).
        slopes: Block → b_i, those that were named and have a gradient in weight space; NaN where it is not finite.
    """

    losses: Float[Tensor, " sample"]
    slopes: Mapping[str, Float[Tensor, " sample"]]


def update_slopes(
    model: nn.Module, task: Task, update: Mapping[str, Matrix], *, fisher: str = "empirical", seed: int = 0
) -> UpdateSlopes:
    """Return the losses of a task's samples at the present weights, and their slopes along an update.

    One forward and one backward pass; ``"sampled"`` takes one more forward pass. The model is in evaluation mode
    meanwhile and left as it was.

    Args:
        model: With adapters, dense trainable weights, or both.
        task: The samples.
        update: Block → its change, as for :func:`probes.gradient_gram` in weight space. Blocks without a gradient there
            (experts in one parameter, variants of LoRA) are left out of the result.
        fisher: ``"empirical"``: slopes of the losses themselves. ``"sampled"``: of the summed cross-entropy of labels
            drawn from the model's own prediction.
        seed: Of these draws.

    Raises:
        ValueError: If the update names what is no block, nothing is trained, or labels cannot be drawn.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> task = Task("x", [{"x": [1.0, 0.0]}], loss=lambda model, batch: model(batch["x"])[:, 0] ** 2)
    >>> update_slopes(layer, task, {"weight": torch.tensor([[3.0, 5.0]])}).slopes["weight"]
    tensor([6.], dtype=torch.float64)
    """
    if fisher == "sampled" and task.loss == "mean":
        task = replace(task, loss="sum")
    names = blocks_in_weight_space(model)
    blocks = find_blocks(model, "weight", [name for name in names if name in update] or names)
    known = {block.name for block in find_blocks(model, "tangent").chosen}
    if unknown := [name for name in update if name not in known]:
        raise ValueError(f"Expected changes of blocks, such as {sorted(known)[:3]}, got {unknown[:3]}.")
    measurement = _Slopes(model, blocks, {name: update[name] for name in names if name in update}, fisher, seed)
    with undisturbed(model) as quiet, torch.enable_grad():
        for batch in task.batches():
            measurement.add(quiet, batch)
    slopes = {name: torch.cat(parts) for name, parts in measurement.slopes.items() if name in update}
    return UpdateSlopes(torch.cat(measurement.losses), slopes)


def quadratic(model: nn.Module, task: Task, update: Mapping[str, Matrix], *, seed: int = 0) -> Float[Tensor, " sample"]:
    """Return what each sample adds to N·δᵀFδ of its task's Fisher, from one draw of its labels.

    F is the Fisher of the task's loss: with tokens summed, E⟨∇ℓ, δ⟩² over drawn labels; with the mean over n tokens
    1/n of that, since n times as many draws are averaged and not added. It takes two forward passes and one backward
    (three forward for means).

    Args:
        model, task, update, seed: As for :func:`update_slopes`.

    Raises:
        ValueError: As there; a task with a loss of its own has nothing to draw.
    """
    slopes = update_slopes(model, task, update, fisher="sampled", seed=seed).slopes
    square = sum(slopes.values(), torch.zeros(len(task), dtype=torch.float64)).square()
    if task.loss != "mean":
        return square
    with undisturbed(model) as quiet, torch.no_grad():
        return square / torch.cat([_counted(quiet, batch.to(device_of(quiet))) for batch in task.batches()])


def losses_of(model: nn.Module, task: Task) -> Float[Tensor, " sample"]:
    """Return the loss of each of a task's samples, float64 on the host; the model is left as it was.

    >>> losses_of(nn.Identity(), Task("x", [{"x": 2.0}], loss=lambda model, batch: model(batch["x"])))
    tensor([2.], dtype=torch.float64)
    """
    with undisturbed(model) as quiet, torch.no_grad():
        batches = (batch.to(device_of(quiet)) for batch in task.batches())
        return torch.cat([task.losses(quiet, batch).double().cpu() for batch in batches])


def _counted(model: nn.Module, batch: ProbeBatch) -> Float[Tensor, " sample"]:
    """Return how many labels of each sample count."""
    outputs = model(**batch)
    labels = batch["labels"].to(outputs.logits.device)
    counted = (labels[:, 1:] if predicts_next(model, outputs, labels) else labels) != IGNORED
    return counted.reshape(len(labels), -1).sum(1).double().cpu()


class _Slopes(Measurement):
    """Batches in, products of their gradients with an update out; no gradient is kept."""

    def __init__(self, model: nn.Module, blocks: Blocks, update: Mapping[str, Matrix], fisher: str, seed: int) -> None:
        super().__init__(model, blocks, None, "weight", fisher, seed, 0, update)
        self._changes = update
        self.slopes: dict[str, list[Tensor]] = {}

    def _keep(self, block: Block, part: Sequence[SampleGradient]) -> None:
        product, _, _ = self.product(block, part, self._changes, part[0].samples)
        self.slopes.setdefault(block.name, []).append(product)
