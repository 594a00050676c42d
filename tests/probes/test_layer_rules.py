"""Rules for the gradients of layers, against autograd for each sample."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from probes.layer_rules import Call, follows, gradient_rows, has_rule, is_convolution, term
from probes.sample_gradients import SampleGradient

SAMPLES = 3


class RootMeanSquare(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(size))

    def forward(self, values: Tensor) -> Tensor:
        return self.weight * values * values.square().mean(-1, keepdim=True).rsqrt()


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 5), (SAMPLES, 2, 4)),
    "conv1d of GPT-2": (lambda: Conv1D(5, 4), (SAMPLES, 2, 4)),
    "convolution": (lambda: nn.Conv2d(2, 3, 3, stride=2, padding=1), (SAMPLES, 2, 6, 5)),
    "layer norm": (lambda: nn.LayerNorm(4), (SAMPLES, 2, 4)),
    "root mean square": (lambda: RootMeanSquare(4), (SAMPLES, 2, 4)),
}


def call_of(module: nn.Module, inputs: Tensor) -> Call:
    output = module(inputs)
    return Call(module, inputs, output, output._version, plain=True)


def by_sample(rows: Sequence[Tensor]) -> Tensor:
    """All samples have as many rows, one sample's after the other's."""
    (only,) = rows
    return only.unflatten(0, (SAMPLES, -1))


def fast_gradients(call: Call, name: str, weights: Tensor) -> Tensor:
    """By the rule of the layer."""
    parameter = call.module.get_parameter(name)
    sum_of = term([call], name, [gradient_rows(call, weights)], by_sample)
    return SampleGradient(tuple(parameter.shape), SAMPLES, [sum_of]).dense(parameter)


def slow_gradients(module: nn.Module, name: str, inputs: Tensor, weights: Tensor) -> Tensor:
    """One backward pass for each sample."""
    parameter = module.get_parameter(name)
    losses = [(module(inputs)[sample] * weights[sample]).sum() for sample in range(SAMPLES)]
    return torch.stack([torch.autograd.grad(loss, parameter)[0] for loss in losses])


@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=list(LAYERS))
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_gradients_of_each_sample(layer: Callable[[], nn.Module], shape: tuple[int, ...], name: str) -> None:
    module = layer().double()
    if not hasattr(module, name):
        pytest.skip("has no bias")
    inputs = torch.randn(shape, dtype=torch.float64)
    call = call_of(module, inputs)
    weights = torch.randn_like(call.output)
    assert has_rule(call, name)
    torch.testing.assert_close(fast_gradients(call, name, weights), slow_gradients(module, name, inputs, weights))


def test_gradients_of_an_embedding_leave_padding_out() -> None:
    module = nn.Embedding(6, 4, padding_idx=0).double()
    tokens = torch.tensor([[1, 2, 2], [0, 5, 1], [3, 0, 0]])
    call = call_of(module, tokens)
    weights = torch.randn_like(call.output)
    torch.testing.assert_close(
        fast_gradients(call, "weight", weights), slow_gradients(module, "weight", tokens, weights)
    )


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(2, 2, 3), True),
        (nn.Conv2d(2, 2, 3, padding=1), True),
        (nn.Conv2d(2, 2, 3, dilation=2), False),
        (nn.Conv2d(2, 2, 3, groups=2), False),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), False),
        (nn.Linear(2, 2), False),
    ],
)
def test_which_convolutions_can_be_unfolded(module: nn.Module, expected: bool) -> None:
    assert is_convolution(module) is expected


def test_an_output_changed_in_place_has_no_rule() -> None:
    call = call_of(nn.Linear(4, 5), torch.randn(SAMPLES, 4))
    assert has_rule(call, "weight")
    call.output.mul_(2)
    assert not has_rule(call, "weight")


def test_more_inputs_than_one_have_no_rule() -> None:
    call = call_of(nn.Linear(4, 5), torch.randn(SAMPLES, 4))
    call.plain = False
    assert not has_rule(call, "weight")


def test_calls_that_follow_each_other() -> None:
    first = call_of(nn.Linear(4, 3, bias=False), torch.randn(SAMPLES, 4))
    last = call_of(nn.Linear(3, 5, bias=False), first.output)
    apart = call_of(nn.Linear(3, 5, bias=False), first.output.clone())
    assert follows(first, last)
    assert follows(first, first)
    assert not follows(first, apart)
