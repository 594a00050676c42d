"""Gradients as the products that they are made of beside the same multiplied out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from probes import LowRankMatrix, sample_gradients
from probes.sample_gradients import Materialised, Outer, SampleGradient, Scatter, compact, gram, inner_products, stacked

ROWS, COLUMNS = 6, 4


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gradient(kind: str, samples: int = 5, tokens: int = 3, seed: int = 0) -> SampleGradient:
    places = torch.randint(ROWS, (samples, tokens), generator=torch.Generator().manual_seed(seed))
    outer = Outer(random(samples, tokens, ROWS, seed=seed + 1), random(samples, tokens, COLUMNS, seed=seed + 2))
    scatter = Scatter(places, random(samples, tokens, COLUMNS, seed=seed + 3), ROWS)
    whole = Materialised(random(samples, ROWS, COLUMNS, seed=seed + 4))
    terms = {"outer": [outer], "scatter": [scatter], "whole": [whole], "all": [outer, scatter, whole]}[kind]
    return SampleGradient((ROWS, COLUMNS), samples, terms)


def dense(gradient: SampleGradient) -> Tensor:
    """One token after the other."""
    found = torch.zeros(gradient.samples, ROWS, COLUMNS, dtype=torch.float64)
    for term in gradient.terms:
        for sample in range(gradient.samples):
            if isinstance(term, Materialised):
                found[sample] += term.values[sample]
                continue
            for token in range(term.right.shape[1]):
                left = (
                    term.left[sample, token] if isinstance(term, Outer) else torch.eye(ROWS)[term.places[sample, token]]
                )
                found[sample] += torch.outer(left.double(), term.right[sample, token])
    return found


KINDS = ["outer", "scatter", "whole", "all"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("budget", [1, 2**28])
def test_gram(kind, tokens, budget, monkeypatch):
    """Few tokens are paired, many are multiplied out; all at once or row by row."""
    monkeypatch.setattr(sample_gradients, "BUDGET", budget)
    given = gradient(kind, tokens=tokens)
    flat = dense(given).flatten(1)
    torch.testing.assert_close(given.dense(flat), dense(given))
    torch.testing.assert_close(gram(given), flat @ flat.mT)


@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_with_a_change(kind):
    given, change = gradient(kind), LowRankMatrix(random(ROWS, 2), random(2, COLUMNS), 0.5)
    expected = dense(given).flatten(1) @ change.to_dense().flatten()
    torch.testing.assert_close(inner_products(given, change), expected)
    torch.testing.assert_close(inner_products(given, change.to_dense()), expected)


@pytest.mark.parametrize("kinds", [("outer", "outer"), ("scatter", "scatter"), ("all", "all"), ("outer", "whole")])
def test_batches_of_other_lengths_are_stacked(kinds):
    first, second = gradient(kinds[0], 2, 3), gradient(kinds[1], 4, 5, seed=9)
    whole = stacked([first, second])
    assert whole.samples == 6
    torch.testing.assert_close(whole.dense(random(1)), torch.cat([dense(first), dense(second)]))


@pytest.mark.parametrize(("tokens", "smaller"), [(2, False), (3, True)])
def test_what_takes_less_memory_is_kept(tokens, smaller):
    """Tokens of 6 + 4 numbers, or a matrix of 24."""
    given = gradient("outer", tokens=tokens)
    kept = compact(given)
    assert isinstance(kept.terms[0], Materialised) == smaller
    torch.testing.assert_close(kept.dense(random(1)), dense(given))


@pytest.mark.parametrize("kind", KINDS)
def test_transposed_and_multiplied(kind):
    given, matrix = gradient(kind), random(2, ROWS)
    torch.testing.assert_close(given.transposed().dense(random(1)), dense(given).mT)
    torch.testing.assert_close(given.led_by(matrix).dense(random(1)), matrix @ dense(given))


@pytest.mark.parametrize("kind", ["outer", "all"])
@pytest.mark.parametrize("transposed", [False, True])
def test_gram_by_rows_that_fit_the_cache(kind, transposed, monkeypatch):
    """Two rows at a time, of the longer side where each term is a product."""
    monkeypatch.setattr(sample_gradients, "CACHE", 1)
    monkeypatch.setattr(sample_gradients, "FEWEST_ROWS", 2)
    given = gradient(kind, tokens=40).transposed() if transposed else gradient(kind, tokens=40)
    flat = given.dense(random(1)).flatten(1)
    torch.testing.assert_close(gram(given), flat @ flat.mT)


def test_nothing_is_zero():
    nothing = SampleGradient((ROWS, COLUMNS), 3, [])
    assert gram(nothing).tolist() == [[0.0] * 3] * 3
    assert nothing.dense(torch.ones(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert compact(nothing) is nothing
