"""Results of runs and rows of scores brought together: which measures, which headline, which groups, which findings."""

import re

import numpy as np
import pytest
import xarray as xr

from dynamics.relate import associate, compare, score_table
from dynamics.relate.run_measures import MEASURES, UPDATE_HEADLINE, measures_of_run, relate_runs, training_loss
from dynamics.relate.score_files import ScoreRow

STEPS = (10, 20, 30, 40)
OF_FISHER = ("ln_participation_ratio", "spectral_entropy", "dominant_ratio")
OF_INTERVENTIONS = ("share", "relative_excess")
OF_UPDATES = ("effective_rank_energy", "stable_rank", "entropy_deficit", "frobenius_norm", "participation_ratio")


def summary(rng, steps):
    dims = ("kind", "step", "quantile")
    coords = {"kind": ["increment", "total"], "step": list(steps), "quantile": [0.25, 0.5, 0.75]}
    return xr.Dataset(
        {f"{name}_quantile": (dims, rng.uniform(1, 4, (2, len(steps), 3))) for name in OF_UPDATES}, coords
    )


def fisher(rng, steps):
    dims = ("block", "task", "step")
    coords = {"block": ["layer0", "global"], "task": ["qa", "all"], "step": list(steps)}
    return xr.Dataset({name: (dims, rng.standard_normal((2, 2, len(steps)))) for name in OF_FISHER}, coords)


def result(seed, steps=STEPS, *, with_fisher=True, **groups):
    """A run's result with the groups that relating reads."""
    rng = np.random.default_rng(seed)
    groups["summary"] = summary(rng, steps)
    if with_fisher:
        groups["fisher"] = fisher(rng, steps)
    return xr.DataTree.from_dict(groups)


def results(names, **options):
    return {name: result(number, **options) for number, name in enumerate(names)}


def accuracies(names, task="qa/accuracy", steps=STEPS, seed=99):
    rng = np.random.default_rng(seed)
    return [ScoreRow(name, step, task, float(rng.random())) for name in names for step in steps]


def only(related, code):
    (found,) = (finding for finding in related.findings if finding.code == code)
    return found


def codes(related):
    return [finding.code for finding in related.findings]


def test_measures_are_the_whole_fishers_and_medians_over_matrices():
    tree = result(0)
    measures = measures_of_run(tree)
    whole = tree["fisher"].to_dataset().sel(block="global", task="all")
    for name in OF_FISHER:
        np.testing.assert_array_equal(measures[name], whole[name])
    for kind in ("increment", "total"):
        medians = tree["summary"].to_dataset().sel(kind=kind, quantile=0.5)
        for name in OF_UPDATES[:-1]:
            np.testing.assert_array_equal(measures[f"{kind}/{name}"], medians[f"{name}_quantile"])
        logarithm = np.log(medians["participation_ratio_quantile"])
        np.testing.assert_array_equal(measures[f"{kind}/ln_participation_ratio"], logarithm)
    assert {array.dims for array in measures.data_vars.values()} == {("step",)}
    assert set(measures.data_vars) <= set(MEASURES)


def test_a_run_without_a_fisher_has_the_measures_of_its_updates():
    with_one, without = measures_of_run(result(0)), measures_of_run(result(0, with_fisher=False))
    assert set(with_one.data_vars) - set(without.data_vars) == set(OF_FISHER)


def test_a_fisher_of_single_blocks_only_is_no_measure():
    tree = result(0)
    tree["fisher"] = xr.DataTree(tree["fisher"].to_dataset().sel(block=["layer0"]))
    assert not set(OF_FISHER) & set(measures_of_run(tree).data_vars)


def test_the_log_of_a_participation_ratio_of_nothing_is_missing():
    tree = result(0)
    ratios = tree["summary"].to_dataset()
    ratios["participation_ratio_quantile"][:, 1] = 0.0
    tree["summary"] = xr.DataTree(ratios)
    assert np.isnan(measures_of_run(tree)[UPDATE_HEADLINE]).values.tolist() == [False, True, False, False]


