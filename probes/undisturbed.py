"""A model measured in the middle of its training, which must not notice; other weights in it for a moment."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from probes.watched import ABSENT, Holder, class_names

#: Child under which each wrapper that only distributes or compiles a model keeps it.
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
}


def bare(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DeepSpeed and ``torch.compile``, adapters included.

    It computes the same and keeps no state.

    >>> inner = nn.Linear(2, 2)
    >>> bare(nn.DataParallel(inner)) is inner
    True
    """
    while wrapper := class_names(model) & _WRAPPERS.keys():
        model = getattr(model, _WRAPPERS[min(wrapper)])
    return model


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """Give the bare model in evaluation mode; the modes of all modules and all random states are as before afterwards.

    Whatever torch.compile has compiled (regions of the model, ``model.compile()``, a loss) runs eagerly meanwhile: a
    compiled graph calls no hooks, and allows no second backward pass. Nothing is compiled again for that afterwards.

    Random states are those of Python, NumPy and torch, on the host and on the devices that the model is on. Modes are
    set without calling ``eval()``: some modules do more than that when they are asked to change their mode.

    >>> model = nn.Sequential(nn.Dropout(0.5)).train()
    >>> with undisturbed(model) as quiet:
    ...     quiet(torch.ones(2))
    tensor([1., 1.])
    >>> model[0].training
    True
    """
    model = bare(model)
    modes = [(module, module.training) for module in model.modules()]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the global state is what a training may use
    devices = {tensor.device for tensor in [*model.parameters(), *model.buffers()]}
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing is compiled; importing it would take seconds
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(devices=[]))
        for kind in sorted({device.type for device in devices} - {"cpu", "meta"}):
            members = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=members, device_type=kind))
        try:
            for module, _ in modes:
                module.training = False
            yield model
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def swapped(parameters: Sequence[nn.Parameter], values: Sequence[Tensor]) -> Iterator[None]:
    """Give parameters other values inside the ``with`` block, and their own back after it, whatever happens there.

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
    pairs = list(zip(parameters, values, strict=True))
    present = [(parameter, value) for parameter, value in pairs if id(parameter) not in ABSENT]
    originals = [(parameter, parameter.detach().clone()) for parameter, _ in present]
    absent: dict[Holder, list[tuple[nn.Parameter, Tensor]]] = {}
    for parameter, value in pairs:
        if (holder := ABSENT.get(id(parameter))) is not None:
            absent.setdefault(holder, []).append((parameter, value))
    with ExitStack() as stack:
        for holder, replacements in absent.items():
            stack.enter_context(holder.replaced(replacements))
        try:
            _copy(present)
            yield
        finally:
            _copy(originals)


@torch.no_grad()
def _copy(values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    for parameter, value in values:
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
        if id(parameter) in ABSENT:
            continue
        other = given.setdefault((parameter.data_ptr(), tuple(parameter.stride())), value)
        if other is not value and not torch.equal(other.to(value.device), value):
            raise ValueError(
                f"Expected equal values for parameters that share their memory, got two for parameter {number}."
            )
