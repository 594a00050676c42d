"""Measures of routing from counts, each against its plain formula."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from dynamics import schema
from dynamics.routing.dataset import joined_routing, matrices_by_expert, measure_routing, routing_record

COUNTS = np.array([6.0, 0.0, 2.0, 4.0])


def record(
    step: int = 1, layers: Sequence[str] = ("a.mlp",), counts: np.ndarray = COUNTS, kind: str = "top-k"
) -> xr.Dataset:
    about = {"routing": [kind] * len(layers), "held_in": ["experts"] * len(layers)}
    return routing_record(step, {name: (counts, counts.sum() / 2, 0.5) for name in layers}, about)


def update(names: Sequence[str], norms: Sequence[float], steps: Sequence[int] = (1,)) -> xr.Dataset:
    """The norms of increments, and nothing else that is needed of `/update`."""
    values = np.full((len(steps), 2, len(names)), np.nan)
    values[:, 1] = norms
    return xr.Dataset(
        {"frobenius_norm": (("step", "kind", "matrix"), values)},
        {"step": list(steps), "kind": list(schema.KINDS), "matrix": np.array(names, dtype=str)},
    )


NAMES = [f"a.mlp.experts.{role}[{expert}]" for role in ("up", "down") for expert in range(4)]


def test_the_load_and_what_follows_from_it() -> None:
    routing = measure_routing(record(), update(NAMES, range(8))).isel(step=0, layer=0)
    load = COUNTS / 12
    np.testing.assert_allclose(routing["load"], load)
    assert routing["entropy"] == pytest.approx(stats.entropy(load))
    assert routing["effective_experts"] == pytest.approx(np.exp(stats.entropy(load)))
    assert routing["largest_share"] == 0.5
    assert routing["dead"] == 1
    assert routing["dead_chance"] == pytest.approx(4 * 0.5**6)
    count = stats.binom.isf(0.05 / 4, 6, 0.5)
    assert routing["largest_share_chance"] == pytest.approx(count / 12)
    assert routing["margin"] == 0.5


def test_an_experts_norm_is_that_of_its_matrices_together() -> None:
    routing = measure_routing(record(), update(NAMES, range(8))).isel(step=0, layer=0)
    np.testing.assert_allclose(routing["update_norm"], [np.hypot(n, n + 4) for n in range(4)])
    norms = routing["update_norm"].values
    assert routing["load_update_correlation"] == pytest.approx(stats.spearmanr(COUNTS, norms).statistic)
    assert routing["gradient_norm"].isnull().all()


def test_experts_that_are_not_trained_have_no_norm() -> None:
    routing = measure_routing(record(), update(["a.mlp.gate", NAMES[1]], [1.0, 2.0]))
    np.testing.assert_array_equal(routing["update_norm"].values[0, 0], [np.nan, 2.0, np.nan, np.nan])
    assert routing["load_update_correlation"].isnull().all()


def test_a_matrix_without_any_value_takes_nothing_from_its_experts_norm() -> None:
    names = [*NAMES, "a.mlp.experts.0.w1"]
    routing = measure_routing(record(), update(names, [*range(8), np.nan]))
    np.testing.assert_allclose(routing["update_norm"].values[0, 0], [np.hypot(n, n + 4) for n in range(4)])


def test_soft_routing_has_no_null() -> None:
    routing = measure_routing(record(counts=np.array([0.5, 1.5]), kind="soft"), update(NAMES, range(8)))
    assert routing["largest_share"].values.tolist() == [[0.75]]
    assert routing[["largest_share_chance", "dead_chance"]].isnull().all().to_array().all()


def test_layers_and_experts_of_any_step_are_joined() -> None:
    one, other = record(1, ["a.mlp"]), record(2, ["b.mlp", "a.mlp"], np.array([1.0, 1.0]))
    joined = joined_routing([one, other])
    assert joined is not None
    assert joined["layer"].values.tolist() == ["a.mlp", "b.mlp"]
    assert joined["assigned"].sel(layer="a.mlp").values[0].tolist() == COUNTS.tolist()
    np.testing.assert_array_equal(joined["assigned"].sel(layer="a.mlp").values[1], [1, 1, np.nan, np.nan])
    assert joined["tokens"].sel(layer="b.mlp", step=1).isnull()
    routing = measure_routing(joined, update(NAMES, range(8), [1, 2]))
    assert routing["dead"].sel(layer="a.mlp").values.tolist() == [1, 0]
    assert routing["dead"].sel(layer="b.mlp", step=1).isnull()


def test_no_token_at_all_has_no_load() -> None:
    routing = measure_routing(record(counts=np.zeros(3)), update(NAMES, range(8)))
    names = ["load", "entropy", "largest_share", "largest_share_chance", "dead"]
    assert routing[names].isnull().all().to_array().all()


@pytest.mark.parametrize(
    ("name", "expert"),
    [
        ("a.mlp.experts.gate_up_proj[2]", 2),
        ("a.mlp.experts.1.w1", 1),
        ("a.mlp.experts.expert_3.fc1", 3),
        ("a.mlp.experts.0", 0),
        ("a.mlp.experts.gate_up_proj[2]@second", 2),
        ("a.mlp.experts.4.w1", None),
        ("a.mlp.experts.mlp.w1", None),
        ("a.mlp.experts_2.w[1]", None),
        ("a.mlp.shared_experts.0.w", None),
        ("b.mlp.experts.0.w1", None),
    ],
)
def test_whose_matrix_a_matrix_is(name: str, expert: int | None) -> None:
    assert [found[1] for found in matrices_by_expert(record(), [name])] == ([] if expert is None else [expert])
