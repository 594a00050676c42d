import math
import re

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from dynamics import dominant_ratio, effective_rank, participation_ratio, spectral_entropy, stable_rank
from dynamics.spectra import measures
from dynamics.spectra.measures import MEASURES
from tests import properties
from tests.matrices import SCALES, SPECTRA
from tests.reference import entropy

RANKS = [
    "effective_rank_energy",
    "effective_rank_amplitude",
    "participation_ratio",
    "stable_rank",
    "nuclear_rank",
    "rank_at_energy",
]
#: Relative to the number of values given, by definition.
COUNTING = {"gini", "hoyer", "condition_number"}
spectra = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=12).map(lambda values: torch.tensor(values).double())


def function(name):
    return MEASURES[name]


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", MEASURES)
@given(values=spectra)
def test_scale_free(name, scale, values):
    properties.assert_scale_free(function(name), values, scale)


@pytest.mark.parametrize("name", MEASURES)
@given(values=spectra)
def test_order_free(name, values):
    properties.assert_order_free(function(name), values)


@pytest.mark.parametrize("name", sorted(set(MEASURES) - COUNTING))
@given(values=spectra)
def test_ignores_appended_zeros(name, values):
    properties.assert_ignores_appended_zeros(function(name), values)


@pytest.mark.parametrize("name", MEASURES)
@given(values=spectra)
def test_ignores_padding(name, values):
    properties.assert_ignores_padding(function(name), values)


@pytest.mark.parametrize("name", RANKS)
@given(values=spectra)
def test_rank_bounds(name, values):
    properties.assert_rank_bounds(function(name), values)


@pytest.mark.parametrize("name", MEASURES)
def test_undefined_for_zero(name):
    properties.assert_undefined_for_zero(function(name))


@pytest.mark.parametrize("name", MEASURES)
def test_nan_in_nan_out(name):
    properties.assert_nan_in_nan_out(function(name))


@given(values=spectra)
def test_renyi_ranks_are_ordered(values):
    """H_1 ≥ H_2 ≥ H_∞ of one distribution."""
    assert effective_rank(values) >= participation_ratio(values) - 1e-9
    assert participation_ratio(values) >= stable_rank(values) - 1e-9


@given(values=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=8))
def test_averaging_two_energies_raises_the_entropy(values):
    spectrum = torch.tensor(values, dtype=torch.float64)
    averaged = spectrum.clone()
    averaged[:2] = spectrum[:2].square().mean().sqrt()
    assert spectral_entropy(averaged) >= spectral_entropy(spectrum) - 1e-12


@pytest.mark.parametrize("count", [1, 2, 7])
def test_flat_spectra_have_full_rank(count):
    values = torch.full((count,), 0.3, dtype=torch.float64)
    for name in (
        "effective_rank_energy",
        "effective_rank_amplitude",
        "participation_ratio",
        "stable_rank",
        "nuclear_rank",
    ):
        assert float(function(name)(values)) == pytest.approx(count, rel=1e-12)
    assert float(measures.condition_number(values)) == 1
    assert float(measures.gini(values)) == pytest.approx(0, abs=1e-12)


def test_rank_one_spectra_have_rank_one():
    values = torch.tensor([2.0, 0, 0, 0])
    for name in RANKS:
        assert float(function(name)(values)) == 1
    assert float(measures.condition_number(values)) == math.inf
    assert float(measures.hoyer(values)) == 1


@pytest.mark.parametrize("ratio", [0.5, 0.9])
def test_geometric_energies_in_closed_form(ratio):
    """p_i ∝ qⁱ, i < n: Σp² = (1−q)(1+qⁿ)/((1+q)(1−qⁿ)), entropy from the mean of i."""
    n = 9
    index = torch.arange(n, dtype=torch.float64)
    values = ratio ** (index / 2)
    mass = (1 - ratio**n) / (1 - ratio)
    mean_index = ratio / (1 - ratio) - n * ratio**n / (1 - ratio**n)
    purity = (1 - ratio) * (1 + ratio**n) / ((1 + ratio) * (1 - ratio**n))
    assert float(spectral_entropy(values)) == pytest.approx(math.log(mass) - mean_index * math.log(ratio), rel=1e-12)
    assert float(participation_ratio(values)) == pytest.approx(1 / purity, rel=1e-12)
    assert float(stable_rank(values)) == pytest.approx(mass, rel=1e-12)
    assert float(dominant_ratio(values)) == pytest.approx(1 / mass, rel=1e-12)


