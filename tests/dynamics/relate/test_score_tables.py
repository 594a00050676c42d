"""The mean over tasks, and scores placed on runs and steps."""

import math
import re

import numpy as np
import pytest
import xarray as xr

from dynamics.relate import rows_of, score_table
from dynamics.relate.score_files import ScoreRow, read_scores
from dynamics.relate.score_tables import better, with_file_scores


def cells(table):
    """Every score that is not missing: (run, step, task) → (score, items, standard error)."""
    columns = table.scores.to_dataframe().reset_index().dropna(subset="score")
    names = ["run", "step", "task", "score", "items", "standard_error"]
    return {tuple(row[:3]): tuple(row[3:]) for row in columns[names].itertuples(index=False)}


def cells_of(table):
    """The same without pandas, which refuses names that are no Unicode: (run, step, task) → score."""
    scores = table.scores["score"].stack(cell=("run", "step", "task"), create_index=False)
    places = zip(*(scores[name].values.tolist() for name in ("run", "step", "task")), strict=True)
    return dict(zip(places, scores.values.tolist(), strict=True))


def finding(table, code):
    (found,) = (finding for finding in table.findings if finding.code == code)
    return found


def written_out(rows, runs):
    """Slow twin: a plain loop over rows. Cells, places given more than once, and places that contradict."""
    given = {}
    for row in rows:
        if row.run in runs:
            step = max(runs[row.run]) if row.step is None else row.step
            given.setdefault((row.run, step, row.task), []).append(row)
    values, contradictions = {}, 0
    for place, alike in given.items():
        if max(row.score for row in alike) - min(row.score for row in alike) > 1e-9:
            contradictions += 1
            continue
        fullest = max(alike, key=lambda row: (row.items == row.items) + (row.standard_error == row.standard_error))
        values[place] = fullest.score, fullest.items, fullest.standard_error
    return values, sum(len(alike) > 1 for alike in given.values()), contradictions


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_placed_as_by_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    runs = {"a": [10, 20], "b": [20, 30], "c": [10]}
    rows = [
        ScoreRow(
            str(rng.choice(["a", "b", "c", "stranger"])),
            [10, 20, 30, None][rng.integers(4)],
            str(rng.choice(["qa/accuracy", "vqa/loss"])),
            float(rng.integers(3)) / 4,
            float(rng.choice([50, math.nan])),
            float(rng.choice([0.25, math.nan])),
        )
        for _ in range(40)
    ]
    table = score_table(rows, runs=runs)
    expected, repeated, contradictions = written_out(rows, runs)
    assert contradictions > 0
    assert repeated > contradictions
    assert finding(table, "OD503").evidence == {"places": repeated, "contradictions": contradictions}
    assert cells(table).keys() == expected.keys()
    for place, values in cells(table).items():
        np.testing.assert_array_equal(values, expected[place])


def test_the_order_of_rows_changes_no_number():
    rng = np.random.default_rng(0)
    rows = [
        ScoreRow(run, step, task, float(rng.random()), 10.0 * step, 0.1)
        for run in "abc"
        for step in (5, 10, 200)
        for task in ("qa/accuracy", "eval_loss")
    ]
    shuffled = [rows[place] for place in rng.permutation(len(rows))]
    assert cells(score_table(rows)) == cells(score_table(shuffled))
    assert len(cells(score_table(rows))) == 18


def test_steps_are_sorted_and_runs_and_tasks_keep_the_order_in_which_they_come():
    rows = [
        ScoreRow("b", 200, "z/accuracy", 1.0),
        ScoreRow("a", 5, "eval_loss", 2.0),
        ScoreRow("b", 30, "eval_loss", 3.0),
    ]
    scores = score_table(rows).scores
    assert scores["run"].values.tolist() == ["b", "a"]
    assert scores["step"].values.tolist() == [5, 30, 200]
    assert scores["task"].values.tolist() == ["z/accuracy", "eval_loss"]
    assert scores["direction"].values.tolist() == [1, -1]