@pytest.mark.parametrize(("ranks", "present"), [([4, 16], True), ([4, 8], False)])
def test_the_gain_at_sixteen_directions_stands_for_concentration(ranks, present):
    gains = np.random.default_rng(0).standard_normal((2, len(STEPS), 2))
    coords = {"block": ["layer0", "global"], "step": list(STEPS), "k": ranks}
    tree = result(0, concentration=xr.Dataset({"ln_gain": (("block", "step", "k"), gains)}, coords))
    measures = measures_of_run(tree)
    assert ("ln_gain_16" in measures) == present
    if present:
        np.testing.assert_array_equal(measures["ln_gain_16"], gains[1, :, 1])


def effects(rng, steps, ks=(4, 16)):
    """Shares and excesses whose headline is the last k."""
    coords = {"step": list(steps), "k": list(ks), "task": ["qa", "all"]}
    arrays = {name: (("step", "k", "task"), rng.random((len(steps), len(ks), 2))) for name in OF_INTERVENTIONS}
    flags = np.tile(np.arange(len(ks)) == len(ks) - 1, (len(steps), 1))
    return xr.Dataset({**arrays, "headline": (("step", "k"), flags)}, coords)


def test_parts_of_updates_are_measured_at_the_headline_of_each_step():
    group = effects(np.random.default_rng(0), STEPS)
    group["share"][2] = np.nan
    group["headline"] = group["headline"].astype(float)  # as flags with gaps are stored
    group["headline"][1] = [1.0, 0.0]
    measures = measures_of_run(result(0, intervention=group))
    for name in OF_INTERVENTIONS:
        values = group[name].sel(task="all").values
        np.testing.assert_array_equal(
            measures[f"intervention/{name}"], [values[0, 1], values[1, 0], values[2, 1], values[3, 1]]
        )
    assert np.isnan(measures["intervention/share"][2])
    assert set(measures.data_vars) <= set(MEASURES)


def test_without_parts_there_is_no_measure_of_them():
    whole = effects(np.random.default_rng(0), STEPS).drop_vars(OF_INTERVENTIONS)
    for tree in (result(0), result(0, intervention=whole)):
        assert not [name for name in measures_of_run(tree).data_vars if str(name).startswith("intervention")]


def test_a_planted_share_is_found_by_compare_and_by_associate():
    """Eight pairs of runs: in one group the part has 0.3 more of the effect, and scores follow it."""
    rng = np.random.default_rng(0)
    runs, rows = {}, []
    for seed in range(8):
        for label, shift in (("imax", 0.3), ("dmax", 0.0)):
            group = effects(rng, STEPS)
            group["share"] = 0.2 + shift + 0.1 * group["share"]
            group["share"][0] = np.nan  # not resolved at the first step
            name = f"{label}_s{seed}"
            runs[name] = result(rng.integers(2**31), intervention=group)
            share = group["share"].sel(k=16, task="all").values[1:]
            rows += [
                ScoreRow(name, step, "qa/accuracy", float(value + 0.02 * rng.standard_normal()))
                for step, value in zip(STEPS[1:], share, strict=True)
            ]
    labels = {name: name.split("_")[0] for name in runs}
    related = relate_runs(runs, rows, labels=labels, headline="intervention/share")
    comparison = related.groups["comparison"].isel(comparison=0).sel(measure="intervention/share")
    assert bool(comparison["holds"])
    np.testing.assert_allclose(comparison["mean_difference"], 0.3, atol=0.05)
    association = related.groups["association"].sel(measure="intervention/share", task="qa/accuracy")
    assert bool(association["holds"])
    assert association["coefficient"] > 0.7
    unplanted = related.groups["comparison"].isel(comparison=0).sel(measure="intervention/relative_excess")
    assert not bool(unplanted["holds"])
    assert "OD516" not in codes(related)


