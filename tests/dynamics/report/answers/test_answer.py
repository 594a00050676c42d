"""An answer is one of the seven questions' and plain JSON."""

from __future__ import annotations

import json

import pytest

from dynamics.report.answers.answer import QUESTIONS, VERDICTS, Answer, Evidence
from dynamics.report.summary import summarise
from tests.trees import example_tree


def test_an_unknown_question_is_refused():
    with pytest.raises(ValueError, match=r"Expected one of trained, rank, .*, got 'speed'"):
        Answer("speed", "yes", "Fast.")


def test_missing_numbers_are_none_in_json():
    evidence = (Evidence("/update/frobenius_norm_all", 2.0), Evidence("/score/score", 1.0, 0.5, 1.5))
    content = Answer("trained", "yes", "All did.", evidence, 0.95).to_json()
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert content["evidence"][0] == {"path": "/update/frobenius_norm_all", "value": 2.0, "low": None, "high": None}
    assert content["sure"] == 0.95


def test_a_summary_answers_every_question_in_order():
    answers = summarise(example_tree())["answers"]
    assert [answer["id"] for answer in answers] == list(QUESTIONS)
    assert all(answer["verdict"] in VERDICTS and answer["answer"].endswith(".") for answer in answers)
