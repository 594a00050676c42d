import numpy as np
import pytest

from dynamics.fisher.samples import (
    SampleGroups,
    confidence_interval,
    counted_groups,
    diagonal_means,
    jackknife_error,
    jackknifed,
    pair_means,
    pair_means_of_products,
    weight_of,
)
from tests.dynamics.fisher.simulated import gradients, grams, power_law

GROUP = np.array([0, 0, 1, 1, 2, 3, 3, 4])
TASK = np.array([0, 1, 0, 1, 1, 0, 0, 1])


@pytest.fixture
def labels():
    return SampleGroups(GROUP, np.stack([np.ones(8, bool), TASK == 0, TASK == 1], axis=1))


def slow_mean(values, labels, s, t, left_out=None):
    """Every pair, one by one."""
    found = [
        values[i, j]
        for i in np.flatnonzero(labels.member[:, s])
        for j in np.flatnonzero(labels.member[:, t])
        if labels.group[i] != labels.group[j] and left_out not in (labels.group[i], labels.group[j])
    ]
    return np.mean(found) if found else np.nan


def test_pair_means_are_those_of_a_loop(labels):
    noise = np.random.default_rng(0).standard_normal((2, 8, 8))
    values = noise + noise.swapaxes(1, 2)
    found = pair_means(values, labels)
    for block in range(2):
        for s in range(3):
            for t in range(3):
                assert found.mean[block, s, t] == pytest.approx(slow_mean(values[block], labels, s, t), abs=1e-12)
                for g in range(5):
                    slow = slow_mean(values[block], labels, s, t, left_out=g)
                    assert found.left_out[block, g, s, t] == pytest.approx(slow, abs=1e-12)


@pytest.mark.parametrize("largest", [1.0, 1e12])
def test_pair_means_of_products_are_those_of_all_pairs(labels, largest):
    numbers = np.random.default_rng(3).uniform(1, 2, (2, 8))
    numbers[:, 2] *= largest
    found, slow = (
        pair_means_of_products(numbers, labels),
        pair_means(numbers[:, :, None] * numbers[:, None, :], labels),
    )
    np.testing.assert_allclose(found.mean, slow.mean, rtol=1e-13)
    for g in range(5):
        np.testing.assert_allclose(found.left_out[:, g], slow.left_out[:, g], rtol=1e-12, atol=1e-13 * largest)


def test_diagonal_means_are_those_of_a_loop(labels):
    values = np.random.default_rng(1).standard_normal((2, 8))
    mean, left_out = diagonal_means(values, labels)
    for t in range(3):
        own = labels.member[:, t]
        np.testing.assert_allclose(mean[:, t], values[:, own].mean(1))
        for g in range(5):
            np.testing.assert_allclose(left_out[:, g, t], values[:, own & (g != GROUP)].mean(1))


def test_one_group_has_no_pairs():
    found = pair_means(np.ones((1, 3, 3)), SampleGroups.of_one_task(np.zeros(3, int)))
    assert np.isnan(found.mean).all()
    assert np.isnan(found.left_out).all()


def test_jackknife_of_a_mean_is_its_standard_error():
    sample = np.random.default_rng(2).standard_normal(10)
    left_out = np.array([np.delete(sample, i).mean() for i in range(10)])
    found = jackknife_error(left_out[None], np.ones(10, bool))
    assert found[0] == pytest.approx(sample.std(ddof=1) / 10**0.5, rel=1e-12)


def test_groups_that_do_not_matter_do_not_count():
    left_out = np.array([[1.0, 2.0, 3.0, 99.0]])
    found = jackknife_error(left_out, np.array([True, True, True, False]))
    assert found == jackknife_error(left_out[:, :3], np.ones(3, bool))


def test_a_statistic_that_hangs_on_one_group_has_no_error():
    assert np.isnan(jackknife_error(np.array([[1.0, np.nan, 2.0]]), np.ones(3, bool))).all()
    assert np.isnan(jackknife_error(np.array([[1.0]]), np.ones(1, bool))).all()


def test_interval_of_too_few_groups_is_missing():
    low, high = confidence_interval(np.zeros(2), np.ones(2), np.array([1, 2]))
    assert np.isnan([low[0], high[0]]).all()
    assert (low[1], high[1]) == pytest.approx((-12.7062, 12.7062), abs=1e-4)


def test_bias_of_a_square_is_removed():
    """E x̄² = μ² + σ²/n; its jackknife is unbiased exactly: x̄² − s²/n."""
    sample = np.random.default_rng(3).standard_normal(6) + 1
    left_out = np.array([np.delete(sample, i).mean() ** 2 for i in range(6)])
    found = jackknifed(np.array([sample.mean() ** 2]), left_out[None], np.ones(6, bool), np.array(6))
    assert found.estimate[0] == pytest.approx(sample.mean() ** 2 - sample.var(ddof=1) / 6, rel=1e-12)
    assert found.low[0] < found.estimate[0] < found.high[0]


def test_without_an_interval_the_estimate_stays_as_it_is():
    found = jackknifed(np.array([2.0]), np.array([[np.nan, np.nan]]), np.ones(2, bool), np.array(2))
    assert found.estimate.tolist() == [2.0]
    assert np.isnan(found.low).all()


def test_weight_counts_what_groups_of_each_task_hold():
    rng = np.random.default_rng(7)
    rows = gradients(rng, 2, 8, power_law(5))
    group, member = np.array([0, 0, 1, 2, 2, 3, 3, 3]), np.stack([np.ones(8, bool), np.arange(8) < 5], axis=1)
    found = weight_of(grams(rows), SampleGroups(group, member))
    squares = (rows**2).sum(-1)
    for task, chosen in enumerate(member.T):
        held = np.stack([squares[:, chosen & (group == code)].sum(1) for code in np.unique(group[chosen])], axis=1)
        np.testing.assert_allclose(found.groups[:, task], held.sum(1) ** 2 / (held**2).sum(1))
        np.testing.assert_allclose(found.largest_group[:, task], held.max(1) / held.sum(1))
        three = np.sort(squares[:, chosen], axis=1)[:, -3:].sum(1)
        np.testing.assert_allclose(found.largest_samples[:, task], three / held.sum(1))


def test_counted_groups_lie_between_two_and_the_number_of_groups():
    gram = np.stack([np.eye(6), np.diag([1e6, 1, 1, 1, 1, 1]), np.diag([4.0, 4, 1, 1, 1, 1]), np.zeros((6, 6))])
    found = counted_groups(gram, SampleGroups.of_one_task(np.arange(6)))
    np.testing.assert_allclose(found[:, 0], [6, 2, 144 / 36, np.nan])
    assert counted_groups(gram[:1], SampleGroups.of_one_task(np.zeros(6, int))) == 1