def test_shares_of_different_k_are_named():
    names = ["a", "b", "c"]
    runs = {
        name: result(seed, intervention=effects(np.random.default_rng(seed), STEPS, ks))
        for seed, (name, ks) in enumerate(zip(names, [(4, 16), (4, 8), (16,)], strict=True))
    }
    related = relate_runs(runs, accuracies(names))
    finding = only(related, "OD516")
    assert finding.message.startswith("Updates were taken apart along different numbers of directions (8, 16).")
    assert finding.evidence == {"k": {"a": [16], "b": [8], "c": [16]}}
    assert "OD516" not in codes(relate_runs({name: runs[name] for name in "ac"}, accuracies("ac")))


def test_associations_are_those_of_associate_on_the_same_numbers():
    names = ["a", "b", "c", "d", "e"]
    runs = results(names)
    related = relate_runs(runs, accuracies(names))
    measures = xr.concat(
        [measures_of_run(tree) for tree in runs.values()], dim=xr.DataArray(names, dims="run", name="run")
    )
    expected = associate(measures, score_table(accuracies(names)).scores)
    association = related.groups["association"]
    assert association.attrs["headline"] == "ln_participation_ratio"
    assert set(related.groups) == {"association"}
    for name in expected.data_vars:
        np.testing.assert_array_equal(association[name], expected[name].sel(measure=association["measure"]))


def test_what_was_related_stands_beside_to_be_drawn():
    names = ["a", "b", "c"]
    runs = results(names)
    rows = accuracies(names)
    association = relate_runs(runs, rows).groups["association"]
    drawn = association["measure_value"].sel(run="b", measure="spectral_entropy")
    np.testing.assert_array_equal(drawn, measures_of_run(runs["b"])["spectral_entropy"])
    scores = association["score"].sel(run="c", scored_task="qa/accuracy")
    assert scores.values.tolist() == [row.score for row in rows if row.run == "c"]


def test_without_scores_and_labels_nothing_is_related():
    related = relate_runs(results(["a", "b"]))
    assert dict(related.groups) == {}
    assert codes(related) == []


@pytest.mark.parametrize(("asked", "missing"), [(None, "ln_participation_ratio"), ("ln_gain_16", "ln_gain_16")])
def test_a_headline_that_no_run_has_is_replaced_by_that_of_increments(asked, missing):
    names = ["a", "b", "c"]
    related = relate_runs(results(names, with_fisher=False), accuracies(names), headline=asked)
    assert related.groups["association"].attrs["headline"] == UPDATE_HEADLINE == "increment/ln_participation_ratio"
    assert only(related, "OD513").message.startswith(
        f"No run has {missing}. The headline measure is {UPDATE_HEADLINE} instead:"
    )


def test_one_run_needs_no_word_on_its_headline():
    runs = results(["a"], with_fisher=False)
    assert "OD513" not in codes(relate_runs(runs, accuracies(["a"])))
    assert "OD513" in codes(relate_runs(runs, accuracies(["a"]), headline="ln_gain_16"))


def test_a_headline_is_kept_where_one_run_has_it():
    names = ["a", "b", "c"]
    runs = results(names, with_fisher=False) | {"d": result(7)}
    related = relate_runs(runs, accuracies([*names, "d"]))
    association = related.groups["association"]
    assert association.attrs["headline"] == "ln_participation_ratio"
    assert "OD513" not in codes(related)
    assert association["n_runs"].sel(task="qa/accuracy", measure="ln_participation_ratio") == 1
    assert association["n_runs"].sel(task="qa/accuracy", measure=UPDATE_HEADLINE) == 4


@pytest.mark.parametrize("headline", ["total/stable_rank", "dominant_ratio"])
def test_a_headline_is_what_was_named(headline):
    names = ["a", "b", "c"]
    related = relate_runs(results(names), accuracies(names), headline=headline, labels={"a": "x", "b": "y", "c": "y"})
    of_measures = [related.groups[name].attrs["headline"] for name in ("association", "comparison")]
    assert of_measures == [headline, headline]
    assert "OD513" not in codes(related)


