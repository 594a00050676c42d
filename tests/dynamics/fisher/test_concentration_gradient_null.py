"""Each block is a data set of its own: probe samples, and the mean gradient of a fresh batch as the update."""

import numpy as np
import pytest

from dynamics.fisher.concentration import _batch_noise, effective_batches, energy_share, matched_gains
from dynamics.fisher.samples import half_splits
from dynamics.fisher.spectrum import fisher_eigenvectors
from tests.dynamics.fisher.simulated import gradients, grams, power_law, stacked

SETS, SAMPLES, SPECTRUM, K = 150, 64, power_law(300), (1, 4, 16)


def probes_and_batch(batch_size, size_of_mean, per_group=1, correlation=0.0, seed=0):
    """Probe gradients, and a fresh batch's mean gradient; ‖μ‖² is ``size_of_mean`` times tr Σ."""
    rng = np.random.default_rng(seed)
    mean = rng.standard_normal((SETS, 1, 300)) * np.sqrt(SPECTRUM)
    mean *= np.sqrt(size_of_mean * SPECTRUM.sum() / (mean**2).sum(-1, keepdims=True))
    rows = gradients(rng, SETS, SAMPLES, SPECTRUM, mean, per_group, correlation)
    batch = mean[:, 0] + rng.standard_normal((SETS, 300)) * np.sqrt(SPECTRUM / batch_size)
    return rows, batch


def gain(rows, update, batch_size, per_group=1, **more):
    product = np.einsum("bnd,bd->bn", rows, update)
    group = np.arange(SAMPLES) // per_group
    gram = stacked(grams(rows), product, np.linalg.norm(update, axis=1), groups=group, batch_size=batch_size)
    return matched_gains(gram, K, **more)[0]


@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize(
    ("batch_size", "size_of_mean", "per_group", "correlation"),
    [(1, 0.01, 1, 0.0), (8, 0.01, 1, 0.0), (64, 0.1, 1, 0.0), (512, 0.02, 1, 0.0), (32, 0.1, 4, 0.6)],
)
def test_a_fresh_gradient_is_not_more_concentrated_than_its_null(
    batch_size, size_of_mean, per_group, correlation, centre
):
    rows, batch = probes_and_batch(batch_size, size_of_mean, per_group, correlation)
    found = gain(rows, batch, batch_size, per_group, centre=centre)
    covered, above = ((found.low <= 1) & (found.high >= 1)).mean(0), (found.low > 1).mean(0)
    assert (covered >= 0.90).all(), covered
    assert (above <= 0.06).all(), above


def test_an_isotropic_null_would_call_every_gradient_concentrated():
    rows, batch = probes_and_batch(32, 0.1)
    found = gain(rows, batch, 32)
    assert (found.captured[:, 0] > 5 / 300).mean() > 0.95
    assert (found.low[:, 0] > 1).mean() < 0.06


def test_share_of_a_gradient_rises_with_its_batch():
    """What makes the match necessary: the mean lies along leading directions, the noise less."""
    mean = np.zeros((SETS, 1, 300))
    mean[:, :, 0] = 2.0
    rows = gradients(np.random.default_rng(1), SETS, SAMPLES, SPECTRUM, mean)
    shares = [gain(rows, mean[:, 0], m).null[:, 0].mean() for m in (1, 8, 64, 512)]
    assert shares == sorted(shares)
    assert shares[-1] - shares[0] > 0.3


@pytest.mark.parametrize("centre", [False, True])
def test_a_planted_update_is_found(centre):
    rows, batch = probes_and_batch(32, 0.01)
    planted = np.tile((np.arange(300) < 2).astype(float), (SETS, 1))
    found = gain(rows, planted, 32, centre=centre)
    assert (found.low[:, 1:] > 1).mean() > 0.95
    assert (gain(rows, batch, 32, centre=centre).low[:, 1:] > 1).mean() < 0.06


def test_direction_and_size_of_the_update_do_not_matter():
    rows, batch = probes_and_batch(8, 0.1)
    one, other = gain(rows, batch, 8), gain(rows, -1e-4 * batch, 8)
    np.testing.assert_allclose(one.gain, other.gain, rtol=1e-10)


def test_share_is_that_of_explicit_directions():
    """The update's share by hand, on the directions of each half."""
    rows, batch = probes_and_batch(8, 0.1)
    slow = []
    for first, _ in half_splits(np.arange(SAMPLES), 2, 3):
        directions = np.linalg.svd(rows[0, first] - rows[0, first].mean(0), full_matrices=False)[2][:4]
        slow.append(((directions @ batch[0]) ** 2).sum() / (batch[0] ** 2).sum())
    found = gain(rows[:1].repeat(1, 0), batch[:1], 8, splits=2, seed=3, centre=True)
    assert found.captured[0, 1] == pytest.approx(np.mean(slow), rel=1e-10)


