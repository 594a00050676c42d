"""Gradients are measured at the end of the outermost backward pass, and nothing of that is left behind."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.utils.checkpoint import checkpoint

from probes import gradients
from probes.gradients import GradientNorms


def norms(squared: Tensor | None) -> list[float]:
    assert squared is not None
    return squared.sqrt().tolist()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever gradients are measured."""
    calls: list[int] = []
    measure = gradients.squared_norms

    def counting(parameters: list[nn.Parameter]) -> Tensor:
        calls.append(len(parameters))
        return measure(parameters)

    monkeypatch.setattr(gradients, "squared_norms", counting)
    return calls


def reentrant(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y = checkpoint(function, x, use_reentrant=True)
    assert isinstance(y, Tensor)
    return y


def layers(weights: list[nn.Parameter], x: Tensor) -> Tensor:
    """Each layer under reentrant checkpointing: a backward pass of its own within the outer one."""
    for weight in weights:
        x = reentrant(lambda x, weight=weight: x * weight, x)
    return x


class AtOuterEnd(torch.autograd.Function):
    """Asks at the start of the backward pass for a call at its end, as DDP with a static graph does."""

    @staticmethod
    def forward(ctx, x: Tensor, call: Callable[[], None]) -> Tensor:
        ctx.call = call
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        queue = Variable._execution_engine.queue_callback  # pyright: ignore[reportAttributeAccessIssue]
        queue(lambda: queue(ctx.call))
        return gradient, None


def test_backward_within_backward(counted: list[int]) -> None:
    weights = [nn.Parameter(torch.tensor([value])) for value in (2.0, 3.0, 5.0)]
    recorded = GradientNorms(weights)
    recorded.arm()
    layers(weights, torch.ones(1, requires_grad=True)).sum().backward()
    assert counted == [3]
    assert norms(recorded.before_clipping()) == [15.0, 10.0, 6.0]


def test_backward_within_backward_within_backward(counted: list[int]) -> None:
    weights = [nn.Parameter(torch.tensor([value])) for value in (2.0, 3.0, 5.0)]
    recorded = GradientNorms(weights)
    recorded.arm()
    x = torch.ones(1, requires_grad=True)
    (reentrant(lambda x: layers(weights[:2], x), x) * weights[2]).sum().backward()
    assert counted == [3]
    assert norms(recorded.before_clipping()) == [15.0, 10.0, 6.0]


@pytest.mark.parametrize("asked_first", [False, True])
def test_what_is_reduced_at_the_end_of_the_outer_pass(asked_first: bool) -> None:
    inner, last = nn.Parameter(torch.tensor([2.0])), nn.Parameter(torch.tensor([3.0]))

    def reduce() -> None:
        for weight in (inner, last):
            weight.grad = weight.grad * 10  # pyright: ignore[reportOptionalOperand]

    recorded = GradientNorms([inner, last])
    recorded.arm()
    y = layers([inner], torch.ones(1, requires_grad=True))
    # In the second case the gradient of ``last`` comes before the request to reduce.
    y = AtOuterEnd.apply(y * last, reduce) if not asked_first else AtOuterEnd.apply(y, reduce) * last  # pyright: ignore
    y.sum().backward()  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    assert norms(recorded.before_clipping()) == [30.0, 20.0]


def test_backward_in_another_thread() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    recorded = GradientNorms([weight])
    recorded.arm()
    loss = (weight * weight).sum()
    thread = threading.Thread(target=loss.backward)
    thread.start()
    thread.join()
    assert norms(recorded.before_clipping()) == [4.0]


def test_two_backward_passes_at_a_time() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    recorded = GradientNorms([first, second])
    recorded.arm()
    middle = second * 2
    other = threading.Thread(target=lambda: (first * 3).sum().backward())

    def begin_the_other(gradient: Tensor) -> None:
        other.start()
        other.join()

    middle.register_hook(begin_the_other)
    (middle * first).sum().backward()
    assert norms(recorded.before_clipping()) == [5.0, 2.0]


def test_compiled() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 1))
    parameters = list(model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(3, 4)
    compiled(x).sum().backward()  # compiled before it is watched
    model.zero_grad()

    recorded = GradientNorms(parameters)
    recorded.arm()
    compiled(x).sum().backward()
    by_hand = [parameter.grad.double().square().sum().sqrt().item() for parameter in parameters]  # pyright: ignore
    assert norms(recorded.before_clipping()) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("watched", [False, True])
def test_gradients_are_bitwise_those_without_us(watched: bool) -> None:
    weights = [nn.Parameter(torch.randn(6, generator=torch.Generator().manual_seed(seed))) for seed in range(3)]
    plain = [nn.Parameter(weight.detach().clone()) for weight in weights]
    recorded = GradientNorms(weights)
    if watched:
        recorded.arm()
    for trained in (weights, plain):
        for _ in range(2):
            layers(trained, torch.ones(6, requires_grad=True)).sin().sum().backward()
    recorded.after_clipping()
    assert all(torch.equal(weight.grad, same.grad) for weight, same in zip(weights, plain, strict=True))  # pyright: ignore
    assert (recorded.before_clipping() is not None) == watched


@pytest.mark.parametrize("register", ["register_post_accumulate_grad_hook", "register_hook"])
def test_gradients_that_an_optimizer_takes_within_the_backward_pass(register: str) -> None:
    """Layer-wise optimizers step as soon as a parameter has its gradient; LOMO with the next one's."""
    first, second, never = (nn.Parameter(torch.ones(1)) for _ in range(3))
    recorded = GradientNorms([first, second, never])

    def step(reached: Tensor) -> None:
        for parameter in (first, second):
            parameter.grad = None

    handles = [getattr(parameter, register)(step) for parameter in (first, second)]
    recorded.arm()
    (first * 2 + second * 3).sum().backward()
    for handle in handles:
        handle.remove()
    left = [parameter.grad is not None for parameter in (first, second)]
    assert sum(left) == (register == "register_hook")  # LOMO takes the last one after the pass
    before, after = recorded.before_clipping(), recorded.after_clipping()
    assert before is not None
    parameters = [first, second, never]
    for squared in (before, after):
        measured = gradients.norms_of(squared, parameters, [[each] for each in parameters])
        assert [math.isnan(norm) for norm in measured] == [not left[0], not left[1], False]
        assert math.isnan(gradients.norms_of(squared, parameters, [parameters])[0])
        assert measured[2] == 0.0
    recorded.arm()
    (first * 2 + second * 3).sum().backward()
    assert norms(recorded.before_clipping())[:2] == [2.0 + 2.0 * left[0], 3.0 + 3.0 * left[1]]


def test_arming_forgets() -> None:
    weight = nn.Parameter(torch.ones(1))
    recorded = GradientNorms([weight])
    recorded.arm()
    weight.sum().backward()
    recorded.disarm()
    assert norms(recorded.before_clipping()) == [1.0]
    recorded.arm()
    assert recorded.before_clipping() is None


def test_disarmed_in_the_middle_of_a_backward_pass() -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    recorded = GradientNorms([first, second])
    recorded.arm()
    middle = first * 2
    middle.register_hook(lambda gradient: recorded.disarm())
    (middle * second).sum().backward()
    assert recorded.before_clipping() is None
    assert (first.grad, second.grad) == (2, 2)


@pytest.mark.parametrize("rearmed", [False, True])
def test_after_an_exception_in_backward(rearmed: bool) -> None:
    first, second = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    recorded = GradientNorms([first, second])
    recorded.arm()
    middle = first * 2

    def fail(gradient: Tensor) -> None:
        raise MemoryError("no memory")

    middle.register_hook(fail)
    with pytest.raises(MemoryError, match="no memory"):
        (middle * second).sum().backward()
    assert recorded.before_clipping() is None
    second.grad = None
    if rearmed:
        recorded.arm()
    (first * second * 3).sum().backward()
    assert norms(recorded.before_clipping()) == [3.0, 3.0]


def test_hooks_of_others_stay() -> None:
    weight = nn.Parameter(torch.ones(1))
    theirs = weight.register_post_accumulate_grad_hook(lambda parameter: None)
    hooks = dict(weight._post_accumulate_grad_hooks)  # pyright: ignore[reportAttributeAccessIssue]
    recorded = GradientNorms([weight])
    for _ in range(2):
        recorded.arm()
        recorded.arm()
        assert len(weight._post_accumulate_grad_hooks) == 2  # pyright: ignore[reportAttributeAccessIssue]
        recorded.disarm()
    assert weight._post_accumulate_grad_hooks == hooks  # pyright: ignore[reportAttributeAccessIssue]
    theirs.remove()
