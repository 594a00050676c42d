"""A projected step is the optimizer's step times the explicit projector, and nothing else of the training changes."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dynamics.intervention import projection
from dynamics.intervention.projection import StepProjection
from probes import Task
from tests.runs import VOCABULARY, lora_llama, random_states

SAMPLES, K = 12, 3


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().sum(-1) / 2


def rows(seed: int, count: int = SAMPLES, inputs: int = 5, outputs: int = 2) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(count, size, generator=generator, dtype=torch.float64) for size in (inputs, outputs))
    return [{"x": one, "y": other} for one, other in zip(x, y, strict=True)]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 2)).double()


def tasks() -> list[Task]:
    return [Task("a", rows(1)[:8], loss=squares, batch_size=3), Task("b", rows(1)[8:], loss=squares)]


def texts() -> list[Task]:
    ids = torch.randint(VOCABULARY, (SAMPLES, 6), generator=torch.Generator().manual_seed(1))
    return [Task("text", [{"input_ids": row, "labels": row} for row in ids], batch_size=5)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().double() for tensor in tensors])


def explicit_projector(model: nn.Module, tasks: list[Task], k: int) -> Tensor:
    """Π of all trained parameters, ``(d, d)``, from the gradient of one sample after the other."""
    model.eval()
    losses = [loss for task in tasks for batch in task.batches() for loss in task.losses(model, batch)]
    gradients = torch.stack(
        [flat(list(torch.autograd.grad(loss, trained(model), retain_graph=True))) for loss in losses]
    )
    leading = torch.linalg.svd(gradients).Vh[:k]
    return leading.mT @ leading


def projected(model: nn.Module, change: Callable[[], None], keep: str, k: int = K, given: list[Task] | None = None):
    """Return the step that remains of a change of a model, and the captured share; the model is set back."""
    before = [parameter.detach().clone() for parameter in trained(model)]
    steps = StepProjection(given or tasks(), keep, k=k)
    steps.begin(model)
    change()
    share = steps.end()
    step = flat(trained(model)) - flat(before)
    with torch.no_grad():
        for parameter, value in zip(trained(model), before, strict=True):
            parameter.copy_(value)
    return step, share


def noise(model: nn.Module) -> Callable[[], None]:
    def change() -> None:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in trained(model):
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)

    return change


# ---- the projection ----


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (network(), tasks()),
        (lora_llama(lora_dropout=0.0, init_lora_weights=False).double(), texts()),
        (lora_llama(lora_dropout=0.0, init_lora_weights=False, modules_to_save=["lm_head"]).double(), texts()),
    ],
    ids=["dense", "factors", "both"],
)
def test_it_is_the_explicit_projector(model: nn.Module, given: list[Task]) -> None:
    projector = explicit_projector(model, given, K)
    full, _ = projected(model, noise(model), "full", given=given)
    on, share = projected(model, noise(model), "on", given=given)
    off, same_share = projected(model, noise(model), "off", given=given)
    torch.testing.assert_close(on, projector @ full, rtol=0, atol=1e-10 * float(full.norm()))
    torch.testing.assert_close(on + off, full, rtol=0, atol=1e-14)
    assert share == same_share == pytest.approx(float(on.square().sum() / full.square().sum()), rel=1e-10)
    assert 1e-4 < share < 0.5


def test_it_is_the_explicit_projector_in_single_precision() -> None:
    model = lora_llama(lora_dropout=0.0, init_lora_weights=False)
    full, _ = projected(model, noise(model), "full", given=texts())
    on, _ = projected(model, noise(model), "on", given=texts())
    expected = explicit_projector(model.double(), texts(), K) @ full
    assert (on - expected).norm() < 1e-4 * expected.norm()


def test_with_all_directions_a_step_of_gradients_is_kept_whole() -> None:
    """δ in the span of the samples' gradients: Πδ = δ, and nothing is left without it."""
    model = network()

    def change() -> None:
        loss = sum(task.losses(model, batch).sum() for task in tasks() for batch in task.batches())
        for parameter, gradient in zip(trained(model), torch.autograd.grad(loss, trained(model)), strict=True):
            parameter.data -= 0.01 * gradient

    full, _ = projected(model, change, "full", SAMPLES)
    on, share = projected(model, change, "on", SAMPLES)
    off, _ = projected(model, change, "off", SAMPLES)
    torch.testing.assert_close(on, full, rtol=0, atol=1e-9 * float(full.norm()))
    assert off.norm() < 1e-9 * full.norm()
    assert share == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_there_are_no_more_directions_than_gradients_span(dtype: torch.dtype) -> None:
    """Eigenvalues that are rounding give no direction: with five inputs there are five."""
    model = nn.Linear(5, 1, bias=False).to(dtype)
    steps = StepProjection([Task("a", rows(1, outputs=1), loss=_in(dtype))], "on", k=SAMPLES)
    steps.begin(model)
    assert steps.directions is not None
    (part,) = steps.directions.rows
    assert len(part) == 5
    torch.testing.assert_close(part @ part.mT, torch.eye(5, dtype=dtype))


