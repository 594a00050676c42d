"""Sentences say what the numbers allow, in the order of the rules, and no more."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from dynamics.findings import from_json, to_json
from dynamics.intervention.findings import (
    findings_of,
    headline,
    measured_steps,
    sharpness_findings,
    statements,
    verdict,
)
from dynamics.schema import SHARPNESS, label_arrays
from tests.interventions import CASES, Outcome, intervention

CAVEAT = "of one run, and intervals hold for the directions found: to say something of a recipe, compare several runs."


def first(outcome: Outcome, **options) -> str:
    return statements(intervention(outcome, **options))[0]


def codes(*outcomes: Outcome, **options) -> list[str]:
    return [finding.code for finding in findings_of(intervention(*outcomes, **options))]


@pytest.mark.parametrize("name", CASES)
def test_each_case_has_its_verdict(name):
    assert verdict(headline(intervention(CASES[name]), 100).sel(task="all")) == name


def test_a_part_that_pays_more_is_told_with_all_effects():
    assert statements(intervention(CASES["more"])) == [
        "Of the update to step 100, 22.0 % of the squared norm lies in the 16 leading directions (of other groups). "
        "Alone, that part lowers the held-out loss by 0.079 (95 % interval 0.059 to 0.099), the rest raises it by "
        "0.031 (0.011 to 0.051), the whole lowers it by 0.050 (0.030 to 0.070). That part pays more than its share of "
        "the norm (by 0.069, 95 % interval 0.049 to 0.089).",
        f"This is one update {CAVEAT}",
    ]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "less",
            "That part lowers the loss, by less than its share of the norm (0.12 short, 95 % interval 0.095 to 0.14).",
        ),
        (
            "as_much",
            "That part is not shown to pay more or less than its share of the norm (excess 0, 95 % interval −0.020 to "
            "0.020).",
        ),
        ("no_gain", "Concentrated, but that part does not lower the loss."),
        (
            "unresolved",
            "The whole update's effect on these samples cannot be told from 0, so nothing is said of shares. If it is "
            "as large as estimated, about 400 groups instead of 40 would show it.",
        ),
        (
            "together",
            "The two parts work only together (interaction 0.12 of 0.070), so neither has a share. At a quarter of its "
            "length they can be split: alone, that part may lower the loss by 0.011 (95 % interval −0.0090 to 0.031), "
            "the rest may lower it by 0.019 (−0.0010 to 0.039), the whole lowers it by 0.037 (0.017 to 0.057).",
        ),
    ],
)
def test_the_judgement_ends_the_first_paragraph(name, sentence):
    assert first(CASES[name]).endswith(sentence)


@pytest.mark.parametrize("name", ["unresolved", "together"])
def test_without_shares_nothing_is_said_of_a_share_of_the_norm(name):
    assert "share of the norm" not in " ".join(statements(intervention(CASES[name])))


def test_an_effect_that_is_not_resolved_only_may_be():
    assert "Alone, that part may raise the held-out loss by 0.010 (95 % interval −0.010 to 0.030), the rest lowers" in (
        first(CASES["no_gain"])
    )


def test_parts_that_spoil_each_other_do_not_work_together():
    words = first(Outcome(on=0.08, off=0.08, full=0.05))
    assert words.endswith(
        "The two parts undo much of each other's effect (interaction −0.11 of 0.050), so neither has a share. They "
        "cannot be split at any shorter length that was run."
    )


def test_the_groups_that_would_be_needed_are_named_where_they_are_more():
    group = intervention(CASES["unresolved"])
    group["required_groups"][:] = 30
    assert statements(group)[0].endswith("so nothing is said of shares.")
    group["required_groups"][:] = np.nan
    assert statements(group)[0].endswith("so nothing is said of shares.")
    assert findings_of(group)[0].remedy == "Probe samples of more groups, or take apart a longer increment."


def test_a_part_that_random_directions_match_is_not_called_concentrated():
    outcome = replace(CASES["no_gain"], captured=0.5)
    assert first(outcome).endswith(" Concentrated, but that part does not lower the loss.")
    assert first(replace(outcome, random=0.6)).endswith(" That part does not lower the loss.")


def test_of_a_harmful_update_the_part_does_harm():
    harmful = Outcome(on=-0.031, off=-0.022, full=-0.053, captured=0.18, error=0.005)
    assert first(harmful).endswith(
        "the whole raises it by 0.053 (0.048 to 0.058). Concentrated, but that part does not lower the loss. It does "
        "more of the harm than its share of the norm (by 0.021, 95 % interval 0.016 to 0.026)."
    )
    helpful_alone = Outcome(on=0.01, off=-0.06, full=-0.1, captured=0.05, error=0.001)
    assert first(helpful_alone).endswith(
        "Alone, that part lowers the loss, but in the update it does more of the harm than its share of the norm (by "
        "0.010, 95 % interval 0.0090 to 0.011)."
    )


def test_a_share_outside_the_space_belongs_to_the_rest():
    assert "The rest includes the 4.0 % of the update that no gradient reaches." in first(
        CASES["more"], share_outside_space=0.04
    )
    assert "reaches" not in first(CASES["more"], share_outside_space=4e-4)


@pytest.mark.parametrize(
    ("shorter", "sentence"),
    [
        ({("on", 0.5): 0.2}, "At half its length, that part would have lowered the loss by more (0.20)."),
        (
            {("on", 0.25): 0.1},
            "At a quarter of its length, the estimate for that part is higher (0.10), but the intervals overlap.",
        ),
        ({("full", 0.5): 0.2}, "At half its length, the whole update would have lowered the loss by more (0.20)."),
    ],
)
def test_overshoot_is_claimed_only_where_intervals_lie_apart(shorter, sentence):
    assert first(replace(CASES["more"], shorter=shorter)).endswith(sentence)


@pytest.mark.parametrize("shorter", [{("full", 0.5): 0.06}, {("on", 0.5): 0.07}])
def test_no_overshoot_is_told_of_noise_in_the_whole_or_of_a_curve_that_rises(shorter):
    assert "At half" not in first(replace(CASES["more"], shorter=shorter))


def test_less_harm_at_a_shorter_length_is_no_overshoot():
    assert "At a quarter" not in first(CASES["no_gain"])


def test_a_longer_part_is_no_overshoot():
    group = intervention(CASES["more"]).assign_coords(scale=[0.5, 1.0, 1.5])
    group["effect"].loc[{"arm": "on", "scale": 1.5}] = 0.3
    assert "length" not in statements(group)[0]


def test_other_k_and_tasks_are_told_by_their_adjusted_p():
    group = intervention(CASES["more"], tasks=("all", "report", "vqa"), ks=(4, 16), factors={"vqa": 3.0})
    group["excess_p"].loc[{"k": 4, "task": "report"}] = 0.06
    group["excess_p"].loc[{"k": 16, "task": "vqa"}] = 0.049
    group["excess"].loc[{"k": 4, "task": "vqa"}] *= -1
    group["resolved"].loc[{"k": 16, "task": "report"}] = False
    assert statements(group)[1] == (
        "Beside the headline, that part pays more than its share of the norm for k = 4 (all samples) and k = 16 (vqa); "
        "less than its share of the norm for k = 4 (vqa): p ≤ 0.049, adjusted for all 6 pairs of k and task."
    )


def test_other_k_and_tasks_without_a_difference_are_not_told():
    group = intervention(CASES["as_much"], tasks=("all", "report", "vqa"), ks=(4, 16))
    assert statements(group)[1:] == [f"This is one update {CAVEAT}"]


def test_a_single_task_is_not_told_twice():
    group = intervention(CASES["more"], tasks=("all", "vqa"))
    assert statements(group)[1:] == [f"This is one update {CAVEAT}"]


def test_the_last_step_that_was_run_is_told_and_steps_are_counted():
    group = intervention(CASES["more"], CASES["no_gain"], CASES["more"], CASES["less"])
    group = group.where(group["step"] < 400)  # flags become numbers with gaps
    assert measured_steps(group) == [100, 200, 300]
    paragraphs = statements(group)
    assert paragraphs[0].startswith("Of the update to step 300,")
    assert paragraphs[1] == (
        "Over 3 steps: that part pays more than its share of the norm (2 of 3); that part does not lower the loss (1 "
        f"of 3). These are updates {CAVEAT}"
    )


def test_the_headline_is_that_of_its_step():
    group = intervention(CASES["more"], CASES["more"], ks=(4, 16))
    group["headline"][0] = [True, False]
    assert [int(headline(group, step)["k"]) for step in (100, 200)] == [4, 16]


def test_one_direction_is_one():
    assert "lies in the leading direction (of other groups)" in first(CASES["more"], ks=(1,))


def test_scores_stand_beside_the_losses():
    scored = replace(CASES["more"], score=(0.1, -0.2))
    assert first(scored).endswith(
        "Scores change: the score by 0.10 (95 % interval 0.050 to 0.15) with that part alone and by −0.20 (−0.25 to "
        "−0.15) with the whole update."
    )
    group = intervention(scored, tasks=("all", "report", "vqa"))
    group["score_effect"].loc[{"task": "report"}] = np.nan
    assert "Scores change: vqa by 0.10 (95 % interval" in statements(group)[0]


def test_scores_that_stay_the_same_have_no_interval():
    scored = replace(CASES["more"], score=(0.0, 0.0))
    group = intervention(scored, tasks=("all", "report", "vqa"))
    for end in ("", "_low", "_high"):
        group[f"score_effect{end}"].loc[{"task": "report"}] = 0.0
        group[f"score_effect{end}"].loc[{"task": "vqa"}] = 0.1
    told = statements(group)[0]
    assert told.endswith("Neither that part nor the whole update changes the score of report.")
    assert "Scores change: vqa by 0.10" in told
    assert "report by" not in told


def test_without_parts_the_whole_is_told():
    group = intervention(CASES["more"]).sel(arm=["full", "random"])
    group = group[["effect", "effect_low", "effect_high", "norm", "headline", "required_groups"]]
    assert statements(group) == [
        "The update to step 100 lowers the held-out loss by 0.050 (95 % interval 0.030 to 0.070)."
    ]
    assert findings_of(group) == []


@pytest.mark.parametrize(
    "lacking", ["captured", "resolved", "separable_scale", "required_groups", "excess_p", "excess"]
)
def test_what_was_not_recorded_is_not_told(lacking):
    group = intervention(*CASES.values(), ks=(4, 16)).drop_vars(lacking)
    assert statements(group)
    assert len(findings_of(group)) == (3 if lacking in ("required_groups", "excess_p") else 0)


def test_a_group_without_numbers_says_nothing():
    group = intervention(CASES["more"])
    group["effect"][:] = np.nan
    assert (statements(group), findings_of(group)) == ([], [])


def test_findings_are_one_for_each_subject():
    found = findings_of(intervention(*CASES.values()))
    assert [finding.code for finding in found] == ["OD701", "OD702", "OD703"]
    unresolved, together, no_gain = found
    assert unresolved.message == (
        "At 1 of 6 steps the effect of the whole update on the loss of the probe samples cannot be told from 0, so its "
        "parts have no shares."
    )
    assert unresolved.evidence == {"steps": [500], "groups": 40, "required_groups": [400]}
    assert together.evidence == {"steps": [600], "separable_scale": [0.25]}
    assert no_gain.message.endswith(
        "Alone, at step 300, it may raise the loss by 0.010 (95 % interval −0.010 to 0.030)."
    )
    assert from_json(to_json(found)) == found


def test_a_single_step_is_named():
    (finding,) = findings_of(intervention(CASES["no_gain"]))
    assert finding.message.startswith("At step 100 the update's part")
    assert " Alone, it may raise" in finding.message


@pytest.mark.parametrize("name", ["more", "less", "as_much"])
def test_shares_that_can_be_told_need_no_finding(name):
    assert codes(CASES[name]) == []


@pytest.mark.parametrize(("apart", "expected"), [(0.0, []), (0.0019, []), (0.0021, ["OD704"])])
def test_losses_of_equal_runs_may_differ_by_a_tenth_of_the_uncertainty(apart, expected):
    assert codes(CASES["more"], repeat_deviation=apart) == expected


@pytest.mark.parametrize(("apart", "expected"), [(9e-6, []), (8e-3, ["OD705"])])
def test_parts_in_half_precision_are_told(apart, expected):
    assert codes(CASES["more"], norm_deviation=apart) == expected


def sharpness(step: int, low: float, value: float, high: float, rate: float) -> xr.Dataset:
    """`/sharpness` of one step, of all samples."""
    ends = {"": value, "_low": low, "_high": high}
    arrays = {f"critical_sharpness{end}": np.array([[number]]) for end, number in ends.items()}
    arrays["learning_rate"] = np.array([rate])
    return xr.Dataset(label_arrays(SHARPNESS, arrays), {"step": [step], "task": ["all"]})


@pytest.mark.parametrize(
    ("low", "rate", "expected"),
    [
        (21.0, 0.1, ["OD706"]),
        (21.0, 2 / 24.5, ["OD706"]),
        (21.0, 2 / 26.9, []),  # 24 is less than nine tenths of 26.9
        (21.0, 2 / 28.0, []),
        (21.0, np.nan, []),
        (np.nan, 0.1, []),
    ],
)
def test_a_step_at_the_edge_is_told_where_the_learning_rate_is_known(low, rate, expected):
    found = sharpness_findings(sharpness(300, low, 24.0, 27.0, rate))
    assert [finding.code for finding in found] == expected


def test_the_last_step_with_a_learning_rate_counts():
    crossed, stable = sharpness(300, 21.0, 24.0, 27.0, 0.1), sharpness(400, 10.0, 12.0, 14.0, 0.1)
    assert sharpness_findings(xr.concat([crossed, stable], "step")) == []
    adam = sharpness(500, 21.0, 24.0, 27.0, np.nan)
    (finding,) = sharpness_findings(xr.concat([stable, crossed.assign_coords(step=[450]), adam], "step"))
    assert finding.step == 450
    assert finding.message == (
        "At step 450 the critical sharpness 24.0 (95 % interval 21.0 to 27.0) exceeds 2/η = 20.0 of the learning rate "
        "0.100: the step as it is raises the loss."
    )
    (finding,) = sharpness_findings(sharpness(7, 18.0, 20.5, 22.0, 0.1))
    assert finding.message.endswith(
        "is at 2/η = 20.0 of the learning rate 0.100: the step as it is leaves the loss where it was."
    )
