"""Leading values and moments are those of the whole spectrum, and the bounds hold it, whatever it looks like."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics.spectra import leading, measures
from dynamics.spectra.dense import dense_spectrum
from dynamics.spectra.leading import count_beyond, measures_of_leading, rank_at_energy_of_leading
from tests.dynamics.spectra.test_dense import planted

COUNT = 200
_INDEX = torch.arange(1, COUNT + 1, dtype=torch.float64)
SPECTRA = {
    "power": 1 / _INDEX,
    "flat": torch.ones(COUNT, dtype=torch.float64),
    "step": torch.where(_INDEX <= 5, 10.0, 1.0).double(),
    "linear": 1.01 - _INDEX / COUNT,
    "geometric": 0.8**_INDEX,
    "two levels below": torch.where(_INDEX <= 5, 10.0, torch.where(_INDEX <= 40, 2.0, 0.1)).double(),
    "one large": torch.where(_INDEX == 1, 1.0, 1e-4).double(),
}


@pytest.mark.parametrize("k", [1, 5, 25])
@pytest.mark.parametrize("shape", [(200, 300), (300, 200)])
@pytest.mark.parametrize("name", SPECTRA)
def test_leading_values_and_bounds_are_those_of_the_whole_spectrum(name, shape, k):
    matrix, values = planted(SPECTRA[name], *shape), SPECTRA[name]
    found = dense_spectrum(matrix, top=k)
    assert found.method == "lanczos"
    torch.testing.assert_close(found.values, values[:k], rtol=1e-6, atol=1e-8 * float(values[0]))
    assert found.remainder.frobenius_norm == pytest.approx(float(values.norm()), rel=1e-12)
    assert found.remainder.participation_ratio == pytest.approx(float(measures.participation_ratio(values)), rel=1e-10)
    entropy = float(measures.spectral_entropy(values))
    assert found.remainder.entropy_energy_low <= entropy + 1e-12
    assert entropy <= found.remainder.entropy_energy_high + 1e-12


def test_the_bounds_close_as_the_rest_vanishes():
    matrix = planted(SPECTRA["geometric"], 200, 300)
    widths = []
    for k in (2, 8, 25):
        remainder = dense_spectrum(matrix, top=k).remainder
        widths.append(remainder.entropy_energy_high - remainder.entropy_energy_low)
    assert widths[0] > 5 * widths[1] > 25 * widths[2]
    assert widths[2] < 1e-3


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda numbers: sum(numbers) > 1e-3))
@settings(max_examples=300, deadline=None)
def test_no_numbers_of_one_sum_and_sum_of_squares_have_an_entropy_outside(numbers):
    shares = np.array(numbers) / sum(numbers) * 0.7
    entropy = -float(sum(share * math.log(share) for share in shares if share > 0))
    low, high = (
        bound(float(shares.sum()), float((shares**2).sum()), len(shares))
        for bound in (leading._smallest_entropy, leading._largest_entropy)
    )
    assert low - 1e-7 <= entropy <= high + 1e-7


@pytest.mark.parametrize("seed", range(20))
def test_the_allowance_for_inexact_vectors_holds(seed):
    """Vectors that are off, with the residual they have."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(60, generator=generator, dtype=torch.float64) ** (1 + seed % 7)
    basis = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64)).Q
    share = (basis * (values / values.sum())) @ basis.mT
    size = 10.0 ** -(seed % 5)
    off = basis[:, values.argsort(descending=True)[:4]] + size * torch.randn(60, 4, generator=generator).double()
    off = torch.linalg.qr(off).Q
    ritz, turn = torch.linalg.eigh(off.mT @ share @ off)
    residual = float(torch.linalg.matrix_norm(share @ off @ turn - off @ turn * ritz))
    low, high, _ = leading._entropy_bounds(share, ritz.flip(-1), residual)
    entropy = float(measures.spectral_entropy(values, "eigenvalue"))
    assert low - 1e-12 <= entropy <= high + 1e-12


@pytest.mark.parametrize("scale", [1e-200, 1e-10, 1e10, 1e200])
def test_scale_only_scales(scale):
    matrix = planted(SPECTRA["power"], 200, 300)
    found, scaled = dense_spectrum(matrix, top=5), dense_spectrum(matrix * scale, top=5)
    torch.testing.assert_close(scaled.values, found.values * scale, rtol=1e-9, atol=0)
    assert scaled.remainder.frobenius_norm == pytest.approx(found.remainder.frobenius_norm * scale, rel=1e-12)
    assert scaled.remainder.entropy_energy_high == pytest.approx(found.remainder.entropy_energy_high, abs=1e-9)


@pytest.mark.parametrize("top", [26, 500])
def test_where_all_cost_no_more_all_are_computed(top):
    found = dense_spectrum(planted(SPECTRA["power"], 200, 300), top=top)
    assert (found.method, len(found.values), found.remainder) == ("gram", 200, None)


def test_what_is_zero_or_not_finite_has_no_leading_values():
    assert dense_spectrum(torch.zeros(100, 100), top=2).method == "gram"
    assert dense_spectrum(torch.full((100, 100), torch.nan), top=2).method == "failed"


@pytest.mark.parametrize("name", SPECTRA)
def test_measures_of_leading_values_are_those_of_the_whole_spectrum_or_nan(name):
    values = SPECTRA[name]
    norm, ratio = float(values.norm()), float(measures.participation_ratio(values))
    tolerance = np.array([0.05])
    known = measures_of_leading(values[None, :30].numpy(), np.array([norm]), np.array([ratio]), tolerance)
    for key, number in known.items():
        expected = measures.numerical_rank(values, 0.05) if key == "numerical_rank" else measures.MEASURES[key](values)
        if not (key in ("rank_at_energy", "numerical_rank") and float(expected) >= 30):
            assert number.item() == pytest.approx(float(expected), rel=1e-12), key
        else:
            assert np.isnan(number.item()), key


def test_ranks_beyond_what_is_known_are_not_guessed():
    values, norm = np.array([[3.0, 2.0, np.nan], [3.0, 2.0, 1.0]]), np.array([4.0, 14**0.5])
    assert np.isnan(rank_at_energy_of_leading(values, norm, 0.9)[0])
    assert rank_at_energy_of_leading(values, norm, 0.9)[1] == 2
    np.testing.assert_array_equal(count_beyond(values, np.array([1.0, 1.5])), [np.nan, 2.0])
