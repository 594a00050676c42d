"""What is answered to "do the tasks fight?" where it is known whether they do."""

from __future__ import annotations

import json

import numpy as np
import pytest

from dynamics.report.answers.conflicts import do_tasks_fight, pair_sentence
from dynamics.report.summary import fisher_summary
from tests.fishers import with_fisher
from tests.trees import HOSTILE, example_tree

SHARE = {"vqa": (3.0, 0.0, 0.0, 0.0), "report": (2.4, 1.8, 0.0, 0.0)}
FIGHT = {"vqa": (3.0, 0.0, 0.0, 0.0), "report": (-2.4, 1.8, 0.0, 0.0)}
NOISE = {"vqa": (0.0, 0.0, 0.0, 0.0), "report": (0.0, 0.0, 0.0, 0.0)}


def answered(means=None, *, tree=None, **changes):
    tree = with_fisher(example_tree(3, 2), means=means, **{"groups": 30, **changes}) if tree is None else tree
    fisher = fisher_summary(tree)
    answer = do_tasks_fight(tree, {"fisher": fisher})
    json.dumps(answer.to_json(), allow_nan=False)
    for evidence in answer.evidence:
        group, _, name = evidence.path.removeprefix("/").partition("/")
        assert name in tree[group]
    return answer


@pytest.mark.parametrize(
    ("means", "verdict", "words"),
    [
        (SHARE, "yes", "Tasks report and vqa share directions: cosine 0."),
        (FIGHT, "no", "Tasks report and vqa fight: cosine −0."),
        (NOISE, "undecided", "Whether report and vqa share directions or fight is not resolved with 60 samples"),
    ],
)
def test_two_tasks_share_or_fight(means, verdict, words):
    answer = answered(means)
    assert answer.verdict == verdict
    assert answer.answer.startswith(words)
    assert (answer.sure, answer.surer != "") == ((None, True) if verdict == "undecided" else (0.95, False))


def test_what_a_step_for_one_does_to_the_other_follows_from_the_sign():
    assert "a gradient step for one lowers the other's loss" in answered(SHARE).answer
    assert "a gradient step for one raises the other's loss" in answered(FIGHT).answer


def test_of_four_tasks_the_resolved_pairs_are_named_and_the_others_counted():
    answer = answered()
    assert answer.verdict == "mixed"
    assert answer.answer.startswith("Tasks chart and document share directions: ")
    assert "chart and grounding fight: " in answer.answer
    assert "; 3 of 6 pairs are not resolved with 120 samples; the tasks use " in answer.answer
    assert [row.path for row in answer.evidence] == 3 * ["/tasks/cosine"] + [
        "/tasks/divergence_normalised",
        "/tasks/divergence_p_value",
    ]
    assert answer.surer == "Probe more than 120 samples, with more groups."


def test_of_many_resolved_pairs_three_are_named_the_strongest_first():
    angles = np.linspace(0, np.pi, 5)
    means = {f"task{n}": (4 * np.cos(angle), 4 * np.sin(angle), 0.0, 0.0) for n, angle in enumerate(angles)}
    answer = answered(means)
    cosines = [abs(row.value) for row in answer.evidence[:3]]
    assert cosines == sorted(cosines, reverse=True)
    assert answer.answer.count("other's loss") == 3
    assert " more " in answer.answer


def test_an_interval_of_all_pairs_together_is_wider_than_of_one():
    fisher = fisher_summary(with_fisher(example_tree(3, 2), groups=30))
    for pair in fisher["pairs"]:
        if pair["state"] != "unresolved":
            assert pair["together"]["low"] <= pair["cosine"]["low"]
            assert pair["together"]["high"] >= pair["cosine"]["high"]
    [alone] = fisher_summary(with_fisher(example_tree(3, 2), means=SHARE, groups=30))["pairs"]
    assert alone["together"]["low"] == pytest.approx(alone["cosine"]["low"])


def test_few_groups_resolve_nothing():
    answer = answered(FIGHT, groups=2)
    assert answer.verdict == "undecided"


def test_one_task_or_no_fisher_is_not_asked():
    assert answered({"vqa": SHARE["vqa"]}).verdict == "not_asked"
    answer = do_tasks_fight(example_tree(3, 2), {"fisher": None})
    assert answer.verdict == "not_asked"
    assert "--probe module:function" in answer.surer


def test_missing_numbers_do_no_harm():
    tree = with_fisher(example_tree(3, 2), means=SHARE).copy(deep=True)
    for name in ("cosine", "cosine_low", "cosine_high", "overlap", "divergence_normalised", "divergence_p_value"):
        tree["tasks"][name][:] = np.nan
    assert answered(tree=tree).verdict == "undecided"


def test_names_are_told_as_they_are_on_one_line():
    answer = answered({f"{HOSTILE}\n\x1b[31m": FIGHT["vqa"], "Bericht": FIGHT["report"]})
    assert HOSTILE in answer.answer
    assert "\n" not in answer.answer
    assert "\x1b" not in answer.answer


def known(state, **changes):
    unknown = {"value": None, "low": None, "high": None}
    pair = {"tasks": ["a", "b"], "state": state, "cosine": {**unknown, "value": -0.31}}
    together = {"low": -0.45, "high": -0.12}
    return {**pair, "together": together, "overlap": unknown, "transfer": unknown, "transfer_back": unknown, **changes}


def test_the_sentence_of_a_pair_has_conflict_overlap_and_transfer():
    transfer = {"transfer": {"value": -2.0}, "transfer_back": {"value": -1.0}}
    overlap = {"value": 0.6, "low": 0.4, "high": 0.8}
    assert pair_sentence(known("conflict", overlap=overlap, **transfer), 64) == (
        "Tasks a and b fight: cosine −0.31 (−0.45 to −0.12), a gradient step for one raises the other's loss; their "
        "Fishers overlap by 0.600 (0.40 to 0.80); to first order, a plain gradient step for the other of learning rate "
        "0.001 changes the loss of b by +0.20 % and a by +0.10 %."
    )


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("undecided", "Whether a and b fight is not resolved: cosine −0.31 (−0.45 to −0.12)."),
        (
            "unresolved",
            "Whether a and b fight is not resolved: a mean gradient is indistinguishable from zero with 64 samples.",
        ),
    ],
)
def test_the_sentence_of_an_open_pair_says_why(state, words):
    assert pair_sentence(known(state), 64) == words
