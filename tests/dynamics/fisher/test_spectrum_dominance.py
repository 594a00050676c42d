import numpy as np
import pytest

from dynamics.fisher.samples import SampleGroups, half_splits
from dynamics.fisher.spectrum import (
    _leading_vector,
    dominant_ratio_error,
    dominant_ratio_interval,
    dominant_ratio_noise_reduced,
    dominant_ratio_plug_in,
    dominant_ratio_split,
    fisher_eigenvalues,
    fisher_eigenvectors,
    shares_by_group,
)
from tests.dynamics.fisher.simulated import gradients, grams, planted, power_law

SPECTRUM = power_law(300)
TRUTH = SPECTRUM[0] / SPECTRUM.sum()


@pytest.fixture(scope="module")
def gram():
    return grams(gradients(np.random.default_rng(0), 200, 32, SPECTRUM))


def test_planted_ratio():
    values = fisher_eigenvalues(grams(planted(np.array([3.0, 1.0]), 5, 6))[None])
    assert dominant_ratio_plug_in(values)[0] == pytest.approx(0.75)


def test_bracket_holds_the_truth_in_expectation(gram):
    low = dominant_ratio_split(gram, np.arange(32))
    high = dominant_ratio_plug_in(fisher_eigenvalues(gram))
    assert low.mean() < TRUTH < high.mean()


@pytest.mark.parametrize(("exponent", "per_group", "correlation"), [(1.5, 1, 0.0), (1.0, 2, 0.6)])
def test_interval_holds_the_truth_where_the_bracket_alone_does_not(exponent, per_group, correlation):
    eigenvalues = power_law(100, exponent)
    truth, group = eigenvalues[0] / eigenvalues.sum(), np.arange(64) // per_group
    rows = gradients(np.random.default_rng(4), 200, 64, eigenvalues, per_group=per_group, correlation=correlation)
    values, vectors = fisher_eigenvectors(grams(rows))
    by_group = shares_by_group(vectors, SampleGroups.of_one_task(group))
    split, plug_in = dominant_ratio_split(grams(rows), group), dominant_ratio_plug_in(values)
    error = dominant_ratio_error(values, by_group)
    low, high = dominant_ratio_interval(split, plug_in, error, by_group.shape[1])
    assert ((split <= truth) & (truth <= plug_in)).mean() < 0.8
    assert ((low <= truth) & (truth <= high)).mean() >= 0.94
    assert high.max() <= 1


def test_noise_reduction_takes_most_of_the_bias_away(gram):
    values = fisher_eigenvalues(gram)
    plug_in, reduced = dominant_ratio_plug_in(values), dominant_ratio_noise_reduced(values)
    assert abs(reduced.mean() - TRUTH) < 0.4 * abs(plug_in.mean() - TRUTH)


def test_split_is_that_of_explicit_directions(gram):
    """One split by hand: the first direction of a half, judged on the other."""
    few = np.array([4.0, 1.0, 0.5, 0.1])
    rows = gradients(np.random.default_rng(1), 1, 12, few)
    halves = list(half_splits(np.arange(12), 3, 7))
    slow = []
    for first, second in halves:
        direction = np.linalg.svd(rows[0, first])[2][0]
        slow.append(((rows[0, second] @ direction) ** 2).sum() / (rows[0, second] ** 2).sum())
    found = dominant_ratio_split(grams(rows), np.arange(12), splits=3, seed=7)
    assert found[0] == pytest.approx(np.mean(slow), rel=1e-3)


def test_weights_are_the_largest_column_of_a_high_power():
    gram = grams(gradients(np.random.default_rng(5), 3, 20, power_law(40, 0.3)))
    power = np.linalg.matrix_power(gram / np.trace(gram, axis1=1, axis2=2)[:, None, None], 64)
    for found, block in zip(_leading_vector(gram), power, strict=True):
        slow = block[:, block.diagonal().argmax()]
        np.testing.assert_allclose(found / np.abs(found).max(), slow / np.abs(slow).max(), rtol=1e-9)


def test_groups_are_never_divided():
    group = np.repeat(np.arange(4), 3)
    for first, second in half_splits(group, 5, 0):
        assert not set(group[first]) & set(group[second])


def test_missing_where_there_is_nothing_to_split():
    assert np.isnan(dominant_ratio_split(np.eye(3)[None], np.zeros(3, int))).all()
    assert np.isnan(dominant_ratio_split(np.zeros((1, 4, 4)), np.arange(4))).all()
    assert np.isnan(dominant_ratio_noise_reduced(np.ones((1, 1)))).all()