def _in(dtype: torch.dtype) -> Callable[[nn.Module, dict[str, Tensor]], Tensor]:
    return lambda model, batch: squares(model, {name: value.to(dtype) for name, value in batch.items()})


# ---- known optimizers ----

SIZES = (3.0, 2.0, 1.0, 0.5)


def axes() -> list[Task]:
    """Samples whose gradients lie along the axes, one each: the Fisher is diag(SIZES²)/4 wherever the weights are."""
    samples = [{"x": size * row} for size, row in zip(SIZES, torch.eye(4, dtype=torch.float64), strict=True)]
    return [Task("axes", samples, loss=lambda model, batch: model(batch["x"])[:, 0])]


def quadratic(model: nn.Module) -> Tensor:
    target = torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    return ((model.weight[0] - target).square() * torch.tensor(SIZES, dtype=torch.float64)).sum() / 2


def trained_with(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], keep: str, steps: int = 7) -> Tensor:
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    chosen, projections = optimizer([model.weight]), StepProjection(axes(), keep, k=2, refresh=3)
    for _ in range(steps):
        quadratic(model).backward()
        projections.begin(model)
        chosen.step()
        projections.end()
        chosen.zero_grad()
    return model.weight.detach()[0]


@pytest.mark.parametrize("keep", ["on", "off"])
def test_sgd_with_momentum_and_decay_is_the_one_written_by_hand(keep: str) -> None:
    """m ← 0.9 m + g with the gradient as it is, w ← w − Π(0.1 m): momentum goes on outside of what is kept."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    weight, momentum = model.weight.detach()[0].clone(), torch.zeros(4, dtype=torch.float64)
    kept = torch.tensor([1.0, 1.0, 0.0, 0.0] if keep == "on" else [0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    sizes, target = torch.tensor(SIZES, dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    for _ in range(7):
        momentum = 0.9 * momentum + sizes * (weight - target) + 0.2 * weight
        weight = weight - kept * 0.1 * momentum
    ours = trained_with(lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.2), keep)
    torch.testing.assert_close(ours, weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("keep", ["on", "off"])
def test_adamw_is_the_one_written_by_hand(keep: str) -> None:
    """The decoupled decay is part of the step."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    weight = model.weight.detach()[0].clone()
    first = second = torch.zeros(4, dtype=torch.float64)
    kept = torch.tensor([1.0, 1.0, 0.0, 0.0] if keep == "on" else [0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    sizes, target = torch.tensor(SIZES, dtype=torch.float64), torch.tensor([1.0, -2.0, 3.0, -4.0], dtype=torch.float64)
    for step in range(1, 8):
        gradient = sizes * (weight - target)
        first, second = 0.9 * first + 0.1 * gradient, 0.99 * second + 0.01 * gradient**2
        moved = (first / (1 - 0.9**step)) / ((second / (1 - 0.99**step)).sqrt() + 1e-8)
        weight = weight - kept * 0.1 * (moved + 0.3 * weight)
    ours = trained_with(lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.99), weight_decay=0.3), keep)
    torch.testing.assert_close(ours, weight, rtol=1e-10, atol=1e-12)


def test_parameter_groups_have_their_own_rates() -> None:
    model = network()
    loss = sum(task.losses(model, batch).sum() for task in tasks() for batch in task.batches())
    gradients = torch.autograd.grad(loss, trained(model))
    rates = [0.01] * 3 + [0.1] * (len(gradients) - 3)
    groups = [{"params": trained(model)[:3], "lr": 0.01}, {"params": trained(model)[3:], "lr": 0.1}]

    def change() -> None:
        for parameter, gradient in zip(trained(model), gradients, strict=True):
            parameter.grad = gradient.clone()
        torch.optim.SGD(groups).step()

    expected = explicit_projector(model, tasks(), K) @ flat(
        [-rate * gradient for rate, gradient in zip(rates, gradients, strict=True)]
    )
    on, _ = projected(model, change, "on")
    torch.testing.assert_close(on, expected, rtol=0, atol=1e-12)


def test_an_optimizer_may_step_within_the_backward_pass() -> None:
    """As LOMO does, parameter by parameter: no gradient is left when the optimizer's own step comes."""
    model = network()
    loss = sum(task.losses(model, batch).sum() for task in tasks() for batch in task.batches())
    gradients = torch.autograd.grad(loss, trained(model))

    def change() -> None:
        def step(parameter: Tensor) -> None:
            parameter.data -= 0.1 * parameter.grad
            parameter.grad = None

        handles = [parameter.register_post_accumulate_grad_hook(step) for parameter in trained(model)]
        sum(task.losses(model, batch).sum() for task in tasks() for batch in task.batches()).backward()
        for handle in handles:
            handle.remove()

    on, _ = projected(model, change, "on")
    expected = explicit_projector(model, tasks(), K) @ flat([-0.1 * gradient for gradient in gradients])
    torch.testing.assert_close(on, expected, rtol=0, atol=1e-12)


