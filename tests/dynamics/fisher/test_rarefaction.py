import numpy as np
import pytest

from dynamics.fisher.rarefaction import rarefied, sizes_up_to
from dynamics.fisher.spectrum import fisher_eigenvalues, fisher_entropy
from tests.dynamics.fisher.simulated import gradients, grams, power_law


def test_all_samples_are_the_plug_in():
    gram = grams(gradients(np.random.default_rng(0), 3, 16, power_law(50)))
    found = rarefied(gram, np.arange(16), [16])
    np.testing.assert_allclose(found.spectral_entropy[:, 0], fisher_entropy(fisher_eigenvalues(gram)))
    assert (found.spectral_entropy_deviation == 0).all()


def test_a_point_is_what_so_few_samples_would_have_given():
    rng = np.random.default_rng(1)
    many, few = (grams(gradients(rng, 150, samples, power_law(50))) for samples in (32, 8))
    found = rarefied(many, np.arange(32), [8]).spectral_entropy[:, 0]
    direct = fisher_entropy(fisher_eigenvalues(few))
    assert found.mean() == pytest.approx(direct.mean(), abs=4 * direct.std() / 150**0.5)


def test_one_sample_of_each_group():
    """Copies within groups add nothing: the curve is that of the groups."""
    rows = np.repeat(gradients(np.random.default_rng(2), 2, 6, power_law(20)), 3, axis=1)
    found = rarefied(grams(rows), np.repeat(np.arange(6), 3), [6, 7])
    np.testing.assert_allclose(found.spectral_entropy[:, 0], fisher_entropy(fisher_eigenvalues(grams(rows[:, ::3]))))
    assert np.isnan(found.spectral_entropy[:, 1]).all()


def test_equal_size_ranks_spectra_where_unequal_size_fails():
    """The flatter spectrum has the larger SE; measured with fewer samples it seems to have the smaller."""
    rng = np.random.default_rng(3)
    flatter = grams(gradients(rng, 20, 48, power_law(400, 1.0)))
    steeper = grams(gradients(rng, 20, 160, power_law(400, 1.15)))
    naive = fisher_entropy(fisher_eigenvalues(flatter)) - fisher_entropy(fisher_eigenvalues(steeper))
    curves = [rarefied(gram, np.arange(gram.shape[-1]), [48], draws=10) for gram in (flatter, steeper)]
    assert (naive > 0).mean() < 0.1
    assert (curves[0].spectral_entropy > curves[1].spectral_entropy).mean() > 0.9


def test_sizes_end_with_the_groups():
    assert sizes_up_to(1) == [1]
    assert sizes_up_to(4) == [4]
    assert sizes_up_to(64) == [4, 8, 16, 32, 64]