def test_runs_are_compared_by_their_labels():
    groups = {"imax": ["imax_s1", "imax_s2", "imax_s3"], "dmax": ["dmax_s1", "dmax_s2", "dmax_s3"]}
    runs = results([*groups["imax"], *groups["dmax"]])
    related = relate_runs(runs, labels={run: group for group, names in groups.items() for run in names})
    names = xr.DataArray(list(runs), dims="run", name="run")
    expected = compare(xr.concat([measures_of_run(tree) for tree in runs.values()], dim=names), groups)
    comparison = related.groups["comparison"]
    assert set(related.groups) == {"comparison"}
    assert comparison["comparison"].values.tolist() == ["imax − dmax"]
    for name in ("mean_difference", "mean_p_value", "difference", "statement"):
        np.testing.assert_array_equal(comparison[name], expected[name].sel(measure=comparison["measure"]))


def test_groups_with_scores_are_compared_in_these_too():
    names = ["a", "b", "c", "d", "e", "f", "g", "h"]
    rows = [ScoreRow(name, step, "qa/accuracy", 0.5 + 0.1 * (name < "e")) for name in names for step in STEPS]
    labels = {name: "x" if name < "e" else "y" for name in names}
    related = relate_runs(results(names), rows, labels=labels)
    assert set(related.groups) == {"association", "comparison", "score_comparison"}
    compared = related.groups["score_comparison"].isel(comparison=0, task=0)
    assert (compared["verdict"].item(), round(compared["difference"].item(), 9)) == ("better", 0.1)
    assert set(related.scores) == set(names)
    assert (related.scores["a"]["score"] == 0.6).all()


def test_groups_of_which_no_run_has_a_score_after_the_start_are_compared_in_measures_alone():
    rows = accuracies(["a", "b"], steps=(0,))
    related = relate_runs(results(["a", "b"]), rows, labels={"a": "x", "b": "y"})
    assert "score_comparison" not in related.groups


def test_runs_without_a_label_are_left_out_of_the_comparison_and_named():
    names = ["a", "b", "c", "d"]
    related = relate_runs(results(names), labels={"a": "x", "b": "y", "d": "y"})
    assert related.groups["comparison"]["run"].values.tolist() == ["a", "b", "d"]
    assert only(related, "OD508").evidence == {"runs": ["c"]}


@pytest.mark.parametrize("labels", [{}, {"a": "x", "b": "x"}, {"a": "x"}, {"stranger": "x", "a": "y"}])
def test_fewer_than_two_groups_of_runs_are_not_compared(labels):
    assert dict(relate_runs(results(["a", "b"]), labels=labels).groups) == {}


def test_each_two_of_three_groups_are_compared_in_the_order_of_the_runs():
    names = ["c1", "a1", "b1", "a2"]
    related = relate_runs(results(names), labels={name: name[0] for name in names})
    assert related.groups["comparison"]["comparison"].values.tolist() == ["c − a", "c − b", "a − b"]


def test_runs_without_scores_are_left_out_of_the_association_and_named():
    names = ["a", "b", "c", "d"]
    related = relate_runs(results(names), accuracies(names[:3]))
    association = related.groups["association"]
    assert association["run"].values.tolist() == association.attrs["runs"] == ["a", "b", "c"]
    left_out = only(related, "OD508")
    assert left_out.message == "1 run without a score or measure is left out: d."
    assert left_out.evidence == {"runs": ["d"]}


def test_scores_of_other_runs_alone_are_related_to_nothing():
    related = relate_runs(results(["a", "b"]), accuracies(["x", "y"]))
    assert dict(related.groups) == {}
    assert only(related, "OD501").evidence == {"runs": ["x", "y"], "rows": 8}


