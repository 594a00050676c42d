"""A measurement leaves modes and random states as they were, and measures in evaluation mode."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn

from probes.undisturbed import bare, undisturbed


class MergesWhenAsked(nn.Module):
    """Changes its weight with its mode, as some adapters do."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def train(self, mode: bool = True) -> nn.Module:
        self.weight.data += 1
        return super().train(mode)


def mixed() -> nn.Module:
    """A model whose modules are not all in one mode."""
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(0.5)))
    model[1].eval()
    return model


def draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]  # noqa: NPY002


def seed() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_random_states(fails: bool) -> None:
    model = mixed()
    modes = [module.training for module in model.modules()]
    seed()
    expected = draws()
    seed()
    try:
        with undisturbed(model) as inside:
            assert not any(module.training for module in inside.modules())
            draws()
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert draws() == expected
    assert [module.training for module in model.modules()] == modes


def test_statistics_of_the_batch_are_not_gathered() -> None:
    model = nn.BatchNorm1d(3).train()
    with undisturbed(model) as inside:
        inside(torch.randn(4, 3))
    assert model.running_mean is not None
    assert model.running_mean.tolist() == [0, 0, 0]


def test_modules_are_not_asked_to_change_their_mode() -> None:
    model = MergesWhenAsked()
    with undisturbed(model):
        pass
    assert model.weight.item() == 1


def test_wrappers_are_left_outside() -> None:
    inner = nn.Linear(2, 2)
    compiled = torch.compile(nn.DataParallel(inner))
    assert isinstance(compiled, nn.Module)
    assert bare(compiled) is inner


@pytest.mark.parametrize("stance", ["default", "fail_on_recompile", "force_eager"])
def test_what_is_compiled_runs_eagerly_meanwhile(stance: str) -> None:
    ran: list[str] = []

    def backend(graph: nn.Module, inputs: list[torch.Tensor]) -> nn.Module:
        ran.append("compiled")
        return graph

    function = torch.compile(lambda x: x + 1, backend=backend)  # pyright: ignore[reportArgumentType]
    model = nn.Linear(2, 2)
    with torch.compiler.set_stance(stance), undisturbed(model):
        function(torch.ones(2))
    assert ran == []
    function(torch.ones(2))
    assert ran == ["compiled"]
    with torch.compiler.set_stance("fail_on_recompile"):
        with undisturbed(model):
            function(torch.ones(3, 3).double())
        with pytest.raises(RuntimeError, match="fail_on_recompile"):
            function(torch.ones(3, 3).double())
