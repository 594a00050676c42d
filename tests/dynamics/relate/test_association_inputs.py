"""What associate and compare accept as measures and scores, what they refuse, and what they make of names of runs."""

import re

import numpy as np
import pytest
import xarray as xr

from dynamics.relate import associate, compare, findings_of

RUNS = ["a1", "a2", "a3", "b1", "b2", "b3"]
GROUPS = {"a": RUNS[:3], "b": RUNS[3:]}
STEPS = [10, 20, 30, 40]


def array(last, names, seed=0):
    values = np.random.default_rng(seed).standard_normal((len(RUNS), len(STEPS), len(names)))
    return xr.DataArray(values, {"run": RUNS, "step": STEPS, last: list(names)}, ("run", "step", last))


MEASURES, SCORES = array("measure", ["m", "n"]), array("task", ["qa/accuracy", "vqa/loss"], 1)


def related(measures=MEASURES, scores=SCORES, **options):
    return associate(measures, scores, **({"headline": "m"} | options))


def assert_same(one, other):
    for name in ("coefficient", "p_value", "p_familywise", "statement"):
        np.testing.assert_array_equal(one[name], other[name].sel(measure=one["measure"], task=one["task"]))


@pytest.mark.parametrize("order", [("step", "measure", "run"), ("measure", "run", "step")])
def test_the_order_of_dimensions_changes_nothing(order):
    turned = SCORES.transpose(*(dim if dim != "measure" else "task" for dim in order))
    assert_same(related(), related(MEASURES.transpose(*order), turned))
    comparisons = [compare(values, GROUPS, headline="m") for values in (MEASURES, MEASURES.transpose(*order))]
    np.testing.assert_array_equal(*(comparison["mean_p_value"] for comparison in comparisons))


def test_the_order_of_runs_and_steps_changes_nothing_but_their_order():
    shuffled = MEASURES.isel(run=[5, 0, 3, 1, 4, 2], step=[2, 0, 3, 1])
    one, other = related(), related(shuffled)
    np.testing.assert_allclose(one["coefficient"], other["coefficient"])
    np.testing.assert_allclose(one["p_value"], other["p_value"])


def test_variables_of_a_dataset_over_runs_and_steps_are_measures():
    dataset = MEASURES.to_dataset("measure").assign(of_matrices=(("matrix",), [1.0, 2.0]))
    assert_same(related(), related(dataset))


def test_the_scores_of_a_table_and_its_array_are_the_same():
    assert_same(related(), related(scores=xr.Dataset({"score": SCORES, "items": SCORES * 0 + 40})))


def test_integers_are_numbers():
    whole = (10 * MEASURES).round()
    assert_same(related(whole), related(whole.astype(np.int64)))


def test_the_headline_is_made_of_the_participation_ratio_where_only_that_is_there():
    ratio = np.exp(MEASURES.sel(measure=["m"])).assign_coords(measure=["participation_ratio"])
    ratio[0, 0] = 0.0
    made = related(ratio, headline="ln_participation_ratio")
    assert made["measure"].values.tolist() == ["ln_participation_ratio", "participation_ratio"]
    logarithm = np.log(ratio.where(ratio > 0)).assign_coords(measure=["ln_participation_ratio"])
    given = related(logarithm, headline="ln_participation_ratio")
    np.testing.assert_array_equal(made["coefficient"].sel(measure="ln_participation_ratio"), given["coefficient"][0])
    assert (made["n_steps"].sel(measure="ln_participation_ratio") == 3).all()
    assert related(ratio, headline="participation_ratio")["measure"].values.tolist() == ["participation_ratio"]


