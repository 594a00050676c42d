"""The preconditioner of each optimizer, beside what the optimizer itself does to a gradient."""

import re

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers.optimization import Adafactor

from probes.preconditioner import Orthogonalisation, preconditioner_of

#: Without momentum the last step is −P∇L, of a state that knows this gradient.
OPTIMIZERS = {
    "SGD": lambda groups: torch.optim.SGD(groups, lr=1e-3),
    "Adam": lambda groups: torch.optim.Adam(groups, lr=1e-3, betas=(0.0, 0.9)),
    "Adam, foreach": lambda groups: torch.optim.Adam(groups, lr=1e-3, betas=(0.0, 0.9), foreach=True),
    "Adam, fused": lambda groups: torch.optim.Adam(groups, lr=1e-3, betas=(0.0, 0.9), fused=True),
    "AdamW": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.0, 0.9), weight_decay=0.0),
    "AdamW, amsgrad": lambda groups: torch.optim.AdamW(
        groups, lr=1e-3, betas=(0.0, 0.5), weight_decay=0.0, amsgrad=True
    ),
    "AdamW, large ε": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.0, 0.9), weight_decay=0.0, eps=0.5),
    "AdamW, rate a tensor": lambda groups: torch.optim.AdamW(
        groups, lr=torch.tensor(1e-3), betas=(0.0, 0.9), weight_decay=0.0, foreach=False
    ),
    "NAdam": lambda groups: torch.optim.NAdam(groups, lr=1e-3, betas=(0.0, 0.9)),
    "RAdam": lambda groups: torch.optim.RAdam(groups, lr=1e-3, betas=(0.0, 0.9)),
    "RAdam, before it adapts": lambda groups: torch.optim.RAdam(groups, lr=1e-3, betas=(0.0, 0.3)),
    "Adamax": lambda groups: torch.optim.Adamax(groups, lr=1e-3, betas=(0.0, 0.9)),
    "Adagrad": lambda groups: torch.optim.Adagrad(groups, lr=1e-3, lr_decay=0.1),
    "RMSprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-3),
    "RMSprop, centred": lambda groups: torch.optim.RMSprop(groups, lr=1e-3, centered=True),
    "Adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-6, d=1e9, weight_decay=0.0),
    "Adafactor of transformers": lambda groups: Adafactor(
        groups, lr=1e-3, relative_step=False, scale_parameter=True, clip_threshold=1e9
    ),
    "Adafactor of transformers, its own rate": lambda groups: Adafactor(groups, clip_threshold=1e9),
}


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64)) for shape in ((4, 6), (5,))]


