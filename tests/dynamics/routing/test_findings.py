"""Dead and overloaded experts are found, and uniform routers are not called either, even if tokens choose in runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import xarray as xr

from dynamics.findings import Finding
from dynamics.routing.dataset import joined_routing, measure_routing, routing_record
from dynamics.routing.findings import DESIGN_EFFECT, STEPS, routing_findings
from tests.dynamics.routing.test_dataset import update

TOKENS, K, EXPERTS, LAYERS = 2048, 2, 8, 4


def routing(counts: np.ndarray, k: float = K) -> xr.Dataset:
    """``/routing`` of ``(step, layer, expert)`` tokens."""
    parts = []
    for step, of_step in enumerate(counts, start=1):
        layers = {f"layers.{row}": (one, float(one.sum() / k), 1.0) for row, one in enumerate(of_step)}
        about = {"routing": ["top-k"] * len(layers), "held_in": ["experts"] * len(layers)}
        parts.append(routing_record(step, layers, about))
    joined = joined_routing(parts)
    assert joined is not None
    return measure_routing(joined, update(["layers.0.gate"], [1.0], range(1, len(counts) + 1)))


def even(steps: int = STEPS) -> np.ndarray:
    return np.full((steps, LAYERS, EXPERTS), TOKENS * K / EXPERTS)


def found(counts: np.ndarray, **options: Any) -> dict[str, Finding]:
    return {finding.code: finding for finding in routing_findings(routing(counts, **options), ["layers.0.gate"])}


def test_an_expert_without_tokens_at_the_last_three_steps() -> None:
    counts = even()
    counts[:, 2, 5] = 0
    finding = found(counts)["OD330"]
    assert finding.message == (
        "1 of 8 experts in 1 layer got no token at the last 3 captured steps: layers.2 (5). Uniform routing "
        "would leave an expert without a token for so long in less than 5 % of trainings."
    )
    assert (finding.matrix, finding.step, finding.evidence["experts"]) == ("layers.2", 3, 1)


def test_not_of_fewer_steps_nor_of_few_tokens() -> None:
    counts = even(STEPS - 1)
    counts[:, 2, 5] = 0
    assert found(counts) == {}
    counts = even()
    counts[:-1, 2, 5] = 0
    assert found(counts) == {}
    few = np.ones((STEPS, 1, 8))
    few[:, :, 0] = 0
    assert found(few) == {}


def test_an_expert_that_gets_most_tokens() -> None:
    counts = even()
    counts[:, 1] = 300
    counts[:, 1, 3] = TOKENS
    finding = found(counts)["OD331"]
    assert finding.message == (
        "In 1 layer one expert gets far more than its share of the tokens at the last 3 captured steps. The worst is "
        "expert 3 of layers.1 with 49.4 %, 3.9 times a uniform load."
    )
    assert finding.evidence["uniform_load"] == 0.125


def test_another_expert_at_each_step_is_not_overloaded() -> None:
    counts = even()
    for step in range(STEPS):
        counts[step, 1] = 300
        counts[step, 1, step] = TOKENS
    assert "OD331" not in found(counts)


def test_matrices_of_several_experts_are_named() -> None:
    names = ["layers.0.experts.mlp.w1", "layers.0.experts.up[3]", "layers.0.gate"]
    (finding,) = routing_findings(routing(even()), names)
    assert finding.code == "OD333"
    assert finding.evidence["names"] == ["layers.0.experts.mlp.w1"]


@pytest.mark.parametrize("run", [1, DESIGN_EFFECT])
def test_uniform_routers_are_called_neither_in_one_of_twenty_trainings(run: int) -> None:
    """Also where runs of 16 tokens choose alike."""
    generator, called, trials = np.random.default_rng(0), 0, 60
    for experts, tokens in ((8, 128), (32, 512)):
        for _ in range(trials):
            scores = generator.random((STEPS, LAYERS, tokens // run, experts))
            chosen = np.argpartition(scores, K - 1, axis=-1)[..., :K].reshape(STEPS, LAYERS, -1)
            counts = run * np.stack([[np.bincount(one, minlength=experts) for one in of] for of in chosen])
            called += bool(found(counts.astype(np.float64)))
    assert called / (2 * trials) <= 0.05
