"""Transfer is what a step really does: exact for quadratic losses, to first order elsewhere, without a trace."""

from __future__ import annotations

import inspect
import math
import random
import re
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from probes.tasks import Task, split_by_group
from probes.transfer import transfer
from tests.families import FAMILIES


class Point(nn.Module):
    """Weights w, to which a sample says how far they are from where it wants them."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -2.0], dtype=dtype))
        self.unused = nn.Parameter(torch.ones(1, dtype=dtype))


def quadratic(model: nn.Module, batch: Any) -> Tensor:
    """½ Σ_k c_k (w_k − t_k)² of each sample."""
    return (0.5 * batch["curvature"] * (model.w - batch["target"]) ** 2).sum(1)


def quadratic_tasks(batch_size: int = 2) -> list[Task]:
    """Three tasks in two dimensions, four samples each."""
    draw = torch.Generator().manual_seed(0)
    return [
        Task(
            name,
            [
                {
                    "curvature": torch.rand(2, generator=draw).double() + 0.5,
                    "target": centre + torch.randn(2, generator=draw),
                }
                for _ in range(4)
            ],
            loss=quadratic,
            batch_size=batch_size,
        )
        for name, centre in (("a", torch.tensor([2.0, 0.0])), ("b", torch.tensor([-3.0, -4.0])), ("c", torch.ones(2)))
    ]


def loss_and_gradient(task: Task, half: list[int], w: Tensor) -> tuple[float, Tensor]:
    """By formula, of the samples in one half."""
    curvature, target = (torch.stack([task.samples[n][key].double() for n in half]) for key in ("curvature", "target"))
    return (0.5 * curvature * (w - target) ** 2).sum(1).mean().item(), (curvature * (w - target)).mean(0)


def sentences() -> tuple[nn.Module, list[Task]]:
    """A GPT-2 with LoRA, in double precision throughout (Llama's norms are not), and two tasks."""
    family = FAMILIES["gpt2"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = get_peft_model(family.model(), family.lora(lora_dropout=0.5)).double().train()
    draw = torch.Generator().manual_seed(0)
    words = torch.randint(3, 60, (8, 6), generator=draw).tolist()
    samples = [{"input_ids": word[: 4 + n % 3], "labels": word[: 4 + n % 3]} for n, word in enumerate(words)]
    return model, [Task("a", samples[:4], batch_size=3), Task("b", samples[4:], loss="mean")]


def state_of(model: nn.Module) -> dict[str, bytes]:
    return {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_quadratic_losses(batch_size: int) -> None:
    model, tasks, lr = Point(), quadratic_tasks(batch_size), 0.1
    result = transfer(model, tasks, lr=lr)
    halves = split_by_group({task.name: task.groups() for task in tasks})
    w = model.w.detach().clone()
    assert result.tasks == ("a", "b", "c")
    for i, stepped in enumerate(tasks):
        step = lr * loss_and_gradient(stepped, halves[stepped.name][0], w)[1]
        for j, measured in enumerate(tasks):
            loss, gradient = loss_and_gradient(measured, halves[measured.name][1], w)
            after, _ = loss_and_gradient(measured, halves[measured.name][1], w - step)
            assert result.loss[j].item() == pytest.approx(loss, rel=1e-14)
            assert result.first_order[i, j].item() == pytest.approx((step @ gradient).item() / loss, rel=1e-13)
            assert result.look_ahead[i, j].item() == pytest.approx(1 - after / loss, rel=1e-12)
    assert (result.look_ahead < 0).any()
    assert (result.look_ahead > 0).any()


def test_first_order_is_off_by_the_square_of_the_step() -> None:
    model, tasks = sentences()
    large, small = (transfer(model, tasks, lr=lr) for lr in (1e-5, 1e-6))
    error = large.first_order - large.look_ahead
    # Against the largest of the four: a pair of tasks may happen to have next to none.
    grown = 100 * (small.first_order - small.look_ahead)
    torch.testing.assert_close(error, grown, rtol=0, atol=0.02 * error.abs().max().item())
    assert 0 < error.abs().max() < 0.05 * large.look_ahead.abs().max()


def test_no_trace() -> None:
    model, tasks = sentences()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5) if parameter.requires_grad else None
    before, modes = state_of(model), [module.training for module in model.modules()]
    torch.manual_seed(0)
    random.seed(0)
    expected = (torch.rand(()).item(), random.random())
    torch.manual_seed(0)
    random.seed(0)
    inspect.unwrap(transfer)(model, tasks, lr=0.1)  # beartype, which checks calls in tests, draws random numbers
    assert (torch.rand(()).item(), random.random()) == expected
    assert state_of(model) == before
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None or p.grad.eq(0.5).all() for p in model.parameters())
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


def test_weights_are_back_after_an_error() -> None:
    model = Point()
    before = state_of(model)

    def fails_elsewhere(inner: nn.Module, batch: Any) -> Tensor:
        if not torch.equal(inner.w.detach(), torch.tensor([1.0, -2.0]).double()):
            raise KeyError("elsewhere")
        return quadratic(inner, batch)

    tasks = [Task(task.name, task.samples, loss=fails_elsewhere) for task in quadratic_tasks()]
    with pytest.raises(KeyError, match="elsewhere"):
        transfer(model, tasks, lr=0.1)
    assert state_of(model) == before


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_preconditioned_as_adam_does(kind: type[torch.optim.Adam], amsgrad: bool) -> None:
    model, tasks, lr = Point(), quadratic_tasks(), 0.1
    optimizer = kind(model.parameters(), lr=0.3, eps=0.01, betas=(0.9, 0.99), amsgrad=amsgrad)
    gradients = [torch.tensor(values).double() for values in ([1.0, -4.0], [0.5, 2.0])]
    for gradient in gradients:
        model.w.grad, model.unused.grad = gradient, torch.ones(1).double()
        optimizer.step()
    seconds = [0.01 * gradients[0] ** 2]
    seconds.append(0.99 * seconds[0] + 0.01 * gradients[1] ** 2)
    second = torch.maximum(*seconds) if amsgrad else seconds[1]
    preconditioner = (second / (1 - 0.99**2)).sqrt() + 0.01

    result = transfer(model, tasks, lr=lr, optimizer=optimizer)

    halves = split_by_group({task.name: task.groups() for task in tasks})
    w = model.w.detach().clone()
    step = lr * loss_and_gradient(tasks[0], halves["a"][0], w)[1] / preconditioner
    loss, gradient = loss_and_gradient(tasks[1], halves["b"][1], w)
    after, _ = loss_and_gradient(tasks[1], halves["b"][1], w - step)
    assert result.first_order[0, 1].item() == pytest.approx((step @ gradient).item() / loss, rel=1e-12)
    assert result.look_ahead[0, 1].item() == pytest.approx(1 - after / loss, rel=1e-11)


def test_a_task_does_not_help_itself_by_its_noise() -> None:
    model = Point()
    draw = torch.Generator().manual_seed(0)

    def noise(inner: nn.Module, batch: Any) -> Tensor:  # a gradient that is noise, and a loss of about 1
        return 1 + (inner.w - inner.w.detach()) @ batch["noise"].T

    own = []
    for _ in range(100):
        samples = [{"noise": torch.randn(2, generator=draw).double()} for _ in range(8)]
        own.append(transfer(model, [Task("noise", samples, loss=noise)], lr=0.1).first_order.item())
    mean, error = torch.tensor(own).mean().item(), torch.tensor(own).std().item() / math.sqrt(100)
    assert abs(mean) < 3 * error  # on the same samples it would be 0.1 · 2/4 = 0.05
    assert error < 0.01


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float64, (1.0, 1e-10)), (torch.bfloat16, (0.0, 0.01))], ids=str)
def test_steps_that_the_format_does_not_keep(dtype: torch.dtype, kept: tuple[float, float]) -> None:
    result = transfer(Point(dtype), quadratic_tasks(), lr=1e-5)
    assert result.step_kept.tolist() == pytest.approx([kept[0]] * 3, abs=kept[1])


