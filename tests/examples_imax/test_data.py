"""Arms: the counts that the study rests on, and that the same annotations are in all of them."""

from __future__ import annotations

import re

import numpy as np
import pytest

from examples.imax.data import ARMS, arm, card, held_out, plan
from examples.imax.phantom import STYLES
from examples.imax.tasks import MOST, TASKS

IMAGES = 200


@pytest.fixture(scope="module")
def arms():
    return {name: arm(name, IMAGES, seed=1) for name in ARMS}


@pytest.fixture(scope="module")
def cards(arms):
    return {name: card(data) for name, data in arms.items()}


def test_imax_has_4_1_tasks_and_7_5_entries_an_image(cards):
    assert cards["imax"]["images"] == IMAGES
    assert cards["imax"]["tasks_an_image"] == pytest.approx(4.1)
    assert cards["imax"]["entries_an_image"] == pytest.approx(7.5)


@pytest.mark.parametrize("name", ARMS[1:])
def test_dmax_has_one_task_an_image_and_4_1_times_the_images(cards, name):
    assert cards[name]["tasks_an_image"] == 1
    assert cards[name]["images"] == round(4.1 * IMAGES)


@pytest.mark.parametrize("name", ARMS[1:])
def test_every_task_has_as_many_entries_in_each_arm(cards, name):
    assert cards[name]["entries_of_task"] == cards["imax"]["entries_of_task"]
    assert cards[name]["images_of_task"] == cards["imax"]["images_of_task"]
    assert cards[name]["entries"] == round(7.5 * IMAGES)


def test_dmax_style_ties_each_task_to_one_hospital_of_its_own(cards):
    hospitals = np.array([cards["dmax-style"]["hospitals_of_task"][task] for task in TASKS])
    assert ((hospitals > 0).sum(1) == 1).all()
    assert ((hospitals > 0).sum(0) == 1).all()


@pytest.mark.parametrize("name", ARMS[:2])
def test_the_other_arms_mix_all_hospitals_in_every_task(cards, name):
    assert all(min(counts) > 0 for counts in cards[name]["hospitals_of_task"].values())


def test_the_two_dmax_arms_have_the_same_patients_and_entries(arms):
    plain, style = arms["dmax-plain"], arms["dmax-style"]
    assert plain.entries == style.entries
    assert np.array_equal(plain.truth.heart_box, style.truth.heart_box)
    assert not np.array_equal(plain.images, style.images)


@pytest.mark.parametrize("name", ARMS)
def test_no_question_is_asked_twice_of_one_image(arms, name):
    asked = [(entry.image, entry.question) for entry in arms[name].entries]
    assert len(set(asked)) == len(asked)


def test_a_plan_keeps_within_what_a_task_can_ask():
    counts = plan(IMAGES, seed=0)
    assert (counts <= [MOST[task] for task in TASKS]).all()
    assert set((counts > 0).sum(1)) == {3, 4, 5}


def test_seeds_have_plans_of_their_own():
    assert not np.array_equal(plan(IMAGES, 0), plan(IMAGES, 1))


def test_an_arm_is_the_same_whenever_it_is_made(arms):
    again = arm("imax", IMAGES, seed=1)
    assert again.entries == arms["imax"].entries
    assert np.array_equal(again.images, arms["imax"].images)


def test_held_out_entries_are_one_an_image_and_even_over_tasks_and_hospitals():
    found = card(held_out(14))
    assert found["entries_an_image"] == 1
    assert set(found["entries_of_task"].values()) == {14}
    assert all(counts == [2] * STYLES for counts in found["hospitals_of_task"].values())


def test_parts_of_what_is_held_out_share_no_image(arms):
    pools = [held_out(7).images, held_out(7, part=1).images, *(data.images for data in arms.values())]
    seen = [{image.tobytes() for image in images} for images in pools]
    assert not seen[0] & seen[1]
    assert not (seen[0] | seen[1]) & set.union(*seen[2:])


@pytest.mark.parametrize("images", [0, 15])
def test_a_number_of_images_without_whole_totals_is_refused(images):
    with pytest.raises(ValueError, match=f"^Expected a positive multiple of 10 images, got {images}.$"):
        plan(images, 0)


def test_an_unknown_arm_is_refused():
    with pytest.raises(ValueError, match=re.escape("Expected one of imax, dmax-plain, dmax-style, got 'x'.")):
        arm("x", 10, 0)


def test_held_out_entries_that_do_not_divide_by_hospitals_are_refused():
    with pytest.raises(ValueError, match=re.escape("Expected a positive multiple of 7 entries a task, got 8.")):
        held_out(8)