def test_runs_scored_at_different_steps_share_one_grid_with_gaps():
    table = score_table([ScoreRow("a", 10, "qa/accuracy", 0.25), ScoreRow("b", 20, "qa/accuracy", 0.5)])
    np.testing.assert_array_equal(table.scores["score"].squeeze("task"), [[0.25, np.nan], [np.nan, 0.5]])
    assert table.findings == ()


def test_variables_have_their_dimensions_types_and_units():
    scores = score_table([ScoreRow("a", 10, "qa/accuracy", 0.5, 200.0, 0.035)]).scores
    assert {name: array.dims for name, array in scores.data_vars.items()} == dict.fromkeys(
        ("score", "items", "standard_error"), ("run", "step", "task")
    )
    assert {array.dtype for array in scores.data_vars.values()} == {np.dtype(np.float64)}
    assert scores["step"].dtype == np.int64
    assert all({"units", "long_name"} <= array.attrs.keys() for array in scores.data_vars.values())
    assert cells(score_table([ScoreRow("a", 10, "qa/accuracy", 0.5, 200.0, 0.035)])) == {
        ("a", 10, "qa/accuracy"): (0.5, 200.0, 0.035)
    }


def test_no_rows_give_an_empty_table():
    table = score_table([], runs={"a": [10]})
    assert dict(table.scores.sizes) == {"run": 0, "step": 0, "task": 0}
    assert table.findings == ()


def test_rows_that_agree_count_once_with_the_items_and_error_of_the_fullest():
    rows = [ScoreRow("a", 10, "qa/accuracy", 0.5), ScoreRow("a", 10, "qa/accuracy", 0.5 + 1e-13, 40.0, 0.08)]
    table = score_table(rows)
    assert cells(table) == {("a", 10, "qa/accuracy"): (pytest.approx(0.5), 40.0, 0.08)}
    assert finding(table, "OD503").evidence == {"places": 1, "contradictions": 0}


@pytest.mark.parametrize(
    ("one", "other", "agree"),
    [(1e6, 1e6 + 1e-4, True), (1e6, 1e6 + 1.0, False), (0.0, 1e-13, True), (0.0, 1e-9, False)],
)
def test_rows_agree_up_to_rounding_at_their_own_scale(one, other, agree):
    table = score_table([ScoreRow("a", 10, "qa/accuracy", value) for value in (one, other)])
    assert finding(table, "OD503").evidence == {"places": 1, "contradictions": int(not agree)}
    assert len(cells(table)) == int(agree)


def test_rows_that_contradict_are_left_out_and_the_first_is_named():
    rows = [ScoreRow("a", 10, "qa/accuracy", value) for value in (0.5, 0.6)]
    rows += [ScoreRow("a", 20, "qa/accuracy", 0.7)] * 2
    table = score_table(rows)
    assert cells(table).keys() == {("a", 20, "qa/accuracy")}
    doubled = finding(table, "OD503")
    assert doubled.message == (
        "2 scores are given more than once, 1 of them, with different values, is left out (for example run 'a', step "
        "10, task 'qa/accuracy')."
    )
    assert doubled.evidence == {"places": 2, "contradictions": 1}


def test_a_score_without_a_step_and_one_at_the_last_step_are_of_one_place():
    rows = [ScoreRow("a", None, "qa/accuracy", 0.5), ScoreRow("a", 30, "qa/accuracy", 0.6)]
    table = score_table(rows, runs={"a": [10, 30, 20]})
    assert cells(table) == {}
    assert finding(table, "OD503").evidence == {"places": 1, "contradictions": 1}


def test_a_score_without_a_step_is_of_the_last_step_with_measures():
    table = score_table([ScoreRow("a", None, "qa/accuracy", 0.5)], runs={"a": [10, 30, 20]})
    assert list(cells(table)) == [("a", 30, "qa/accuracy")]
    without = finding(table, "OD502")
    assert without.message == "1 score of 'a' is without a step and counts for the run's last step."
    assert without.evidence == {"rows": 1, "left_out": 0}


def test_without_known_runs_the_last_step_is_the_last_that_was_scored():
    rows = [ScoreRow("a", None, "vqa/accuracy", 0.5), ScoreRow("a", 40, "qa/accuracy", 0.1)]
    rows += [ScoreRow("a", 20, "qa/accuracy", 0.2)]
    assert ("a", 40, "vqa/accuracy") in cells(score_table(rows))