@pytest.mark.parametrize(
    ("known", "asked", "expected"),
    [
        (None, None, [1, -1]),
        ([-1, 1], None, [-1, 1]),
        ([0, 0], None, [1, -1]),
        ([-1, 1], {"qa/accuracy": "higher"}, [1, 1]),
        (None, {"vqa/loss": "higher", "a task without scores": "lower"}, [1, 1]),
    ],
    ids=["names", "coordinate", "coordinate that does not know", "the user before it", "another task"],
)
def test_the_direction_is_the_users_else_the_coordinates_else_the_names(known, asked, expected):
    scores = SCORES if known is None else SCORES.assign_coords(direction=("task", known))
    found = related(scores=scores, directions=asked)["direction"].drop_vars("direction").to_series()
    assert found.drop("all").tolist() == expected


def test_unknown_directions_take_no_part_in_the_mean_and_are_noted():
    scores = SCORES.assign_coords(task=["qa/accuracy", "oddity"])
    found = related(scores=scores)
    assert found["task"].values.tolist() == ["qa/accuracy", "oddity"]
    (note,) = (finding for finding in findings_of(found) if finding.code == "OD505")
    assert note.evidence == {"tasks": ["oddity"]}
    assert note.message == (
        "Whether higher is better is unknown for oddity. Their associations keep the sign of the scores as given, and "
        "the mean over tasks leaves them out."
    )
    assert note.remedy == "Pass --higher oddity or --lower oddity; in Python, directions={'oddity': 'higher'}."


def twice(values, dim):
    return xr.concat([values, values.isel({dim: [0]})], dim=dim)


