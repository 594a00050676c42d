"""The checkpoint to keep, by scores alone."""

import json

import numpy as np
import pytest
import xarray as xr

from dynamics import choose_checkpoint


def scores(errors=0.01, steps=None, retained=(), **tasks):
    """Scores over steps 0, 100, …; "/" in a name is written "__"."""
    values = np.array(list(tasks.values()), dtype=float).T
    arrays = {"score": values, "items": np.full_like(values, 100), "standard_error": np.full_like(values, errors)}
    names = [name.replace("__", "/") for name in tasks]
    steps = steps or [100 * number for number in range(len(values))]
    coords = {"step": steps, "task": names, "retained": ("task", [name in retained for name in names])}
    return xr.Dataset({name: (("step", "task"), array) for name, array in arrays.items()}, coords)


def test_the_best_of_one_score_is_its_best_step():
    choice = choose_checkpoint(scores(vqa__acc=[0.5, 0.6, 0.8, 0.7]))
    assert (choice["based_on"], choice["best"], choice["within_one_standard_error"]) == ("scores", "step 200", [])
    (task,) = choice["reported"]["tasks"]
    assert task["improvement"] == pytest.approx(0.3)
    # Three checkpoints and one score: 2.394 standard errors of a difference of two.
    assert task["high"] - 0.3 == pytest.approx(2.393980 * 0.01 * np.sqrt(2))
    assert choice["caveats"][0].startswith("Intervals treat evaluations as independent")


def test_lower_losses_are_better():
    assert choose_checkpoint(scores(eval_loss=[2.0, 1.5, 1.7]))["best"] == "step 100"


def test_retained_scores_hold_new_ones_back():
    data = scores(vqa__acc=[0.2, 0.6, 0.62], mmlu__acc=[0.62, 0.61, 0.3])
    assert choose_checkpoint(data)["best"] == "step 100"
    for retained in ("mmlu", "mmlu/acc"):
        choice = choose_checkpoint(data, retained=[retained])
        assert (choice["best"], choice["retained"]) == ("step 100", ["mmlu/acc"])
    assert choose_checkpoint(data, retained=["mmlu"], retained_weight=0.0)["best"] == "step 200"
    marked = scores(vqa__acc=[0.2, 0.6, 0.62], mmlu__acc=[0.62, 0.61, 0.3], retained=["mmlu/acc"])
    assert choose_checkpoint(marked) == choose_checkpoint(data, retained=["mmlu"])
    with pytest.raises(ValueError, match=r"^retained: expected tasks among vqa/acc, mmlu/acc, got 'arc'\.$"):
        choose_checkpoint(data, retained=["arc"])


def test_checkpoints_within_noise_are_named_together():
    choice = choose_checkpoint(scores(vqa__acc=[0.5, 0.7, 0.705, 0.6]))
    assert (choice["best"], choice["within_one_standard_error"]) == ("step 200", ["step 100"])


def test_a_score_that_only_fluctuates_does_not_decide():
    choice = choose_checkpoint(scores(vqa__acc=[0.2, 0.5, 0.7, 0.7], arc__acc=[0.5, 0.501, 0.499, 0.499]))
    assert choice["best"] in ("step 200", "step 300")


def test_scores_of_one_task_share_its_weight():
    data = scores(vqa__acc=[0.1, 0.9, 0.2], vqa__f1=[0.1, 0.9, 0.2], report__acc=[0.1, 0.2, 0.9])
    values = [candidate["value"] for candidate in choose_checkpoint(data)["candidates"]]
    assert values[1] == pytest.approx(values[2])


def test_without_standard_errors_only_the_best_is_named():
    choice = choose_checkpoint(scores(np.nan, vqa__acc=[0.5, 0.7, 0.705, 0.6]))
    assert (choice["best"], choice["within_one_standard_error"]) == ("step 200", None)
    assert choice["reported"]["low"] is None
    json.dumps(choice, allow_nan=False)


def test_without_a_score_at_the_start_nothing_is_reported():
    choice = choose_checkpoint(scores(eval_loss=[1.5, 1.2, 1.3], steps=[100, 200, 300]))
    assert (choice["best"], choice["reported"]) == ("step 200", None)
    assert choice["candidates"][0]["kind"] == "step"


def test_scores_at_few_steps_or_of_unknown_direction_are_left_out():
    nan = np.nan
    choice = choose_checkpoint(
        scores(eval_loss=[nan, 1.5, 1.2, 1.3], mmlu__acc=[0.6, nan, nan, 0.5], oddity=[1.0, 2.0, 3.0, 4.0])
    )
    assert (choice["best"], choice["tasks"]) == ("step 200", ["eval_loss"])
    assert choice["left_out"] == [
        "mmlu/acc: values at too few steps",
        "oddity: which direction is better is not known",
    ]


def test_scores_that_share_no_step_leave_the_one_with_most():
    nan = np.nan
    choice = choose_checkpoint(scores(a__acc=[0.1, nan, 0.3, nan, 0.2], b__acc=[nan, 0.3, nan, 0.2, nan]))
    assert (choice["tasks"], choice["best"]) == (["a/acc"], "step 200")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (scores(vqa__acc=[0.5]), "no score of known direction has a value after the start"),
        (scores(oddity=[0.5, 0.6]), "no score of known direction has a value after the start"),
        (scores(vqa__acc=[np.nan, np.nan]), "no score of known direction has a value after the start"),
        (scores(vqa__acc=[0.5], steps=[1200]), "only step 1,200 has scores"),
        (scores(mmlu__acc=[0.5, 0.4], retained=["mmlu/acc"]), "every score is of a retained task"),
    ],
    ids=["start alone", "no direction", "all NaN", "one step", "retained alone"],
)
def test_where_nothing_can_be_chosen_it_is_said_why(data, reason):
    choice = choose_checkpoint(data)
    assert (choice["best"], choice["reason"], choice["candidates"]) == (None, reason, [])


def test_the_best_of_eight_equal_checkpoints_is_rarely_called_better_than_the_start():
    rng = np.random.default_rng(0)
    better = []
    for _ in range(400):
        noise = 0.01 * rng.standard_normal((2, 9))
        reported = choose_checkpoint(scores(a__acc=0.5 + noise[0], b__acc=0.6 + noise[1]))["reported"]
        better.append(reported["low"] > 0)
    assert np.mean(better) <= 0.07
