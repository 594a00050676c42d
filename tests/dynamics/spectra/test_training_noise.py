"""Adapters that learn a teacher of known rank: what is said of their rank is true, or nothing is said."""

from __future__ import annotations

import numpy as np
import pytest

from dynamics.spectra.training_noise import ABOVE, energy_above_noise, states_of_rank
from tests.adapters import Setting, claims, train


@pytest.mark.parametrize(
    ("rank", "needed", "state"), [(4, 8, "used up"), (4, 4, "used up"), (8, 6, "ends within"), (8, 2, "idle")]
)
def test_clear_trainings_are_told(rank, needed, state):
    states = train(Setting(rank, needed, noise=0.1), draws=10, seed=0).states
    assert states.count(state) >= 9


@pytest.mark.parametrize("needed", [2, 8])
def test_with_much_noise_nothing_is_said_that_is_false(needed):
    states = train(Setting(4, needed, noise=4.0, rate=2e-2), draws=10, seed=1).states
    assert states.count("unclear") >= 9


def test_claims_of_random_trainings_are_true():
    tally = claims(np.random.default_rng(0), ((4, 2), (8, 6), (4, 4), (4, 8)), settings=6, draws=6)
    for state in ("idle", "used up", "ends within"):
        right, of = tally[state]
        assert of >= 3
        assert right >= 0.93 * of


def test_random_walks_stay_below():
    generator = np.random.default_rng(0)
    steps = generator.normal(size=(8, 200, 30, 4))  # 8 increments of 200 matrices with fixed A
    increments = np.linalg.svd(steps, compute_uv=False)
    total = np.linalg.svd(steps.sum(0), compute_uv=False)
    ratio = energy_above_noise(total, increments, [30] * 8, 240)
    assert np.median(ratio) == pytest.approx(1.0, rel=0.2)
    assert ratio.max() < ABOVE


def test_a_steady_trend_is_as_many_times_above_as_there_are_increments():
    increments = np.ones((10, 1, 2))
    assert energy_above_noise(np.full((1, 2), 10.0), increments, [50] * 10, 500).tolist() == [[10.0, 10.0]]


@pytest.mark.parametrize(
    "change",
    [
        {"intervals": [50] * 2, "increments": np.ones((2, 1, 2))},  # too few
        {"intervals": [5] * 4},  # too close
        {"increments": np.full((4, 1, 2), np.nan)},
        {"increments": np.zeros((4, 1, 2))},
    ],
)
def test_where_noise_cannot_be_estimated_nothing_is_known(change):
    given = {"total": np.ones((1, 2)), "increments": np.ones((4, 1, 2)), "intervals": [50] * 4, "steps": 200}
    assert np.isnan(energy_above_noise(**(given | change))).all()


def test_matrices_with_shorter_spectra_are_padded():
    ratio = energy_above_noise(np.array([[2.0, 1.0, np.nan]]), np.ones((4, 1, 2)), [50] * 4, 200)
    assert ratio[0, :2].tolist() == [1.0, 0.25]
    assert np.isnan(ratio[0, 2])


@pytest.mark.parametrize(
    ("needed", "above", "state"),
    [
        (2, [90.0, 90.0, 90.0, 90.0], "unclear"),  # half holds the energy, and yet the rest is no noise
        (2, [np.nan] * 4, "idle"),
        (4, [np.nan] * 4, "unclear"),
        (4, [2.0, 1.0, 0.5, 0.5], "unclear"),  # all may be noise
        (4, [90.0, 90.0, 90.0, 2.0], "unclear"),
    ],
)
def test_what_contradicts_itself_or_is_not_known_is_unclear(needed, above, state):
    assert states_of_rank(np.array([4.0]), np.array([float(needed)]), np.array([above])) == [state]


def test_rank_one_cannot_be_idle():
    assert states_of_rank(np.array([1.0]), np.array([1.0]), np.array([[0.5]])) == ["unclear"]