def test_scores_at_steps_without_checkpoints_are_named():
    related = relate_runs(results(["a", "b"]), accuracies(["a", "b"], steps=(5, *STEPS)))
    assert only(related, "OD502").evidence == {"places": 2, "first": [["a", 5], ["b", 5]]}
    assert (related.groups["association"]["n_steps"] == 4).all()


def test_runs_of_different_steps_are_related_at_those_they_share():
    later = (20, 30, 40, 50)
    runs = {"a": result(0), "b": result(1, later), "c": result(2)}
    rows = accuracies("ac") + accuracies("b", steps=later, seed=98)
    association = relate_runs(runs, rows).groups["association"]
    assert association["step"].values.tolist() == [10, 20, 30, 40, 50]
    assert set(association["n_steps"].values.ravel().tolist()) == {3}
    assert set(association["n_runs"].values.ravel().tolist()) == {3}


def logged_scores(value):
    dims = ("step", "task")
    nothing = np.full((4, 1), np.nan)
    arrays = {"score": [[value + step] for step in STEPS], "items": nothing, "standard_error": nothing}
    variables = {name: (dims, np.asarray(array, dtype=float)) for name, array in arrays.items()}
    return xr.Dataset(
        variables | {"direction": (dims, np.full((4, 1), -1))}, {"step": list(STEPS), "task": ["eval_oddity"]}
    )


def test_scores_in_results_count_beside_those_of_files():
    runs = {name: result(n, score=logged_scores(float(n**2))) for n, name in enumerate("abc")}
    association = relate_runs(runs, accuracies("abc")).groups["association"]
    assert association["task"].values.tolist() == ["all", "eval_oddity", "qa/accuracy"]
    assert association["direction"].values.tolist() == [1, -1, 1]
    np.testing.assert_array_equal(association["score"].sel(run="c", scored_task="eval_oddity"), [14, 24, 34, 44])


def test_a_file_that_contradicts_a_result_is_not_believed_either():
    runs = {name: result(n, score=logged_scores(float(n))) for n, name in enumerate("abc")}
    related = relate_runs(runs, [ScoreRow("a", 10, "eval_oddity", 0.5), ScoreRow("a", 20, "eval_oddity", 20.0)])
    assert only(related, "OD503").evidence == {"places": 2, "contradictions": 1}
    scores = related.groups["association"]["score"].sel(run="a", scored_task="eval_oddity")
    np.testing.assert_array_equal(scores, [np.nan, 20, 30, 40])


def test_a_direction_turns_a_score():
    names = ["a", "b", "c"]
    rows = accuracies(names, task="oddity")
    up, down, neither = (
        relate_runs(results(names), rows, directions=directions)
        for directions in ({"oddity": "higher"}, {"oddity": "lower"}, None)
    )
    coefficients = [related.groups["association"]["coefficient"].values for related in (up, down, neither)]
    np.testing.assert_array_equal(coefficients[0], -coefficients[1])
    np.testing.assert_array_equal(coefficients[0], coefficients[2])
    assert codes(neither).count("OD505") == 1
    assert "OD505" not in codes(up)


def test_a_retained_task_without_a_score_is_named():
    rows = [ScoreRow("a", 10, "vqa/acc", 0.5)]
    absent = only(relate_runs(results(["a", "b"]), rows, retained=["vqa", "mmlu"]), "OD520")
    assert absent.message == "Expected retained tasks among the scores, got 'mmlu'; there are scores of 'vqa/acc'."
    assert "there are no scores" in only(relate_runs(results(["a"]), retained=["mmlu"]), "OD520").message


def test_a_direction_without_any_score_is_named():
    related = relate_runs(results(["a", "b"]), directions={"vqa": "higher", "qa": "lower"})
    absent = only(related, "OD512")
    assert (absent.message, absent.remedy) == (
        "A direction is given for vqa, qa, but there are no scores.",
        "Pass them with --scores.",
    )


