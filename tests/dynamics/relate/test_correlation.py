"""Correlations beside slow twins: least squares with dummies, every unit left out anew, grids by hand."""

import numpy as np
import pytest
from scipy import stats

from dynamics.relate.correlation import (
    Grid,
    centred_curves,
    centred_numbers,
    centred_ranks,
    cluster_means,
    common_grid,
    jackknife_interval,
    paired,
    spearman_interval,
    without_each,
)
from dynamics.relate.permutations import pairings


def test_a_covariate_is_removed_as_by_least_squares_with_dummies_of_runs_and_steps():
    rng = np.random.default_rng(2)
    x, loss = rng.standard_normal((2, 6, 9))
    smooth = loss
    for _ in range(2):
        wide = np.concatenate([smooth[:, :1], smooth, smooth[:, -1:]], axis=1)
        smooth = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    dummies = [np.kron(np.eye(6), np.ones((9, 1))), np.kron(np.ones((6, 1)), np.eye(9))]
    design = np.hstack([*dummies, *(smooth.reshape(-1, 1) ** power for power in (1, 2, 3))])
    residuals = x.ravel() - design @ np.linalg.lstsq(design, x.ravel(), rcond=None)[0]
    np.testing.assert_allclose(
        centred_curves(x, loss).ravel(), residuals / np.linalg.norm(residuals), rtol=1e-8, atol=1e-10
    )


def test_the_trend_of_each_run_is_removed():
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 8))
    sloped = x + rng.standard_normal((6, 1)) * np.arange(8)
    np.testing.assert_allclose(centred_curves(x, slopes=True), centred_curves(sloped, slopes=True), atol=1e-10)


@pytest.mark.parametrize(("centre", "twin"), [(centred_numbers, stats.pearsonr), (centred_ranks, stats.spearmanr)])
def test_numbers_and_ranks_correlate_as_scipy_has_it(centre, twin):
    x, y = np.random.default_rng(4).integers(0, 6, (2, 9)).astype(float)
    assert (centre(x) * centre(y)).sum() == pytest.approx(twin(x, y).statistic)


def test_ranks_are_scipys_among_equal_and_missing_numbers():
    values = np.random.default_rng(6).integers(0, 5, (3, 4, 9)).astype(float)
    values[1, 2, 3] = np.nan
    np.testing.assert_array_equal(centred_ranks(values), centred_numbers(stats.rankdata(values, axis=-1)))


@pytest.mark.parametrize("centre", [centred_numbers, centred_ranks])
def test_of_a_constant_nothing_is_left(centre):
    assert np.isnan(centre(np.full((2, 5), 0.1))).all()


def test_curves_that_differ_by_rounding_only_are_constant():
    curves = 1e6 + np.random.default_rng(5).uniform(-1e-10, 1e-10, (4, 6))
    assert np.isnan(centred_curves(curves)).all()


def test_each_pairing_has_the_correlation_and_t_of_the_curves_it_pairs():
    x, y = (centred_curves(values) for values in np.random.default_rng(6).standard_normal((2, 4, 5)))
    pairing = pairings(4)
    products = np.einsum("us,vs->uv", x, y)[..., None]
    shares = np.stack([(x * y[list(order)]).sum(1) for order in pairing])
    np.testing.assert_allclose(paired(products, pairing, studentise=False).ravel(), shares.sum(1), atol=1e-12)
    t = shares.mean(1) / (shares.std(1, ddof=1) / 2)
    np.testing.assert_allclose(paired(products, pairing, studentise=True).ravel(), t, rtol=1e-9)


def test_the_correlation_without_a_unit_is_that_of_the_others():
    values = np.random.default_rng(7).standard_normal((2, 6, 5))
    x, y = (centred_curves(curves) for curves in values)
    expected = []
    for unit in range(6):
        others = [centred_curves(np.delete(curves, unit, axis=0)) for curves in values]
        expected.append((others[0] * others[1]).sum())
    np.testing.assert_allclose(without_each(x[..., None], y[..., None]).ravel(), expected, rtol=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_an_interval_excludes_0_exactly_where_its_p_value_is_at_most_a_twentieth(seed):
    rng = np.random.default_rng(seed)
    estimate = rng.uniform(-1, 1, 200)
    left_out = np.tanh(np.arctanh(estimate) + rng.normal(0, 0.2, (7, 200)))
    for low, high, p_value in (jackknife_interval(estimate, left_out), spearman_interval(estimate, 12)):
        np.testing.assert_array_equal((low > 0) | (high < 0), p_value <= 0.05)
        assert ((low <= estimate) & (estimate <= high)).all()


def test_too_few_units_have_no_interval():
    for low, high, p_value in (jackknife_interval(np.array(0.9), np.ones((2,))), spearman_interval(np.array(0.9), 3)):
        assert np.isnan(low)
        assert np.isnan(high)
        assert p_value == 1


@pytest.mark.parametrize(
    ("present", "least", "expected"),
    [
        ([[1, 1, 1], [1, 1, 1]], 3, Grid((0, 1), (0, 1, 2))),
        ([[1, 1, 0], [1, 1, 1], [0, 0, 1]], 1, Grid((0, 1), (0, 1))),
        ([[1, 0, 0], [0, 1, 1], [0, 1, 1]], 2, Grid((1, 2), (1, 2))),
        ([[1, 1, 0], [0, 0, 0]], 2, Grid((0,), (0, 1))),
        ([[1, 0], [1, 0]], 2, Grid((), ())),
    ],
    ids=["all", "the sparsest goes", "the sparsest goes first", "an empty run", "none"],
)
def test_the_common_grid(present, least, expected):
    assert common_grid(np.array(present, dtype=bool), least) == expected


def test_means_of_clusters_are_in_the_order_of_their_numbers():
    values = np.arange(8.0).reshape(4, 2)
    np.testing.assert_array_equal(cluster_means(values, np.array([1, 0, 1, 0])), [[4, 5], [2, 3]])
