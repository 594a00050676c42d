"""How often nothing is called something, how often something is found, and how often intervals hold the truth."""

import numpy as np
import pytest
from scipy import stats

from dynamics.relate.differences import paired_difference, unpaired_difference
from dynamics.relate.families import permutation_tests
from dynamics.relate.pairs import pair_of
from dynamics.relate.permutations import permutation_test
from tests.dynamics.relate.simulated import clustered_walks, planted, random_walks, saturating_trends

SETS = 500


def p_values(curves, cluster):
    pairs = [pair_of(x, y, cluster, "over_steps", "pearson") for x, y in zip(*curves, strict=True)]
    return permutation_tests(pairs, draws=999, seed=0).p_value


def naive(curves):
    """Spearman over all checkpoints of all runs, as if each were a sample."""
    return np.array([stats.spearmanr(x.ravel(), y.ravel()).pvalue for x, y in zip(*curves, strict=True)])


@pytest.mark.parametrize("kind", [random_walks, saturating_trends])
def test_independent_curves_are_called_associated_no_more_often_than_stated(kind):
    curves = kind(np.random.default_rng(0), SETS, 6, 15)
    assert 0.03 <= (p_values(curves, np.arange(6)) < 0.05).mean() <= 0.07
    assert (naive(curves) < 0.05).mean() >= 0.44


def test_clustered_seeds_count_once():
    curves = clustered_walks(np.random.default_rng(1), SETS, 6, 3, 12)
    cluster = np.repeat(np.arange(6), 3)
    assert 0.03 <= (p_values(curves, cluster) < 0.05).mean() <= 0.07
    as_if_independent = p_values(tuple(each[:200] for each in curves), np.arange(18))
    assert (as_if_independent < 0.05).mean() > 0.15


def test_a_planted_association_is_found():
    """Correlation 0.5 of deviations, eight runs of twelve steps: a power above 0.8."""
    curves = planted(np.random.default_rng(2), 100, 8, 12, 0.5)
    assert (p_values(curves, np.arange(8)) < 0.05).mean() >= 0.8


def test_intervals_of_associations_hold_the_truth():
    curves = planted(np.random.default_rng(3), SETS, 8, 20, 0.5)
    found = [pair_of(x, y, np.arange(8), "over_steps", "pearson") for x, y in zip(*curves, strict=True)]
    assert 0.90 <= np.mean([each.low <= 0.5 <= each.high for each in found]) <= 0.98


@pytest.mark.parametrize("pairs", [6, 8])
def test_sign_flips_keep_their_level(pairs):
    rng = np.random.default_rng(4)
    first, second = (rng.standard_exponential((pairs, 4000)) for _ in range(2))
    p = permutation_test_of_each(paired_difference(first, second))
    attainable = np.floor(0.05 * 2**pairs / 2) * 2 / 2**pairs
    assert (p <= 0.05).mean() == pytest.approx(attainable, abs=0.012)


def test_intervals_of_differences_hold_the_truth():
    rng = np.random.default_rng(5)
    for function, units in ((paired_difference, (8, 8)), (unpaired_difference, (6, 9))):
        first, second = 1 + 2 * rng.standard_normal((units[0], 3000)), rng.standard_normal((units[1], 3000))
        found = function(first, second, draws=1)
        assert 0.93 <= ((found.low <= 1) & (found.high >= 1)).mean() <= 0.97


def permutation_test_of_each(found):
    return np.array([permutation_test(found.statistics[:, [place]]).p_value[0] for place in range(4000)])
