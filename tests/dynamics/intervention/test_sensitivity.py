"""Directions that the loss needs are found, the check is of other groups, and what is missing says why."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import dynamics
from dynamics import schema
from dynamics.intervention.sensitivity import kept_by_effect
from probes import Task, watched_matrices
from tests.runs import VOCABULARY, lora_llama


def planted(dtype: torch.dtype = torch.float64) -> nn.Module:
    """One adapted layer: a direction of σ = 10 that no input meets, one of σ = 1 that targets ask for twice."""
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=2, lora_alpha=2, target_modules=["0"]))
    factors = {name: p for name, p in model.named_parameters() if "lora_" in name}
    (left,), (right,) = ([p for name, p in factors.items() if side in name] for side in ("lora_B", "lora_A"))
    left.data = torch.eye(3)[:, :2] * torch.tensor([10.0, 1.0])
    right.data = torch.eye(4)[:2]
    return model.to(dtype).eval()


def squares(model: nn.Module, batch: Any) -> Tensor:
    residual = model(batch["x"].to(next(model.parameters()).dtype)) - batch["target"]
    return 0.5 * residual.square().sum(1)


def regression(name: str = "asked", twice: float = 2.0, samples: int = 16, seed: int = 0) -> Task:
    """Inputs without a component along v₁, and targets with so many times the adapter's second direction."""
    base = planted()
    draw = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 4, generator=draw, dtype=torch.float64)
    inputs[:, 0] = 0.0
    with torch.no_grad(), base.disable_adapter():
        targets = base(inputs)
    targets[:, 1] += twice * inputs[:, 1]
    rows = [{"x": x, "target": t, "group": n // 2} for n, (x, t) in enumerate(zip(inputs, targets, strict=True))]
    return Task(name, rows, loss=squares, group="group", batch_size=5)


def words(name: str, seed: int, samples: int = 12) -> Task:
    rows = torch.randint(VOCABULARY, (samples, 8), generator=torch.Generator().manual_seed(seed))
    return Task(name, [{"input_ids": row, "labels": row} for row in rows], group=[n // 2 for n in range(samples)])


def trained_llama() -> nn.Module:
    """An adapter that has been somewhere: its B is not zero."""
    model = lora_llama()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def result() -> xr.Dataset:
    return dynamics.sensitivity(trained_llama(), [words("a", 1), words("b", 2, 8)], step=30)


def test_a_small_direction_that_matters_is_found_by_effect_and_missed_by_energy() -> None:
    result = dynamics.sensitivity(planted(), [regression()]).isel(step=0, matrix=0)
    assert result["singular_value"].values == pytest.approx([10.0, 1.0])
    slopes = result["loss_slope"].sel(task="asked").values
    second = np.mean([row["x"][1].item() ** 2 for row in regression().samples])
    assert slopes == pytest.approx([0.0, -second], abs=1e-12)  # ∂/∂σ of ½(σ x₂ − 2 x₂)² at σ = 1
    assert result["kept_by_effect"].values.tolist() == [False, True]
    assert (result["rank_by_effect"], result["rank_by_energy"]) == (1, 1)
    effect = result["truncation_effect"].sel(task="asked").to_series()
    # Without the second direction the residual is 2 x₂ instead of x₂: ½(1 − 4) x₂² a sample.
    lost = -1.5 * second
    assert effect[["effect", "sigma_tail"]].values == pytest.approx([0.0, 0.0], abs=1e-12)
    assert effect[["sigma_top", "energy", "none"]].values == pytest.approx([lost] * 3)
    assert (result["truncation_effect_high"].sel(truncation=["energy", "none"]) < 0).all()


def test_a_direction_that_harms_is_removed_and_removal_helps() -> None:
    """Targets ask for the opposite: the loss falls without the direction, and the truncation's effect is positive."""
    result = dynamics.sensitivity(planted(), [regression(twice=-1.0)]).isel(step=0, matrix=0)
    assert result["loss_slope"].sel(task="all").values[1] > 0
    assert result["rank_by_effect"] == 0
    assert result["truncation_effect"].sel(task="all", truncation="effect") > 0
    predicted = result["predicted_truncation_effect"].sel(task="all", truncation="effect")
    slope = result["loss_slope"].sel(task="all").values[1]
    assert predicted.item() == pytest.approx(slope)  # σ g, σ = 1


def test_pooled_slopes_are_means_over_all_samples(result: xr.Dataset) -> None:
    slopes, loss = result["loss_slope"], result["loss"]
    expected = (12 * slopes.sel(task="a") + 8 * slopes.sel(task="b")) / 20
    np.testing.assert_allclose(slopes.sel(task="all"), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(loss.sel(task="all"), (12 * loss.sel(task="a") + 8 * loss.sel(task="b")) / 20)
    assert result["groups"].values.tolist() == [[6, 6, 4]]  # groups of one name in two tasks are one group


def test_it_keeps_the_schema(result: xr.Dataset) -> None:
    assert set(result.data_vars) == set(schema.SENSITIVITY)
    for name, variable in schema.SENSITIVITY.items():
        assert result[name].dims == variable.dims
        assert result[name].attrs == variable.attributes
    assert result["step"].values.tolist() == [30]
    assert set(result["matrix"].values) == set(watched_matrices(trained_llama()))
    assert (result["reason"] == "").all()


def test_ranks_are_numbers_of_kept_directions(result: xr.Dataset) -> None:
    assert (result["rank_by_effect"] == result["kept_by_effect"].sum("index")).all()
    assert result["kept_by_effect"].values.any()
    assert not result["kept_by_effect"].values.all()
    effect = -(result["singular_value"] * result["loss_slope"].sel(task="all"))
    positive = effect.clip(min=0)
    kept = positive.where(result["kept_by_effect"], 0.0)
    assert kept.sum() >= 0.99 * positive.sum()
    smallest = effect.where(result["kept_by_effect"]).min()
    assert kept.sum() - smallest < 0.99 * positive.sum()  # one less would not do
    assert smallest > effect.where(~result["kept_by_effect"]).max()


def test_what_is_kept_has_that_many_parameters(result: xr.Dataset) -> None:
    by_energy = (result["rank_by_energy"] * (result["out"] + result["in"])).sum()
    assert result["parameters"].sel(truncation="energy").item() == by_energy
    same = result.sel(truncation=["effect", "sigma_top", "random", "sigma_tail"])
    assert np.ptp(same["parameters"].values) < 1e-9
    assert np.ptp(same["directions"].values) < 1e-9
    assert result["parameters"].sel(truncation="none").item() == 0


def test_without_the_check_its_numbers_are_missing(result: xr.Dataset) -> None:
    alone = dynamics.sensitivity(trained_llama(), [words("a", 1), words("b", 2, 8)], check=False)
    np.testing.assert_allclose(alone["loss_slope"], result["loss_slope"], rtol=1e-4, atol=1e-7)  # other batches
    missing = [name for name in alone.data_vars if "truncation" in alone[name].dims]
    assert "truncation_effect" in missing
    assert all(alone[name].isnull().all() for name in missing)


def test_a_zero_update_has_no_slope_and_says_so() -> None:
    result = dynamics.sensitivity(lora_llama(), [words("a", 1)])
    assert set(result["reason"].values.ravel()) == {"the update is zero"}
    assert result["loss_slope"].isnull().all()
    assert result["rank_by_effect"].isnull().all()
    assert (result["truncation_effect"] == 0).all()


def test_a_frozen_part_is_not_judged_and_stays() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 3)), LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
    )
    model.add_adapter("frozen", LoraConfig(r=1, target_modules=["0"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "frozen"])
    for name, parameter in model.named_parameters():
        if "frozen" in name:
            parameter.requires_grad_(False)
    result = dynamics.sensitivity(model.double(), [regression()])
    assert result["reason"].values.tolist() == [["a frozen adapter is part of the update"]]
    assert result["rank_by_effect"].isnull().all()
    assert (result["truncation_effect"] == 0).all()
    assert (result["directions"] == 2).all()


def test_the_model_is_left_as_it_was() -> None:
    model = trained_llama().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    dynamics.sensitivity(model, [words("a", 1)])
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_progress_counts_samples_of_all_passes() -> None:
    calls: list[tuple[int, int]] = []
    dynamics.sensitivity(planted(), [regression()], draws=2, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (144, 144)  # 16 samples: one pass with gradients, the whole adapter, 5 + 2 truncations
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"share": 0.0}, r"Expected a share in \(0, 1\], got 0.0\."),
        ({"draws": 0}, "Expected at least 1 random truncation"),
        ({"matrices": "nothing"}, "whose name matches 'nothing'"),
    ],
)
def test_bad_choices_are_refused(how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dynamics.sensitivity(planted(), [regression()], **how)


def test_bad_tasks_and_models_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one task"):
        dynamics.sensitivity(planted(), [])
    one_group = Task("one", regression().samples, loss=squares, group=lambda sample: "same")
    with pytest.raises(ValueError, match="at least two groups"):
        dynamics.sensitivity(planted(), [one_group])
    assert np.isfinite(dynamics.sensitivity(planted(), [one_group], check=False)["loss_slope"]).all()
    model = planted()
    next(p for name, p in model.named_parameters() if "lora_A" in name).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="0: Expected finite factors"):
        dynamics.sensitivity(model, [regression()])


@pytest.mark.parametrize("share", [0.5, 0.9, 1.0])
def test_the_fewest_directions_hold_the_share(share: float) -> None:
    generator = np.random.default_rng(0)
    values, slopes = generator.exponential(size=(4, 3)), generator.standard_normal((4, 3))
    values[1, 2] = slopes[1, 2] = np.nan
    kept = kept_by_effect(values, slopes, share)
    effects = sorted(np.maximum(-(values * slopes)[np.isfinite(values)], 0.0), reverse=True)
    fewest = next(n for n in range(12) if sum(effects[:n]) >= share * sum(effects) - 1e-12)
    assert kept.sum() == fewest
    assert (-(values * slopes)[kept]).sum() == pytest.approx(sum(effects[:fewest]))


def test_without_a_positive_effect_nothing_is_kept() -> None:
    assert not kept_by_effect(np.ones((2, 2)), np.ones((2, 2))).any()
    assert not kept_by_effect(np.full((1, 2), np.nan), np.full((1, 2), np.nan)).any()


def test_a_single_task_needs_no_list() -> None:
    model, task = trained_llama(), words("a", 1)
    xr.testing.assert_identical(dynamics.sensitivity(model, task), dynamics.sensitivity(model, [task]))