# ---- when directions are estimated ----


@pytest.fixture
def estimated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many parameters the directions of each estimate have."""
    counts, actual = [], projection.estimated_directions

    def counted(*arguments):
        directions = actual(*arguments)
        counts.append(len(directions.parameters))
        return directions

    monkeypatch.setattr(projection, "estimated_directions", counted)
    return counts


def test_directions_are_estimated_at_the_first_step_and_at_every_refresh(estimated: list[int]) -> None:
    model, steps = network(), StepProjection(tasks(), "on", k=K, refresh=3)
    seen = []
    for _ in range(7):
        steps.begin(model)
        steps.end()
        seen.append(len(estimated))
    assert seen == [1, 1, 1, 2, 2, 2, 3]


def test_a_step_in_the_middle_of_a_training_is_counted_as_it_is(estimated: list[int]) -> None:
    """As when a training resumes at step 4: at once, and then at the multiples."""
    model, steps = network(), StepProjection(tasks(), "on", k=K, refresh=3)
    seen = []
    for step in (4, 5, 6, 7):
        steps.begin(model, step)
        seen.append(len(estimated))
    assert seen == [1, 1, 2, 2]


def test_what_is_frozen_or_unfrozen_is_followed(estimated: list[int]) -> None:
    model, steps = network(), StepProjection(tasks(), "on", k=K, refresh=100)
    model[3].requires_grad_(False)
    frozen = model[3].weight.detach().clone()
    steps.begin(model)
    noise(model)()
    steps.end()
    assert torch.equal(model[3].weight, frozen)
    model[3].requires_grad_(True)
    projector = explicit_projector(model, tasks(), K)
    before = flat(trained(model))
    steps.begin(model)
    noise(model)()
    full = flat(trained(model)) - before
    steps.end()
    assert estimated == [4, 6]
    torch.testing.assert_close(flat(trained(model)) - before, projector @ full, rtol=0, atol=1e-10)


# ---- what is left alone ----


def test_estimating_leaves_random_states_modes_and_gradients() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 2)).double().train()
    model[0].eval()
    squares(model, {"x": torch.ones(3, 5).double(), "y": torch.ones(3, 2).double()}).sum().backward()
    states, gradients = random_states(), [p.grad.clone() for p in model.parameters()]
    weights = [p.detach().clone() for p in model.parameters()]
    StepProjection(tasks(), "on", k=K).begin(model)
    assert random_states() == states
    assert [module.training for module in model.modules()] == [True, False, True, True]
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(model.parameters(), gradients, strict=True))
    assert all(torch.equal(p, weight) for p, weight in zip(model.parameters(), weights, strict=True))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("keep", ["full", "on", "off"])
def test_a_step_that_was_not_taken_changes_no_bit(keep: str) -> None:
    """As a loss scaler skips it."""
    model = network().float()
    before = [p.detach().clone() for p in model.parameters()]
    steps = StepProjection([Task("a", rows(1), loss=_in(torch.float32))], keep, k=K)
    steps.begin(model)
    assert np.isnan(steps.end())
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((tasks(), "in"), {}, "Expected 'on' (keep only the part in the leading directions), 'off' (remove it) or"),
        ((tasks(), "on"), {"k": 0}, "Expected k between 1 and the number of probe samples, 12, got 0."),
        ((tasks(), "on"), {"k": 13}, "Expected k between 1 and the number of probe samples, 12, got 13."),
        ((tasks(), "on"), {"k": 3, "refresh": 0}, "Expected to estimate directions again after at least 1 step"),
        (([], "on"), {}, "Expected at least one task, got none."),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StepProjection(*arguments, **options)


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="got one in which none requires a gradient"):
        StepProjection(tasks(), "on", k=K).begin(network().requires_grad_(False))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got {dtype}: a projected step is smaller than its rounding")):
        StepProjection(tasks(), "on", k=K).begin(network().to(dtype))


def test_split_parameters_are_refused() -> None:
    model = network()
    model[0].weight.ds_id = 0  # as DeepSpeed ZeRO-3 marks them
    message = "those of FSDP or DeepSpeed, which are split. Train with DistributedDataParallel"
    with pytest.raises(ValueError, match=re.escape(message)):
        StepProjection(tasks(), "on", k=K).begin(model)


def test_a_loss_that_differs_from_pass_to_pass_is_refused() -> None:
    calls = iter(range(1, 100))
    given = [Task("a", rows(1), loss=lambda model, batch: next(calls) * squares(model, batch))]
    with pytest.raises(ValueError, match="Expected the same gradients of the probe samples in two passes"):
        StepProjection(given, "on", k=K).begin(network())


def test_gradients_of_zero_are_refused() -> None:
    given = [Task("a", rows(1), loss=lambda model, batch: 0 * squares(model, batch))]
    with pytest.raises(ValueError, match="got only gradients of zero: no direction leads"):
        StepProjection(given, "on", k=K).begin(network())
