import re

import numpy as np
import pytest

from dynamics.fisher import concentration
from dynamics.schema import CONCENTRATION
from tests.dynamics.fisher.simulated import gradients, grams, power_law, probe_gram

SPECTRUM = power_law(60)
ROWS = gradients(np.random.default_rng(0), 1, 48, SPECTRUM)[0]


def of_update(update, **more):
    given = {"batch_size": 16, "dimension": 60} | more
    return concentration(probe_gram(grams(ROWS), ROWS @ update, np.linalg.norm(update), **given)).isel(block=0)


def test_every_variable_says_what_it_is():
    found = of_update(np.ones(60))
    assert set(found) == set(CONCENTRATION) - {"share_outside_space"}
    for name, variable in found.items():
        assert variable.dims == tuple(dim for dim in CONCENTRATION[name].dims if dim not in ("step", "block"))
        assert {"units", "long_name", "definition"} <= set(variable.attrs), name


def test_concentrated_is_said_of_a_planted_update_and_not_of_a_fresh_gradient():
    planted = of_update((np.arange(60) < 2).astype(float))
    assert planted["concentrated"].sel(k=[4, 8, 16]).all()
    assert planted["rayleigh_ratio_low"] > 1
    rng = np.random.default_rng(1)
    fresh = [of_update(rng.standard_normal(60) * np.sqrt(SPECTRUM)) for _ in range(20)]
    assert sum(bool(found["concentrated"].any()) for found in fresh) <= 3
    # Beside the isotropic null alone most of them would have been.
    assert sum(bool((found["captured"] > found["null_isotropic_high"]).any()) for found in fresh) >= 15


def test_both_gains_must_be_proven():
    """An update along the mean alone: more than a gradient of one sample has, but no part of the centred Fisher."""
    mean = np.zeros(60)
    mean[-1] = 1.0
    rows = gradients(np.random.default_rng(2), 1, 64, SPECTRUM / 4, mean)[0]
    found = concentration(probe_gram(grams(rows), rows @ mean, 1.0, batch_size=1), k=[1, 2, 4]).isel(block=0)
    assert (found["gain_low"] > 1).any()
    assert not (found["gain_low_centred"] > 1).any()
    assert not found["concentrated"].any()


def test_without_a_batch_size_nothing_is_called_concentrated():
    found = of_update((np.arange(60) < 2).astype(float), batch_size=0)
    assert np.isnan(found["gain"]).all()
    assert np.isnan(found["null_batch"])
    assert not found["concentrated"].any()


def test_a_zero_update_is_missing():
    found = of_update(np.zeros(60))
    assert np.isnan(found["captured"]).all()
    assert np.isnan(found["gain"]).all()
    assert np.isnan(found["rayleigh_ratio"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"norm": None},
            "Expected a Gram with update_product = Gδ and update_norm_squared = ‖δ‖² of an update, got none.",
        ),
        ({"product": None}, "Expected a Gram with update_product = Gδ and update_norm_squared = ‖δ‖² of an update"),
        ({"norm": 0.01}, "Expected b = Gδ and ‖δ‖² of one update, got a share of"),
        ({"product": np.ones(3)}, "Expected an update product b = Gδ of block 'global' with shape (48,), got (3,)."),
        ({"groups": ["a"]}, "Expected one group for each of 48 samples, got labels of shape (1,)."),
        ({"projection": 5}, "Expected K of whole gradients, got that of gradients projected to 5 numbers"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    values = {"product": ROWS @ np.ones(60), "norm": 60**0.5} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        concentration(probe_gram(grams(ROWS), **values))


@pytest.mark.parametrize("k", [[], [0, 1]])
def test_numbers_of_directions_are_at_least_one(k):
    message = f"Expected numbers of leading directions of at least 1, got {k}."
    with pytest.raises(ValueError, match=re.escape(message)):
        concentration(probe_gram(grams(ROWS), ROWS @ np.ones(60), 60**0.5), k=k)


def test_nothing_is_called_concentrated_against_a_null_of_too_many_samples():
    """An update in the leading direction itself: as plain as can be."""
    rng = np.random.default_rng(3)
    rows = rng.standard_normal((32, 60)) / np.arange(1, 61)
    update = np.eye(60)[0]
    flags = {
        size: concentration(probe_gram(rows @ rows.T, rows @ update, 1.0, batch_size=size), k=[2])
        for size in (16, 128, 129)
    }
    assert [bool(found["concentrated"].item()) for found in flags.values()] == [True, True, False]
    assert all(found["gain_low"].item() > 1 and found["null_batch_limit"] == 128 for found in flags.values())
