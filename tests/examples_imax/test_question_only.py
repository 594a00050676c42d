"""What the question alone is worth, and the gate above it."""

from __future__ import annotations

import re

import pytest

from examples.imax.data import Entry
from examples.imax.question_only import gate, kind, question_only
from examples.imax.tasks import METRICS, TASKS

HALF = {task: {METRICS[task][0].name: {"score": 0.5, "standard_error": 0.02, "entries": 9}} for task in TASKS}


def better_by(change, error=0.02):
    return {
        task: {
            METRICS[task][0].name: {
                "score": 0.5 + change * (1 if METRICS[task][0].higher_is_better else -1),
                "standard_error": error,
            }
        }
        for task in TASKS
    }


def calculated(*values):
    return [Entry(number, "calculation", "cardiothoracic ratio", value) for number, value in enumerate(values)]


def test_the_answer_to_a_number_is_the_median():
    train = calculated("0 . 1 0", "0 . 4 0", "0 . 4 5", "0 . 5 0", "0 . 9 9")
    assert question_only(train, calculated("0 . 0 0")) == ["0 . 4 5"]


def test_each_question_has_its_own_answer():
    train = [Entry(0, "vqa", "a", "yes"), Entry(1, "vqa", "b", "no")]
    assert question_only(train, [Entry(2, "vqa", "b", "?"), Entry(3, "vqa", "a", "?")]) == ["no", "yes"]


def test_a_new_question_gets_the_answer_of_its_task():
    train = [Entry(0, "vqa", "a", "no"), Entry(1, "vqa", "a", "no"), Entry(2, "vqa", "b", "yes")]
    assert question_only(train, [Entry(3, "vqa", "c", "?")]) == ["no"]


def test_a_task_without_training_entries_is_refused():
    with pytest.raises(ValueError, match=re.escape("found none of report.")):
        question_only(calculated("0 . 5 0"), [Entry(0, "report", "write the report", "")])


def test_places_are_told_by_side_and_height():
    assert kind("what is at <3> <2> <7> <6>") != kind("what is at <9> <2> <13> <6>")
    assert kind("what is at <9> <2> <13> <6>") == kind("what is at <10> <2> <14> <6>")


def test_six_errors_above_pass():
    assert all(each["passes"] for each in gate(better_by(0.12), HALF).values())


def test_four_errors_above_fail():
    assert not any(each["passes"] for each in gate(better_by(0.08), HALF).values())


def test_worse_than_the_baseline_fails_whatever_the_direction():
    assert not any(each["passes"] for each in gate(better_by(-0.3), HALF).values())


def test_the_ceiling_fails():
    assert not any(each["passes"] for each in gate(better_by(0.5), HALF).values())


def test_the_larger_error_counts():
    assert gate(better_by(0.12, error=0.04), HALF)["vqa"]["errors_above"] == pytest.approx(3)