def test_what_is_no_direction_is_refused():
    message = "directions['qa/accuracy']: expected 'higher' or 'lower' (whichever is better), got 'up'."
    with pytest.raises(ValueError, match=re.escape(message)):
        relate_runs(results(["a", "b"]), accuracies("ab"), directions={"qa/accuracy": "up"})


def log(losses, segments=None):
    """A training log: (step, loss) of each entry, beside a metric that is no loss."""
    steps, values = zip(*losses, strict=True)
    coords = {
        "metric": ["grad_norm", "loss"],
        "log_step": ("row", list(steps)),
        "log_segment": ("row", list(segments or [0] * len(steps))),
    }
    return xr.Dataset({"value": (("row", "metric"), np.stack([np.full(len(values), 7.0), values], axis=1))}, coords)


def test_the_loss_of_a_step_is_the_mean_of_what_was_logged_since_the_step_before():
    rng = np.random.default_rng(0)
    losses = {step: float(rng.random()) for step in range(3, 60, 4)}
    tree = result(0, training=log(list(losses.items())))
    expected = [np.mean([loss for step, loss in losses.items() if end - 10 < step <= end]) for end in STEPS]
    loss = training_loss(tree, STEPS)["loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-12)
    assert loss["step"].values.tolist() == list(STEPS)


def test_a_step_without_a_logged_loss_has_none():
    tree = result(0, training=log([(5, 1.0), (10, np.nan), (25, 3.0), (99, 4.0)]))
    np.testing.assert_array_equal(training_loss(tree, STEPS)["loss"], [1, np.nan, 3, np.nan])
    assert np.isnan(training_loss(result(0), STEPS)["loss"]).all()


def test_of_a_resumed_training_the_later_log_counts():
    entries, segments = [(10, 5.0), (20, 4.0), (10, 1.0), (20, 2.0)], [1, 1, 0, 0]
    tree = result(0, training=log(entries, segments))
    np.testing.assert_array_equal(training_loss(tree, (10, 20))["loss"], [5, 4])


def with_losses(names):
    rng = np.random.default_rng(5)
    return {
        name: result(number, training=log([(step, float(rng.random())) for step in STEPS]))
        for number, name in enumerate(names)
    }


def test_the_logged_loss_is_held_equal_where_that_is_asked_for():
    names = list("abcdef")
    plain, equal = (relate_runs(with_losses(names), accuracies(names), given=given) for given in (None, "loss"))
    associations = [related.groups["association"] for related in (plain, equal)]
    assert [association.attrs["given"] for association in associations] == ["", "loss"]
    np.testing.assert_allclose(associations[0]["coefficient_given_loss"], associations[1]["coefficient"])
    assert not np.allclose(*(association["coefficient"] for association in associations))
    assert "OD514" not in codes(equal)


@pytest.mark.parametrize(
    ("names", "given", "message", "remedy"),
    [
        (
            "abcd",
            "loss",
            "Nothing is held equal. given='loss': expected the training loss of these runs at these steps (loss=, "
            "(run, step)), got none. Log it, or ask for given='trend', which holds each run's own straight line over "
            "the steps equal.",
            "Log the training loss at each checkpoint, or pass --given trend.",
        ),
        (
            "a",
            "trend",
            "Nothing is held equal. given='trend': expected several runs that share at least 3 steps, got the question "
            "'one_run'. Leave it out, or score more checkpoints of each run.",
            "",
        ),
    ],
)
def test_what_cannot_be_held_equal_is_not_and_a_finding_says_why(names, given, message, remedy):
    related = relate_runs(results(names), accuracies(names), given=given)
    assert related.groups["association"].attrs["given"] == ""
    refused = only(related, "OD514")
    assert (refused.message, refused.remedy) == (message, remedy)
    plain = relate_runs(results(names), accuracies(names)).groups["association"]
    np.testing.assert_array_equal(related.groups["association"]["coefficient"], plain["coefficient"])
