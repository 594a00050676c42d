"""Matrices beside their role: planted outliers are found, healthy roles of every spread are left alone."""

from __future__ import annotations

import numpy as np
import pytest

from dynamics.spectra.outlying_sizes import outlying, relative_sizes

ROLES = [f"role {number % 4}" for number in range(48)]


def healthy(generator: np.random.Generator, spread: float, heavy: bool = False) -> np.ndarray:
    """Sizes with a trend over layers and a scale for each role."""
    scatter = generator.standard_t(4, 48) if heavy else generator.normal(size=48)
    scale = np.tile(generator.lognormal(0, 1, 4), 12)
    return scale * np.exp(spread * scatter + generator.normal(0, 0.5) * np.linspace(0, 1, 48))


@pytest.mark.parametrize(
    ("spread", "heavy"),
    [(0.05, False), (0.3, False), (0.7, False), (1.0, False), (0.1, True), (0.3, True), (0.5, True)],
)
def test_healthy_updates_are_left_alone(spread, heavy):
    generator = np.random.default_rng(0)
    alarms = [outlying(healthy(generator, spread, heavy), ROLES).any() for _ in range(200)]
    assert np.mean(alarms) <= 0.05


@pytest.mark.parametrize(("factor", "side"), [(1e-3, -1), (1e-2, -1), (100.0, 1), (1e4, 1)])
def test_a_planted_outlier_is_found_and_no_other(factor, side):
    generator, found = np.random.default_rng(1), []
    for _ in range(200):
        sizes = healthy(generator, 0.15)
        center = np.median(sizes[5::4])
        sizes[5] = factor * center
        expected = np.zeros(48, dtype=int)
        expected[5] = side
        found.append((outlying(sizes, ROLES) == expected).all())
    assert np.mean(found) >= 0.9


def test_rarely_chosen_experts_are_not_too_small_but_can_be_too_large():
    roles = ["mlp.experts.*.up_proj"] * 6
    assert outlying(np.array([1.0, 1.1, 0.9, 1e-4, 1.0, 1e4]), roles).tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize("sizes", [[1.0, 1e-6], [0.0, 0.0, 1.0], [np.nan, 1.0, 1e-6]])
def test_fewer_than_three_updates_that_moved_have_no_median(sizes):
    assert outlying(np.array(sizes), ["q"] * len(sizes)).tolist() == [0] * len(sizes)
    assert np.isnan(relative_sizes(np.array(sizes), ["q"] * len(sizes))).all()


def test_zero_and_nan_are_not_judged_and_do_not_count():
    sizes = np.array([0.0, 0.0, 0.0, 0.0, 1.0, 1.1, 0.9, np.nan])
    assert outlying(sizes, ["q"] * 8).tolist() == [0] * 8
    assert relative_sizes(sizes, ["q"] * 8)[4] == pytest.approx(1.0)


def test_no_matrix_at_all():
    assert outlying(np.empty(0), []).tolist() == []