def test_no_null_without_batch_size_or_groups():
    rows, batch = probes_and_batch(8, 0.1)
    assert np.isnan(gain(rows, batch, 0).gain).all()
    product = np.einsum("bnd,bd->bn", rows, batch)
    few = matched_gains(stacked(grams(rows), product, np.ones(SETS), groups=np.arange(SAMPLES) % 3, batch_size=8), K)[0]
    assert np.isnan(few.low).all()


def test_zero_gradients_and_more_directions_than_a_half_has_are_missing():
    gram = np.stack([np.zeros((8, 8)), np.eye(8) + 1])
    found = matched_gains(stacked(gram, np.ones((2, 8)), np.full(2, 9.0), batch_size=4), (1, 8))[0]
    assert np.isnan(found.gain[0]).all()
    assert np.isfinite(found.gain[1, 0])
    assert np.isnan(found.gain[1, 1])


def test_leakage_would_pass_for_concentration():
    """An update made of the probe samples themselves is found in their directions: they must be held out."""
    rows, _ = probes_and_batch(64, 0.0001)
    values, vectors = fisher_eigenvectors(grams(rows))
    own = rows.mean(1)
    leaked = energy_share(values, vectors, np.einsum("bnd,bd->bn", rows, own), np.linalg.norm(own, axis=1), [16])
    fresh = probes_and_batch(64, 0.0001, seed=1)[1]
    honest = energy_share(values, vectors, np.einsum("bnd,bd->bn", rows, fresh), np.linalg.norm(fresh, axis=1), [16])
    assert leaked.mean() > honest.mean() + 0.1


@pytest.mark.parametrize(("samples", "batch_size"), [(4, 8), (4, 16), (8, 16), (8, 64)])
@pytest.mark.parametrize("spectrum", [power_law(300), np.ones(300)])
def test_an_interval_where_draws_may_be_no_gradient(samples, batch_size, spectrum):
    """A multiple of the half's size may draw each sample equally often, which would be a batch without noise."""
    rng = np.random.default_rng(2)
    rows = gradients(rng, SETS, samples, spectrum)
    update = rng.standard_normal((SETS, 300)) * np.sqrt(spectrum / batch_size)
    product = np.einsum("bnd,bd->bn", rows, update)
    found = matched_gains(stacked(grams(rows), product, np.linalg.norm(update, axis=1), batch_size=batch_size), (1, 2))[
        0
    ]
    for name in ("gain", "ln_gain", "low", "high", "null", "null_low", "null_high"):
        assert np.isfinite(getattr(found, name)).all(), name
    assert (found.low <= np.exp(found.ln_gain)).all()
    assert (np.exp(found.ln_gain) <= found.high).all()
    assert (found.low > 1).mean() <= 0.06


def test_the_log_gain_of_a_fresh_gradient_is_about_zero():
    """With the mean gain it is not: its median is 0.3 to 0.6 for one direction."""
    for size_of_mean, batch_size in ((0.001, 16), (0.001, 256), (0.25, 16)):
        rows, batch = probes_and_batch(batch_size, size_of_mean)
        found = gain(rows, batch, batch_size)
        assert abs(np.median(found.ln_gain[:, 2])) < 0.15


@pytest.mark.parametrize(("steps", "before", "momentum"), [(1, 0, 0.9), (1, 7, 0.9), (20, 100, 0.9), (3, 500, 0.99)])
def test_effective_batches_are_those_of_simulated_momentum(steps, before, momentum):
    """Each batch's weight by running v ← βv + g on unit vectors; the noise of the mean is Σw²/(Σw)²."""
    velocity, increment = np.zeros(before + steps), np.zeros(before + steps)
    for step, batch in enumerate(np.eye(before + steps)):
        velocity = momentum * velocity + batch
        increment += velocity if step >= before else 0.0
    expected = max(steps, increment.sum() ** 2 / (increment**2).sum())
    assert effective_batches(steps, before, momentum) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("momentum", [0.0, np.nan, 1.0])
def test_without_momentum_steps_are_batches(momentum):
    assert effective_batches(5, 10, momentum) == 5


def test_momentum_unknown_to_the_null_passes_for_gain():
    """One step of momentum 0.9 is the mean of 19 batches: against one batch nearly every update has a gain."""
    rows, batch = probes_and_batch(19 * 8, 0.25)
    assert (gain(rows, batch, 8).low[:, 2] > 1).mean() > 0.5
    assert (gain(rows, batch, round(8 * effective_batches(1, 1000, 0.9))).low[:, 2] > 1).mean() < 0.06


@pytest.mark.parametrize("batch_size", [3, 8, 100])
def test_noise_of_a_batch_has_the_samples_covariance(batch_size):
    group = np.arange(8) // 2
    noise = _batch_noise(np.random.default_rng(3), batch_size, group, 200_000)
    np.testing.assert_allclose(noise.sum(1), 0, atol=1e-12)
    np.testing.assert_allclose(noise.T @ noise / len(noise), (np.eye(8) - 1 / 8) / 7, atol=2e-3)
    assert np.abs(noise).max(1).min() > 0
