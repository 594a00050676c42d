import warnings

import numpy as np
import pytest

from dynamics.spectra.measures import known_quantiles

QUARTILES = [0.25, 0.5, 0.75]


@pytest.mark.parametrize("shape", [(7,), (3, 1), (4, 6), (3, 2, 5)])
@pytest.mark.parametrize("missing", [0.0, 0.4, 1.0])
def test_are_those_of_numpy(shape, missing):
    generator = np.random.default_rng(0)
    values = generator.lognormal(0.0, 3.0, shape)
    values[generator.uniform(size=shape) < missing] = np.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of rows without a number
        expected = np.moveaxis(np.nanquantile(values, QUARTILES, axis=-1), 0, -1)
    np.testing.assert_allclose(known_quantiles(values, QUARTILES), expected, rtol=1e-14)


def test_infinite_numbers_are_numbers():
    found = known_quantiles(np.array([[1.0, 2.0, np.inf], [np.inf, np.inf, np.inf]]), [0.0, 0.5])
    np.testing.assert_array_equal(found[0], [1.0, 2.0])
    assert not np.isfinite(found[1]).any()


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_nothing_has_no_quantiles(shape):
    assert np.isnan(known_quantiles(np.empty(shape), QUARTILES)).all()
    assert known_quantiles(np.empty(shape), QUARTILES).shape == (shape[0], 3)


def test_values_stay_as_they_are():
    values = np.array([[3.0, np.nan, 1.0]])
    values.flags.writeable = False
    assert known_quantiles(values, [0.5]).tolist() == [[2.0]]