@pytest.mark.parametrize("runs", [None, {"a": []}])
def test_a_score_without_a_step_is_left_out_where_no_last_step_is_known(runs):
    table = score_table([ScoreRow("a", None, "qa/accuracy", 0.5)], runs=runs)
    assert cells(table) == {}
    without = finding(table, "OD502")
    assert without.message.endswith("the run's last step. 1 of them is left out: that step is not known.")
    assert without.evidence == {"rows": 1, "left_out": 1}


def test_scores_of_unknown_runs_are_left_out_and_named():
    rows = [ScoreRow(run, 10, "qa/accuracy", 0.5) for run in ("a", "y", "x", "x")]
    table = score_table(rows, runs={"b": [10], "a": [10]})
    assert list(cells(table)) == [("a", 10, "qa/accuracy")]
    unknown = finding(table, "OD501")
    assert unknown.message == "Expected scores of 'a', 'b', got 3 of 'x', 'y'."
    assert unknown.evidence == {"runs": ["x", "y"], "rows": 3}


def test_of_many_unknown_runs_eight_are_named():
    rows = [ScoreRow(f"x{number}", 10, "qa/accuracy", 0.5) for number in range(10)]
    message = finding(score_table(rows, runs={"a": [10]}), "OD501").message
    assert message.endswith("'x6', 'x7' and 2 more.")


def test_scores_at_steps_without_measures_are_kept_and_named():
    rows = [ScoreRow("a", step, task, 0.5) for step in (5, 10, 15) for task in ("qa/accuracy", "vqa/accuracy")]
    table = score_table(rows, runs={"a": [10, 20]})
    assert len(cells(table)) == 6
    apart = finding(table, "OD502")
    assert apart.step == 5
    assert apart.evidence == {"places": 2, "first": [["a", 5], ["a", 15]]}
    assert apart.message == (
        "4 scores have no checkpoint with measures at the same step and are not related to any (for example step 5 of "
        "run 'a')."
    )


def test_scores_before_training_have_no_measures_and_need_none():
    table = score_table([ScoreRow("a", step, "qa/accuracy", 0.5) for step in (0, 10)], runs={"a": [10]})
    assert len(cells(table)) == 2
    assert table.findings == ()


def test_scores_of_files_stand_beside_those_that_were_recorded():
    arrays = {name: (("step", "task"), [[value], [np.nan]]) for name, value in (("score", 0.4), ("items", 9.0))}
    recorded = xr.Dataset(
        arrays | {"standard_error": (("step", "task"), [[0.1], [np.nan]])}, {"step": [10, 20], "task": ["oddity"]}
    )
    rows = [*rows_of({"a": recorded}), ScoreRow("a", 20, "oddity", 0.6), ScoreRow("a", 0, "eval_loss", 2.0)]
    scores = score_table(rows, directions={"oddity": "lower"}).scores
    joined = with_file_scores(recorded, scores.sel(run="a"))
    assert joined["step"].values.tolist() == [0, 10, 20]
    np.testing.assert_array_equal(joined["score"].sel(task="oddity"), [np.nan, 0.4, 0.6])
    np.testing.assert_array_equal(joined["items"].sel(task="oddity"), [np.nan, 9, np.nan])
    assert (joined["direction"] == -1).all()
    assert with_file_scores(None, scores.sel(run="a"))["score"].sel(task="eval_loss", step=0) == 2


@pytest.mark.parametrize("by_step", [False, True])
def test_retained_tasks_are_marked_by_records_and_by_name(by_step):
    table = score_table([ScoreRow("a", 10, task, 0.5) for task in ("mmlu/acc", "vqa/acc", "wiki")])
    recorded = table.scores.sel(run="a").isel(task=[2]).drop_vars(["run", "direction"])
    marks = ("task", [True]) if not by_step else (("step", "task"), [[True]])
    joined = with_file_scores(recorded.assign(retained=marks), table.scores.sel(run="a"), ["mmlu"])
    assert joined["retained"].dtype == bool
    assert joined["task"].values[joined["retained"].values].tolist() == ["mmlu/acc", "wiki"]
    assert "retained" not in with_file_scores(None, table.scores.sel(run="a"))


