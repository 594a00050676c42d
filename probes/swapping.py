"""Other weights in a model for a moment, its own back afterwards, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def swapped(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Gives parameters other values inside the ``with`` block, and their own back after it, whatever happens there.

    Their own values are kept as exact copies in their own format on their own device (θ is not recovered as θ' + δ,
    which rounds), and copied back in place: addresses, ``.grad``, hooks, the state of the optimizer and a graph that is
    waiting for its backward pass stay as they are. While it lasts, it takes as much memory as the parameters do.

    Args:
        parameters: Which to change. Parameters that share their memory (tied weights) must be given equal values.
        values: Their values inside the block, each of its parameter's shape and format, on any device.

    Raises:
        ValueError: If the values do not fit the parameters; nothing has been changed then.

    >>> weight = nn.Parameter(torch.tensor([1.0]))
    >>> with swapped([weight], [torch.tensor([2.0])]):
    ...     weight.item()
    2.0
    >>> weight.item()
    1.0
    """
    _require_fitting(parameters, values)
    own = [parameter.detach().clone() for parameter in parameters]
    try:
        _copy(parameters, values)
        yield
    finally:
        _copy(parameters, own)


@torch.no_grad()
def _copy(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        # Through .data: a graph that has saved the parameter must not find it modified, since it gets it back.
        parameter.data.copy_(value)
    # Autocast keeps casts of weights until its outermost block ends; they would be those of other values.
    torch.clear_autocast_cache()


def _require_fitting(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    if len(parameters) != len(values):
        raise ValueError(f"Expected one value for each of {len(parameters)} parameters, got {len(values)} values.")
    memory = {parameter.untyped_storage().data_ptr() for parameter in parameters if parameter.numel()}
    given: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    for number, (parameter, value) in enumerate(zip(parameters, values, strict=True)):
        if value.shape != parameter.shape or value.dtype != parameter.dtype:
            raise ValueError(
                f"Expected a value like parameter {number}, {tuple(parameter.shape)} in {parameter.dtype}, got "
                f"{tuple(value.shape)} in {value.dtype}. Swap only exact copies: parameter.detach().clone()."
            )
        if value.numel() and value.untyped_storage().data_ptr() in memory:
            raise ValueError(
                f"Expected a copy as the value of parameter {number}, got a parameter's memory, which swapping "
                "overwrites. Pass parameter.detach().clone()."
            )
        other = given.setdefault((parameter.data_ptr(), tuple(parameter.stride())), value)
        if other is not value and not torch.equal(other.to(value.device), value):
            raise ValueError(
                f"Expected equal values for parameters that share their memory, got two for parameter {number}."
            )
