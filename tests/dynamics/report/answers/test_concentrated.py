"""What is answered to "did updates concentrate, and does it matter?" where both are known."""

from __future__ import annotations

import copy
import json
import math

import pytest

from dynamics.intervention.findings import VERDICTS
from dynamics.report.answers.concentrated import concentration_state, did_updates_concentrate
from dynamics.report.interventions import intervention_summary
from dynamics.report.summary import fisher_summary
from tests.fishers import with_fisher
from tests.interventions import CASES, Outcome, intervention, with_intervention
from tests.trees import example_tree


def answered(tree, *, fisher=None):
    summary = {"fisher": fisher or fisher_summary(tree), "intervention": intervention_summary(tree)}
    answer = did_updates_concentrate(tree, summary)
    json.dumps(answer.to_json(), allow_nan=False)
    for evidence in answer.evidence:
        group, _, name = evidence.path.removeprefix("/").partition("/")
        assert name in tree[group]
    assert answer.answer.endswith(".")
    return answer


@pytest.fixture(scope="module")
def leading():
    return with_fisher(example_tree(3, 2), update="leading")


def changed(tree, **changes):
    """The Fisher's summary with other numbers in the row at k, or beside it."""
    fisher = copy.deepcopy(fisher_summary(tree))
    part = fisher["concentration"]
    for name, value in changes.items():
        (part if name in part else part["at_k"])[name] = value
    return fisher


def interval(value, low, high):
    return {"value": value, "low": low, "high": high}


def test_concentrated_updates_that_pay_more_are_a_yes(leading):
    outcome = Outcome(on=0.04, off=0.02, full=0.06, captured=0.08, error=0.005)
    answer = answered(with_intervention(leading, intervention(outcome, steps=[300])))
    assert answer.verdict == "yes"
    assert answer.answer.startswith(
        "In 3 of 3 updates the 16 leading directions hold more than a fresh gradient's share"
    )
    assert "chance: up to 1); that part brings 67 % (" in answer.answer
    assert answer.answer.endswith(" of the fall of the loss with 8.0 % of the squared norm.")
    assert (answer.sure, answer.surer) == (0.95, "")


@pytest.mark.parametrize("case", [name for name in VERDICTS if name != "more"])
def test_concentrated_updates_that_do_not_pay_more_are_mixed(leading, case):
    answer = answered(with_intervention(leading, intervention(CASES[case], CASES[case])))
    assert answer.verdict == "mixed"
    assert "(step 200; it pays more at 0 of 2 steps)." in answer.answer


def test_an_update_that_raised_the_loss_does_not_pay(leading):
    outcome = Outcome(on=0.04, off=-0.1, full=-0.06, captured=0.3, error=0.005)
    answer = answered(with_intervention(leading, intervention(outcome)))
    assert answer.verdict == "mixed"
    assert "raised the loss" in answer.answer or "does" in answer.answer


def test_another_k_of_the_intervention_is_told(leading):
    answer = answered(with_intervention(leading, intervention(CASES["more"], ks=(4,))))
    assert "; the part in 4 leading directions brings " in answer.answer


def test_concentration_whose_effect_was_not_measured_is_mixed(leading):
    answer = answered(leading)
    assert answer.verdict == "mixed"
    assert answer.answer.endswith("; whether that matters was not measured.")
    assert "--intervene" in answer.surer


def test_a_random_update_is_a_no():
    answer = answered(with_fisher(example_tree(3, 2), update="random"))
    assert answer.verdict == "no"
    assert "less than a fresh gradient's share" in answer.answer


def test_a_gradient_step_is_never_called_concentrated():
    for seed in range(4):
        assert answered(with_fisher(example_tree(3, 2), seed=seed)).verdict in ("undecided", "no")


@pytest.mark.parametrize(
    ("steps", "verdict"),
    [
        ({"concentrated": 9, "of": 12}, "mixed"),
        ({"concentrated": 2, "of": 12}, "mixed"),
        ({"concentrated": 1, "of": 12}, "no"),
        ({"concentrated": 2, "of": 30}, "no"),
        ({"concentrated": 1, "of": 3}, "undecided"),
        ({"concentrated": 1, "of": 1}, "mixed"),
    ],
)
def test_as_many_steps_as_chance_would_have_are_no_claim(leading, steps, verdict):
    answer = answered(leading, fisher=changed(leading, steps=steps))
    assert answer.verdict == verdict
    if verdict == "mixed" and steps["of"] > 1:
        assert f"In {steps['concentrated']} of {steps['of']} updates" in answer.answer


@pytest.mark.parametrize(
    ("gain", "concentrated", "state"),
    [
        (interval(1.4, 1.2, 1.7), True, "concentrated"),
        (interval(0.5, 0.3, 0.8), False, "less"),
        (interval(1.0, 0.8, 1.3), False, "not_shown"),
        (interval(1.4, None, None), False, "not_shown"),
        (interval(None, None, None), False, "no_null"),
    ],
)
def test_the_state_is_that_of_the_interval(leading, gain, concentrated, state):
    steps = {"concentrated": int(concentrated), "of": 1}
    fisher = changed(leading, gain=gain, concentrated=concentrated, steps=steps)
    assert concentration_state(fisher["concentration"]) == state
    answer = answered(leading, fisher=fisher)
    assert answer.verdict == {"concentrated": "mixed", "less": "no"}.get(state, "undecided")


