"""Batches of probe samples, and what is measured of each sample in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn

#: Loss, or score, of each sample in a batch.
PerSample = Callable[[nn.Module, Any], Tensor]


class ProbeBatch(dict[str, Any]):
    """A batch as the model takes it, which also knows how its samples' losses are measured.

    Args:
        values: The batch.
        samples: How many samples it holds.
        loss: Their losses, a function (model, batch) → ``[samples]``.
    """

    def __init__(self, values: Mapping[str, Any], samples: int, loss: PerSample) -> None:
        super().__init__(values)
        self.samples = samples
        self.loss = loss

    def to(self, device: torch.device | str) -> ProbeBatch:
        """The batch with its tensors on a device.

        >>> ProbeBatch({"x": torch.ones(2)}, 2, lambda model, batch: batch["x"]).to("meta")["x"].device.type
        'meta'
        """
        moved = {key: value.to(device) if hasattr(value, "to") else value for key, value in self.items()}
        return ProbeBatch(moved, self.samples, self.loss)


def on_device(batch: Any, device: torch.device) -> Any:
    """A batch with its tensors on a device.

    Raises:
        ValueError: If it is no dict.
    """
    if isinstance(batch, ProbeBatch):
        return batch.to(device)
    if not isinstance(batch, Mapping):
        raise ValueError(f"Expected a batch to be a dict as the model takes it, got {type(batch).__name__}.")
    return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}


def is_text(batch: Mapping[str, Any], samples: int) -> bool:
    """Whether all that the model is given is one row of tokens, or one number, a sample.

    >>> is_text({"input_ids": torch.ones(2, 3)}, 2), is_text({"pixel_values": torch.ones(2, 3, 4, 4)}, 2)
    (True, False)
    """
    given = [value for value in batch.values() if isinstance(value, Tensor)]
    return all(value.ndim in (1, 2) and value.shape[0] == samples for value in given)


def one_each(values: Any, samples: int | None, what: str) -> Shaped[Tensor, " sample"]:
    """The values, if they are one number a sample.

    Args:
        values: What a user's function returned.
        samples: How many samples it was given, ``None`` if that is not known.
        what: The function, for the error.

    Raises:
        ValueError: If they are anything else: a mean over the batch would go unnoticed.

    >>> one_each(torch.tensor(3.0), 2, "loss(model, batch)")
    Traceback (most recent call last):
    ValueError: Expected loss(model, batch) to return one number for each of 2 samples, got a tensor of shape (). \
Do not average over the batch.
    """
    if isinstance(values, Tensor) and values.ndim == 1 and (samples is None or len(values) == samples):
        return values
    count = "sample" if samples is None else f"of {samples} samples"
    got = f"a tensor of shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
    raise ValueError(
        f"Expected {what} to return one number for each {count}, got {got}. Do not average over the batch."
    )
