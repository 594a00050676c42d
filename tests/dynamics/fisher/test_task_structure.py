import numpy as np
import pytest

from dynamics.fisher.samples import SampleGroups
from dynamics.fisher.task_structure import conflict_rate, cosines, first_order_transfer, noise_scale, overlap
from tests.dynamics.fisher.simulated import gradients, grams, within_three_errors


def two_tasks(samples, per_group=1):
    """The first half of the samples is of the one task, the second of the other."""
    member = np.repeat(np.eye(2, dtype=bool), samples, axis=0)
    return SampleGroups(np.arange(2 * samples) // per_group, member)


def with_means(samples, cosine, size=1.0, seed=0, sets=400, **more):
    """Two tasks with unit noise in 20 directions and means of norm ``size`` at a given angle."""
    rng = np.random.default_rng(seed)
    means = np.zeros((2, 20))
    means[0, 0] = size
    means[1, :2] = size * cosine, size * np.sqrt(1 - cosine**2)
    return np.concatenate([gradients(rng, sets, samples, np.full(20, 0.05), mean, **more) for mean in means], axis=1)


def test_cosine_is_unbiased_where_the_raw_one_is_attenuated():
    found = cosines(grams(with_means(16, 0.6)), two_tasks(16))
    assert found.raw[:, 0, 1].mean() < 0.59
    assert np.nanmean(found.cosine.estimate[:, 0, 1]) == pytest.approx(0.6, abs=0.01)
    weak = cosines(grams(with_means(16, 0.6, size=0.4)), two_tasks(16))
    assert weak.raw[:, 0, 1].mean() < 0.45


def test_cosine_of_orthogonal_means_sharing_groups_is_fooled_by_pairs_within_groups_and_ours_is_not():
    """Samples of one image carry both tasks: what they share is no agreement of the tasks."""
    rng = np.random.default_rng(3)
    common = rng.standard_normal((400, 16, 20)) * 0.3
    means = np.zeros((2, 20))
    means[[0, 1], [0, 1]] = 1.0
    rows = np.concatenate([mean + common + 0.1 * rng.standard_normal((400, 16, 20)) for mean in means], axis=1)
    labels = SampleGroups(np.tile(np.arange(16), 2), np.repeat(np.eye(2, dtype=bool), 16, axis=0))
    found = cosines(grams(rows), labels)
    assert not within_three_errors(found.raw[:, 0, 1], 0.0)
    assert within_three_errors(found.cosine.estimate[:, 0, 1], 0.0)


@pytest.mark.parametrize(("per_group", "correlation"), [(1, 0.0), (2, 0.6)])
def test_cosine_interval_coverage(per_group, correlation):
    rows = with_means(32, 0.3, sets=1000, per_group=per_group, correlation=correlation)
    found = cosines(grams(rows), two_tasks(32, per_group)).cosine
    assert 0.90 <= ((found.low <= 0.3) & (found.high >= 0.3))[:, 0, 1].mean() <= 0.98


def test_a_mean_that_is_only_noise_is_unresolved():
    found = cosines(grams(with_means(32, 0.0, size=0.0)), two_tasks(32))
    assert found.unresolved[:, 0, 1].mean() > 0.9
    assert np.isnan(found.cosine.estimate[found.unresolved]).all()
    assert np.isnan(found.magnitude_similarity[found.unresolved]).all()


def test_conflict_needs_an_interval():
    def rate(cosine, size):
        found = cosines(grams(with_means(32, cosine, size)), two_tasks(32)).cosine
        return conflict_rate(found.low, found.high)

    assert (rate(-0.6, 1.0)[0] == 1).all()
    assert (rate(0.6, 1.0)[0] == 0).all()
    by_noise, decided = rate(0.0, 0.0)
    assert decided.mean() < 0.1
    assert np.isnan(by_noise[decided == 0]).all()


def test_magnitude_similarity():
    rng = np.random.default_rng(1)
    rows = np.concatenate(
        [gradients(rng, 50, 64, np.full(5, 1e-4), np.array([size, 0, 0, 0, 0])) for size in (3, 1)], 1
    )
    found = cosines(grams(rows), two_tasks(64)).magnitude_similarity
    np.testing.assert_allclose(found[:, 0, 1], 0.6, rtol=0.01)
    np.testing.assert_allclose(found[:, 0, 0], 1.0)


def test_overlap_of_rotated_covariances():
    """Σ and RΣRᵀ: tr ΣRΣRᵀ/tr Σ² in closed form."""
    rng = np.random.default_rng(2)
    spectrum, angle = np.array([4.0, 1.0]), 0.6
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    sigma = np.diag(spectrum)
    truth = np.trace(sigma @ rotation @ sigma @ rotation.T) / np.trace(sigma @ sigma)
    rows = [gradients(rng, 1000, 64, spectrum), gradients(rng, 1000, 64, spectrum) @ rotation.T]
    found = overlap(grams(np.concatenate(rows, axis=1)), two_tasks(64))
    assert found.estimate[:, 0, 1].mean() == pytest.approx(truth, abs=0.008)
    assert 0.90 <= ((found.low <= truth) & (truth <= found.high))[:, 0, 1].mean() <= 0.98
    assert (found.estimate[:, 0, 0] == 1).all()


def test_overlap_of_one_fisher_is_one_and_of_disjoint_ones_zero():
    rng = np.random.default_rng(4)
    same = gradients(rng, 200, 128, np.array([2.0, 1.0, 1.0]))
    first, second = np.array([2.0, 1.0, 0.0, 0.0]), np.array([0.0, 0.0, 2.0, 1.0])
    disjoint = np.concatenate([gradients(rng, 200, 64, spectrum) for spectrum in (first, second)], axis=1)
    assert overlap(grams(same), two_tasks(64)).estimate[:, 0, 1].mean() == pytest.approx(1.0, abs=0.02)
    assert np.nan_to_num(overlap(grams(disjoint), two_tasks(64)).estimate[:, 0, 1]).max() < 1e-12


def test_noise_scale():
    """tr Σ = 3, ‖μ‖² = 1."""
    mean = np.array([1.0, 0.0, 0.0, 0.0])
    labels = SampleGroups.of_one_task(np.arange(64))
    found = noise_scale(grams(gradients(np.random.default_rng(5), 1000, 64, np.full(4, 0.75), mean)), labels)
    assert np.nanmedian(found.estimate) == pytest.approx(3.0, rel=0.03)
    assert 0.90 <= ((found.low <= 3) & (found.high >= 3)).mean() <= 0.98


def test_noise_scale_of_pure_noise_is_missing():
    labels = SampleGroups.of_one_task(np.arange(32))
    found = noise_scale(grams(gradients(np.random.default_rng(6), 300, 32, np.ones(20))), labels)
    assert np.isnan(found.estimate).mean() > 0.9


def test_transfer_is_the_fall_of_a_quadratic_loss():
    """L_t = ½‖x_t − θ‖² + 5: exact but for η²."""
    rng = np.random.default_rng(7)
    targets, rate = rng.standard_normal((2, 200, 6)) + np.array([1.0, -0.5])[:, None, None], 1e-5
    rows = -targets.reshape(1, 400, 6)  # at θ = 0
    losses = 0.5 * (targets**2).sum(-1).ravel() + 5
    found = first_order_transfer(grams(rows), two_tasks(200), losses).estimate[0]
    mean_loss = losses.reshape(2, 200).mean(1)
    step = rate * targets.mean(1)
    after = (0.5 * ((targets[None] - step[:, None, None]) ** 2).sum(-1) + 5).mean(-1)
    ahead = 1 - after / mean_loss
    assert found[0, 1] * rate == pytest.approx(ahead[0, 1], rel=1e-3)
    assert found[1, 0] * rate == pytest.approx(ahead[1, 0], rel=1e-3)
    # A task's own: the mean gradient of the same samples has noise of its own, which a fresh step would not find.
    assert found[0, 0] * rate < ahead[0, 0]
    assert found[0, 0] * rate == pytest.approx(ahead[0, 0], rel=0.05)


def test_one_group_a_task_is_missing_not_zero():
    rows = with_means(2, 0.5, sets=1)
    labels = SampleGroups(np.array([0, 0, 1, 1]), np.repeat(np.eye(2, dtype=bool), 2, axis=0))
    found = cosines(grams(rows), labels)
    assert found.unresolved.all()
    assert np.isnan(overlap(grams(rows), labels).estimate).all()
    assert np.isnan(noise_scale(grams(rows), labels).estimate).all()