def test_a_gain_close_to_one_is_a_no(leading):
    fisher = changed(leading, gain=interval(1.0, 0.9, 1.1), concentrated=False, steps={"concentrated": 0, "of": 1})
    answer = answered(leading, fisher=fisher)
    assert (answer.verdict, answer.sure) == ("no", 0.95)
    assert (
        "no more than a fresh gradient's share in the 16 leading directions (gain 1.00, 0.900 to 1.10; chance: 1)."
        in answer.answer
    )


def test_a_gain_that_lies_little_above_one_is_not_called_no_more(leading):
    fisher = changed(leading, gain=interval(1.1, 1.02, 1.2), concentrated=False, steps={"concentrated": 0, "of": 1})
    answer = answered(leading, fisher=fisher)
    assert (answer.verdict, "hardly more than a fresh" in answer.answer) == ("no", True)


def test_a_batch_beyond_the_null_is_undecided(leading):
    fisher = changed(
        leading, concentrated=False, null_batch=400, null_batch_limit=160.0, steps={"concentrated": 0, "of": 1}
    )
    answer = answered(leading, fisher=fisher)
    assert answer.verdict == "undecided"
    assert "the null can imitate at most 160 samples" in answer.answer


def test_without_a_null_nothing_is_claimed():
    answer = answered(with_fisher(example_tree([7], 2), steps=(7,), batch_size=0, update="leading"))
    assert answer.verdict == "undecided"
    assert math.isnan(answer.evidence[0].value)


@pytest.mark.parametrize("update", ["none", None])
def test_without_a_fisher_or_an_update_it_is_not_asked(update):
    tree = example_tree(3, 2) if update is None else with_fisher(example_tree(3, 2), update=update)
    answer = did_updates_concentrate(tree, {"fisher": fisher_summary(tree), "intervention": None})
    assert answer.verdict == "not_asked"
    assert "--probe module:function" in answer.surer


@pytest.fixture(scope="module")
def beside():
    """Updates and the null of an optimizer that flattens, by kind of update."""
    kinds = ("gradient", "step", "leading", "random")
    return {kind: with_fisher(example_tree(3, 2), update=kind, optimizer=True) for kind in kinds}


def test_more_than_both_nulls_is_as_more_than_one(beside):
    outcome = Outcome(on=0.04, off=0.02, full=0.06, captured=0.08, error=0.005)
    answer = answered(with_intervention(beside["leading"], intervention(outcome, steps=[300])))
    assert answer.verdict == "yes"
    assert ", and more than the share of a fresh gradient that went through the optimizer (gain 1.98, " in answer.answer
    assert [evidence.path for evidence in answer.evidence[:2]] == [
        "/concentration/gain",
        "/concentration/gain_optimizer",
    ]


def test_more_than_a_gradient_but_not_than_a_step_of_the_optimizer_is_mixed(beside):
    fisher = changed(
        beside["leading"],
        gain_optimizer=interval(1.1, 0.7, 1.6),
        concentrated_optimizer=False,
        steps_optimizer={"concentrated": 0, "of": 3},
    )
    outcome = Outcome(on=0.04, off=0.02, full=0.06, captured=0.08, error=0.005)
    answer = answered(with_intervention(beside["leading"], intervention(outcome, steps=[300])), fisher=fisher)
    assert answer.verdict == "mixed"
    assert (
        ", but are not shown to hold more than the share of a fresh gradient that went through the optimizer (gain "
        "1.10, 0.700 to 1.60): the optimizer may explain it; that part brings" in answer.answer
    )


def test_more_than_a_step_of_the_optimizer_but_not_than_a_gradient_is_mixed(beside):
    answer = answered(beside["gradient"])
    assert answer.verdict == "mixed"
    assert answer.answer.startswith(
        "In 2 of 3 updates the 16 leading directions hold more than the share of a fresh gradient that went through "
        "the optimizer (at the last gain 1.53, "
    )
    assert ", but not more than a fresh gradient's share (gain 1.04, " in answer.answer
    assert "): the optimizer flattens its steps; whether that matters was not measured." in answer.answer


def test_less_than_a_gradient_because_of_the_optimizer_is_undecided(beside):
    """Without the optimizer's null this is a no."""
    answer = answered(beside["step"])
    assert answer.verdict == "undecided"
    assert answered(with_fisher(example_tree(3, 2), update="step")).verdict == "no"
    assert "more than a step of the optimizer cannot be told (gain 1.01, " in answer.answer


def test_less_than_both_is_a_no(beside):
    answer = answered(beside["random"])
    assert (answer.verdict, answer.sure) == ("no", 0.95)
    assert "less than the share of a fresh gradient that went through the optimizer in the 16 leading" in answer.answer


def test_the_same_null_twice_is_told_once(leading):
    row = fisher_summary(leading)["concentration"]["at_k"]
    fisher = changed(leading, gain_optimizer=row["gain"], concentrated_optimizer=True)
    assert answered(leading, fisher=fisher) == answered(leading)
