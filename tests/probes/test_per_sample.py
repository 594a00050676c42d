"""What a parameter may do besides its layer's product is found out, whoever called the layer, and however."""

from __future__ import annotations

import copy
import gc
import re
import types

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from probes import gradient_gram
from tests.reference import flat_gradients, per_sample_gradients

BATCH = {"x": torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))}


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().sum((1, 2))


class Net(nn.Module):
    """Three layers; subclasses call them in their own ways."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = (nn.Linear(4, 4) for _ in range(3))
        self.double()

    def inner(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).tanh()).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(x))


class Gated(nn.Module):
    """A norm that is given more than what it normalises."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, dtype=torch.float64))

    def forward(self, x: Tensor, gate: Tensor | None = None, power: float = 1.0) -> Tensor:
        x = x * (1 if gate is None else gate.sigmoid())
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True)) ** power


class WithGate(Net):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.norm, self.how = Gated(), how

    def inner(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.how == "positional":
            return self.norm(x, x)
        return self.norm(x, power=2.0) if self.how == "keyword" else self.norm(x=x)


class Checkpointed(Net):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.inner, x, use_reentrant=self.reentrant))  # pyright: ignore[reportArgumentType]


def assert_is_twins(model: nn.Module) -> tuple[str, ...]:
    found = gradient_gram(model, BATCH, squares)
    gradients = flat_gradients(model, BATCH, squares)
    torch.testing.assert_close(found.gram["global"], gradients @ gradients.mT, rtol=1e-10, atol=0)
    return found.one_by_one


def test_layers_as_they_are():
    assert assert_is_twins(Net()) == ()


@pytest.mark.parametrize("how", ["positional", "keyword", "input by name"])
def test_a_layer_that_is_given_more(how):
    assert assert_is_twins(WithGate(how)) == ("norm.weight",)


def test_a_layer_with_a_forward_of_its_own():
    model = Net()
    model.second.forward = types.MethodType(lambda self, x: (x @ self.weight.mT) ** 3 + self.bias, model.second)
    assert set(assert_is_twins(model)) == {"second.weight", "second.bias"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_hooks_of_others_that_change_what_goes_in_or_comes_out(when):
    model = Net()
    if when == "before":
        model.second.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 3,))
    else:
        model.second.register_forward_hook(lambda module, inputs, output: output * 3)
    assert assert_is_twins(model) == ()


def test_checkpointed_activations():
    assert assert_is_twins(Checkpointed(reentrant=False)) == ()


def test_reentrant_checkpoints_hide_layers_and_are_refused():
    """They would come out as zero."""
    batch = {"x": BATCH["x"].clone().requires_grad_()}
    message = "got Linear inside one of CheckpointFunctionBackward, which hide it."
    with pytest.raises(ValueError, match=re.escape(message)):
        gradient_gram(Checkpointed(reentrant=True), batch, squares)


def test_a_layer_without_graph_has_no_gradient():
    class Frozen(Net):
        def inner(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                return super().inner(x)

    assert assert_is_twins(Frozen()) == ()


def test_one_cast_that_autocast_keeps_for_two_operations():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).tanh() + nn.functional.linear(2 * x, self.layer.weight)

    batch = {"x": BATCH["x"].float()}
    with torch.autocast("cpu", torch.bfloat16):
        found = gradient_gram(Twice(), batch, squares)
        gradients = flat_gradients(Twice(), batch, squares)
    assert found.one_by_one == ("layer.weight",)
    torch.testing.assert_close(found.gram["global"], gradients @ gradients.mT, rtol=1e-2, atol=0.1)


def test_the_graph_is_gone_at_once():
    """Not when Python next looks for cycles: it holds all activations."""
    model = Net()
    gc.collect()
    gc.disable()
    try:
        gradient_gram(model, BATCH, squares)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [type(each).__name__ for each in gc.garbage if isinstance(each, Tensor) or "Backward" in str(type(each))]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []


