import numpy as np
import pytest

from dynamics.fisher.concentration import energy_share, isotropic_null, rayleigh_ratio, relative_rayleigh_ratio
from dynamics.fisher.spectrum import fisher_eigenvectors
from tests.dynamics.fisher.simulated import gradients, grams, planted, power_law, stacked, within_three_errors

K = (1, 2, 4, 8)


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    rows = gradients(rng, 3, 10, power_law(14), mean=0.3)
    update = rng.standard_normal((3, 14))
    return rows, update, np.einsum("bnd,bd->bn", rows, update), np.linalg.norm(update, axis=1)


def test_share_is_that_of_the_explicit_projection(data):
    rows, update, product, norm = data
    found = energy_share(*fisher_eigenvectors(grams(rows)), product, norm, K)
    for block in range(3):
        directions = np.linalg.svd(rows[block])[2]
        for place, k in enumerate(K):
            explicit = ((directions[:k] @ update[block]) ** 2).sum() / (update[block] ** 2).sum()
            assert found[block, place] == pytest.approx(explicit, rel=1e-10)


def test_rayleigh_ratio_is_that_of_the_explicit_fisher(data):
    rows, update, product, norm = data
    ratio = rayleigh_ratio(stacked(grams(rows), product, norm, dimension=14))
    relative = relative_rayleigh_ratio(fisher_eigenvectors(grams(rows))[0], product, norm)
    explicit = np.zeros(3)
    for block in range(3):
        fisher = rows[block].T @ rows[block] / 10
        quotient = update[block] @ fisher @ update[block] / (update[block] ** 2).sum()
        explicit[block] = quotient / (np.trace(fisher) / 14)
        assert relative[block] == pytest.approx(quotient / np.linalg.eigvalsh(fisher)[-1], rel=1e-10)
    # Corrected for bias: close to the explicit number, and about it.
    np.testing.assert_allclose(ratio.estimate, explicit, rtol=0.1)
    assert ((ratio.low < explicit) & (explicit < ratio.high)).all()


def test_rayleigh_interval_coverage():
    """The update is fixed and the probe samples are drawn: the interval is for the population's Fisher."""
    spectrum = power_law(30)
    update = np.ones(30)
    truth = (spectrum @ update**2 / 30) / spectrum.mean()
    rows = gradients(np.random.default_rng(1), 1000, 32, spectrum)
    gram, norm = grams(rows), np.full(1000, 30**0.5)
    found = rayleigh_ratio(stacked(gram, rows @ update, norm, dimension=30))
    assert 0.90 <= ((found.low <= truth) & (truth <= found.high)).mean() <= 0.98
    assert within_three_errors(np.log(found.estimate), np.log(truth))


def test_directions_beyond_the_rank_add_nothing():
    data = planted(np.array([2.0, 1.0]), 6, 8)
    update = np.ones(8)
    found = energy_share(*fisher_eigenvectors(grams(data)[None]), (data @ update)[None], np.array([8**0.5]), K)
    assert found[0, 1] == pytest.approx(found[0, 2], rel=1e-12)
    assert np.isnan(found[0, 3])  # eight directions of six samples


def test_zero_update_and_zero_gradients_are_missing():
    values, vectors = fisher_eigenvectors(np.stack([np.eye(3), np.zeros((3, 3))]))
    assert np.isnan(energy_share(values, vectors, np.zeros((2, 3)), np.array([0.0, 1.0]), [1])).all()


def test_isotropic_null_is_that_of_random_directions():
    update = np.random.default_rng(2).standard_normal((20000, 30))
    share = (update[:, :4] ** 2).sum(1) / (update**2).sum(1)
    mean, low, high = isotropic_null(np.array([30.0]), [4])
    assert mean[0, 0] == 4 / 30
    assert share.mean() == pytest.approx(mean[0, 0], rel=0.01)
    assert np.quantile(share, [0.025, 0.975]) == pytest.approx([low[0, 0], high[0, 0]], rel=0.04)


def test_isotropic_null_of_a_small_or_unknown_space():
    mean, low, high = isotropic_null(np.array([2.0, np.nan]), [1, 2, 8])
    assert mean[0].tolist() == [0.5, 1.0, 1.0]
    assert low[0, 1:].tolist() == high[0, 1:].tolist() == [1.0, 1.0]
    assert np.isnan([mean[1], low[1], high[1]]).all()
