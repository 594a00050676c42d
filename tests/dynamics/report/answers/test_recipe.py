"""Which recipe is better: the answer where the difference is known."""

import json

import numpy as np
import pytest
import xarray as xr

from dynamics.relate import compare, compare_scores
from dynamics.report.answers.recipe import which_recipe
from tests.dynamics.relate.test_score_comparison import study
from tests.trees import HOSTILE, example_tree


def answered(compared=None, measures=None):
    """The answer for several runs with these comparisons; its evidence is in the tree."""
    tree = xr.DataTree.from_dict({"/runs/a": xr.Dataset()})
    for name, group in (("score_comparison", compared), ("comparison", measures)):
        if group is not None:
            tree[name] = xr.DataTree(group)
    answer = which_recipe(tree, {})
    assert answer.to_json() == json.loads(json.dumps(answer.to_json(), allow_nan=False))
    for number in answer.evidence:
        _, group, name = number.path.split("/")
        assert name in tree[group]
    return answer


def test_one_run_is_not_asked():
    answer = which_recipe(example_tree(steps=1, matrices=1), {})
    assert (answer.verdict, answer.sure) == ("not_asked", None)
    assert "Pass several runs" in answer.surer


def test_runs_without_labels_or_scores_are_not_asked():
    assert answered().verdict == "not_asked"
    values, groups = study(6, 6, shift=0.05)
    measures = compare(values.rename(task="measure"), groups, headline="vqa/accuracy")
    answer = answered(measures=measures)
    assert answer.verdict == "not_asked"
    assert answer.answer.endswith("the groups differ in vqa/accuracy (imax − dmax).")
    assert "--scores" in answer.surer


def test_a_planted_difference_is_told_with_its_interval():
    answer = answered(compare_scores(*study(6, 6, shift=0.05)))
    assert (answer.verdict, answer.sure) == ("yes", 0.95)
    assert answer.answer.startswith("imax is better than dmax in vqa/accuracy by 0.0")
    assert answer.evidence[0].low > 0


def test_a_loser_named_first_turns_the_sentence():
    answer = answered(compare_scores(*study(6, 6, shift=0.05, tasks=("eval_loss",))))
    assert answer.verdict == "yes"
    assert answer.answer.startswith("dmax is better than imax in eval_loss by 0.0")
    assert "interval 0.0" in answer.answer


def test_three_and_three_runs_cannot_decide_and_the_smallest_design_is_named():
    answer = answered(compare_scores(*study(3, 3, shift=0.05)))
    assert (answer.verdict, answer.sure) == ("undecided", None)
    assert answer.answer.startswith(
        "3 + 3 runs cannot decide whether imax or dmax is better in vqa/accuracy (smallest design that can: 3 + 4 "
        "runs); observed: imax better by 0.0"
    )
    assert answer.surer.startswith("Train more runs: 3 + 4 runs can decide it")


@pytest.mark.parametrize("sizes", [(1, 1), (2, 5)])
def test_groups_of_one_or_two_runs_cannot_decide(sizes):
    assert answered(compare_scores(*study(*sizes, shift=0.5))).verdict == "undecided"


def test_no_difference_is_told_with_what_is_ruled_out():
    answer = answered(compare_scores(*study(8, 8)))
    assert (answer.verdict, answer.sure) == ("undecided", 0.95)
    assert answer.surer == "More runs narrow the interval."
    assert answer.answer.startswith("No difference between imax and dmax is shown in vqa/accuracy (imax − dmax: 95 %")


def test_equal_scores_are_no_difference():
    scores, groups = study(4, 4)
    assert answered(compare_scores(xr.full_like(scores, 0.5), groups)).verdict == "no"


