"""How SE and ρ differ between conditions whose Fisher does not: the naive number is fooled, ours is not."""

import numpy as np
import pytest

from dynamics.fisher import fisher_measures
from dynamics.fisher.spectrum import per_sample_gram
from tests.dynamics.fisher.simulated import gradients, grams, power_law, probe_gram
from tests.dynamics.fisher.test_spectrum_closed_forms import linear_regression

SPECTRUM = power_law(600)


def measured(rows, groups=()):
    """Over data sets as blocks, all samples together."""
    return of_grams(grams(rows), groups)


def of_grams(sets, groups=()):
    blocks = {str(number): gram for number, gram in enumerate(sets)}
    return fisher_measures(probe_gram(blocks, groups=groups)).sel(task="all")


def test_several_entries_of_one_image_lower_the_entropy():
    rng = np.random.default_rng(0)
    alone = measured(gradients(rng, 8, 210, SPECTRUM))
    images = np.repeat(np.arange(30), 7)
    clustered = measured(gradients(rng, 8, 210, SPECTRUM, per_group=7, correlation=0.6), images)
    naive = (alone["spectral_entropy"] - clustered["spectral_entropy"]).mean().item()
    assert naive > 0.3
    at_same_n = alone["rarefied_spectral_entropy"].sel(n=16) - clustered["rarefied_spectral_entropy"].sel(n=16)
    assert abs(at_same_n.mean().item()) < 0.06
    ours = alone["ln_participation_ratio"].mean() - clustered["ln_participation_ratio"].mean()
    assert abs(ours.item()) < 4 * clustered["ln_participation_ratio"].std().item() / 8**0.5


def test_being_further_from_the_optimum_looks_like_concentration():
    near, far = np.zeros(3), np.array([2.0, 0.0, 0.0])

    def rho(distance, sampled):
        return measured(linear_regression(400, distance, sampled=sampled)[None])["dominant_ratio"].item()

    assert rho(far, False) - rho(near, False) > 0.1
    assert abs(rho(far, True) - rho(near, True)) < 1e-12  # labels from the model: the same Fisher


def test_unequal_numbers_of_samples_look_like_concentration():
    rng = np.random.default_rng(1)
    few, many = measured(gradients(rng, 10, 32, SPECTRUM)), measured(gradients(rng, 10, 128, SPECTRUM))
    assert (many["spectral_entropy"] - few["spectral_entropy"]).min().item() > 0.6
    at_same_n = many["rarefied_spectral_entropy"].sel(n=32) - few["rarefied_spectral_entropy"].sel(n=32)
    assert abs(at_same_n.mean().item()) < 0.1
    ours = many["ln_participation_ratio"] - few["ln_participation_ratio"]
    assert abs(ours.mean().item()) < 4 * ours.std().item() / 10**0.5


def test_means_of_micro_batches_look_like_concentration():
    rng, mean, sizes = np.random.default_rng(2), np.sqrt(SPECTRUM) * 0.5, [16] * 32
    single = measured(gradients(rng, 5, 32, SPECTRUM, mean))
    means = np.stack([gradients(rng, 5, size, SPECTRUM, mean).mean(1) for size in sizes], axis=1)
    naive, corrected = measured(means), per_sample_gram(grams(means), sizes)
    ours = of_grams(corrected)
    reference = single["dominant_ratio"].mean().item()
    assert naive["dominant_ratio"].mean().item() > reference + 0.2
    assert ours["dominant_ratio"].mean().item() == pytest.approx(reference, abs=0.03)
