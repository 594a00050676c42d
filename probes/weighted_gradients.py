"""Sums of per-sample gradients with weights of any sign, several at once: Gᵀw for one pass over the samples.

A projection of an update on directions of the samples' gradients is such a sum. In tangent space it is a change of the
adapted matrix, of rank 2r at most, that a step of the factors can make.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.blocks import Block, find_blocks, trained_parameters
from probes.gram import GLOBAL, Measurement
from probes.sample_gradients import at_least_single, weighted_sums
from probes.tasks import Task, probe_batches
from probes.undisturbed import undisturbed
from probes.watched import Matrix


def weighted_gradients(
    model: nn.Module,
    tasks: Sequence[Task],
    weights: Float[Tensor, "part sample"],
    *,
    space: str = "tangent",
    blocks: Sequence[str] | None = None,
) -> list[dict[str, Matrix]]:
    r"""Return Σ_i w_i ∇ℓ_i at the present weights, for each row of weights, as changes of the model's matrices.

    One pass over the samples, forward and backward, however many rows; it costs what :func:`gradient_gram` does.
    Sums are formed in float64 and returned in the parameters' precision, single at least. The model is in evaluation
    mode meanwhile and left as it was.

    Args:
        model: With adapters, dense trainable weights, or both.
        tasks: The samples, in the order of the weights: task after task.
        weights: One row for each sum. Samples whose weights are all 0 do not count, be their gradients finite or not.
        space: ``"tangent"`` or ``"factor"``, as for :func:`gradient_gram`.
        blocks: As for :func:`gradient_gram`; ``["global"]`` means all.

    Returns:
        For each row, block → its sum: low-rank for an adapted matrix in tangent space. In factor space parameter →
        its sum.

    Raises:
        ValueError: If the weights do not fit the samples, or the space is another one.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> task = Task("x", [{"x": [1.0, 0.0]}, {"x": [0.0, 1.0]}], loss=lambda model, batch: model(batch["x"])[:, 0])
    >>> weighted_gradients(layer, [task], torch.tensor([[2.0, -1.0]]))[0]["weight"].tolist()
    [[2.0, -1.0]]
    """
    if space not in ("tangent", "factor"):
        raise ValueError(f"Expected space 'tangent' or 'factor', got {space!r}.")
    measurement, chosen, sums = _sums(model, tasks, weights, space, blocks)
    changes: list[dict[str, Matrix]] = [{} for _ in weights]
    for block in chosen:
        names = measurement.parameter_names(block)
        for part, change in enumerate(changes):
            change.update(_matrices(block, [total[part] for total in sums[block.name]], names, space))
    return changes


def weighted_parameter_gradients(
    model: nn.Module, tasks: Sequence[Task], weights: Float[Tensor, "part sample"]
) -> dict[str, Tensor]:
    """Return Σ_i w_i ∇ℓ_i of every trained parameter, for each row of weights, in one pass over the samples.

    What :func:`weighted_gradients` gives in factor space, by parameter: also of those that hold several matrices.

    Args:
        model, tasks, weights: As for :func:`weighted_gradients`.

    Returns:
        Parameter → its sums ``(part, *shape)``, on its device, in its precision, single at least.

    >>> layer = nn.Linear(2, 1)
    >>> task = Task("x", [{"x": [1.0, 0.0]}, {"x": [0.0, 1.0]}], loss=lambda model, batch: model(batch["x"])[:, 0])
    >>> sums = weighted_parameter_gradients(layer, [task], torch.tensor([[2.0, -1.0]]))
    >>> sums["weight"].tolist(), sums["bias"].tolist()
    ([[[2.0, -1.0]]], [[1.0]])
    """
    _, chosen, sums = _sums(model, tasks, weights, "factor", None)
    trained = trained_parameters(model)
    names = {id(parameter): name for name, parameter in trained.items()}
    results = {
        name: at_least_single(parameter.detach()).new_zeros(len(weights), *parameter.shape)
        for name, parameter in trained.items()
    }
    for block in chosen:
        for value, (parameter, view) in zip(sums.pop(block.name), block.parameters, strict=True):
            for total, part in zip(results[names[id(parameter)]], value, strict=True):
                home = total if view is None else view(total)  # shares its memory
                home.copy_(part.view_as(home))
    return results


def _sums(
    model: nn.Module, tasks: Sequence[Task], weights: Tensor, space: str, blocks: Sequence[str] | None
) -> tuple[Measurement, tuple[Block, ...], dict[str, list[Tensor]]]:
    """Return the blocks, and of each its sums in float64, ``(part, …)``, one for each of its parameters."""
    batches, names, *_ = probe_batches(tasks)
    if weights.ndim != 2 or weights.shape[1] != len(names):
        raise ValueError(f"Expected weights (part, {len(names)}), one for each sample, got {tuple(weights.shape)}.")
    chosen = find_blocks(model, space, None if blocks is None or list(blocks) == [GLOBAL] else blocks)
    sums: dict[str, list[Tensor]] = {}
    measurement = Measurement(model, chosen, None, space, "empirical", 0, 0, None)
    first = 0
    with undisturbed(model) as quiet, torch.enable_grad():
        for batch in batches:
            last = first + batch.samples
            w = weights[:, first:last]
            first = last
            if not w.any():
                continue
            measurement.add(quiet, batch)
            for block in chosen.chosen:
                _add(sums, block, w)
    if first and not sums:
        raise ValueError("Expected a weight other than 0, got none.")
    return measurement, chosen.chosen, sums


def _add(sums: dict[str, list[Tensor]], block: Block, weights: Tensor) -> None:
    """Add a batch to the sums of a block, and let its gradients go."""
    counted = weights.any(0)
    weights = weights[:, counted].to(block.parameters[0][0].device)
    gradients = block.parts.pop()
    parts = [weighted_sums(gradient.of_samples(counted), weights) for gradient in gradients]
    if block.name in sums:
        for total, part in zip(sums[block.name], parts, strict=True):
            total += part
    else:
        sums[block.name] = parts


def _matrices(block: Block, sums: Sequence[Tensor], names: Sequence[str], space: str) -> dict[str, Matrix]:
    """Return a block's sum by name, in its parameters' precision, single at least."""
    dtype = torch.promote_types(block.parameters[0][0].dtype, torch.float32)
    if block.tangent is not None:
        return {block.name: block.tangent.to_matrix(sums[0].flatten(), dtype)}
    if not (space == "factor" and block.products):
        return {block.name: sums[0].to(dtype)}
    for value, (parameter, _) in zip(sums, block.parameters, strict=True):
        if value.numel() != parameter.numel():
            raise ValueError(
                f"Expected a matrix with factors of its own, got {block.name!r}, one of several experts. "
                "Choose space='tangent'."
            )
    return {
        name: value.view(parameter.shape).to(dtype)
        for name, value, (parameter, _) in zip(names, sums, block.parameters, strict=True)
    }
