"""The model's own loss, sample by sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from probes.watched import class_names

#: Cross-entropy leaves these labels out.
IGNORED = -100

#: Two means of the same cross-entropies differ by so many roundings at most: of the mean, and of one token's.
_OF_MEAN, _OF_TOKEN = 8, 4


def token_losses(model: nn.Module, batch: Mapping[str, Any], reduction: str = "sum") -> Float[Tensor, " sample"]:
    """Return the model's own cross-entropy of each sample: over its tokens, or of its class.

    Models predict either the next label (decoders) or the label at the same place (encoder-decoders, masked language
    models, token classification). Which it is, is not guessed: it is the one whose mean over the batch is the loss
    that the model itself computes, up to rounding. A loss with other terms is refused: the auxiliary loss of a mixture
    of experts, for example, belongs to a batch and not to its samples.

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
    logits, model_loss = getattr(outputs, "logits", None), getattr(outputs, "loss", None)
    if not isinstance(logits, Tensor) or not isinstance(model_loss, Tensor):
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
    losses, counted = _as_the_model(_readings(model, logits, labels.to(logits.device)), outputs)
    total, count = losses.sum(1), counted.sum(1)
    return torch.where(count > 0, total / count if reduction == "mean" else total, torch.nan)


def predicts_next(model: nn.Module, outputs: Any, labels: Tensor) -> bool:
    """Return whether logits predict the next label or the one at the same position, as the model's own loss tells.

    Args:
        model: That gave the outputs.
        outputs: With ``logits``, ``[sample, token, class]`` or ``[sample, class]``, and the model's own ``loss``.
        labels: ``[sample, token]`` or ``[sample]``.

    Raises:
        ValueError: If the model's own loss is neither's mean cross-entropy.
    """
    losses, _ = _as_the_model(_readings(model, outputs.logits.detach(), labels), outputs)
    return labels.ndim > 1 and losses.shape[1] < labels.shape[1]


def _readings(model: nn.Module, logits: Tensor, labels: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return what the logits may predict, the likelier first.

    ``[sample, token, class]`` and labels ``[sample, token]``.
    """
    if labels.ndim == 1:
        return {"the labels": (logits[:, None], labels[:, None])}
    readings = {"the next labels": (logits[:, :-1], labels[:, 1:]), "the labels": (logits, labels)}
    return readings if _predicts_next(model) else dict(reversed(readings.items()))


def _predicts_next(model: nn.Module) -> bool:
    """Return what the model's class suggests; only its own loss decides."""
    names = {name for module in model.modules() for name in class_names(module)}
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not encoder_decoder and not any(name.endswith(("MaskedLM", "TokenClassification")) for name in names)


def _as_the_model(
    readings: Mapping[str, tuple[Tensor, Tensor]], outputs: Any
) -> tuple[Float[Tensor, "sample token"], Bool[Tensor, "sample token"]]:
    """Return the cross-entropies whose mean is the model's own loss, and which of them count."""
    model_loss = outputs.loss.detach()
    loss = model_loss.double().mean().item()
    means: dict[str, float] = {}
    sizes: dict[str, float] = {}
    results = {}
    for name, (logits, labels) in readings.items():
        losses, counted = _cross_entropies(logits, labels), labels != IGNORED
        results[name] = losses, counted
        means[name] = (losses.detach().double().sum() / counted.sum()).item()
        least, most = logits.detach().aminmax(dim=-1)
        sizes[name] = means[name] + torch.maximum(-least, most)[counted].double().mean().item()
        # Also where there is nothing to compare with: no labels at all, or a model that has diverged. Models take
        # logits for cross-entropy in single precision, whatever their own is.
        if math.isnan(loss) or abs(means[name] - loss) <= _OF_MEAN * torch.finfo(torch.float32).eps * sizes[name]:
            return results[name]
    best = min(means, key=lambda name: abs(means[name] - loss))
    tokens, auxiliary = int(results[best][1].sum()), _auxiliary(outputs)
    # A model that names an auxiliary loss has added it; no rounding explains the difference then.
    allowed = _half_precision(model_loss, readings[best][0], sizes[best] / math.sqrt(max(tokens, 1)))
    if not auxiliary and abs(means[best] - loss) <= allowed:
        return results[best]
    listed = ", ".join(f"{mean:.6g} for {name}" for name, mean in means.items())
    reason = (
        f"it has an auxiliary loss ({', '.join(auxiliary)}), which belongs to a batch and not to its samples. To probe "
        "the cross-entropy alone, pass loss=lambda model, batch: probes.losses.token_losses(model, {**batch, "
        "'output_router_logits': False}). Otherwise pass"
        if auxiliary
        else "it is weighted, smoothed or has other terms. Pass"
    )
    raise ValueError(
        f"Expected the model's own loss to be a mean cross-entropy ({listed}), got {loss:.6g}: {reason} loss=, a "
        "function (model, batch) that returns one loss a sample."
    )


def _auxiliary(outputs: Any) -> list[str]:
    """Return the names of auxiliary losses in the outputs, such as those of routers."""
    given = outputs if isinstance(outputs, Mapping) else vars(outputs)
    return [name for name, value in given.items() if name.endswith(("aux_loss", "z_loss")) and value is not None]


def _half_precision(loss: Tensor, logits: Tensor, size: float) -> float:
    """Return by how much two means may differ where something was rounded to half precision.

    Args:
        loss: The model's own loss; if half precision, it is rounded as such.
        logits: Errors of tokens are independent, so that they average out.
        size: Of what is rounded for a token, over the square root of the number of tokens.
    """
    half = [tensor.dtype for tensor in (loss, logits) if tensor.dtype.itemsize < 4]
    rounding = max((torch.finfo(kind).eps for kind in half), default=0.0)
    return rounding * (_OF_TOKEN * size + (abs(loss.double().mean().item()) if loss.dtype in half else 0.0))


def _cross_entropies(
    logits: Float[Tensor, "sample token class"], labels: Int[Tensor, "sample token"]
) -> Float[Tensor, "sample token"]:
    """Return cross-entropies in at least single precision.

    Half precision has too few digits for a sum over a vocabulary.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none"
    ).view(labels.shape)