@pytest.mark.parametrize(
    ("measures", "scores", "message"),
    [
        (
            MEASURES.rename(run="seed"),
            SCORES,
            "measures: expected the dimensions ('run', 'step', 'measure'), got ('seed', 'step', 'measure').",
        ),
        (
            MEASURES,
            SCORES.isel(task=0),
            "scores: expected the dimensions ('run', 'step', 'task'), got ('run', 'step').",
        ),
        (
            MEASURES.drop_vars("run"),
            SCORES,
            "measures: expected a coordinate for each dimension, got none for run.",
        ),
        (
            MEASURES,
            SCORES.drop_vars(["step", "task"]),
            "scores: expected a coordinate for each dimension, got none for step, task.",
        ),
        (twice(MEASURES, "run"), SCORES, "measures: expected each run once, got some of them twice."),
        (MEASURES, twice(SCORES, "step"), "scores: expected each step once, got some of them twice."),
        (MEASURES, twice(SCORES, "task"), "scores: expected each task once, got some of them twice."),
        (
            xr.Dataset({"gini": ("matrix", [1.0, 2.0])}),
            SCORES,
            "measures: expected variables of (run, step), got ['gini'] of {'matrix': 2}. Choose a matrix, a kind, or "
            "take a mean first.",
        ),
        (
            MEASURES.assign_coords(measure=["x", "y"]),
            SCORES,
            "headline: expected one of the measures 'x', 'y', got 'm'.",
        ),
        (
            MEASURES,
            SCORES.assign_coords(run=[f"x{number}" for number in range(6)]),
            "Expected runs that have both measures and scores, got measures of ['a1', 'a2', 'a3', 'b1', 'b2', 'b3'] "
            "and scores of ['x0', 'x1', 'x2', 'x3', 'x4', 'x5'].",
        ),
    ],
)
def test_other_measures_and_scores_are_refused(measures, scores, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        related(measures, scores)


def test_clusters_that_lack_a_run_are_refused():
    message = "clusters: expected a cluster for every run, got none for 'b2', 'b3'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        related(clusters={"a1": "x", "a2": "x", "a3": "x", "b1": "y"})


def test_pairs_of_runs_that_are_in_no_group_are_refused():
    message = "pairs: expected runs of the groups, got 'x', 'y'."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        compare(MEASURES, GROUPS, pairs={"y": "1", "x": "1", "a1": "1"}, headline="m")


def named(runs):
    values = np.random.default_rng(0).standard_normal((len(runs), len(STEPS)))
    return xr.Dataset({"m": (("run", "step"), values)}, {"run": list(runs), "step": STEPS})


@pytest.mark.parametrize(
    ("runs", "sets"),
    [
        (["imax_s1", "imax_s2", "dmax_s1", "dmax_s2"], ["imax_s1, imax_s2", "dmax_s1, dmax_s2"]),
        (["imax-seed1", "imax-seed22", "dmax"], ["imax-seed1, imax-seed22"]),
        (["a.rep1", "a.rep2", "b_v1", "b_v2", "c3"], ["a.rep1, a.rep2", "b_v1, b_v2"]),
        (["imax_S1", "imax_s2", "x"], ["imax_S1, imax_s2"]),
        (["run_1", "run_2", "run_3"], []),
        (["imax", "dmax", "base"], []),
        (["qwen-7b", "llama-8b", "gemma-2b"], []),
        (["1", "2", "x"], []),
    ],
)
def test_runs_that_differ_by_a_seed_only_are_taken_for_repeats_where_there_are_others(runs, sets):
    scores = named(runs)["m"].expand_dims(task=["qa/accuracy"])
    found = associate(named(runs), scores, headline="m")
    assert found.attrs["repeats"] == sets
    assert [finding.evidence["sets"] for finding in findings_of(found) if finding.code == "OD509"] == (
        [sets] if sets else []
    )
    clusters = dict.fromkeys(runs, "one")
    assert associate(named(runs), scores, headline="m", clusters=clusters).attrs["repeats"] == []


SIX = range(1, 7)


@pytest.mark.parametrize(
    ("first", "second", "labels"),
    [
        ([f"imax_s{n}" for n in SIX], [f"dmax_s{n}" for n in SIX], [f"s{n}" for n in SIX]),
        ([f"qwen{n}-IMAX" for n in SIX], [f"qwen{n}-dmax" for n in SIX], [f"qwen{n}" for n in SIX]),
        ([f"data{n}/imax.s1" for n in SIX], [f"data{n}/dmax.s1" for n in SIX], [f"data{n}_s1" for n in SIX]),
        ([f"imax_s{n}" for n in SIX], [f"dmax_s{n}" for n in (*SIX, 7)], [f"s{n}" for n in SIX]),
    ],
    ids=["group before seed", "group after model, capitals", "group in the middle", "one without a partner"],
)
def test_runs_are_paired_by_their_names_without_the_groups(first, second, labels):
    found = compare(named([*first, *second]), {"imax": first, "dmax": second}, headline="m")
    pairs = dict(zip(found["run"].values.tolist(), found["run_pair"].values.tolist(), strict=True))
    assert [pairs[run] for run in first] == labels
    assert [pairs[run] for run in second[:6]] == labels
    assert found.attrs["pairs"] == "by name"
    assert found.attrs["unpaired"] == second[6:]
    unpaired = [finding for finding in findings_of(found) if finding.code == "OD511"]
    assert [finding.evidence for finding in unpaired] == [{"runs": second[6:]}] * (len(second) - 6)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([f"run{n}" for n in SIX], [f"other{n}" for n in SIX]),
        ([f"imax_s{n}" for n in SIX], [f"dmax_t{n}" for n in SIX]),
        ([f"imax{n}" for n in SIX], [f"dmax{n}" for n in SIX]),
        (["imax_s1", "imax-s1", *(f"imax_s{n}" for n in SIX[1:])], [f"dmax_s{n}" for n in SIX]),
    ],
    ids=["no group in the names", "other labels", "not a word of its own", "two of one label"],
)
def test_runs_whose_names_say_nothing_are_not_paired(first, second):
    found = compare(named([*first, *second]), {"imax": first, "dmax": second}, headline="m")
    assert found.attrs["pairs"] == "none"
    assert found["n_pairs"].item() == 0
    assert set(found["run_pair"].values.tolist()) == {""}


def test_runs_of_no_group_are_left_out_of_a_comparison_and_noted():
    found = compare(MEASURES, {"a": RUNS[:3], "b": RUNS[3:5]}, headline="m")
    assert found.attrs["runs_left_out"] == ["b3"]
    (note,) = (finding for finding in findings_of(found) if finding.code == "OD508")
    assert note.evidence == {"runs": ["b3"]}
