"""Quartiles over matrices: of updates and gradients, beside medians of their null models."""

import numpy as np
import pytest

from dynamics import schema
from dynamics.spectra import measures, null_models, rounding
from dynamics.spectra.dataset import measure_update
from dynamics.spectra.raw import concatenate
from dynamics.text import percent
from tests.runs import drifting, records


@pytest.fixture
def groups():
    steps = list(records(drifting([5, 10, 15])).values())
    update, gradient = (concatenate([record[name] for record in steps]) for name in ("update", "gradient"))
    gradient["norm_before_clip"].values[0, :2] = np.nan, np.inf
    gradient["norm_before_clip"].values[1] = np.nan
    return measure_update(update, gradient)


def test_quartiles_of_an_update_are_those_of_its_numbers(groups):
    update, null, summary = groups["update"], groups["null"], groups["summary"]
    for name in ("frobenius_norm", "stable_rank", "path_length"):
        expected = np.nanquantile(update[name].transpose(..., "matrix"), schema.QUANTILES, axis=-1)
        np.testing.assert_allclose(summary[f"{name}_quantile"].transpose("quantile", ...), expected)
    np.testing.assert_allclose(summary["gini_null_high"], np.nanmedian(null["gini_high"].values, axis=-1))
    assert {name: variable.dims for name, variable in summary.data_vars.items()} == {
        name: variable.dims for name, variable in schema.SUMMARY.items()
    }


def test_quartiles_of_gradients_are_those_of_the_finite_numbers(groups):
    gradient, null, summary = (groups[name] for name in ("gradient", "null_gradient", "summary_gradient"))
    for number, quantile in enumerate(schema.QUANTILES):
        norms = summary["norm_before_clip_quantile"].values[:, number]
        assert norms[0] == pytest.approx(np.quantile(gradient["norm_before_clip"].values[0, 2:], quantile), rel=1e-14)
        assert np.isnan(norms[1])
        ranks = summary["stable_rank_quantile"].values[:, number]
        np.testing.assert_allclose(ranks, np.nanquantile(gradient["stable_rank"].values, quantile, axis=1))
    np.testing.assert_allclose(summary["stable_rank_null_low"], np.nanmedian(null["stable_rank_low"].values, axis=1))
    assert summary["norm_before_clip_quantile"].attrs["units"] == "loss/weight"


def test_what_is_not_finite_stays_in_the_gradient_itself(groups):
    assert np.isinf(groups["gradient"]["norm_before_clip"].values[0, 1])


def test_definitions_state_the_numbers_that_measures_use():
    assert f"{null_models.DRAWS} products" in schema.NULL["gini"].definition
    assert f"({null_models.DRAWS};" in schema.MEASURES["null_percentile"].definition
    assert f"the {measures.TOP_K} largest" in schema.MEASURES["energy_top_k"].definition
    assert percent(measures.ENERGY_SHARE, 0) in schema.MEASURES["rank_at_energy"].definition
    assert percent(measures.ENERGY, 0) in schema.UPDATE["suggested_rank"].definition
    assert schema.UPDATE["quantisation_limited"].definition == f"quantisation_noise_share > {rounding.NOISE_LIMIT}"