# ---- compiled and scripted layers ----


class Block(nn.Module):
    """torch.compile skips the modules of torch itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inner = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).tanh()


COMPILED = {
    "torch.compile(layer)": lambda model, backend: setattr(
        model, "second", torch.compile(model.second, backend=backend)
    ),
    "layer.compile()": lambda model, backend: model.second.compile(backend=backend),
    "model.compile()": lambda model, backend: model.compile(backend=backend),
}


@pytest.mark.parametrize("how", COMPILED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("warm", [False, True])
def test_compiled_layers_are_measured_eagerly_and_stay_compiled(how, backend, warm):
    """A graph of AOTAutograd calls no hooks, and its gradients would come out as zero."""

    def graphs(measured: bool) -> int:
        """How many are compiled in a training, and what the measurement in its middle finds."""
        torch._dynamo.reset()
        compiled: list[int] = []
        plain = torch._dynamo.lookup_backend(backend)
        model = Net()
        model.second = Block()
        twin = copy.deepcopy(model)
        COMPILED[how](model, lambda graph, inputs: compiled.append(1) or plain(graph, inputs))
        for step in range(4):
            if measured and step == 2 * warm:
                found = gradient_gram(model, BATCH, squares)
                gradients = flat_gradients(twin, BATCH, squares)
                torch.testing.assert_close(found.gram["global"], gradients @ gradients.mT, rtol=1e-10, atol=0)
                assert found.one_by_one == ()
            squares(model, BATCH).sum().backward()
        return len(compiled)

    assert graphs(measured=True) == graphs(measured=False) > 0


def test_layers_compiled_ahead_of_time_are_measured_one_by_one():
    """No stance of torch.compile reaches them, and they call no hooks."""
    functorch = pytest.importorskip("functorch.compile")
    model = Net()
    model.second = functorch.aot_module(model.second, functorch.nop)
    assert len(assert_is_twins(model)) == 2


def test_scripted_layers_are_measured_one_by_one():
    """They take no hooks."""
    model = Net()
    model.second = torch.jit.script(model.second)
    assert set(assert_is_twins(model)) == {"second.weight", "second.bias"}


def test_outputs_that_the_losses_do_not_see_are_not_taken_for_zero():
    """The hook sees another tensor than the one that goes on."""

    class Replaced(nn.Linear):
        def __call__(self, x: Tensor) -> Tensor:
            super().__call__(x)
            return nn.functional.linear(x, self.weight, self.bias)

    model = Net()
    model.second = Replaced(4, 4).double()
    assert set(assert_is_twins(model)) == {"second.weight", "second.bias"}


LAYERS = {
    "strided": nn.Conv2d(4, 3, (2, 3), stride=(1, 2), padding=(1, 0)),
    "in time": nn.Conv1d(4, 3, 3, stride=2, padding=1),
    "in space": nn.Conv3d(4, 3, 2, padding=1, bias=False),
    "padded to the same": nn.Conv2d(4, 3, 3, padding="same"),
    "valid": nn.Conv2d(4, 3, 3, padding="valid"),
    "dilated": nn.Conv2d(4, 3, 2, dilation=2),
    "grouped": nn.Conv2d(4, 4, 2, groups=2),
    "reflected": nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "transposed": nn.ConvTranspose2d(4, 3, 2),
    "layer norm": nn.LayerNorm((6, 6)),
    "group norm": nn.GroupNorm(2, 4),
    "batch norm": nn.BatchNorm2d(4),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_images(name):
    layer, shape = LAYERS[name], (4, 6, 6)
    for dimension, kind in ((1, nn.Conv1d), (3, nn.Conv3d)):
        shape = (4, *[6] * dimension) if isinstance(layer, kind) else shape
    model = nn.Sequential(nn.Tanh(), layer, nn.Tanh()).double()
    model.append(nn.LazyLinear(2).double())
    x = torch.randn(5, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss = lambda model, batch: model(batch["x"]).square().flatten(1).sum(1)  # noqa: E731
    loss(model, {"x": x})  # makes the last layer
    found = gradient_gram(model, {"x": x}, loss)
    gradients = flat_gradients(model, {"x": x}, loss)
    torch.testing.assert_close(found.gram["global"], gradients @ gradients.mT, rtol=1e-10, atol=1e-12)


class Gate(nn.Module):
    """A scale that is a function of its parameter."""

    def __init__(self, function, value: float) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.full((6,), value))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.function(self.weight)


def of_zero_bias(layer: nn.Module) -> nn.Module:
    nn.init.zeros_(layer.bias)
    return layer


#: As many channels as places, and parameters that are still constant: they could be of either.
CONSTANT = {
    "batch norm": lambda: nn.BatchNorm1d(6),
    "batch norm of images": lambda: nn.BatchNorm2d(6),
    "group norm": lambda: nn.GroupNorm(2, 6),
    "instance norm": lambda: nn.InstanceNorm1d(6, affine=True),
    "instance norm of images": lambda: nn.InstanceNorm2d(6, affine=True),
    "depthwise": lambda: of_zero_bias(nn.Conv2d(6, 6, 3, padding=1, groups=6)),
    "dilated": lambda: of_zero_bias(nn.Conv2d(6, 6, 3, padding=2, dilation=2)),
    "transposed": lambda: of_zero_bias(nn.ConvTranspose1d(6, 6, 1)),
    "PReLU": lambda: nn.PReLU(6),
    **{
        f"{function.__name__} at {value}": lambda function=function, value=value: Gate(function, value)
        for function in (torch.sigmoid, torch.exp, torch.tanh, torch.abs, torch.relu, torch.square)
        for value in (0.0, 1.0)
    },
}


@pytest.mark.parametrize("name", CONSTANT)
def test_parameters_that_look_elementwise_as_they_are_at_first(name):
    torch.manual_seed(0)
    layer = CONSTANT[name]()
    shape = (6, 6, 6) if "of images" in name or isinstance(layer, nn.Conv2d) else (6, 6)
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(36 if len(shape) == 2 else 216, 2)).double().eval()
    batch = {"x": torch.randn(5, *shape, dtype=torch.float64)}
    loss = lambda model, batch: model(batch["x"]).square().sum(1)  # noqa: E731
    found = gradient_gram(model, batch, loss, space="factor")
    for part, gradients in per_sample_gradients(model, batch, loss).items():
        block = part if part in found.gram else part.removesuffix(".weight")
        gradients = gradients.flatten(1)
        torch.testing.assert_close(found.gram[block], gradients @ gradients.mT, rtol=1e-10, atol=1e-14)


def test_judging_a_layer_leaves_it_alone():
    """Its parameters, its buffers, its hooks and random numbers."""

    class Counting(nn.LayerNorm):
        def __init__(self) -> None:
            super().__init__(4)
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model, seen = nn.Sequential(Counting().double(), nn.Linear(4, 4).double()), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    before, weight = torch.get_rng_state(), model[0].weight
    value = weight.detach().clone()
    assert gradient_gram(model, BATCH, squares).one_by_one == ()
    assert model[0].weight is weight
    assert torch.equal(weight, value)
    assert model[0].calls.item() == 1
    assert seen == [1]
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 0}, {"scale_grad_by_freq": True}, {"max_norm": 0.5}])
def test_embeddings(options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, **options), nn.Linear(4, 3)).double()
    rows = torch.tensor([[1, 2, 0, 0], [3, 3, 3, 0], [5, 6, 1, 2]])
    loss = lambda model, batch: model(batch["rows"]).tanh().sum((1, 2))  # noqa: E731
    gradients = flat_gradients(model, {"rows": rows}, loss)
    found = gradient_gram(model, {"rows": rows}, loss)
    torch.testing.assert_close(found.gram["global"], gradients @ gradients.mT, rtol=1e-10, atol=0)
