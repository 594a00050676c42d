"""Swapped weights come back bit for bit, and nothing around them notices."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor, nn

from probes.undisturbed import swapped

FORMATS = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Tied(nn.Module):
    """An embedding whose weight is also the output's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, words: Tensor) -> Tensor:
        return self.head(self.embedding(words))


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def others(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Values that are not the parameters', of the same shapes and formats."""
    return [torch.full_like(parameter, 0.3).detach() for parameter in parameters]


def copies(model: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_values_inside_and_own_values_after(dtype: torch.dtype) -> None:
    model = network(dtype)
    parameters = list(model.parameters())
    before, values = copies(model), others(parameters)
    with swapped(parameters, values):
        assert same_bits(copies(model), values)
    assert same_bits(copies(model), before)


def test_values_that_equality_does_not_see() -> None:
    weight = nn.Parameter(torch.tensor([float("nan"), -0.0, 0.0, float("-inf")]))
    before = weight.detach().clone()
    with swapped([weight], [torch.tensor([-0.0, float("nan"), 1.0, 0.0])]):
        assert weight[1].isnan()
    assert same_bits([weight.detach()], [before])


def test_restored_after_an_error() -> None:
    model = network()
    parameters = list(model.parameters())
    before = copies(model)
    with pytest.raises(KeyError, match="inside"), swapped(parameters, others(parameters)):
        raise KeyError("inside")
    assert same_bits(copies(model), before)


def test_nested() -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    with swapped([weight], [torch.tensor([2.0])]):
        with swapped([weight], [torch.tensor([3.0])]):
            assert weight.item() == 3
        assert weight.item() == 2
    assert weight.item() == 1


def test_tied_parameters_named_once_and_twice() -> None:
    model = Tied()
    words, value = torch.tensor([0, 4]), torch.full((5, 3), 0.5)
    before, output = copies(model), model(words)
    for parameters in ([model.embedding.weight], [model.embedding.weight, model.head.weight]):
        with swapped(parameters, [value] * len(parameters)):
            assert model(words).tolist() == [[0.75] * 5] * 2
        assert same_bits(copies(model), before)
        assert torch.equal(model(words), output)


def test_parameters_that_are_views_of_one_memory() -> None:
    memory = torch.arange(6.0)
    first, second = nn.Parameter(memory[:4]), nn.Parameter(memory[2:])
    with swapped([first, second], [torch.zeros(4), torch.zeros(4)]):
        assert memory.tolist() == [0] * 6
    assert memory.tolist() == [0, 1, 2, 3, 4, 5]


def test_the_training_goes_on_bitwise_as_without_it() -> None:
    model = network()
    twin = copy.deepcopy(model)
    pairs = [(m, torch.optim.AdamW(m.parameters(), lr=0.1)) for m in (model, twin)]
    for step in range(3):
        batch = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
        for trained, optimizer in pairs:
            optimizer.zero_grad()
            trained(batch).square().mean().backward()
            optimizer.step()
        parameters = list(model.parameters())
        gradients = [parameter.grad for parameter in parameters]
        with swapped(parameters, others(parameters)):
            torch.autograd.grad(model(batch).sum(), parameters)
        assert all(parameter.grad is gradient for parameter, gradient in zip(parameters, gradients, strict=True))
    assert same_bits(copies(model), copies(twin))


def test_a_graph_that_waits_for_its_backward_pass() -> None:
    model = network()
    batch, parameters = torch.ones(2, 4), list(model.parameters())
    expected = torch.autograd.grad(model(batch).square().sum(), parameters)
    loss = model(batch).square().sum()
    with swapped(parameters, others(parameters)):
        model(batch)
    assert same_bits(list(torch.autograd.grad(loss, parameters)), list(expected))


def test_addresses_versions_and_requirements_stay() -> None:
    model = network()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    state = [(p.data_ptr(), p._version, p.requires_grad) for p in parameters]
    with swapped(parameters, others(parameters)):
        pass
    assert [(p.data_ptr(), p._version, p.requires_grad) for p in parameters] == state


def test_casts_that_autocast_keeps_are_not_used_for_other_weights() -> None:
    model = network()
    batch, parameters = torch.ones(2, 4), list(model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        before = model(batch)
        with swapped(parameters, others(parameters)):
            inside = model(batch)
        after = model(batch)
    with torch.autocast("cpu", torch.bfloat16), swapped(parameters, others(parameters)):
        expected = model(batch)
    assert torch.equal(inside, expected)
    assert not torch.equal(inside, before)
    assert torch.equal(after, before)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([], "Expected one value for each of 1 parameters, got 0 values."),
        (
            [torch.zeros(3)],
            "Expected a value like parameter 0, (2,) in torch.float32, got (3,) in torch.float32. "
            "Swap only exact copies: parameter.detach().clone().",
        ),
        (
            [torch.zeros(2, dtype=torch.bfloat16)],
            "Expected a value like parameter 0, (2,) in torch.float32, got (2,) in torch.bfloat16. "
            "Swap only exact copies: parameter.detach().clone().",
        ),
    ],
    ids=["count", "shape", "format"],
)
def test_values_that_do_not_fit(values: list[Tensor], message: str) -> None:
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"), swapped([weight], values):
        pass
    assert weight.tolist() == [1, 1]


def test_values_in_the_parameters_own_memory() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.zeros(2))
    with (
        pytest.raises(ValueError, match="Expected a copy as the value of parameter 0, got a parameter's memory"),
        swapped([first, second], [second.detach(), torch.ones(2)]),
    ):
        pass


def test_two_values_for_one_memory() -> None:
    weight = nn.Parameter(torch.ones(2))
    with (
        pytest.raises(ValueError, match="Expected equal values for parameters that share their memory, got two for"),
        swapped([weight, weight], [torch.zeros(2), torch.ones(2)]),
    ):
        pass
    assert weight.tolist() == [1, 1]
