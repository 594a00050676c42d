"""Critical steps are those of quadratics, found with few passes; what cannot be told has no number, but a reason."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import dynamics
from dynamics import schema
from dynamics.fisher.samples import SampleGroups
from dynamics.intervention import sharpness
from dynamics.intervention.findings import sharpness_findings
from dynamics.intervention.sharpness import Critical, Search
from probes import LowRankMatrix, Task
from tests.dynamics.intervention.quadratics import edge_of_stability

DIMENSION = 6


def point(start: Tensor) -> nn.Module:
    """A model whose output is its weights."""
    layer = nn.Linear(1, len(start), bias=False).to(start.dtype)
    layer.weight.data = start[:, None].clone()
    return layer


def bowl(model: nn.Module, batch: Any) -> Tensor:
    """½(θ − c)ᵀH(θ − c) of each sample."""
    apart = model(batch["x"].to(next(model.parameters()).dtype)) - batch["centre"]
    return 0.5 * torch.einsum("nd,nde,ne->n", apart, batch["hessian"], apart)


def rotated(seed: int, low: float = 0.0, high: float = 2.0) -> Tensor:
    """A Hessian of known spectrum in random directions."""
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=generator, dtype=torch.float64))
    return turn * torch.logspace(low, high, DIMENSION, dtype=torch.float64) @ turn.mT


def quadratic(name: str, seed: int, samples: int = 16, spread: float = 0.0, hessian: Tensor | None = None) -> Task:
    """Samples with one Hessian and centres about 0."""
    generator = torch.Generator().manual_seed(seed)
    hessian = rotated(seed) if hessian is None else hessian
    centres = spread * torch.randn(samples, DIMENSION, generator=generator, dtype=torch.float64)
    rows = [{"x": torch.ones(1), "centre": c, "hessian": hessian, "group": n // 2} for n, c in enumerate(centres)]
    return Task(name, rows, loss=bowl, group="group", batch_size=5)


def mean_of(task: Task, key: str) -> Tensor:
    return torch.stack([row[key] for row in task.samples]).mean(0)


def gradient(task: Task, theta: Tensor) -> Tensor:
    return mean_of(task, "hessian") @ (theta - mean_of(task, "centre"))


def drawn(seed: int) -> Tensor:
    return torch.randn(DIMENSION, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def of(result: xr.Dataset, name: str, task: str = "all", task_: str | None = None) -> Any:
    at = result[name].isel(step=0).sel(task=task)
    return (at if task_ is None else at.sel(task_=task_)).item()


@pytest.mark.parametrize("seed", range(8))
def test_rotated_quadratics_have_their_curvature_along_any_step(seed: int) -> None:
    task, theta, lr = quadratic("bowl", seed, spread=0.1), drawn(seed + 100), 0.03
    slope = gradient(task, theta)
    towards = slope + 0.3 * slope.norm() * drawn(seed + 200)
    towards = towards if towards @ slope > 0 else -towards
    result = dynamics.critical_sharpness(point(theta), [task], {"weight": -lr * towards[:, None]}, lr=lr)
    curvature = towards @ mean_of(task, "hessian") @ towards / (towards @ slope)
    assert of(result, "critical_sharpness") == pytest.approx(curvature.item(), rel=1e-9)
    assert of(result, "critical_step") == pytest.approx(2 / (lr * curvature.item()), rel=1e-9)


def test_by_default_the_step_is_down_the_gradient_of_all_samples() -> None:
    tasks, theta = [quadratic("a", 1, 16), quadratic("b", 2, 8)], drawn(3)
    result = dynamics.critical_sharpness(point(theta), tasks, lr=0.1)
    pooled = (2 * gradient(tasks[0], theta) + gradient(tasks[1], theta)) / 3
    for task in tasks:
        curvature = pooled @ mean_of(task, "hessian") @ pooled / (pooled @ gradient(task, theta))
        assert of(result, "critical_sharpness", task.name) == pytest.approx(curvature.item(), rel=1e-9)
    hessian = (2 * mean_of(tasks[0], "hessian") + mean_of(tasks[1], "hessian")) / 3
    assert of(result, "critical_sharpness") == pytest.approx((pooled @ hessian @ pooled / (pooled @ pooled)).item())
    assert result.attrs["direction"] == "gradient"


def test_the_relative_table_has_each_tasks_curvature_along_each_gradient() -> None:
    theta = drawn(5)
    tasks = [quadratic("a", 1), quadratic("b", 2), quadratic("against", 3, hessian=torch.eye(DIMENSION).double())]
    for row in tasks[2].samples:
        row["centre"] += 2 * theta  # its gradient is −θ: against those of the others
    result = dynamics.critical_sharpness(point(theta), tasks, {"weight": -theta[:, None]})
    pooled = sum(gradient(task, theta) for task in tasks) / 3
    for name, g in [("all", pooled), *((task.name, gradient(task, theta)) for task in tasks)]:
        for other in tasks:
            found = of(result, "relative_sharpness", name, other.name)
            slope = (g @ gradient(other, theta)).item()
            if slope > 0:
                curvature = (g @ mean_of(other, "hessian") @ g).item() / slope
                assert found == pytest.approx(curvature, rel=1e-9)
            else:
                assert math.isnan(found)
                assert of(result, "relative_reason", name, other.name) == sharpness.AT_ONCE
    assert of(result, "relative_reason", "a", "against") == sharpness.AT_ONCE
    assert of(result, "relative_reason", "a", "a") == ""


@pytest.mark.parametrize("direction", [None, {"weight": -drawn(5)[:, None]}])
def test_of_a_single_task_the_table_has_one_number(direction: dict[str, Tensor] | None) -> None:
    task, theta = quadratic("bowl", 4), drawn(5)
    result = dynamics.critical_sharpness(point(theta), [task], direction, lr=0.2)
    g = gradient(task, theta)
    curvature = (g @ mean_of(task, "hessian") @ g / (g @ g)).item()
    assert of(result, "relative_sharpness", "all", "bowl") == pytest.approx(curvature, rel=1e-9)
    assert of(result, "relative_sharpness", "bowl", "bowl") == pytest.approx(curvature, rel=1e-9)


def parabola(edge: float, samples: int = 6) -> Callable[[int], np.ndarray]:
    """Differences of a loss that is lower up to an edge."""
    return lambda n: np.full(samples, (2 ** (n / 16)) ** 2 - edge * 2 ** (n / 16))


def counted(difference: Callable[[int], np.ndarray], start: float, rounding: float = 0.0) -> tuple[Critical, int]:
    search = Search(difference, rounding)
    found = search.critical(start, SampleGroups.of_one_task(np.arange(6)))
    return found, len(search.points)


@pytest.mark.parametrize("factor", [1 / 15, 0.2, 0.5, 0.97, 1.0, 1.03, 2.0, 5.0, 15.0])
@pytest.mark.parametrize("edge", [3e-4, 1.0, 77.0])
def test_a_start_within_a_factor_of_15_takes_ten_passes_at_most(factor: float, edge: float) -> None:
    found, passes = counted(parabola(edge), factor * edge)
    assert found.step == pytest.approx(edge, rel=1e-9)
    assert 1 + passes <= 10  # with the one at the start


@pytest.mark.parametrize("edge", [2e-6, 1e-3, 1.0, 4.1])
def test_a_cold_start_takes_29_passes_at_most(edge: float) -> None:
    found, passes = counted(parabola(edge), 1e-6)
    assert found.step == pytest.approx(edge, rel=1e-9)
    assert 1 + passes <= 29


@pytest.mark.parametrize("power", [1.5, 3.0, 6.0])
@pytest.mark.parametrize("edge", [0.02, 1.7])
def test_losses_that_are_no_quadratics_are_within_five_per_cent(power: float, edge: float) -> None:
    """A dense scan is the slow twin."""
    loss = lambda t: (t / edge) ** power - t / edge  # noqa: E731
    scan = edge * np.linspace(0.5, 2.0, 30_001)
    slow = scan[np.argmax(loss(scan) > 0)]
    found, _ = counted(lambda n: np.full(6, loss(2 ** (n / 16))), 1.0)
    assert found.step == pytest.approx(slow, rel=0.05)
    assert found.step == pytest.approx(slow, rel=0.005)  # it is far nearer


def test_passes_are_counted_as_they_are_made() -> None:
    made = []

    def watched(model: nn.Module, batch: Any) -> Tensor:
        made.append(torch.is_grad_enabled())
        return bowl(model, batch)

    task = quadratic("bowl", 4)
    task = Task("bowl", task.samples, loss=watched, group="group", batch_size=16)
    theta = drawn(5)
    result = dynamics.critical_sharpness(point(theta), [task], {"weight": -gradient(task, theta)[:, None] / 30})
    assert made.count(True) == 1  # the gradient of the relative table
    assert made.count(False) == result["passes"].sum() + result["relative_passes"].sum()
    assert of(result, "passes", "bowl") <= 10
    assert of(result, "passes", "all") == 0  # its losses are those of the only task
    warm = dynamics.critical_sharpness(point(theta), [task], {"weight": -gradient(task, theta)[:, None]}, start=result)
    assert of(warm, "passes", "bowl") <= 12  # δ is 30 times as long: three doublings more
    again = dynamics.critical_sharpness(point(theta), [task], start=result, relative=True)
    assert of(again, "relative_passes", "bowl", "bowl") == 0


def test_an_earlier_result_is_a_warm_start() -> None:
    tasks, theta = [quadratic("a", 1), quadratic("b", 2)], drawn(3)
    step = {"weight": -theta[:, None] / 3}
    cold = dynamics.critical_sharpness(point(theta), tasks, step, start=1e-4)
    warm = dynamics.critical_sharpness(point(1.05 * theta), tasks, step, start=cold)
    assert (warm["passes"] <= 10).all()
    assert (warm["relative_passes"].sel(task=["a", "b"]) <= 10).all()
    assert (cold["passes"].sel(task=["a", "b"]) > 10).all()
    later = dynamics.critical_sharpness(point(theta), [*tasks, quadratic("new", 3)], step, start=warm)
    assert np.isfinite(later["critical_step"]).all()


def test_groups_that_disagree_leave_it_unresolved() -> None:
    theta, step = drawn(5), {"weight": -0.01 * drawn(5)[:, None]}
    clear = dynamics.critical_sharpness(point(theta), [quadratic("bowl", 4, spread=0.1)], step)
    assert of(clear, "resolved")
    assert of(clear, "reason") == ""
    low, value, high = (of(clear, f"critical_step{end}") for end in ("_low", "", "_high"))
    assert 0 < low < value < high
    assert of(clear, "critical_sharpness_low") == pytest.approx(2 / high)
    assert of(clear, "critical_sharpness_high") == pytest.approx(2 / low)
    noisy = quadratic("bowl", 4, spread=30.0)
    towards = gradient(noisy, theta) @ theta
    step = {"weight": -0.01 * float(torch.sign(towards)) * theta[:, None]}
    unclear = dynamics.critical_sharpness(point(theta), [noisy], step)
    assert of(unclear, "critical_step") > 0
    assert not of(unclear, "resolved")
    assert of(unclear, "reason") == sharpness.UNRESOLVED
    assert math.isnan(of(unclear, "critical_sharpness_high"))


def test_one_group_has_no_interval() -> None:
    task = Task("one", quadratic("one", 4).samples, loss=bowl, group=lambda sample: "same")
    result = dynamics.critical_sharpness(point(drawn(5)), [task])
    assert np.isfinite(of(result, "critical_sharpness"))
    assert not of(result, "resolved")
    assert np.isnan(of(result, "critical_step_high"))


def slope_of(loss: Callable[[Tensor], Tensor]) -> Task:
    """A task whose loss is a function of the first weight."""
    rows = [{"x": torch.ones(1)}] * 4
    return Task("line", rows, loss=lambda model, batch: loss(model(batch["x"].to(model.weight.dtype))[:, 0]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda w: w, sharpness.NEVER),
        (lambda w: w * 0 + 3, sharpness.NEVER),
        (lambda w: -w, sharpness.AT_ONCE),
        (lambda w: 1 + w.square(), sharpness.AT_ONCE),
        (lambda w: w / 0 * 0, sharpness.NOT_FINITE),
    ],
)
def test_a_step_that_is_missing_has_a_reason(loss: Callable[[Tensor], Tensor], reason: str, dtype: torch.dtype) -> None:
    model = point(torch.zeros(1, dtype=dtype))
    step = {"weight": -torch.ones(1, 1, dtype=dtype)}
    result = dynamics.critical_sharpness(model, [slope_of(loss)], step, relative=False)
    for task in ("line", "all"):
        assert of(result, "reason", task) == reason
        assert np.isnan(of(result, "critical_step", task))
        assert np.isnan(of(result, "critical_sharpness", task))
        assert not of(result, "resolved", task)
    assert of(result, "passes", "line") <= 29


def test_a_flat_or_zero_direction_has_a_reason() -> None:
    step = {"weight": torch.zeros(1, 1)}
    result = dynamics.critical_sharpness(point(torch.zeros(1)), [slope_of(torch.square)], step)
    assert of(result, "reason") == sharpness.NO_DIRECTION
    assert of(result, "passes", "line") == 1
    assert of(result, "relative_reason", "line", "line") == sharpness.NO_DIRECTION  # at the minimum


def test_a_loss_that_overflows_ends_the_search_there() -> None:
    """ln(w) + 2 falls until w is 0."""
    result = dynamics.critical_sharpness(
        point(torch.ones(1).double()), [slope_of(torch.log)], {"weight": -torch.full((1, 1), 0.3).double()}
    )
    assert of(result, "critical_step") == pytest.approx(1 / 0.3, rel=0.03)
    assert of(result, "reason") == sharpness.OVERFLOWS
    assert np.isnan(of(result, "critical_step_low"))


def test_a_sample_without_a_finite_loss_costs_its_task_and_the_pooled_number_alone() -> None:
    broken = quadratic("broken", 2)
    broken.samples[3]["centre"][0] = torch.nan
    result = dynamics.critical_sharpness(
        point(drawn(5)), [quadratic("bowl", 4), broken], {"weight": -0.01 * drawn(5)[:, None]}, relative=False
    )
    assert np.isfinite(of(result, "critical_step", "bowl"))
    assert {of(result, "reason", task) for task in ("broken", "all")} == {sharpness.NOT_FINITE}


def test_a_start_in_the_rounding_of_the_loss_finds_the_step() -> None:
    model, task = point(torch.full((1,), 3.0)), slope_of(torch.square)
    result = dynamics.critical_sharpness(model, [task], {"weight": -torch.ones(1, 1)}, start=1e-5)
    assert of(result, "critical_step") == pytest.approx(6.0, rel=1e-4)  # from 3 to −3
    exactly = dynamics.critical_sharpness(model, [task], {"weight": -torch.ones(1, 1)}, start=6.0)
    assert of(exactly, "critical_step") == pytest.approx(6.0, rel=1e-4)


def test_a_model_in_half_precision_keeps_its_weights() -> None:
    theta, task = drawn(5).bfloat16(), quadratic("bowl", 4)
    model, slope = point(theta), gradient(task, drawn(5))
    result = dynamics.critical_sharpness(model, [task], {"weight": -0.02 * slope[:, None]}, relative=False)
    curvature = slope @ mean_of(task, "hessian") @ slope / (slope @ slope)
    assert of(result, "critical_step") == pytest.approx(2 / (0.02 * curvature.item()), rel=0.05)
    assert torch.equal(model.weight[:, 0], theta)


def planted() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model = get_peft_model(layers, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False))
    return model.double()


def fits(samples: int = 12) -> Task:
    generator = torch.Generator().manual_seed(1)
    rows = [
        {
            "x": torch.randn(4, generator=generator, dtype=torch.float64),
            "y": torch.randn(3, generator=generator, dtype=torch.float64),
        }
        for _ in range(samples)
    ]
    return Task("fit", rows, loss=lambda model, batch: (model(batch["x"]) - batch["y"]).square().sum(1))


def test_adapters_move_along_the_gradients_of_their_factors_and_are_left_as_they_were() -> None:
    model, task = planted().train(), fits()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    result = dynamics.critical_sharpness(model, [task], step=7)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert result["step"].values.tolist() == [7]
    # Slow twin: the base's weights moved by s(∇_B A + B ∇_A), by a little less and more than what was found.
    whole = mean_loss(model, task)
    whole.backward()
    for factor in (0.99, 1.01):
        moved = planted()
        for name, own in model.named_modules():
            if hasattr(own, "lora_A"):
                a, b = own.lora_A["default"].weight, own.lora_B["default"].weight
                change = own.scaling["default"] * (b.grad @ a + b @ a.grad).detach()
                moved.get_submodule(name).base_layer.weight.data -= factor * of(result, "critical_step") * change
        assert (mean_loss(moved, task) > whole) == (factor > 1)


def mean_loss(model: nn.Module, task: Task) -> Tensor:
    return torch.cat([task.losses(model, batch) for batch in task.batches()]).mean()


def test_low_rank_steps_are_taken_as_they_are() -> None:
    model, task = planted(), fits()
    name = "0"
    left, right = torch.randn(5, 1).double(), torch.randn(1, 4).double()
    low = dynamics.critical_sharpness(model, [task], {name: LowRankMatrix(left, right)}, relative=False)
    if np.isnan(of(low, "critical_step")):
        left = -left
        low = dynamics.critical_sharpness(model, [task], {name: LowRankMatrix(left, right)}, relative=False)
    dense = dynamics.critical_sharpness(model, [task], {name: left @ right}, relative=False)
    assert of(low, "critical_step") == pytest.approx(of(dense, "critical_step"), rel=1e-9)


def test_it_keeps_the_schema() -> None:
    result = dynamics.critical_sharpness(point(drawn(5)), [quadratic("a", 1), quadratic("b", 2)])
    assert set(result.data_vars) == set(schema.SHARPNESS)
    for name, variable in schema.SHARPNESS.items():
        assert result[name].dims == variable.dims
        assert result[name].attrs == variable.attributes
    assert result["task"].values.tolist() == ["all", "a", "b"]
    assert result["task_"].values.tolist() == ["a", "b"]
    assert np.isnan(result["learning_rate"].item())


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"lr": 0.0}, r"Expected a positive learning rate as lr, got 0.0\."),
        ({"start": -1.0}, r"Expected a positive step to start from, got -1.0\."),
        ({"direction": {"weight": torch.full((6, 1), torch.nan)}}, "Expected a finite direction.*'weight'"),
        ({"direction": {"other": torch.ones(6, 1)}}, "Expected changes of matrices"),
    ],
)
def test_bad_choices_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dynamics.critical_sharpness(point(drawn(5)), [quadratic("bowl", 4)], **how)


def test_frozen_models_and_no_tasks_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        dynamics.critical_sharpness(point(drawn(5)), [])
    with pytest.raises(ValueError, match="parameters are all frozen"):
        dynamics.critical_sharpness(point(drawn(5)).requires_grad_(False), [quadratic("bowl", 4)])


def test_gradient_descent_sharpens_until_the_edge_of_stability() -> None:
    """λ_c η rises to 2 and stays there, while the loss goes on to fall."""
    results = edge_of_stability(0.3, 500)
    whole = results.sel(task="all")
    edge = 0.3 * whole["critical_sharpness"]
    assert edge.sel(step=slice(20, 160)).max() < 0.5
    assert (whole["critical_sharpness"] < 0.5 * whole["eigenvalue"]).sel(step=slice(20, 160)).all()
    assert edge.sel(step=slice(400, 500)).median() == pytest.approx(2.0, abs=0.05)
    assert [finding.step for finding in sharpness_findings(results)] == [500]
    assert sharpness_findings(results.sel(step=slice(0, 160))) == []
    assert whole["loss"].sel(step=500) < 0.5 * whole["loss"].sel(step=160)