def test_a_trade_of_one_task_for_another_is_mixed_and_less_sure():
    scores, groups = study(7, 7, tasks=("a/accuracy", "b/accuracy"))
    scores[:7] += xr.DataArray([0.06, -0.06], dims="task")
    answer = answered(compare_scores(scores, groups))
    assert (answer.verdict, answer.sure) == ("mixed", 0.90)
    assert "in the mean over 2 scores" in answer.answer
    assert "imax is better than dmax in a/accuracy by" in answer.answer
    assert "dmax is better than imax in b/accuracy by" in answer.answer


def test_other_scores_are_counted():
    scores, groups = study(6, 6, tasks=("a/accuracy", "b/accuracy", "c/accuracy", "d/accuracy"))
    scores[:6] += xr.DataArray([0.05, 0.05, 0.0, 0.0], dims="task")
    answer = answered(compare_scores(scores, groups))
    assert answer.verdict == "yes"
    assert answer.answer.startswith("imax is better than dmax in the mean over 4 scores by ")
    assert "imax is better than dmax in a/accuracy by" in answer.answer
    assert answer.answer.endswith("of 2 other scores, 2 show no difference.")


def test_pairs_are_counted_as_pairs():
    names = {group: [f"{group}_s{seed}" for seed in range(3)] for group in ("imax", "dmax")}
    scores, _ = study(3, 3, shift=0.05)
    scores = scores.assign_coords(run=[*names["imax"], *names["dmax"]])
    pairs = {run: run[-2:] for runs in names.values() for run in runs}
    answer = answered(compare_scores(scores, names, pairs=pairs))
    assert answer.answer.startswith("3 pairs cannot decide whether imax or dmax is better in vqa/accuracy (smallest ")
    assert "6 pairs" in answer.answer


def test_of_three_groups_every_comparison_is_told():
    scores, groups = study(12, 6, shift=0.05)
    thirds = {"imax": groups["imax"][:6], "dmax": groups["dmax"], "other": groups["imax"][6:]}
    answer = answered(compare_scores(scores, thirds))
    assert answer.verdict == "mixed"
    assert "imax is better than dmax" in answer.answer
    assert "no difference between imax and other is shown" in answer.answer


def test_a_score_of_unknown_direction_names_no_winner():
    answer = answered(compare_scores(*study(6, 6, shift=0.05, tasks=("oddity",))))
    assert answer.verdict == "undecided"
    assert answer.answer.startswith("imax is higher than dmax in oddity by 0.0")
    assert answer.surer == "Say which way is better: --higher TASK or --lower TASK."


def test_a_score_that_one_group_lacks_cannot_be_compared():
    scores, groups = study(4, 4)
    scores[4:] = np.nan
    answer = answered(compare_scores(scores, groups))
    assert answer.verdict == "undecided"
    assert answer.answer == "imax and dmax have no score in common."


def test_names_are_told_as_they_are():
    answer = answered(compare_scores(*study(6, 6, shift=0.05, groups=("a − b", HOSTILE))))
    assert answer.answer.startswith(f"a − b is better than {HOSTILE} in vqa/accuracy by 0.0")


def test_of_groups_without_a_difference_few_answers_claim_one():
    """The same with 400 studies of each kind: python -m tests.benchmarks.calibration --table verdicts."""
    rng = np.random.default_rng(0)
    answers = [recipe_answer(rng, (4, 4)) for _ in range(60)]
    claims = [answer.sure for answer in answers if answer.verdict in ("yes", "mixed")]
    assert claims.count(0.95) / 60 <= 0.07
    assert len(claims) / 60 <= 0.10


def recipe_answer(rng, sizes, *, spread=1.0, shift=0.0):
    """The answer for groups whose three scores differ by ``shift`` standard deviations."""
    scores, groups = study(*sizes, tasks=("a/accuracy", "b/accuracy", "c/accuracy"), steps=(10,))
    values = rng.standard_normal(scores.shape) + rng.standard_normal((sum(sizes), 1, 1))
    values[: sizes[0]] = spread * values[: sizes[0]] + shift
    return answered(compare_scores(scores.copy(data=values), groups, draws=999))
