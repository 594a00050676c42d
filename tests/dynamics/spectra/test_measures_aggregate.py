import numpy as np
import pytest
import torch

from dynamics.spectra import measures
from dynamics.spectra.measures import entropy_of_direct_sum, participation_ratio_of_direct_sum


@pytest.fixture
def spectra():
    generator = np.random.default_rng(0)
    return [torch.from_numpy(generator.exponential(scale, size)) for scale, size in ((1.0, 3), (0.1, 8), (5.0, 5))]


def each(function, spectra):
    return np.array([float(function(values)) for values in spectra])


def test_chain_rule_equals_all_spectra_together(spectra):
    together = torch.cat(spectra)
    energy = np.array([float(values.square().sum()) for values in spectra])
    entropy = entropy_of_direct_sum(energy, each(measures.spectral_entropy, spectra))
    ratio = participation_ratio_of_direct_sum(energy, each(measures.participation_ratio, spectra))
    assert entropy == pytest.approx(float(measures.spectral_entropy(together)), rel=1e-12)
    assert ratio == pytest.approx(float(measures.participation_ratio(together)), rel=1e-12)


def test_a_zero_update_changes_nothing(spectra):
    energy = np.array([float(values.square().sum()) for values in spectra])
    entropy = each(measures.spectral_entropy, spectra)
    with_zero = entropy_of_direct_sum(np.append(energy, 0.0), np.append(entropy, np.nan))
    assert with_zero == pytest.approx(entropy_of_direct_sum(energy, entropy), rel=1e-14)


def test_an_unknown_matrix_makes_the_sum_unknown():
    assert np.isnan(entropy_of_direct_sum(np.array([1.0, np.nan]), np.array([0.5, np.nan])))


def test_nothing_moved_has_no_entropy():
    assert np.isnan(entropy_of_direct_sum(np.zeros(3), np.full(3, np.nan)))
    assert np.isnan(participation_ratio_of_direct_sum(np.zeros(3), np.full(3, np.nan)))