def test_cells_that_are_no_numbers_are_missing_from_the_table(tmp_path):
    lines = ["run,step,task,score,items,standard_error", "a,10,qa,0.5,many,0.1", "a,20,qa,n/a,5,0.1", "b,10,qa,NaN,5,"]
    (tmp_path / "scores.csv").write_text("\n".join([*lines, "b,20,qa,1e-1,5,"]))
    file = read_scores(tmp_path / "scores.csv")
    found = cells(score_table(file.rows, directions={"qa": "higher"}))
    assert found.keys() == {("a", 10, "qa"), ("b", 20, "qa")}
    np.testing.assert_array_equal(found["a", 10, "qa"], (0.5, np.nan, 0.1))
    np.testing.assert_array_equal(found["b", 20, "qa"], (0.1, 5, np.nan))
    assert [finding.evidence for finding in file.findings] == [{"cells": 3}]


def test_the_direction_is_the_users_else_the_files_else_the_names():
    tasks = {"a/loss": False, "b/loss": True, "c/loss": None, "oddity": None}
    rows = [ScoreRow("r", 10, task, 1.0, higher_is_better=higher) for task, higher in tasks.items()]
    table = score_table(rows, directions={"a/loss": "higher"})
    assert dict(zip(tasks, table.scores["direction"].values.tolist(), strict=True)) == {
        "a/loss": 1,
        "b/loss": 1,
        "c/loss": -1,
        "oddity": 0,
    }


def test_a_direction_that_one_file_states_holds_where_another_is_silent():
    rows = [ScoreRow("a", 10, "oddity", 1.0, higher_is_better=False), ScoreRow("b", 10, "oddity", 2.0)]
    assert score_table(rows).scores["direction"].values.tolist() == [-1]
    assert score_table(rows[::-1]).scores["direction"].values.tolist() == [-1]


@pytest.mark.parametrize(("task", "asked", "expected"), [("x/loss", {}, -1), ("x", {}, 0), ("x", {"x": "higher"}, 1)])
def test_of_files_that_contradict_each_other_on_a_direction_neither_counts(task, asked, expected):
    rows = [ScoreRow(run, 10, task, 1.0, higher_is_better=run == "a") for run in "ab"]
    table = score_table(rows, directions=asked)
    assert table.scores["direction"].values.tolist() == [expected]
    torn = finding(table, "OD505")
    assert torn.message == (
        f"Score files contradict each other on whether higher is better for '{task}'. The user's word decides, else "
        "the name of the score."
    )
    assert torn.evidence == {"tasks": [task]}


@pytest.mark.parametrize("runs", [None, {"caf\udce9": [5, 2**62 + 1]}])
def test_names_that_are_no_unicode_and_large_steps_are_kept_as_they_are(runs):
    rows = [
        ScoreRow("caf\udce9", 2**62 + 1, "qa\udce9/accuracy", 0.5),
        ScoreRow("caf\udce9", None, "qa\udce9/loss", 0.25),
    ]
    assert cells_of(score_table(rows, runs=runs)) == {
        ("caf\udce9", 2**62 + 1, "qa\udce9/accuracy"): 0.5,
        ("caf\udce9", 2**62 + 1, "qa\udce9/loss"): 0.25,
    }


def test_an_infinite_score_given_twice_agrees_with_itself():
    table = score_table([ScoreRow("a", 10, "qa/loss", math.inf)] * 2)
    assert table.scores["score"].values.tolist() == [[[math.inf]]]
    assert finding(table, "OD503").evidence == {"places": 1, "contradictions": 0}


def test_a_direction_of_a_task_without_scores_is_named_beside_the_tasks_there_are():
    table = score_table([ScoreRow("r", 10, "vqa/accuracy", 1.0)], directions={"vqa": "higher"})
    absent = finding(table, "OD512")
    assert absent.message == "A direction is given for 'vqa', but there are only scores of 'vqa/accuracy'."
    assert absent.evidence == {"tasks": ["vqa"]}


