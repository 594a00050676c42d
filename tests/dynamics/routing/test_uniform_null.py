"""The null of uniform routing, against simulated routers."""

from __future__ import annotations

import numpy as np
import pytest

from dynamics.routing.uniform_null import dead_probability, largest_share

CASES = [(40, 1, 8), (60, 2, 8), (100, 2, 4), (300, 4, 32), (30, 1, 32)]


def simulated(tokens: int, k: int, experts: int, trials: int = 4000) -> np.ndarray:
    """Tokens of each expert, (trial, expert): each token draws k different experts."""
    generator = np.random.default_rng(0)
    scores = generator.random((trials, tokens, experts), dtype=np.float32)
    chosen = np.argpartition(scores, k - 1, axis=-1)[..., :k].reshape(trials, -1)
    return np.stack([np.bincount(row, minlength=experts) for row in chosen])


@pytest.mark.parametrize(("tokens", "k", "experts"), CASES)
def test_simulated_routers_exceed_the_largest_share_in_at_most_one_of_twenty(tokens: int, k: int, experts: int) -> None:
    counts = simulated(tokens, k, experts)
    bound = largest_share(*(np.array([float(number)]) for number in (tokens, k, experts)))[0]
    exceeding = (counts.max(-1) / (tokens * k) > bound).mean()
    below = (counts.max(-1) / (tokens * k) > bound - 1.5 / (tokens * k)).mean()
    assert exceeding <= 0.05 + 3 * np.sqrt(0.05 * 0.95 / len(counts))
    assert below > exceeding  # one token less is within reach


@pytest.mark.parametrize(("tokens", "k", "experts"), CASES)
def test_simulated_routers_leave_as_many_experts_without_a_token(tokens: int, k: int, experts: int) -> None:
    dead = (simulated(tokens, k, experts) == 0).mean(0)
    expected = dead_probability(*(np.array([float(number)]) for number in (tokens, k, experts)))[0]
    assert dead.mean() == pytest.approx(expected, abs=4 * np.sqrt(max(expected, 1e-5) / len(dead) / 1000))


def test_where_every_expert_is_chosen_nothing_is_left_to_chance() -> None:
    tokens, k, experts = np.array([10.0]), np.array([4.0]), np.array([4.0])
    assert dead_probability(tokens, k, experts).tolist() == [0.0]
    assert largest_share(tokens, k, experts).tolist() == [0.25]


def test_unknown_numbers_stay_unknown() -> None:
    unknown = np.array([np.nan])
    assert np.isnan(largest_share(np.array([10.0]), unknown, np.array([4.0]))).all()
    assert np.isnan(largest_share(np.zeros(1), np.array([2.0]), np.array([4.0]))).all()
