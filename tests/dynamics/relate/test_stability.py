"""What simulated trainings of known course are said to be doing."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dynamics.relate.stability import (
    best_evaluation,
    course_of,
    motion_of,
    products_of_increments,
    sizes_of,
    spikes_of,
    trend_of,
)
from tests.trainings import KINDS, trainings


def courses(name: str, count: int = 20, seed: int = 1):
    kind, true = KINDS[name]
    return [course_of(training) for training in trainings(kind, np.random.default_rng(seed), count)], true


def one(name: str, **changes):
    training = next(trainings(KINDS[name][0], np.random.default_rng(2), 1))
    return dataclasses.replace(training, **changes)


@pytest.mark.parametrize("name", [name for name in KINDS if "logistic" not in name and "4 directions" not in name])
def test_a_training_of_known_course_is_recognised(name):
    reached, true = courses(name)
    states = [course.state for course in reached]
    assert np.mean([state in (*true, "undecided") for state in states]) >= 0.85  # of 20; the table has 400
    assert "undecided" in true or states.count("undecided") <= 6


def test_a_schedule_that_ended_is_not_taken_for_rest():
    decayed, _ = courses("far, schedule decayed early", 5)
    at_rest, _ = courses("converged without noise", 5)
    assert {(course.state, course.ended) for course in decayed} == {("moving", True)}
    assert {(course.state, course.ended) for course in at_rest} == {("converged", False)}


def test_increments_have_the_products_of_the_points():
    points = np.random.default_rng(0).standard_normal((5, 30)).cumsum(0)
    moved = np.diff(points, axis=0, prepend=0)
    np.testing.assert_allclose(products_of_increments(points @ points.T), moved @ moved.T, atol=1e-12)


def test_the_cosine_is_that_of_joined_unit_increments():
    training = one("stationary noise, SGD")
    products = products_of_increments(training.gram)[-8:, -8:]
    units = np.linalg.cholesky(products / np.sqrt(np.outer(np.diag(products), np.diag(products))))
    pairs = [units[i] @ units[j] for i in range(8) for j in range(i + 2, 8)]
    motion = motion_of(training)
    assert motion is not None
    assert motion.blocks == 8
    assert motion.cosine == pytest.approx(np.mean(pairs), abs=1e-9)
    assert motion.first_step == training.step[7]


@pytest.mark.parametrize("dimension", [2, 20, 500])
def test_noise_of_any_dimension_agrees_in_direction_as_often_as_it_should(dimension):
    rng = np.random.default_rng(3)
    training = one("stationary noise, SGD")
    p_values = []
    for _ in range(200):
        points = rng.standard_normal((16, dimension)).cumsum(0)
        motion = motion_of(dataclasses.replace(training, gram=points @ points.T))
        assert motion is not None
        p_values.append(motion.p_value)
    assert 0.01 <= np.mean(np.array(p_values) <= 0.05) <= 0.1


def test_a_falling_learning_rate_does_not_hide_the_direction():
    rng = np.random.default_rng(4)
    shrinking = np.geomspace(1.0, 1e-3, 16)[:, None]
    points = (shrinking * (rng.standard_normal((16, 300)) + 0.5)).cumsum(0)
    motion = motion_of(one("stationary noise, SGD", gram=points @ points.T))
    assert motion is not None
    assert motion.p_value <= 0.01


@pytest.mark.parametrize(("cosine", "state"), [(0.02, "wandering"), (0.2, "moving")])
def test_a_drift_that_noise_outweighs_is_wandering(cosine, state):
    """All increments agree a little, so that both are significant: of twelve, a drift outweighs noise from 1/12 on."""
    products = np.full((24, 24), cosine) + (1 - cosine) * np.eye(24)
    training = dataclasses.replace(
        one("stationary noise, SGD"),
        step=10 * np.arange(1, 25),
        gram=products.cumsum(0).cumsum(1),
        moved=np.ones(24),
        moved_step=10 * np.arange(1, 25),
        moved_from=10 * np.arange(24),
        loss=np.full(0, np.nan),
        learning_rate=np.full(0, np.nan),
        log_step=np.arange(0),
    )
    course = course_of(training)
    assert course.motion.p_value < 0.01
    assert course.state == state


def test_five_increments_are_too_few():
    training = one("stationary noise, SGD")
    assert motion_of(dataclasses.replace(training, step=training.step[:5], gram=training.gram[:5, :5])) is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_gram_has_no_direction(value):
    training = one("far from the optimum, SGD")
    broken = training.gram.copy()
    broken[3, 3] = value
    assert motion_of(training) is not None
    assert motion_of(dataclasses.replace(training, gram=broken)) is None


def test_what_never_moved_has_no_direction_and_is_not_at_rest():
    training = one("stationary noise, SGD", gram=np.zeros((16, 16)), moved=np.zeros(16))
    course = course_of(training)
    assert course.motion is None
    assert course.state == "undecided"


def test_size_is_judged_for_the_learning_rate_and_the_number_of_steps():
    training = one("stationary noise, SGD")
    rates = np.linspace(1.0, 0.1, len(training.log_step))
    steps = np.cumsum(np.arange(1, 17) * 5)
    begins = np.concatenate([[0], steps[:-1]])
    mean_rate = [
        np.interp(np.arange(a + 1, b + 1), training.log_step, rates).mean() for a, b in zip(begins, steps, strict=True)
    ]
    drift, _ = sizes_of(
        dataclasses.replace(
            training, learning_rate=rates, moved=mean_rate * (steps - begins), moved_step=steps, moved_from=begins
        )
    )
    np.testing.assert_allclose(drift, 1.0, rtol=0.02)


def test_without_a_learning_rate_nothing_is_said_of_a_schedule():
    training = one("converged without noise")
    course = course_of(dataclasses.replace(training, learning_rate=np.full(len(training.loss), np.nan)))
    assert course.state == "converged"
    assert course.ended is None


def test_an_infinite_loss_is_unstable():
    training = one("far from the optimum, SGD")
    loss = training.loss.copy()
    loss[-1] = np.inf
    course = course_of(dataclasses.replace(training, loss=loss))
    assert (course.state, course.reasons) == ("unstable", ("loss",))


def test_steps_beyond_the_edge_are_unstable_only_if_the_loss_does_not_fall():
    assert course_of(one("stationary noise, SGD", beyond_edge=True)).reasons == ("edge",)
    assert course_of(one("far from the optimum, SGD", beyond_edge=True)).state == "moving"


def test_increments_below_the_rounding_are_called_that():
    training = one("3 checkpoints, stationary", rounded=0.8)
    assert course_of(training).state == "below_rounding"


def test_a_loss_that_falls_has_a_trend_with_its_interval():
    loss = 2.0 - 0.01 * np.arange(80) + 0.01 * np.random.default_rng(0).standard_normal(80)
    trend = trend_of(one("stationary noise, SGD", loss=loss))
    assert trend is not None
    assert trend.low < -0.38 < trend.high < 0


def test_a_random_walk_of_the_loss_is_rarely_called_a_trend():
    rng = np.random.default_rng(5)
    training = one("stationary noise, SGD")
    ends = [trend_of(dataclasses.replace(training, loss=10 + rng.standard_normal(80).cumsum())) for _ in range(200)]
    assert np.mean([trend.low > 0 or trend.high < 0 for trend in ends if trend is not None]) <= 0.1


def test_few_rows_have_no_trend_and_no_spikes():
    training = one("one spike")
    last = {name: getattr(training, name)[-19:] for name in ("log_step", "loss", "learning_rate")}
    short = dataclasses.replace(training, **last)
    assert trend_of(short) is None
    assert spikes_of(short) == 0
    assert spikes_of(training) == 1


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ([3.0, 2.0, 1.0, 1.2, 1.4, 1.6, 1.8], 2),
        ([3.0, 2.0, 1.0, 1.2, 1.4, 1.6], None),  # too few since
        ([3.0, 2.0, 1.0, 1.5, 1.1, 1.6, 1.2], None),  # up and down
        ([3.0, 2.0, 1.0, 1.001, 1.002, 1.003, 1.004], None),  # nothing to speak of
        ([3.0, np.nan, 1.0, 1.2, 1.4, np.nan, 1.6, 1.8], 1),
        ([], None),
        ([np.nan] * 6, None),
    ],
)
def test_an_evaluation_is_best_once_those_after_it_have_risen(values, best):
    assert best_evaluation(np.array(values)) == best