def test_another_direction_than_higher_or_lower_is_refused():
    message = "directions['vqa']: expected 'higher' or 'lower' (whichever is better), got 'up'."
    with pytest.raises(ValueError, match=re.escape(message)):
        score_table([ScoreRow("r", 10, "vqa", 1.0)], directions={"vqa": "up"})


def test_scores_of_results_are_rows_again():
    dims = ("step", "task")
    group = xr.Dataset(
        {
            "score": (dims, [[0.5, np.nan, 2.0], [0.75, 3.0, np.nan]]),
            "items": (dims, [[40, np.nan, np.nan], [40, 8, np.nan]]),
            "standard_error": (dims, [[0.1, np.nan, np.nan], [0.05, np.nan, np.nan]]),
            "direction": (dims, [[1, -1, 0], [1, -1, 0]]),
        },
        {"step": [10, 20], "task": ["qa", "vqa", "oddity"]},
    )
    table = score_table(rows_of({"a": group, "b": group.isel(step=[1])}))
    assert table.scores["direction"].to_series().to_dict() == {"qa": 1, "vqa": -1, "oddity": 0}
    found = cells(table)
    assert found.keys() == {
        ("a", 10, "qa"),
        ("a", 20, "qa"),
        ("a", 20, "vqa"),
        ("a", 10, "oddity"),
        ("b", 20, "qa"),
        ("b", 20, "vqa"),
    }
    assert found["a", 20, "qa"] == (0.75, 40.0, 0.05)
    np.testing.assert_array_equal(found["b", 20, "vqa"], (3.0, 8.0, np.nan))


def scores(values, tasks, directions):
    coords = {"run": ["a", "b"], "step": [1, 2, 3], "task": tasks, "direction": ("task", directions)}
    return xr.DataArray(values, coords, ("run", "step", "task"))


def standard(values):
    return (values - values.mean()) / values.std()


def test_a_task_counts_once_however_many_scores_it_has():
    values = np.random.default_rng(0).standard_normal((2, 3, 4))
    tasks = ["eval_loss", "eval_ppl", "eval_accuracy", "vqa/accuracy"]
    mean = better(scores(values, tasks, [-1, -1, 1, 1])).sel(task="all").values
    of_evaluation = -standard(values[..., 0]) - standard(values[..., 1]) + standard(values[..., 2])
    np.testing.assert_allclose(mean, (standard(of_evaluation) + standard(values[..., 3])) / 2)


def test_the_mean_is_missing_where_a_score_is_and_unknown_directions_are_left_out():
    values = np.random.default_rng(1).standard_normal((2, 3, 3))
    values[0, 1, 0] = np.nan
    mean = better(scores(values, ["qa/acc", "vqa/acc", "oddity"], [1, 1, 0])).sel(task="all").values
    kept = values[..., 0][np.isfinite(values[..., 0])]
    first = (values[..., 0] - kept.mean()) / kept.std()
    expected = (first + standard(values[..., 1])) / 2
    assert np.isnan(mean[0, 1])
    np.testing.assert_allclose(mean[1], expected[1])


@pytest.mark.parametrize(
    ("tasks", "directions"), [(["qa/acc", "oddity"], [1, 0]), (["all", "qa/acc"], [1, 1]), (["x", "y"], [0, 0])]
)
def test_there_is_no_mean_of_one_direction_or_beside_a_task_of_its_name(tasks, directions):
    values = np.random.default_rng(2).standard_normal((2, 3, 2))
    turned = better(scores(values, tasks, directions))
    assert turned["task"].values.tolist() == tasks
    np.testing.assert_array_equal(turned, values)


def test_a_task_that_does_not_vary_adds_nothing_to_the_mean():
    values = np.random.default_rng(3).standard_normal((2, 3, 2))
    values[..., 1] = 0.5
    mean = better(scores(values, ["qa/acc", "vqa/acc"], [1, 1])).sel(task="all")
    np.testing.assert_allclose(mean, standard(values[..., 0]) / 2)
