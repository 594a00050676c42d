"""Permutations listed and drawn, and p-values beside ones that are counted by hand."""

from itertools import combinations, permutations, product
from math import comb, factorial

import numpy as np
import pytest
from scipy import stats

from dynamics.relate.permutations import (
    MaxT,
    false_discovery_rates,
    pairings,
    permutation_test,
    sign_flips,
    splits,
)


@pytest.mark.parametrize("units", [1, 2, 5, 8])
def test_few_units_are_paired_in_every_way_the_observed_first(units):
    rows = [tuple(row) for row in pairings(units).tolist()]
    assert rows[0] == tuple(range(units))
    assert len(rows) == factorial(units)
    assert set(rows) == set(permutations(range(units)))


def test_few_pairs_are_flipped_in_every_way_and_few_runs_split_in_every_way():
    flips = [tuple(row) for row in sign_flips(5).tolist()]
    assert flips[0] == (1,) * 5
    assert sorted(flips) == sorted(product((-1, 1), repeat=5))
    chosen = [tuple(np.flatnonzero(row).tolist()) for row in splits(3, 4)]
    assert chosen[0] == (0, 1, 2)
    assert sorted(chosen) == sorted(combinations(range(7), 3))
    assert len(chosen) == comb(7, 3)


@pytest.mark.parametrize(
    "draw",
    [
        lambda seed: pairings(9, draws=50, seed=seed),
        lambda seed: sign_flips(14, draws=50, seed=seed),
        lambda seed: splits(8, 9, draws=50, seed=seed),
    ],
    ids=["pairings", "flips", "splits"],
)
def test_of_many_units_random_relabellings_are_drawn_after_the_observed_one(draw):
    rows = draw(0)
    assert len(rows) == 51
    np.testing.assert_array_equal(rows, draw(0))
    assert not np.array_equal(rows, draw(1))
    np.testing.assert_array_equal(rows[0], draw(1)[0])


def counted(statistics, row):
    """Share of relabellings whose |statistic| is at least that of one row, rounding apart."""
    return (np.abs(statistics) >= np.abs(statistics[row]) * (1 - 1e-9)).mean(0)


def test_p_values_are_shares_of_relabellings():
    statistics = np.random.default_rng(0).standard_normal((200, 6))
    test = permutation_test(statistics)
    np.testing.assert_allclose(test.p_value, counted(statistics, 0))
    largest = np.abs(statistics).max(1)
    np.testing.assert_allclose(test.p_familywise, [(largest >= abs(value)).mean() for value in statistics[0]])
    np.testing.assert_allclose(test.smallest_p, 1 / 200)
    most = np.abs(statistics).max(0)
    np.testing.assert_allclose(test.smallest_familywise, [(largest >= value).mean() for value in most])


def test_a_statistic_exceeds_the_critical_value_exactly_where_its_p_value_is_at_most_the_level():
    rng = np.random.default_rng(1)
    statistics = np.abs(rng.standard_normal((400, 300)))
    statistics[0] *= rng.uniform(0.5, 3, 300)
    test = permutation_test(statistics)
    np.testing.assert_array_equal(statistics[0] > test.critical, test.p_value <= 0.05)
    np.testing.assert_array_equal(statistics[0] > test.critical_familywise, test.p_familywise <= 0.05)


def test_ties_up_to_rounding_count():
    statistics = np.array([[1.0], [-1.0 + 1e-13], [1.0 + 1e-13], [0.5]])
    assert permutation_test(statistics).p_value.tolist() == [0.75]


def test_a_missing_statistic_has_no_p_value_and_counts_for_no_other():
    statistics = np.random.default_rng(2).standard_normal((100, 3))
    alone = permutation_test(statistics[:, :2])
    statistics[:, 2] = np.nan
    test = permutation_test(statistics)
    assert np.isnan([test.p_value[2], test.p_familywise[2], test.critical[2], test.critical_familywise[2]]).all()
    np.testing.assert_array_equal(test.p_familywise[:2], alone.p_familywise)


@pytest.mark.parametrize("families", [1, 3])
def test_parts_are_one_family_and_several_families_are_adjusted(families):
    statistics = np.random.default_rng(3).standard_normal((100, 8))
    family = MaxT()
    for start in (0, 3, 6):
        family.add(statistics[:, start : start + 3])
    test, whole = family.test(families), permutation_test(statistics)
    np.testing.assert_array_equal(test.p_value, whole.p_value)
    np.testing.assert_allclose(test.p_familywise, np.minimum(1, families * whole.p_familywise))


@pytest.mark.parametrize("digits", [1, 15])  # of one digit, many are equal
def test_false_discovery_rates_are_scipys_without_what_is_missing(digits):
    p_values = np.random.default_rng(4).random((5, 8)).round(digits)
    expected = p_values.copy()
    expected.flat[1:] = stats.false_discovery_control(p_values.flat[1:])
    expected[0, 0] = p_values[0, 0] = np.nan
    np.testing.assert_array_equal(false_discovery_rates(p_values), expected)
    assert np.isnan(false_discovery_rates(np.full(2, np.nan))).all()
