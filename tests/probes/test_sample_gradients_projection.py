"""Projected gradients: their inner products in expectation, and a participation ratio from which it is taken out."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

import dynamics
from dynamics.fisher.spectrum import without_projection
from probes import sample_gradients as module
from probes.gram import ProbeGram, gradient_gram
from probes.sample_gradients import Materialised, Outer, SampleGradient, projected
from tests.probes.test_gram import adapted, tokens

SAMPLES, NUMBERS = 6, 12
ROWS = torch.randn(SAMPLES, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
GRADIENT = SampleGradient((40,), SAMPLES, [Materialised(ROWS)])
LIKE = torch.ones(1, dtype=torch.float64)


def test_inner_products_and_their_squares_in_expectation():
    exact = (ROWS @ ROWS.mT).numpy()
    draws = np.stack([(each @ each.mT).numpy() for seed in range(4000) for each in [draw(seed)]])
    error = draws.std(0, ddof=1) / len(draws) ** 0.5
    assert (np.abs(draws.mean(0) - exact) < 4 * error).all()
    norms = np.diagonal(draws, axis1=1, axis2=2)
    squares, traces = without_projection(draws**2, norms[:, :, None] * norms[:, None, :], NUMBERS)
    expected = exact**2, np.outer(np.diag(exact), np.diag(exact))
    apart = ~np.eye(SAMPLES, dtype=bool)
    for found, truth in zip((squares, traces), expected, strict=True):
        error = found.std(0, ddof=1) / len(draws) ** 0.5
        assert (np.abs(found.mean(0) - truth) < 4 * error)[apart].all()
    # Without the correction the squares are far too large.
    assert ((draws**2).mean(0) - expected[0])[apart].min() > 0.5 * expected[1].max() / NUMBERS / 4


def draw(seed: int) -> torch.Tensor:
    return projected(GRADIENT, NUMBERS, seed, LIKE)


def test_pieces_are_the_whole(monkeypatch):
    left, right = torch.randn(3, 5, 7).double(), torch.randn(3, 5, 4).double()
    outer = SampleGradient((7, 4), 3, [Outer(left, right)])
    dense = SampleGradient((7, 4), 3, [Materialised(left.mT @ right)])
    whole = projected(dense, 9, 1, LIKE)
    torch.testing.assert_close(projected(outer, 9, 1, LIKE), whole)
    monkeypatch.setattr(module, "PROJECTION_BUDGET", 4 * 4 * 9 * 2)
    torch.testing.assert_close(projected(outer, 9, 1, LIKE), projected(dense, 9, 1, LIKE))


def test_zero_is_zero():
    assert not projected(SampleGradient((7,), 3, []), 9, 1, LIKE).any()


@pytest.mark.parametrize("space", ["tangent", "factor"])
def test_gram_of_a_model(space):
    """Enough numbers give K itself; any number gives b itself; batches do not matter."""
    model, batch = adapted(), tokens()
    exact = gradient_gram(model, batch, space=space)
    found = gradient_gram(model, batch, space=space, projection=6000)
    for block, gram in exact.gram.items():
        assert (found.gram[block] - gram).abs().max() < 0.1 * gram.abs().max(), block
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 2), slice(2, 5))]
    cut = gradient_gram(model, halves, space=space, projection=6000)
    torch.testing.assert_close(cut.gram["global"], found.gram["global"])
    assert found.projection == 6000
    assert exact.projection == 0


def test_update_products_are_exact():
    model, batch = adapted(), tokens()
    update = {"model.layers.0.self_attn.q_proj": torch.randn(16, 16, dtype=torch.float64)}
    exact, found = (gradient_gram(model, batch, update=update, projection=k) for k in (0, 5))
    for block, product in exact.update_product.items():
        torch.testing.assert_close(found.update_product[block], product)
    assert found.update_norm_squared == pytest.approx(exact.update_norm_squared)


def test_participation_ratio_is_corrected():
    """K of 64 samples through 24 numbers: the corrected ratio is that of whole gradients, the other is far below."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(64, 60, generator=generator, dtype=torch.float64) / torch.arange(1, 61).sqrt()
    (exact,) = ln_ratios([rows @ rows.mT], 0)
    gradient = SampleGradient((60,), 64, [Materialised(rows)])
    grams = [(each := projected(gradient, 24, seed, LIKE)) @ each.mT for seed in range(60)]
    corrected, naive = (ln_ratios(grams, k) for k in (24, 0))
    assert abs(corrected.mean() - exact) < 4 * corrected.std(ddof=1) / 60**0.5 + 0.02
    assert naive.mean() < exact - 0.2


def ln_ratios(grams: Sequence[torch.Tensor], projection: int) -> np.ndarray:
    blocks = {str(number): gram for number, gram in enumerate(grams)}
    return dynamics.fisher_measures(ProbeGram(blocks, projection=projection))["ln_participation_ratio"].values.ravel()


def test_directions_of_projected_gradients_are_refused():
    update = {"model.layers.0.self_attn.q_proj": torch.ones(16, 16)}
    found = gradient_gram(adapted(), tokens(), projection=5, update=update)
    message = re.escape("Expected K of whole gradients, got that of gradients projected to 5 numbers")
    with pytest.raises(ValueError, match=message):
        dynamics.concentration(found)
    with pytest.raises(ValueError, match=message):
        dynamics.task_structure(replace(found, tasks=["a", "a", "a", "b", "b"]))
    with pytest.raises(ValueError, match="Expected a projection to at least 1 number"):
        gradient_gram(adapted(), tokens(), projection=-1)