def frozen() -> nn.Module:
    return Point().requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (Point(), {"tasks": []}, "Expected at least one task, got none."),
        (Point(), {"lr": 0.0}, "Expected a positive step size lr, got 0.0."),
        (Point(), {"lr": math.nan}, "Expected a positive step size lr, got nan."),
        (
            Point(),
            {"optimizer": "lion"},
            "Expected optimizer 'sgd' or a torch.optim.Adam or AdamW, got 'lion'. Pass 'sgd' ",
        ),
        (
            model := Point(),
            {"optimizer": torch.optim.Adam(model.parameters())},
            "Expected an optimizer that has stepped on all trainable parameters, got none of its moments for parameter "
            "0 (2,). Let it step once, or pass 'sgd'.",
        ),
        (frozen(), {}, "Expected a model with trainable parameters, got one whose parameters are all frozen."),
        (
            Point(),
            {"tasks": [Task("one", quadratic_tasks()[0].samples, loss=quadratic, group=["x"] * 4)]},
            "Task 'one': expected samples in at least two groups, ",
        ),
        (
            Point(),
            {"tasks": [Task("nan", [{"x": math.nan}] * 2, loss=lambda model, batch: model.w[0] * batch["x"])]},
            "Task 'nan': expected a finite loss other than zero, of which to take a share, got nan.",
        ),
        (
            Point(),
            {"tasks": [Task("zero", [{"x": 0.0}] * 2, loss=lambda model, batch: model.w[0] * batch["x"])]},
            "Task 'zero': expected a finite loss other than zero, of which to take a share, got 0.0.",
        ),
    ],
    ids=["no task", "no step", "nan", "optimizer", "not stepped", "frozen", "one group", "nan loss", "zero loss"],
)
def test_refused(model: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        transfer(model, **{"tasks": quadratic_tasks(), "lr": 0.1, **arguments})