def last_step(optimizer, weights, steps=7):
    """Gradients and changes of the last of some steps."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
    return [weight.grad for weight in weights], [w.detach() - b for w, b in zip(weights, before, strict=True)]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_without_momentum_is_the_preconditioned_gradient(name):
    """One factor for all parameters remains: rates are relative."""
    weights = parameters()
    optimizer = OPTIMIZERS[name]([{"params": weights[:1]}, {"params": weights[1:]}])
    gradients, changes = last_step(optimizer, weights)
    preconditioner = preconditioner_of(optimizer)
    passed = [-preconditioner.of(weight) * gradient for weight, gradient in zip(weights, gradients, strict=True)]
    flat, expected = (torch.cat([part.flatten() for part in parts]) for parts in (passed, changes))
    factor = float((flat @ expected) / (flat @ flat))
    torch.testing.assert_close(factor * flat, expected, rtol=2e-5, atol=0)
    if "Adafactor of" not in name:
        assert factor == pytest.approx(float(optimizer.param_groups[0]["lr"]), rel=1e-5)


@pytest.mark.parametrize("name", ["SGD", "Adam", "RMSprop", "Adagrad", "Adafactor"])
def test_rates_of_groups_are_relative(name):
    """LoRA+ gives B a larger rate than A."""
    weights = parameters()
    optimizer = OPTIMIZERS[name]([{"params": weights[:1], "lr": 1e-8}, {"params": weights[1:], "lr": 1.6e-7}])
    gradients, changes = last_step(optimizer, weights)
    passed = [-1.6e-7 * preconditioner_of(optimizer).of(w) * g for w, g in zip(weights, gradients, strict=True)]
    for one, other in zip(passed, changes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-15)


@pytest.mark.parametrize("adjustment", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (16, 16)])
def test_muon_steps_along_the_orthogonalised_gradient(shape, adjustment):
    """Muon iterates in bfloat16, so its own step is a few per cent from the same in single precision."""
    weight = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.Muon([weight], lr=1.0, momentum=0.0, nesterov=False, adjust_lr_fn=adjustment)
    weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    optimizer.step()
    step = preconditioner_of(optimizer).of(weight)
    assert isinstance(step, Orthogonalisation)
    torch.testing.assert_close(
        -step(weight.grad), weight.detach(), rtol=0.05, atol=0.02 * float(weight.detach().abs().max())
    )


def test_what_the_optimizer_does_not_step_does_not_move():
    stepped, unstepped, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([stepped, unstepped], lr=0.1)
    stepped.grad = torch.ones(2)
    optimizer.step()
    preconditioner = preconditioner_of(optimizer)
    assert [preconditioner.of(weight) for weight in (unstepped, frozen)] == [0.0, 0.0]
    assert preconditioner.of(stepped).shape == (2,)
    assert [preconditioner.steps(weight) for weight in (stepped, unstepped, frozen)] == [True, True, False]


def test_rates_are_those_of_the_step_and_the_state_is_read_later():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([{"params": [weight], "lr": 0.1}, {"params": [nn.Parameter(torch.ones(1))], "lr": 0.2}])
    before = preconditioner_of(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0  # a scheduler's next rate
    assert before.of(weight) == 0.5
    adam = torch.optim.Adam([weight], lr=0.1, betas=(0.0, 0.5))
    preconditioner = preconditioner_of(adam)
    weight.grad = torch.full((2,), 4.0)
    adam.step()
    torch.testing.assert_close(preconditioner.of(weight), torch.full((2,), 0.25))


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad", "Adafactor", "Adafactor of transformers"])
def test_how_many_gradients_a_second_moment_rests_on(name):
    """(Σw)²/Σw² of their weights, which are found by a single gradient that is not 0."""
    steps, weights = 6, []
    for only in range(steps):
        weight, idle = nn.Parameter(torch.ones(1, dtype=torch.float64)), nn.Parameter(torch.ones(1))
        optimizer = OPTIMIZERS[name]([weight, idle])
        for step in range(steps):
            weight.grad = torch.full_like(weight, float(step == only))
            optimizer.step()
        state = optimizer.state[weight]
        weights.append(
            float(next(state[key] for key in ("exp_avg_sq", "square_avg", "sum", "variance") if key in state))
        )
    counted = sum(weights) ** 2 / sum(part**2 for part in weights)
    assert preconditioner_of(optimizer).gradients == pytest.approx(counted, rel=1e-6)


def test_a_schedule_of_transformers_adafactor_is_its_own():
    """It writes what the optimizer computes into the group, which the optimizer does not read."""
    weights = parameters()
    optimizer = Adafactor([{"params": weights[:1]}, {"params": weights[1:]}])
    last_step(optimizer, weights)
    before = [preconditioner_of(optimizer).of(weight) for weight in weights]
    for group, rate in zip(optimizer.param_groups, (0.0, 3.0), strict=True):
        group["lr"] = rate
    for one, other in zip(before, [preconditioner_of(optimizer).of(weight) for weight in weights], strict=True):
        assert torch.equal(one, other)


def test_accelerates_wrapper_is_looked_into():
    weight = nn.Parameter(torch.ones(2))
    optimizer = Accelerator(cpu=True).prepare(torch.optim.SGD([weight], lr=0.1))
    assert type(optimizer) is not torch.optim.SGD
    assert preconditioner_of(optimizer).of(weight) == 1.0


class Adam(torch.optim.Adam):
    """A subclass may do anything."""


@pytest.mark.parametrize(
    ("optimizer", "reason"),
    [
        (None, "the optimizer is unknown"),
        (Adam([nn.Parameter(torch.ones(1))]), f"the preconditioner of Adam ({__name__}) is unknown"),
        (
            torch.optim.Adadelta([nn.Parameter(torch.ones(1))]),
            "the preconditioner of Adadelta (torch.optim.adadelta) is unknown",
        ),
        (torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.0), "the learning rate of SGD is 0 at this step"),
    ],
)
def test_an_optimizer_without_a_known_preconditioner_is_named(optimizer, reason):
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}$"):
        preconditioner_of(optimizer)
