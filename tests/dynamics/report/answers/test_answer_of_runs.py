"""One answer for several runs: what they share, and which of them differ."""

from __future__ import annotations

import math

import pytest

from dynamics.report.answers import answers_of_runs
from dynamics.report.answers.answer import QUESTIONS, how_sure, recipe_first
from dynamics.report.summary import summarise
from tests.answers import made_up
from tests.trees import example_runs, example_tree


def together(question, *verdicts, words=()):
    """The answer of runs ``a``, ``b``, … with these verdicts, and these words where they differ."""
    names = [chr(ord("a") + number) for number in range(len(verdicts))]
    tree = example_runs(**{name: example_tree(steps=1, matrices=1) for name in names})
    summary = summarise(tree)
    for number, (name, verdict) in enumerate(zip(names, verdicts, strict=True)):
        words_of_run = words[number] if words else "All matrices moved."
        summary["runs"][name]["answers"] = [made_up(one, verdict, words_of_run) for one in QUESTIONS]
    (answer,) = [answer for answer in answers_of_runs(tree, summary) if answer.id == question]
    return answer


def test_what_all_runs_say_comes_once():
    answer = together("trained", "yes", "yes", "yes")
    assert (answer.verdict, answer.answer) == ("yes", "Yes in all 3 runs: All matrices moved.")
    assert together("trained", "yes", "yes").answer == "Yes in both runs: All matrices moved."


def test_answers_in_other_words_have_an_example():
    answer = together("trained", "yes", "yes", words=["20 matrices moved.", "8 matrices moved."])
    assert answer.answer == "Yes in both runs: For example a: 20 matrices moved."


def test_runs_that_differ_are_named_with_their_reason():
    words = ["All moved."] * 3 + ["None moved."]
    answer = together("trained", "yes", "yes", "yes", "no", words=words)
    assert (answer.verdict, answer.answer) == ("mixed", "Yes in 3 of 4 runs: All moved. No in d: None moved.")


def test_many_runs_that_differ_are_counted():
    answer = together("rank", *["yes"] * 9, *["no"] * 7)
    assert "No in j, k, l, m, n and 2 more: " in answer.answer


def test_a_question_put_to_some_runs_is_answered_for_those():
    answer = together("tasks", "yes", "yes", "not_asked")
    assert answer.verdict == "yes"
    assert answer.answer == "Yes in 2 of 3 runs: All matrices moved. Not asked in c."
    assert together("tasks", "not_asked", "not_asked").verdict == "not_asked"


def test_undecided_runs_make_it_mixed():
    answer = together("concentration", "yes", "undecided")
    assert answer.verdict == "mixed"
    assert (answer.sure, answer.surer) == (0.95, "Probe more samples.")


def test_evidence_names_the_run():
    answer = together("trained", "yes", "no")
    assert [number.path for number in answer.evidence] == [
        "/runs/a/update/frobenius_norm_all",
        "/runs/b/update/frobenius_norm_all",
    ]
    assert (answer.evidence[0].value, answer.evidence[0].low) == (-2.5, -3.0)


def test_missing_ends_of_evidence_stay_missing():
    tree = example_runs(a=example_tree(steps=1, matrices=1))
    summary = summarise(tree)
    evidence = [{"path": "/update/x", "value": None, "low": None, "high": None}]
    summary["runs"]["a"]["answers"] = [{**made_up(one, "yes"), "evidence": evidence} for one in QUESTIONS]
    (number,) = answers_of_runs(tree, summary)[0].evidence
    assert all(map(math.isnan, (number.value, number.low, number.high)))


@pytest.mark.parametrize(
    ("verdict", "sure", "surer", "words"),
    [
        ("yes", None, "", ""),
        ("yes", 0.95, "", "Confidence 95 %."),
        ("undecided", 0.95, "Probe more.", "Confidence 95 %. To be surer: probe more."),
        ("not_asked", None, "not asked: pass --probe M:F", "To ask: pass --probe M:F."),
        ("mixed", None, "GPU runs.", "To be surer: GPU runs."),
    ],
)
def test_how_sure_an_answer_is(verdict, sure, surer, words):
    assert how_sure({"verdict": verdict, "sure": sure, "surer": surer}) == words


def test_of_several_runs_the_comparison_is_read_first():
    order = [answer["id"] for answer in recipe_first([made_up(one, "yes") for one in QUESTIONS])]
    assert order == ["recipe", *(question for question in QUESTIONS if question != "recipe")]
