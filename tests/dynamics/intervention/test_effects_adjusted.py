"""Tests of several numbers of directions and tasks at once."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from dynamics.fisher.samples import SampleGroups
from dynamics.intervention import effects
from dynamics.intervention.effects import SIGNS, adjusted_p


def two_tasks(groups: int, per_group: int = 1) -> SampleGroups:
    """All samples, and a task of every other group."""
    member = np.stack([np.ones(groups, dtype=bool), np.arange(groups) % 2 == 0], axis=1)
    return SampleGroups(np.repeat(np.arange(groups), per_group), np.repeat(member, per_group, axis=0))


def normal(seed: int, *shape: int, mean: float = 0.0) -> np.ndarray:
    return mean + np.random.default_rng(seed).standard_normal(shape)


def t_statistic(values: np.ndarray) -> float:
    return np.sqrt(len(values)) * values.mean() / values.std(ddof=1)


def slow_adjusted_p(values: np.ndarray, labels: SampleGroups, seed: int) -> np.ndarray:
    """One sample a group: sign by sign and test by test."""
    tests, tasks = len(values), labels.member.shape[1]
    observed = np.array(
        [[abs(t_statistic(values[test, labels.member[:, task]])) for task in range(tasks)] for test in range(tests)]
    )
    signs = np.random.default_rng(seed).integers(0, 2, (effects.SIGNS, len(labels.group)), dtype=np.int8) * 2.0 - 1.0
    exceeded = np.zeros((tests, tasks))
    for sign in signs:
        drawn = [
            abs(t_statistic(sign[member] * (row[member] - row[member].mean())))
            for row in values
            for member in labels.member.T
        ]
        exceeded += max(drawn) >= observed
    return (1 + exceeded) / (1 + effects.SIGNS)


def test_p_is_that_of_the_largest_t_under_random_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(effects, "SIGNS", 499)
    labels = two_tasks(26)
    values = normal(0, 2, 26, mean=0.3)
    p = adjusted_p(values, labels, seed=5)
    assert 0.01 < p.min() < 0.1  # neither end of the scale
    np.testing.assert_allclose(p, slow_adjusted_p(values, labels, 5), rtol=1e-12)


def test_p_is_the_same_however_few_signs_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    labels, values = two_tasks(26), normal(1, 3, 26, mean=0.3)
    whole = adjusted_p(values, labels)
    monkeypatch.setattr(effects, "_PART", 1000)
    np.testing.assert_allclose(adjusted_p(values, labels), whole, atol=0.03)


def test_fewer_than_twelve_groups_are_tested_by_bonferroni() -> None:
    labels, values = two_tasks(22), normal(2, 2, 22, mean=0.8)  # 22 groups, and 11 of the second task
    single = [[stats.ttest_1samp(row[member], 0)[1] for member in labels.member.T] for row in values]
    p = adjusted_p(values, labels)
    np.testing.assert_allclose(p, np.minimum(1, 4 * np.array(single)), rtol=1e-10)
    assert (p < 1).any()


def test_a_task_that_cannot_be_tested_counts_for_nothing() -> None:
    """A task of one group has no t: it is NaN, makes no p larger, and does not call for Bonferroni."""
    labels = two_tasks(30)
    alone = np.arange(30)[:, None] == 3
    with_it = SampleGroups(labels.group, np.concatenate([labels.member, alone], axis=1))
    values = normal(3, 2, 30, mean=0.3)
    p = adjusted_p(values, with_it)
    np.testing.assert_array_equal(p[:, :2], adjusted_p(values, labels))
    assert np.isnan(p[:, 2]).all()


@pytest.mark.parametrize("values", [np.zeros((1, 20)), np.full((1, 20), np.nan)], ids=["no variation", "NaN"])
def test_what_has_no_t_has_no_p(values: np.ndarray) -> None:
    assert np.isnan(adjusted_p(values, two_tasks(20))).all()


def test_one_broken_test_leaves_the_others_alone() -> None:
    values = normal(4, 2, 26, mean=0.3)
    broken = np.concatenate([values, np.full((1, 26), np.nan)])
    np.testing.assert_array_equal(adjusted_p(broken, two_tasks(26))[:2], adjusted_p(values, two_tasks(26)))


def test_samples_of_a_group_count_once() -> None:
    values = normal(5, 2, 26, mean=0.3)
    repeated = np.repeat(values, 4, axis=1)
    np.testing.assert_array_equal(adjusted_p(repeated, two_tasks(26, 4)), adjusted_p(values, two_tasks(26)))


def test_splits_that_disagree_raise_p() -> None:
    values = normal(6, 2, 26, mean=0.3)
    apart = normal(7, 2, 26)
    splits = np.stack([values + apart, values - apart])
    assert (adjusted_p(splits, two_tasks(26)) > adjusted_p(values, two_tasks(26))).all()


def test_numbers_that_are_alike_up_to_sign_are_never_extreme_under_the_null() -> None:
    """Half of them 1 and half −1: t is 0, and some signs make every number the same."""
    values = np.resize([1.0, -1.0], (1, 12))
    assert adjusted_p(values, SampleGroups.of_one_task(np.arange(12))).item() == 1


def test_a_strong_effect_has_the_smallest_p() -> None:
    assert adjusted_p(normal(8, 2, 40, mean=5.0), two_tasks(40)).max() == 1 / (1 + SIGNS)


@pytest.mark.parametrize("groups", [8, 16])
def test_at_most_one_family_in_twenty_has_a_false_positive(groups: int) -> None:
    """Five correlated tests of two tasks, by Bonferroni and by random signs."""
    labels = two_tasks(2 * groups)
    values = np.cumsum(normal(9, 150, 5, 2 * groups), axis=1)
    false = sum((adjusted_p(family, labels) <= 0.05).any() for family in values)
    assert false <= stats.binom.ppf(0.999, 150, 0.05)
