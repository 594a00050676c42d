import numpy as np
import pytest

from dynamics.fisher.samples import SampleGroups
from dynamics.fisher.spectrum import (
    entropy_error,
    fisher_eigenvalues,
    fisher_eigenvectors,
    fisher_entropy,
    normalised_by_sample_rank,
    shares_by_group,
    spectral_entropy_block_diagonal,
)
from tests.dynamics.fisher.simulated import gradients, grams, planted, power_law


def shannon(p):
    return -(p * np.log(p)).sum()


def test_planted_spectrum():
    spectrum = np.array([4.0, 2.0, 1.0, 1.0])
    found = fisher_entropy(fisher_eigenvalues(grams(planted(spectrum, 9, 12))[None]))
    assert found[0] == pytest.approx(shannon(spectrum / 8), rel=1e-10)


def test_no_gradient_has_no_entropy():
    assert np.isnan(fisher_entropy(np.zeros((1, 3)))).all()


def test_plug_in_lies_below_the_truth_and_below_log_n():
    truth = shannon(power_law(200) / power_law(200).sum())
    values = fisher_eigenvalues(grams(gradients(np.random.default_rng(0), 50, 16, power_law(200))))
    found = fisher_entropy(values)
    assert found.max() < min(truth, np.log(16))


def test_standard_error_is_that_of_repeated_data():
    rows = gradients(np.random.default_rng(1), 500, 64, power_law(30), per_group=2, correlation=0.6)
    values, vectors = fisher_eigenvectors(grams(rows))
    errors = entropy_error(values, shares_by_group(vectors, SampleGroups.of_one_task(np.arange(64) // 2)))
    spread = fisher_entropy(values).std()
    assert errors.mean() == pytest.approx(spread, rel=0.2)


def test_one_group_has_no_standard_error():
    values, vectors = fisher_eigenvectors(np.eye(3)[None])
    assert np.isnan(entropy_error(values, shares_by_group(vectors, SampleGroups.of_one_task(np.zeros(3, int))))).all()


def test_block_diagonal_is_the_spectra_together_and_at_least_the_whole():
    rng = np.random.default_rng(2)
    parts = [gradients(rng, 1, 8, power_law(20))[0] for _ in range(3)]
    values = fisher_eigenvalues(np.stack([grams(part) for part in parts]))
    chain = spectral_entropy_block_diagonal(values.sum(-1), fisher_entropy(values))
    assert chain == pytest.approx(fisher_entropy(values.ravel()).item(), rel=1e-12)
    whole = fisher_entropy(fisher_eigenvalues(sum(grams(part) for part in parts)[None]))
    assert chain >= whole[0]


def test_normalised_by_the_smaller_of_samples_and_dimension():
    flat = np.log([4.0, 4.0])
    np.testing.assert_allclose(normalised_by_sample_rank(flat, 8, np.array([4.0, np.nan])), [1.0, 2 / 3])
    assert np.isnan(normalised_by_sample_rank(np.zeros(1), 1, 5.0)).all()
