"""The model's own loss, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.unwrapping import class_names

#: Cross-entropy leaves these labels out.
IGNORED = -100

#: Relative difference of two means of the same cross-entropies: in single precision, and at most, in half precision.
_SAME, _ALIKE = 1e-4, 2e-2


def token_losses(model: nn.Module, batch: Mapping[str, Any], reduction: str = "sum") -> Float[Tensor, " sample"]:
    """The model's own cross-entropy of each sample: over its tokens, or of its class.

    Models predict either the next label (decoders) or the label at the same place (encoder-decoders, masked language
    models, token classification). Which it is, is not guessed: it is the one whose mean over the batch is the loss
    that the model itself computes.

    Args:
        model: Takes the batch as keywords and returns ``loss`` and ``logits``, as Hugging Face models do.
        batch: With ``labels``, ``[sample, token]`` or ``[sample]``; labels of −100 (padding, prompts) are left out.
        reduction: ``"sum"`` over a sample's tokens, or their ``"mean"``.

    Returns:
        In nats, with a graph where gradients are enabled; NaN for a sample without any label.

    Raises:
        ValueError: If there are no labels, no logits of their shape, or the model's own loss is not a mean
            cross-entropy (weighted, smoothed, with auxiliary terms).
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"Expected reduction 'sum' or 'mean', got {reduction!r}.")
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        keys = ", ".join(map(repr, batch)) or "nothing"
        raise ValueError(
            f"Expected 'labels' in the batch for the model's own loss, got {keys}. Add them, or pass loss=."
        )
    # A cache of keys and values serves generation only, and keeps the memory of every layer.
    config = getattr(model, "config", None)
    outputs = model(**batch, **({"use_cache": False} if getattr(config, "use_cache", False) else {}))
    logits, own = getattr(outputs, "logits", None), getattr(outputs, "loss", None)
    if not isinstance(logits, Tensor) or not isinstance(own, Tensor):
        raise ValueError(
            f"Expected {type(model).__name__} to return loss and logits, got {type(outputs).__name__}. Pass loss=, a "
            "function (model, batch) that returns one loss a sample."
        )
    if logits.shape[:-1] != labels.shape or labels.is_floating_point():
        raise ValueError(
            f"Expected integer labels of shape {tuple(logits.shape[:-1])} for logits of shape {tuple(logits.shape)}, "
            f"got {tuple(labels.shape)} in {labels.dtype}. Pass loss=, a function (model, batch) that returns one "
            "loss a sample."
        )
    losses, counted = _as_the_model(_readings(model, logits, labels.to(logits.device)), own.detach())
    total, count = losses.sum(1), counted.sum(1)
    return torch.where(count > 0, total / count if reduction == "mean" else total, torch.nan)


def predicts_next(model: nn.Module, logits: Tensor, labels: Tensor, own: Tensor) -> bool:
    """Whether logits predict the next label or the one at the same place: as the model's own loss has it.

    Args:
        model: That gave the logits.
        logits: ``[sample, token, class]`` or ``[sample, class]``.
        labels: ``[sample, token]`` or ``[sample]``.
        own: The model's own loss.

    Raises:
        ValueError: If the model's own loss is neither's mean cross-entropy.
    """
    losses, _ = _as_the_model(_readings(model, logits, labels), own)
    return labels.ndim > 1 and losses.shape[1] < labels.shape[1]


def _readings(model: nn.Module, logits: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What the logits may predict, the likelier first: ``[sample, token, class]`` and labels ``[sample, token]``."""
    if labels.ndim == 1:
        return {"the labels": (logits[:, None], labels[:, None])}
    readings = {"the next labels": (logits[:, :-1], labels[:, 1:]), "the labels": (logits, labels)}
    return readings if _predicts_next(model) else dict(reversed(readings.items()))


def _predicts_next(model: nn.Module) -> bool:
    """What its class says; only the model's own loss decides."""
    names = {name for module in model.modules() for name in class_names(module)}
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encoder_decoder and not any(name.endswith(("MaskedLM", "TokenClassification")) for name in names)


def _as_the_model(
    readings: Mapping[str, tuple[Tensor, Tensor]], own: Tensor
) -> tuple[Float[Tensor, "sample token"], Bool[Tensor, "sample token"]]:
    """Cross-entropies whose mean is the model's own loss, and which of them count."""
    loss = own.double().mean().item()
    tried: dict[str, float] = {}
    results = {}
    for name, (logits, labels) in readings.items():
        losses, counted = _cross_entropies(logits, labels), labels != IGNORED
        results[name] = losses, counted
        tried[name] = (losses.detach().double().sum() / counted.sum()).item()
        # Also where there is nothing to compare with: no labels at all, or a model that has diverged.
        if math.isnan(loss) or abs(tried[name] - loss) <= _SAME * abs(loss):
            return results[name]
    best = min(tried, key=lambda name: abs(tried[name] - loss))
    if abs(tried[best] - loss) <= _ALIKE * abs(loss):
        return results[best]
    listed = ", ".join(f"{mean:.6g} for {name}" for name, mean in tried.items())
    raise ValueError(
        f"Expected the model's own loss to be a mean cross-entropy ({listed}), got {loss:.6g}: it is weighted, "
        "smoothed or has other terms. Pass loss=, a function (model, batch) that returns one loss a sample."
    )


def _cross_entropies(
    logits: Float[Tensor, "sample token class"], labels: Int[Tensor, "sample token"]
) -> Float[Tensor, "sample token"]:
    """In single precision at least: half precision has too few digits for a sum over a vocabulary."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
