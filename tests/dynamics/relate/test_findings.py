"""What a reader of associations and comparisons must know: whole messages, and when there is none."""

import numpy as np
import pytest
import xarray as xr

from dynamics.relate import associate, compare, findings_of


def measures(runs, seed=0, steps=4):
    values = np.random.default_rng(seed).standard_normal((len(runs), steps))
    return xr.Dataset({"m": (("run", "step"), values)}, {"run": list(runs), "step": range(steps)})


def associated(runs, scored=None, task="qa/accuracy", **options):
    scores = measures(scored or runs, 1)["m"].expand_dims(task=[task])
    return findings_of(associate(measures(runs), scores, headline="m", **options))


def compared(first, second, others=(), **options):
    return findings_of(
        compare(measures([*first, *second, *others]), {"a": first, "b": second}, headline="m", **options)
    )


def one(findings):
    (finding,) = findings
    return finding


RUNS = ["ash", "birch", "cedar", "elm", "fir"]


def test_enough_runs_leave_nothing_to_say():
    assert associated(RUNS) == []
    assert compared(["a1", "a2", "a3", "a4"], ["b1", "b2", "b3", "b4"], pairs={}) == []


def test_too_few_runs_cannot_decide():
    finding = one(associated(RUNS[:3]))
    assert finding.code == "OD507"
    assert finding.message.startswith("1 of 1 question cannot be decided with 3 independent units: the smallest ")
    assert finding.remedy.startswith("Add independent runs")
    assert (finding.evidence["questions"], finding.evidence["n"]) == (1, 3)


def test_groups_of_fewer_than_three_runs_are_described():
    finding = one(compared(["a1", "a2"], ["b1", "b2", "b3"], pairs={}))
    assert (finding.code, finding.message) == (
        "OD507",
        "a − b: a group has fewer than 3 runs, so the difference is described, not tested.",
    )
    assert finding.evidence == {"comparisons": ["a − b"]}


@pytest.mark.parametrize(
    ("count", "message"),
    [
        (1, "1 run without a score or measure is left out: x0."),
        (9, "9 runs without a score or measure are left out: x0, x1, x2, x3, x4, x5, x6, x7 and 1 more."),
    ],
)
def test_runs_that_lack_scores_are_left_out(count, message):
    finding = one(associated([*RUNS, *(f"x{number}" for number in range(count))], RUNS))
    assert (finding.code, finding.message) == ("OD508", message)


def test_runs_of_no_group_are_left_out():
    finding = one(compared(["a1", "a2", "a3", "a4"], ["b1", "b2", "b3", "b4"], ["c1"], pairs={}))
    assert (finding.code, finding.message) == ("OD508", "1 run without a group is left out: c1.")


def test_runs_without_a_partner_are_named():
    first, second = [f"a_{number}" for number in range(7)], [f"b_{number}" for number in range(6)]
    finding = one(compared(first, second))
    assert (finding.code, finding.message) == (
        "OD511",
        "1 run without a partner in another group is left out of paired comparisons: a_6.",
    )


def test_repeats_are_named_unless_clusters_say_what_runs_share():
    runs = ["ash_s1", "ash_s2", "elm_s1", "elm_s2", "fir"]
    finding = one(associated(runs))
    assert (finding.code, finding.message) == (
        "OD509",
        "Runs count as independent, but their names look like repeats of one another: ash_s1, ash_s2; elm_s1, elm_s2.",
    )
    assert "OD509" not in [finding.code for finding in associated(runs, clusters={run: run[:3] for run in runs})]


def test_an_unknown_direction_is_named_with_how_to_say_it():
    finding = one(associated(RUNS, task="oddity"))
    assert (finding.code, finding.evidence) == ("OD505", {"tasks": ["oddity"]})
    assert finding.remedy == "Pass --higher oddity or --lower oddity; in Python, directions={'oddity': 'higher'}."
