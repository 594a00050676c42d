"""Differences between arms: paired by seed, tested exactly, one primary."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from examples.imax.summary import MAIN, MEAN, add_mean_score, differences, sign_flip
from examples.imax.tasks import METRICS, TASKS

COLUMNS = [
    *("ln_participation_ratio", "spectral_entropy", "dominant_ratio", "gain_over_isotropic", "gain_over_gradient"),
    *(f"{task}: {metric.name}" for task in TASKS for metric in METRICS[task]),
]
ARMS = ("imax", "dmax-plain", "dmax-style")


@pytest.fixture
def rows():
    random = np.random.default_rng(0)
    made = [
        {"arm": arm, "seed": seed, **{column: random.normal() + 5 * (arm == "imax") for column in COLUMNS}}
        for seed in range(8)
        for arm in ARMS
    ]
    add_mean_score(made)
    return made


def found(rows, measure, other="dmax-plain"):
    [one] = [e for e in differences(rows, ARMS) if (e["measure"], e["contrast"]) == (measure, f"imax − {other}")]
    return one


def test_the_interval_is_that_of_the_paired_t_test(rows):
    ours, theirs = ([r["spectral_entropy"] for r in rows if r["arm"] == arm] for arm in ARMS[:2])
    interval = stats.ttest_rel(ours, theirs).confidence_interval()
    one = found(rows, "spectral_entropy")
    assert (one["low"], one["high"]) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_eight_pairs_of_one_sign_have_p_of_2_in_256(rows):
    assert found(rows, "dominant_ratio")["p"] == pytest.approx(2 / 256)


def test_the_sign_flip_test_is_scipy_s():
    values = [0.3, -0.1, 0.8, 0.4, 0.2]
    theirs = stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(values) == pytest.approx(theirs)


def test_null_data_have_uniform_p():
    random = np.random.default_rng(1)
    p = np.array([sign_flip(random.normal(size=8).tolist()) for _ in range(400)])
    assert 0.02 < (p <= 0.05).mean() < 0.08


def test_only_one_measure_is_primary_and_not_corrected(rows):
    primary = [each for each in differences(rows, ARMS) if each["primary"]]
    assert [(each["measure"], each["contrast"]) for each in primary] == [
        ("ln_participation_ratio", "imax − dmax-plain")
    ]
    assert math.isnan(primary[0]["p_holm"])


def test_all_others_are_corrected_together(rows):
    others = [each for each in differences(rows, ARMS) if not each["primary"]]
    smallest = min(others, key=lambda each: each["p"])
    assert smallest["p_holm"] == pytest.approx(min(1, smallest["p"] * len(others)))


def test_what_is_not_finite_in_one_unit_has_no_difference(rows):
    rows[0]["dominant_ratio"] = math.nan
    one = found(rows, "dominant_ratio")
    assert all(math.isnan(one[name]) for name in ("difference", "low", "high", "p", "p_holm"))


def test_one_pair_has_a_difference_and_no_interval(rows):
    one = found(rows[:3], "dominant_ratio")
    assert math.isfinite(one["difference"])
    assert math.isnan(one["p"])


def test_the_mean_score_is_of_standardised_metrics_that_point_up(rows):
    signs = np.array([1 if higher else -1 for higher in MAIN.values()])
    table = np.array([[each[column] for column in MAIN] for each in rows])
    expected = (stats.zscore(table, axis=0, ddof=1) * signs).mean(1)
    np.testing.assert_allclose([each[MEAN] for each in rows], expected)
