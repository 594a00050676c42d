"""Changes are vectors: norms, products and sums of low-rank matrices are those of what they multiply out to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dynamics.intervention.update_vectors import (
    as_matrices,
    energy,
    in_format,
    inner,
    random_change,
    sigma_top,
    weighted_sum,
)
from probes import LowRankMatrix
from tests.matrices import random_lora
from tests.updates import adapted_model, dense_model, trained


def dense(change) -> torch.Tensor:
    return torch.cat(
        [(m.to_dense() if isinstance(m, LowRankMatrix) else m.double()).flatten() for m in change.values()]
    )


@pytest.fixture
def changes():
    one = {
        "a": random_lora(7, 5, 2, seed=0),
        "b": torch.ones(3, dtype=torch.float64),
        "c": random_lora(4, 4, 1, seed=1),
    }
    other = {"a": random_lora(7, 5, 3, seed=2), "b": torch.arange(3.0), "c": torch.ones(4, 4)}
    return one, other


def test_norms_products_and_sums(changes) -> None:
    one, other = changes
    assert energy(one) == pytest.approx(float(dense(one).square().sum()), rel=1e-12)
    assert inner(one, other) == pytest.approx(float(dense(one) @ dense(other)), rel=1e-10)
    assert inner(other, one) == pytest.approx(inner(one, other), rel=1e-12)
    weighted = weighted_sum([(2.0, one), (-0.5, other)])
    torch.testing.assert_close(dense(weighted), 2 * dense(one) - 0.5 * dense(other), rtol=1e-6, atol=1e-6)
    assert isinstance(weighted["a"], LowRankMatrix)
    assert weighted["a"].rank == 5


def test_formats_keep_the_scale() -> None:
    matrix = LowRankMatrix(torch.ones(2, 1), torch.ones(1, 2), 3.0, column_scale=torch.tensor([2.0]))
    converted = in_format(nn.ModuleDict({"a": nn.Linear(2, 2)}), {"a": matrix}, torch.float64)["a"]
    assert isinstance(converted, LowRankMatrix)
    torch.testing.assert_close(converted.to_dense(), matrix.to_dense())


def test_a_sum_is_on_the_device_of_its_first_term() -> None:
    product, dense = LowRankMatrix(torch.ones(2, 1), torch.ones(1, 2)), torch.ones(2, 2)
    away = LowRankMatrix(torch.ones(2, 1, device="meta"), torch.ones(1, 2, device="meta"))
    both = weighted_sum([(1.0, {"a": away}), (1.0, {"a": product})])["a"]
    assert isinstance(both, LowRankMatrix)
    assert (both.left_factor.device.type, both.rank) == ("meta", 2)
    assert weighted_sum([(1.0, {"a": dense.to("meta")}), (1.0, {"a": dense})])["a"].device.type == "meta"


def test_a_change_goes_to_the_devices_of_the_model() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2, device="meta")})
    product = LowRankMatrix(torch.ones(2, 1), torch.ones(1, 2))
    change = {"b.weight": product, "b.bias": torch.ones(2), "a": torch.ones(2, 2)}
    placed = in_format(model, change, torch.float64)
    assert [placed["b.weight"].left_factor.device.type, placed["b.bias"].device.type] == ["meta", "meta"]
    assert placed["a"].device.type == "cpu"
    with pytest.raises(ValueError, match="such as"):
        in_format(model, {"c": torch.ones(1)}, torch.float64)


def test_leading_directions_beyond_the_rank_are_the_matrix() -> None:
    matrix = random_lora(6, 5, 2, seed=3, dtype=torch.float64)
    top = sigma_top({"a": matrix}, 4)["a"]
    assert isinstance(top, LowRankMatrix)
    torch.testing.assert_close(top.to_dense(), matrix.to_dense(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("make", [adapted_model, dense_model])
def test_a_random_direction_is_orthogonal_and_of_norm_one(make) -> None:
    model = make()
    change, _, _ = trained(model, steps=1)
    one, other = (random_change(model, change, "tangent", seed) for seed in (1, 2))
    assert energy(one) == pytest.approx(1, rel=1e-9)
    assert inner(one, change) == pytest.approx(0, abs=1e-9 * energy(change) ** 0.5)
    assert abs(inner(one, other)) < 0.2  # of thousands of dimensions
    assert energy(random_change(model, change, "tangent", 1)) == energy(one)


def test_changes_of_factors_are_changes_of_matrices() -> None:
    model = adapted_model()
    matrices, moved, _ = trained(model)
    converted = as_matrices(model, moved, "factor")
    assert converted.keys() == matrices.keys()
    torch.testing.assert_close(
        dense(converted), dense({name: matrices[name] for name in converted}), rtol=1e-9, atol=1e-14
    )
