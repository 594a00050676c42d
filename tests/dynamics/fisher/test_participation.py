import numpy as np
import pytest

from dynamics.fisher.eigenvalues import fisher_eigenvalues
from dynamics.fisher.pairs import Labels, pair_means
from dynamics.fisher.participation import log_participation_ratio, participation_ratio_plug_in
from tests.dynamics.fisher.simulated import gradients, grams, power_law, within_three_errors

SPECTRUM = power_law(60)
TRUTH = SPECTRUM.sum() ** 2 / (SPECTRUM**2).sum()


def alone(samples, per_group=1):
    return Labels(np.arange(samples) // per_group, np.ones((samples, 1), bool))


@pytest.mark.parametrize(("per_group", "correlation"), [(1, 0.0), (4, 0.6)])
def test_both_parts_are_unbiased(per_group, correlation):
    rows = gradients(np.random.default_rng(0), 800, 16, SPECTRUM, per_group=per_group, correlation=correlation)
    gram, labels = grams(rows), alone(16, per_group)
    norms = np.diagonal(gram, axis1=1, axis2=2)
    traces = pair_means(norms[:, :, None] * norms[:, None, :], labels).mean[:, 0, 0]
    squares = pair_means(gram**2, labels).mean[:, 0, 0]
    assert within_three_errors(traces, SPECTRUM.sum() ** 2)
    assert within_three_errors(squares, (SPECTRUM**2).sum())


def test_the_plug_in_is_far_below_and_ours_is_not():
    gram = grams(gradients(np.random.default_rng(1), 600, 32, SPECTRUM))
    assert participation_ratio_plug_in(fisher_eigenvalues(gram)).mean() < 0.75 * TRUTH
    assert within_three_errors(log_participation_ratio(gram, alone(32)).estimate, np.log(TRUTH))


@pytest.mark.parametrize(("samples", "per_group", "correlation"), [(32, 1, 0.0), (64, 2, 0.6)])
def test_interval_coverage(samples, per_group, correlation):
    rows = gradients(np.random.default_rng(2), 1500, samples, SPECTRUM, per_group=per_group, correlation=correlation)
    found = log_participation_ratio(grams(rows), alone(samples, per_group))
    covered = (found.low <= np.log(TRUTH)) & (np.log(TRUTH) <= found.high)
    assert 0.90 <= covered.mean() <= 0.98


def test_tasks_are_measured_on_their_own_samples():
    gram = grams(gradients(np.random.default_rng(3), 2, 12, SPECTRUM))
    first = np.arange(12) < 5
    together = log_participation_ratio(gram, Labels(np.arange(12), np.stack([np.ones(12, bool), first], axis=1)))
    own = log_participation_ratio(gram[:, :5, :5], alone(5))
    for name in ("estimate", "low", "high"):
        np.testing.assert_allclose(getattr(together, name)[:, 1], getattr(own, name)[:, 0], rtol=1e-10)


def test_too_few_groups_and_orthogonal_gradients_are_missing():
    assert np.isnan(log_participation_ratio(np.ones((1, 3, 3)), alone(3, per_group=3)).estimate).all()
    two = log_participation_ratio(np.ones((1, 2, 2)), alone(2))
    assert np.isfinite(two.estimate).all()
    assert np.isnan(two.low).all()
    assert np.isnan(log_participation_ratio(np.eye(4)[None], alone(4)).estimate).all()
    assert np.isnan(log_participation_ratio(np.zeros((1, 4, 4)), alone(4)).estimate).all()
