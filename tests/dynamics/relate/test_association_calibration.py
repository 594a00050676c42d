"""How often nothing is called something, how often something is found, and how often intervals hold the truth."""

import numpy as np
import pytest
from scipy import stats

from dynamics.relate.differences import relabelled_difference, students_test
from dynamics.relate.pairwise import Specification, associate_pairs
from tests.dynamics.relate.simulated import (
    clustered_walks,
    decided,
    groups_of_spread,
    learning_speeds,
    one_lively_run,
    planted,
    random_walks,
    saturating_trends,
    shared_volatility,
)

SETS = 1000


def rate(result):
    return (result.p_value <= 0.05).mean()


@pytest.mark.parametrize("given", [None, "loss", "trend"])
def test_many_studies_are_decided_as_one_is(given):
    x, y, loss = learning_speeds(np.random.default_rng(6), 3, 5, 9)
    held = loss if given == "loss" else None
    many = decided(x, y, held, slopes=given == "trend")
    for study in range(3):
        specification = Specification(covariate=None if held is None else held[study], slopes=given == "trend")
        leading = np.ones((1, 1), dtype=bool)
        one = associate_pairs(x[study, ..., None], y[study, ..., None], np.arange(5), specification, leading)
        for name in ("p_value", "low", "high"):
            assert getattr(one, name).item() == pytest.approx(getattr(many, name)[study])


def naive(x, y):
    """Spearman over all checkpoints of all runs, as if each were a sample."""
    return np.mean([stats.spearmanr(a.ravel(), b.ravel()).pvalue < 0.05 for a, b in zip(x, y, strict=True)])


@pytest.mark.parametrize(
    ("kind", "fewest", "most_naive"), [(random_walks, 0.015, 0.44), (saturating_trends, 0.015, 0.44)]
)
def test_independent_curves_are_called_associated_no_more_often_than_stated(kind, fewest, most_naive):
    curves = kind(np.random.default_rng(0), SETS, 6, 15)
    assert fewest <= rate(decided(*curves)) <= 0.06
    assert naive(*curves) >= most_naive


@pytest.mark.parametrize("kind", [shared_volatility, one_lively_run])
@pytest.mark.parametrize("runs", [6, 12])
def test_runs_that_are_livelier_in_both_are_no_association(kind, runs):
    x, y = kind(np.random.default_rng(1), SETS, runs, 10)
    assert rate(decided(x, y)) <= 0.065


@pytest.mark.parametrize("runs", [6, 12])
def test_own_learning_speeds_are_a_common_cause_until_the_loss_is_held_equal(runs):
    x, y, loss = learning_speeds(np.random.default_rng(2), SETS, runs, 12)
    assert rate(decided(x, y, loss=loss)) <= 0.07
    assert rate(decided(x, y)) >= {6: 0.1, 12: 0.25}[runs]


def test_clustered_seeds_count_once():
    x, y = clustered_walks(np.random.default_rng(1), SETS, 6, 3, 12)
    assert rate(decided(x, y, cluster=np.repeat(np.arange(6), 3))) <= 0.06
    assert rate(decided(x[:150], y[:150])) > 0.15


def test_a_planted_association_is_found():
    """Correlation 0.5 of deviations, twelve runs of twelve steps."""
    assert rate(decided(*planted(np.random.default_rng(2), 100, 12, 12, 0.5))) >= 0.9


def test_intervals_of_associations_hold_the_truth():
    result = decided(*planted(np.random.default_rng(3), SETS, 12, 20, 0.5))
    assert 0.94 <= ((result.low <= 0.5) & (result.high >= 0.5)).mean() <= 0.995


def p_values(first, second, pairs=False):
    difference, test = relabelled_difference(first, second, pairs=pairs, draws=999)
    return test.p_value, np.maximum(test.p_value, students_test(difference, difference.freedom)[0])


@pytest.mark.parametrize(("size", "relabelled"), [((3, 4), 0.08), ((3, 5), 0.1), ((3, 10), 0.1), ((5, 5), 0.07)])
def test_groups_of_unequal_spread_are_no_difference(size, relabelled):
    permuted, both = p_values(*groups_of_spread(np.random.default_rng(4), 3000, *size, 5.0))
    assert (both <= 0.05).mean() <= 0.07
    assert (permuted <= 0.05).mean() >= relabelled


@pytest.mark.parametrize("pairs", [6, 8])
def test_sign_flips_keep_their_level(pairs):
    rng = np.random.default_rng(4)
    first, second = (rng.standard_exponential((pairs, 4000)) for _ in range(2))
    permuted, both = p_values(first, second, pairs=True)
    attainable = np.floor(0.05 * 2**pairs / 2) * 2 / 2**pairs
    assert (permuted <= 0.05).mean() == pytest.approx(attainable, abs=0.012)
    assert 0.01 <= (both <= 0.05).mean() <= attainable + 0.012


@pytest.mark.parametrize(("pairs", "units"), [(True, (8, 8)), (False, (6, 9)), (False, (3, 5))])
def test_intervals_of_differences_hold_the_truth(pairs, units):
    rng = np.random.default_rng(5)
    first, second = 1 + 5 * rng.standard_normal((units[0], 3000)), rng.standard_normal((units[1], 3000))
    difference = relabelled_difference(first, second, pairs=pairs, draws=1)[0]
    assert 0.93 <= ((difference.low <= 1) & (difference.high >= 1)).mean() <= 0.97