@pytest.mark.parametrize("name", SPECTRA)
def test_entropies_against_the_loop(name):
    values = SPECTRA[name]
    assert float(spectral_entropy(values)) == pytest.approx(entropy([v * v for v in values]), rel=1e-12, abs=1e-15)
    assert float(spectral_entropy(values, "amplitude")) == pytest.approx(entropy(values), rel=1e-12, abs=1e-15)
    assert float(spectral_entropy(values, "eigenvalue")) == pytest.approx(entropy(values), rel=1e-12, abs=1e-15)


def test_six_ranks_of_one_spectrum():
    """The example of the field's ambiguity: one spectrum, six numbers that go by the name of effective rank."""
    values = [10, 3, 1, 0.3, 0.1, 0.03, 0.01, 0.003]
    assert float(effective_rank(values, "amplitude")) == pytest.approx(2.46, abs=5e-3)
    assert float(effective_rank(values, "energy")) == pytest.approx(1.41, abs=5e-3)
    assert float(stable_rank(values)) == pytest.approx(1.10, abs=5e-3)
    assert float(measures.nuclear_rank(values)) == pytest.approx(1.44, abs=5e-3)
    assert float(participation_ratio(values)) == pytest.approx(1.20, abs=5e-3)
    assert float(dominant_ratio(values, "amplitude")) == pytest.approx(0.69, abs=5e-3)


def test_energy_and_numerical_rank():
    values = torch.tensor([3.0, 2.0, 1.0, 1e-9])
    assert float(measures.energy_top_k(values, k=2)) == pytest.approx(13 / 14)
    assert float(measures.rank_at_energy(values, 13 / 14)) == 2
    assert float(measures.rank_at_energy(values, 1.0)) == 3  # the fourth holds 1e-18 of the energy
    assert float(measures.numerical_rank(values, 1e-6)) == 3
    assert float(measures.numerical_rank(torch.zeros(3), 1e-6)) == 0


def test_labelled_arrays_lists_and_tensors_are_the_same():
    values = [3.0, 2.0, 1.0]
    expected = effective_rank(torch.tensor(values, dtype=torch.float64))
    for same in (values, np.array(values), xr.DataArray(values), torch.tensor(values), (3, 2, 1)):
        assert effective_rank(same) == expected


def test_tolerance_of_half_precision_stays_below_one():
    assert measures.rank_tolerance(4096, 4096, 2**-7) == 2**-3.5
    assert measures.rank_tolerance(11008, 4096, 2**-23) == 11008 * 2**-23
    assert measures.rank_tolerance(64, 32, 2**-23) == 64 * 2**-23


def test_gini_against_the_mean_difference():
    energies = [4.0, 1.0, 0.25, 0.0]
    differences = sum(abs(a - b) for a in energies for b in energies) / (2 * len(energies) * sum(energies))
    assert float(measures.gini([e**0.5 for e in energies])) == pytest.approx(differences, rel=1e-12)


def test_batches_are_rows():
    values = torch.rand(3, 4, 6, dtype=torch.float64)
    for name in MEASURES:
        together = function(name)(values)
        assert together.shape == (3, 4)
        torch.testing.assert_close(together[1, 2], function(name)(values[1, 2]))


def test_no_values_at_all_is_nan():
    for name in MEASURES:
        assert function(name)(torch.empty(2, 0)).isnan().all()


def test_eigenvalues_may_carry_rounding_below_zero_but_not_more():
    assert float(effective_rank([1.0, 1.0, -1e-16], weights="eigenvalue")) == pytest.approx(2)
    message = "Expected eigenvalues of a positive semi-definite matrix, which are not negative; the smallest is -0.5."
    with pytest.raises(ValueError, match=re.escape(message)):
        effective_rank([1.0, -0.5], weights="eigenvalue")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: spectral_entropy([1.0], "power"),
            "Expected weights 'energy', 'amplitude' or 'eigenvalue', got 'power'.",
        ),
        (lambda: stable_rank([1.0, -1.0]), "Expected singular values, which are not negative; the smallest is -1."),
        (lambda: stable_rank(1.0), "Expected values of shape [..., rank], got a single number."),
        (lambda: measures.rank_at_energy([1.0], 0.0), "Expected a share of energy in (0, 1], got 0.0."),
    ],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
