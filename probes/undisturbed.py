"""A model measured in the middle of its training, which must not notice."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
from torch import nn

from probes.unwrapping import class_names

#: Child under which each wrapper that only distributes or compiles a model keeps it.
_WRAPPERS = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}


def bare(model: nn.Module) -> nn.Module:
    """The model inside DDP and ``torch.compile``, adapters included: it computes the same and keeps no books.

    >>> inner = nn.Linear(2, 2)
    >>> bare(nn.DataParallel(inner)) is inner
    True
    """
    while wrapper := class_names(model) & _WRAPPERS.keys():
        model = getattr(model, _WRAPPERS[min(wrapper)])
    return model


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[nn.Module]:
    """The bare model in evaluation mode; the modes of all modules and all random states are as before afterwards.

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
            own = [device for device in devices if device.type == kind]
            stack.enter_context(torch.random.fork_rng(devices=own, device_type=kind))
        try:
            for module, _ in modes:
                module.training = False
            yield model
        finally:
            for module, mode in modes:
                module.training = mode
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
