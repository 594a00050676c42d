"""Truncated adapters do what adapters with these factors do, and choose on other groups than they are measured on."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from dynamics.intervention.truncations import (
    TRUNCATIONS,
    Adapters,
    Halves,
    TruncationEffects,
    not_truncated,
    truncation_effects,
)
from probes import Task
from probes.singular_directions import low_rank_matrices
from tests.families import FAMILIES

NAMES = ("0", "2")


def adapted() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    config = LoraConfig(r=3, target_modules=list(NAMES), init_lora_weights=False)
    return get_peft_model(layers, config).double().eval()


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["x"]) - batch["target"]).square().sum(1)


def tasks(samples: int = 10) -> list[Task]:
    draw = torch.Generator().manual_seed(1)
    rows = [
        {
            "x": torch.randn(5, generator=draw).double(),
            "target": torch.randn(4, generator=draw).double(),
            "group": n // 2,
        }
        for n in range(2 * samples)
    ]
    parts = {"a": rows[:samples], "b": rows[samples:]}
    return [Task(name, part, loss=squares, group="group", batch_size=3) for name, part in parts.items()]


def every_loss(model: nn.Module) -> np.ndarray:
    with torch.no_grad():
        return torch.cat([task.losses(model, batch) for task in tasks() for batch in task.batches()]).numpy()


def measured(model: nn.Module, chosen: np.ndarray, draws: int = 2, seed: int = 0) -> tuple[Adapters, TruncationEffects]:
    adapters = Adapters.of(low_rank_matrices(model))
    is_cut = np.ones(len(adapters.names), dtype=bool)
    return adapters, truncation_effects(model, Halves.of(tasks()), adapters, chosen, is_cut, draws=draws, seed=seed)


def with_ranks(*ranks: int) -> np.ndarray:
    """The same for both halves: so many leading directions of each matrix."""
    return np.stack([np.arange(3) < np.array(ranks)[:, None]] * 2)


def effect_of(result: TruncationEffects, name: str) -> np.ndarray:
    return result.effect.estimate[TRUNCATIONS.index(name)]


def test_an_adapter_without_any_direction_is_the_base() -> None:
    model = adapted()
    whole = every_loss(model)
    with model.disable_adapter():
        difference = whole - every_loss(model)
    _, result = measured(model, with_ranks(1, 1))
    assert effect_of(result, "none") == pytest.approx(
        [difference.mean(), difference[:10].mean(), difference[10:].mean()]
    )


def test_a_truncated_adapter_is_one_of_fewer_factors() -> None:
    model = adapted()
    adapters, result = measured(model, with_ranks(2, 1))
    whole = every_loss(model)
    for name, rank in zip(NAMES, (2, 1), strict=True):
        u, sigma, v = torch.linalg.svd(low_rank_matrices(model)[name].read().to_dense())
        layer = model.get_submodule(f"base_model.model.{name}")
        scale = layer.scaling["default"]
        layer.lora_B["default"].weight.data[:] = 0.0
        layer.lora_B["default"].weight.data[:, :rank] = u[:, :rank] * sigma[:rank] / scale
        layer.lora_A["default"].weight.data[:rank] = v[:rank]
    difference = whole - every_loss(model)
    assert effect_of(result, "sigma_top")[0] == pytest.approx(difference.mean())
    assert effect_of(result, "effect") == pytest.approx(effect_of(result, "sigma_top"))
    assert adapters.names == list(NAMES)


def test_effects_are_those_of_what_the_other_half_chose() -> None:
    """One half keeps everything, the other nothing: on the samples of the latter nothing changes."""
    model = adapted()
    halves = Halves.of(tasks())
    chosen = np.stack([np.ones((2, 3), dtype=bool), np.zeros((2, 3), dtype=bool)])
    _, result = measured(model, chosen)
    whole = every_loss(model)
    with model.disable_adapter():
        difference = whole - every_loss(model)
    # The second half chose to keep nothing, so only samples of the first are changed.
    expected = difference[halves.places(0)].sum() / 20
    assert effect_of(result, "effect")[0] == pytest.approx(expected)


def test_controls_keep_as_many_directions_of_each_matrix() -> None:
    _, result = measured(adapted(), with_ranks(2, 0), draws=3)
    kept = dict(zip(TRUNCATIONS, result.kept.sum(-1).swapaxes(0, 1), strict=True))
    for name in ("effect", "sigma_top", "random", "sigma_tail"):
        assert kept[name] == pytest.approx(np.array([[2.0, 0.0]] * 2)), name
    tail = result.kept[:, TRUNCATIONS.index("sigma_tail"), 0]
    assert tail.tolist() == [[0.0, 1.0, 1.0]] * 2
    random = result.kept[:, TRUNCATIONS.index("random"), 0]
    assert ((random >= 0) & (random <= 1)).all()


def test_random_truncations_follow_from_the_seed() -> None:
    first, again, other = (measured(adapted(), with_ranks(1, 1), seed=seed)[1] for seed in (0, 0, 1))
    assert (first.kept == again.kept).all()
    assert not (first.kept == other.kept).all()
    assert effect_of(first, "random") == pytest.approx(effect_of(again, "random"), abs=0)


def test_a_matrix_that_is_not_cut_stays_whole() -> None:
    model = adapted()
    adapters = Adapters.of(low_rank_matrices(model))
    is_cut = np.array([True, False])
    result = truncation_effects(model, Halves.of(tasks()), adapters, with_ranks(1, 1), is_cut, draws=1, seed=0)
    assert (result.kept[:, :, 1] == 1).all()
    assert (result.kept[:, TRUNCATIONS.index("none"), 0] == 0).all()


def test_halves_share_no_group_and_miss_no_sample() -> None:
    halves = Halves.of(tasks())
    first, second = halves.places(0), halves.places(1)
    assert sorted([*first, *second]) == list(range(20))
    groups = halves.labels.group
    assert not set(groups[first]) & set(groups[second])
    assert halves.sizes.sum(0).tolist() == [20.0, 10.0, 10.0]
    assert Halves.whole(tasks()).sizes.tolist() == [[20.0, 10.0, 10.0]]


def test_fused_experts_are_not_truncated_and_say_why() -> None:
    family = next(family for family in FAMILIES.values() if family.parameters)
    model = get_peft_model(family.model(), family.lora()).eval()
    adapters = Adapters.of(low_rank_matrices(model))
    reasons = not_truncated(model, adapters, np.ones(len(adapters.names), dtype=bool))
    assert reasons
    assert set(reasons) == {name for name in adapters.names if name.endswith("]")}
    assert all(reason.startswith("not truncated: Expected a matrix that one layer uses") for reason in reasons.values())
    assert not any(module._forward_hooks for module in model.modules())
    assert not not_truncated(adapted(), Adapters.of(low_rank_matrices(adapted())), np.ones(2, dtype=bool))
