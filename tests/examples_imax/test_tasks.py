"""Questions are true of their image, and metrics are what they are called."""

from __future__ import annotations

import re

import numpy as np
import pytest

from examples.imax.phantom import GRADES, phantoms
from examples.imax.tasks import (
    METRICS,
    MOST,
    TASKS,
    absolute_error,
    bleu4,
    f1_counts,
    intersection_over_union,
    questions,
    rouge_l,
    total,
)

_, TRUTH = phantoms(64, seed=9)


def asked(task):
    return [dict(questions(task, TRUTH, image)) for image in range(len(TRUTH))]


def test_ratios_are_the_truth_to_two_digits():
    said = [float(each["cardiothoracic ratio"].replace(" ", "")) for each in asked("calculation")]
    np.testing.assert_allclose(said, TRUTH.cardiothoracic_ratio, atol=0.00501)


def test_the_grade_is_the_truth():
    assert [each["grade the oedema"] for each in asked("grade")] == [GRADES[grade] for grade in TRUTH.oedema]


def test_findings_are_the_truth():
    said = [each["list the findings"] for each in asked("findings")]
    assert [("cardiomegaly" in text) for text in said] == TRUTH.cardiomegaly.tolist()
    assert [("opacity" in text) for text in said] == TRUTH.opacity.any(1).tolist()
    assert [("effusion" in text) for text in said] == TRUTH.effusion.any(1).tolist()


def test_boxes_are_the_truth_within_half_a_line_of_the_grid():
    said = [[int(word[1:-1]) for word in each["where is the heart"].split()] for each in asked("comprehension")]
    np.testing.assert_allclose(np.array(said) / 16, TRUTH.heart_box, atol=1 / 32)


def test_what_is_at_a_place_depends_on_the_image():
    said = {answer.split()[0] for each in asked("generation") for answer in each.values()}
    assert said == {"clear", "opacity", "fluid"}


def test_a_zone_is_asked_only_of_a_lung_with_an_opacity():
    zones = [sum(question.startswith("in which zone") for question in each) for each in asked("vqa")]
    assert zones == TRUTH.opacity.sum(1).tolist()


@pytest.mark.parametrize("task", TASKS)
def test_every_image_has_as_many_questions_as_a_plan_may_ask(task):
    assert min(map(len, asked(task))) >= MOST[task]


@pytest.mark.parametrize("task", TASKS)
def test_the_truth_scores_best(task):
    for metric in METRICS[task]:
        pairs = [(answer, answer) for each in asked(task) for answer in each.values()]
        best = 1.0 if metric.higher_is_better else 0.0
        assert total([metric.of(*pair) for pair in pairs]) == (pytest.approx(best), pytest.approx(0, abs=1e-9))


@pytest.mark.parametrize("task", TASKS)
def test_nonsense_scores_worse(task):
    for metric in METRICS[task]:
        score, _ = total([metric.of("the", answer) for each in asked(task) for answer in each.values()])
        assert (score < 0.2) if metric.higher_is_better else (score == 1)


def test_boxes_apart_do_not_overlap():
    assert intersection_over_union("<0> <0> <2> <2>", "<4> <4> <6> <6>") == 0


def test_a_box_turned_inside_out_is_no_box():
    assert intersection_over_union("<6> <6> <4> <4>", "<4> <4> <6> <6>") == 0


def test_two_empty_boxes_score_0():
    assert intersection_over_union("<4> <4> <4> <4>", "<4> <4> <4> <4>") == 0


def test_an_empty_answer_is_no_number():
    assert absolute_error("", "0 . 5 0") == 1


def test_micro_f1_is_that_of_scikit_learn_s_definition():
    truths, guesses = ["a , b", "c", "a"], ["a", "b , c", "c"]
    score, _ = total([f1_counts(guess, truth) for guess, truth in zip(guesses, truths, strict=True)])
    true_positive, false_positive, false_negative = 2, 2, 2  # a; c with b in excess; c for a, b missed
    assert score == pytest.approx(2 * true_positive / (2 * true_positive + false_positive + false_negative))


def test_bleu_of_no_word_in_common_is_0():
    assert bleu4("a b c d e", "f g h i j") == 0


def test_rouge_l_counts_the_longest_common_subsequence():
    assert rouge_l("a x b y", "a b c") == pytest.approx(2 * (2 / 4) * (2 / 3) / (2 / 4 + 2 / 3))


def test_the_standard_error_of_a_ratio_is_that_of_the_mean_where_denominators_are_1():
    values = np.random.default_rng(0).random(50)
    score, error = total([(value, 1.0) for value in values])
    assert (score, error) == (pytest.approx(values.mean()), pytest.approx(values.std(ddof=1) / np.sqrt(50)))


def test_one_entry_has_no_standard_error():
    with pytest.raises(ValueError, match=re.escape("Expected at least 2 entries for a standard error, got 1.")):
        total([(1.0, 1.0)])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match=re.escape("vqa, got 'x'.")):
        questions("x", TRUTH, 0)
