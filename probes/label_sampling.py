"""Labels drawn from a model's own prediction: with them the mean of ggᵀ is the true Fisher, not the empirical one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from probes.batches import ProbeBatch
from probes.losses import IGNORED, predicts_next


@torch.no_grad()
def with_sampled_labels(model: nn.Module, batch: Any, generator: torch.Generator) -> Any:
    """The batch with each label that counts replaced by one drawn from the model's softmax at its place.

    Inputs stay as they are: every token is drawn given the data's own prefix, so with losses summed over tokens the
    mean over draws is the token-level Fisher (Kunstner, Balles & Hennig 2019).

    Args:
        model: In evaluation mode.
        batch: With integer ``labels``.
        generator: On the host; the same seed gives the same labels on every device.

    Raises:
        ValueError: If the batch has no labels, or a task's own loss, for which nothing can be drawn.
    """
    own = getattr(batch, "loss", None)
    task = getattr(own, "__self__", None)
    labels = batch.get("labels")
    if callable(getattr(task, "loss", None)) or not isinstance(labels, Tensor) or labels.is_floating_point():
        raise ValueError(
            "Expected integer 'labels' and the model's own loss for fisher='sampled', got a batch without. "
            "Use fisher='empirical'."
        )
    outputs = model(**batch)
    shift = predicts_next(model, outputs, labels.to(outputs.logits.device))
    logits = outputs.logits.detach().float()
    places = torch.softmax(logits[:, :-1] if shift else logits, -1).to("cpu")
    drawn = torch.multinomial(places.flatten(0, -2), 1, generator=generator).view(places.shape[:-1]).to(labels.device)
    sampled = labels.clone()
    target = sampled[:, 1:] if shift else sampled
    target[target != IGNORED] = drawn[target != IGNORED]
    values = {**batch, "labels": sampled}
    return ProbeBatch(values, batch.samples, own) if isinstance(batch, ProbeBatch) and own is not None else values
