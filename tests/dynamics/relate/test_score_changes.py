"""A run's scores since its start: planted forgetting is told, noise is not, and what is not known is not claimed."""

import numpy as np
import pytest
import xarray as xr

from dynamics.relate.score_changes import score_changes

STEPS = [0, 100, 200]


def scores(errors=0.01, **tasks):
    """Scores over steps of tasks by name; "/" in a name is written "__"."""
    values = np.array(list(tasks.values()), dtype=float).T
    arrays = {"score": values, "standard_error": np.full_like(values, errors)}
    names = [name.replace("__", "/") for name in tasks]
    dims = ("step", "task")
    return xr.Dataset({name: (dims, array) for name, array in arrays.items()}, {"step": STEPS, "task": names})


def only(dataset):
    (row,) = score_changes(dataset)
    return row


def test_what_fell_beyond_its_standard_errors_is_worse():
    row = only(scores(mmlu__acc=[0.62, 0.60, 0.55]))
    assert row["verdict"] == "worse"
    reach = 1.959964 * 0.01 * np.sqrt(2)
    assert (row["low"], row["high"]) == pytest.approx((-0.07 - reach, -0.07 + reach))
    assert (row["start"], row["last"]) == ({"step": 0, "score": 0.62}, {"step": 200, "score": 0.55})
    assert row["best"] == {"step": 0, "score": 0.62}


@pytest.mark.parametrize(
    ("values", "verdict"), [([2.0, 2.1, 2.5], "worse"), ([2.0, 1.8, 1.5], "better"), ([2.0, 1.9, 2.01], "not_shown")]
)
def test_a_loss_is_worse_when_it_rises(values, verdict):
    row = only(scores(eval_loss=values))
    assert row["verdict"] == verdict
    assert row["direction"] == -1
    assert row["best"]["score"] == min(values)


@pytest.mark.parametrize(
    ("dataset", "verdict"),
    [
        (scores(np.nan, mmlu__acc=[0.62, 0.6, 0.5]), "undecided"),
        (scores(0.0, mmlu__acc=[0.62, 0.6, 0.5]), "undecided"),
        (scores(oddity=[0.62, 0.6, 0.5]), "undecided"),
        (scores(mmlu__acc=[np.nan, 0.6, 0.5]), "not_asked"),
        (scores(mmlu__acc=[0.6, np.nan, np.nan]), "not_asked"),
    ],
    ids=["no standard error", "standard error 0", "no direction", "no start", "start alone"],
)
def test_what_is_not_known_is_not_claimed(dataset, verdict):
    row = only(dataset)
    assert row["verdict"] == verdict
    assert (row["low"], row["high"]) == (None, None)


def test_the_last_step_is_that_of_the_score_and_of_equal_bests_the_first():
    row = only(scores(mmlu__acc=[0.5, 0.6, np.nan]))
    assert row["last"]["step"] == 100
    assert only(scores(mmlu__acc=[0.5, 0.6, 0.6]))["best"]["step"] == 100


def test_stated_directions_go_before_names():
    dataset = scores(oddity=[2.0, 1.0, 0.5]).assign(direction=(("step", "task"), np.full((3, 1), -1)))
    assert only(dataset)["verdict"] == "better"


def test_a_score_without_any_value_is_left_out():
    assert [row["task"] for row in score_changes(scores(a__acc=[0.1, 0.2, 0.3], b__acc=[np.nan] * 3))] == ["a/acc"]


def test_of_runs_that_forgot_nothing_five_percent_are_said_to_have():
    """1000 runs with five scores whose true value stays, one standard error of noise at each evaluation."""
    rng = np.random.default_rng(0)
    said = [
        any(
            row["verdict"] == "worse"
            for row in score_changes(
                scores(**{f"t{n}__acc": 0.5 + 0.01 * rng.standard_normal(3) for n in range(5)}),
            )
        )
        for _ in range(1000)
    ]
    assert np.mean(said) <= 0.05


def test_forgetting_of_five_standard_errors_is_nearly_always_told():
    rng = np.random.default_rng(1)
    told = [
        only(scores(mmlu__acc=np.array([0.6, 0.56, 0.53]) + 0.01 * rng.standard_normal(3)))["verdict"] == "worse"
        for _ in range(200)
    ]
    assert np.mean(told) >= 0.95
