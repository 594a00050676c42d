"""Associations within arms beside a slow twin, and what is no association."""

from __future__ import annotations

import re
from itertools import permutations

import numpy as np
import pytest

from examples.imax.associations import associations, within_arms


def draws(seed, shape=(3, 5)):
    return np.random.default_rng(seed).standard_normal(shape)


def test_every_exchange_of_seeds_is_the_same_in_all_arms():
    x, y = draws(0), draws(1)
    found = within_arms(x, y)

    def correlation(values):
        a, b = (each - each.mean(1, keepdims=True) for each in (x, values))
        return np.corrcoef(a.ravel(), b.ravel())[0, 1]

    null = np.array([correlation(y[:, list(order)]) for order in permutations(range(5))])
    assert found.r == pytest.approx(correlation(y))
    assert found.p == pytest.approx((np.abs(null) >= abs(found.r) - 1e-9).mean())
    assert found.low < found.r < found.high


def test_a_difference_between_arms_is_no_association():
    x, y = draws(2), draws(3)
    apart = 100 * np.arange(3)[:, None]
    assert within_arms(x + apart, y + apart) == pytest.approx(within_arms(x, y))


def test_null_data_have_uniform_p():
    """With seed effects that the arms share, in measure and score each."""
    random = np.random.default_rng(0)
    p = [
        within_arms(*(random.normal(size=(3, 5)) + 2 * random.normal(size=(1, 5)) for _ in range(2))).p
        for _ in range(600)
    ]
    assert 0.02 < np.mean(np.array(p) <= 0.05) < 0.08


def test_a_constant_has_none():
    assert np.isnan(within_arms(np.ones((2, 4)), draws(0, (2, 4)))).all()


def test_too_many_seeds_are_refused():
    with pytest.raises(
        ValueError, match=re.escape("Expected at most 9 seeds, of which all exchanges are made, got 10.")
    ):
        within_arms(draws(0, (1, 10)), draws(1, (1, 10)))


def test_all_but_the_primary_pair_are_corrected():
    random = np.random.default_rng(4)
    rows = [
        {"arm": arm, "seed": seed, **{name: random.normal() for name in ("a", "b", "s", "t")}}
        for arm in ("x", "y")
        for seed in range(5)
    ]
    found = associations(rows, ["a", "b"], ["s", "t"], primary=("a", "s"))
    assert [each["primary"] for each in found] == [True, False, False, False]
    assert np.isnan(found[0]["p_holm"])
    smallest = min(found[1:], key=lambda each: each["p"])
    assert smallest["p_holm"] == pytest.approx(min(1.0, 3 * smallest["p"]))
