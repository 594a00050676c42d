"""Synthetic radiographs: seeded, and true to what they are said to show."""

from __future__ import annotations

import re

import numpy as np
import pytest

from examples.imax.phantom import CHUNK, SIZE, STYLES, phantoms


@pytest.fixture(scope="module")
def drawn():
    return phantoms(512, seed=3)


def pixels_in(image, box):
    left, top, right, bottom = np.round(box * SIZE).astype(int)
    return image[top:bottom, left:right]


def around(box, across, down):
    """A small box about a place within a box."""
    left, top, right, bottom = box
    x, y = left + across * (right - left), top + down * (bottom - top)
    return np.array([x - 0.04, y - 0.04, x + 0.04, y + 0.04])


def test_images_are_the_same_whenever_they_are_drawn(drawn):
    images, truth = phantoms(512, seed=3)
    assert np.array_equal(images, drawn[0])
    assert np.array_equal(truth.heart_box, drawn[1].heart_box)


def test_the_first_images_do_not_depend_on_the_count(drawn):
    images, truth = phantoms(CHUNK + 5, seed=3)
    assert np.array_equal(images, drawn[0][: CHUNK + 5])
    assert np.array_equal(truth.opacity_zone, drawn[1].opacity_zone[: CHUNK + 5])


def test_another_seed_gives_other_images(drawn):
    assert not np.array_equal(phantoms(8, seed=4)[0], drawn[0][:8])


def test_the_hospital_changes_the_image_and_not_the_patient():
    first, truth = phantoms(8, 0, np.zeros(8, int))
    second, other = phantoms(8, 0, np.ones(8, int))
    assert np.array_equal(truth.heart_box, other.heart_box)
    assert np.array_equal(truth.cardiopulmonary_area_ratio, other.cardiopulmonary_area_ratio)
    assert np.abs(first - second).mean() > 0.02


def test_pixels_are_float32_from_0_to_1(drawn):
    assert drawn[0].dtype == np.float32
    assert drawn[0].min() >= 0
    assert drawn[0].max() <= 1


def test_no_images_are_an_empty_array():
    images, truth = phantoms(0, 0)
    assert images.shape == (0, SIZE, SIZE)
    assert len(truth) == 0


def test_the_cardiothoracic_ratio_is_the_width_of_the_box_over_that_of_the_thorax(drawn):
    truth = drawn[1]
    heart = truth.heart_box[:, 2] - truth.heart_box[:, 0]
    thorax = truth.lung_box[:, 1, 2] - truth.lung_box[:, 0, 0]
    np.testing.assert_allclose(heart / thorax, truth.cardiothoracic_ratio, rtol=1e-5)


def test_the_heart_is_brighter_than_the_lungs(drawn):
    images, truth = drawn
    healthy = np.flatnonzero(~truth.opacity.any(1) & ~truth.effusion.any(1) & (truth.oedema == 0))
    assert len(healthy) > 10
    for image in healthy:
        middle = around(truth.heart_box[image], 0.4, 0.4)
        lung = around(truth.lung_box[image, 0], 0.4, 0.5)
        assert pixels_in(images[image], middle).mean() > pixels_in(images[image], lung).mean() + 0.1


def test_an_opacity_brightens_its_box():
    images, truth = phantoms(512, 5, np.zeros(512, int))
    upper = truth.opacity_zone == 0
    boxes = [(image, side, truth.opacity_box[image, side]) for image, side in np.argwhere(upper)]
    there = np.mean([pixels_in(images[image], box).mean() for image, _, box in boxes])
    without = [np.flatnonzero(~truth.opacity[:, side])[number % 200] for number, (_, side, _) in enumerate(boxes)]
    absent = np.mean([pixels_in(images[i], box).mean() for i, (_, _, box) in zip(without, boxes, strict=True)])
    assert there > absent + 0.03


def test_oedema_brightens_the_lungs_grade_by_grade():
    images, truth = phantoms(1024, 6, np.zeros(1024, int))
    middle = images[:, 24:36, 14:24].mean((1, 2))
    means = [middle[truth.oedema == grade].mean() for grade in range(4)]
    assert means == sorted(means)


def test_an_effusion_whitens_the_costophrenic_angle():
    images, truth = phantoms(512, 7, np.zeros(512, int))
    lungs = truth.lung_box[:, 0]
    corners = np.stack([lungs[:, 0], lungs[:, 3] - 0.15, lungs[:, 0] + 0.1, lungs[:, 3] - 0.05], axis=1)
    angle = np.array([pixels_in(image, corner).mean() for image, corner in zip(images, corners, strict=True)])
    assert angle[truth.effusion[:, 0]].mean() > angle[~truth.effusion[:, 0]].mean() + 0.05


def test_what_is_absent_has_no_box(drawn):
    truth = drawn[1]
    assert np.isnan(truth.opacity_box[~truth.opacity]).all()
    assert (truth.opacity_zone[~truth.opacity] == -1).all()
    assert np.isnan(truth.effusion_box[~truth.effusion]).all()
    assert np.isfinite(truth.opacity_box[truth.opacity]).all()


@pytest.mark.parametrize("box", ["heart_box", "lung_box", "opacity_box", "effusion_box"])
def test_boxes_are_ordered_and_within_the_image(drawn, box):
    left, top, right, bottom = np.moveaxis(getattr(drawn[1], box), -1, 0)
    there = np.isfinite(left)
    assert (left < right)[there].all()
    assert (top < bottom)[there].all()
    assert (left >= 0)[there].all()
    assert (bottom <= 1)[there].all()


@pytest.mark.parametrize("styles", [[0], [0, STYLES], [-1, 0]])
def test_styles_that_do_not_fit_are_refused(styles):
    with pytest.raises(ValueError, match=re.escape(f"Expected 2 styles from 0 to 6, got {len(styles)}: ")):
        phantoms(2, 0, np.array(styles))
