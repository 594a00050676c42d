"""Every pair beside pairs by themselves; one run's trend and autocorrelation beside slow twins."""

import numpy as np
import pytest

from dynamics.relate.correlation import centred_curves
from dynamics.relate.pairwise import (
    DEGREE,
    Specification,
    associate_pairs,
    blocks,
    coefficients,
    describe_run,
    detrended,
    effective_steps,
)

RUNS, STEPS = 6, 5


def draws(seed, names):
    return np.random.default_rng(seed).standard_normal((RUNS, STEPS, names))


def with_gaps(values):
    """Two columns with one gap each, at the same place, and one without."""
    values = values.copy()
    values[2, 3, :2] = np.nan
    return values


def test_pairs_with_the_same_gaps_are_one_block():
    x, y = with_gaps(draws(0, 3)), draws(1, 2)
    parts = list(blocks(x, y, np.arange(RUNS), Specification()))
    assert [(part.measures.tolist(), part.tasks.tolist()) for part in parts] == [([0, 1], [0, 1]), ([2], [0, 1])]
    assert [len(part.grid.steps) for part in parts] == [STEPS - 1, STEPS]


def test_every_coefficient_is_that_of_its_own_curves():
    x, y = with_gaps(draws(2, 3)), draws(3, 2)
    values = coefficients(x, y, np.arange(RUNS), Specification())
    for measure in range(3):
        steps = [0, 1, 2, 4] if measure < 2 else list(range(STEPS))
        for task in range(2):
            a, b = centred_curves(x[:, steps, measure]), centred_curves(y[:, steps, task])
            assert values[measure, task] == pytest.approx((a * b).sum())


def test_a_pair_beside_others_has_the_numbers_that_it_has_alone():
    x, y = draws(4, 3), draws(5, 2)
    leading = np.zeros((3, 2), dtype=bool)
    together = associate_pairs(x, y, np.arange(RUNS), Specification(), leading)
    alone = associate_pairs(x[..., :1], y[..., :1], np.arange(RUNS), Specification(), leading[:1, :1])
    for name in ("coefficient", "p_value", "smallest_p", "n_runs", "n_units", "n_steps"):
        np.testing.assert_allclose(getattr(together, name)[0, 0], getattr(alone, name)[0, 0])
    assert (together.p_familywise >= together.p_value).all()


def test_statistics_in_parts_are_one_family(monkeypatch):
    x, y = draws(6, 2), draws(7, 4)
    leading = np.zeros((2, 4), dtype=bool)
    whole = associate_pairs(x, y, np.arange(RUNS), Specification(), leading)
    monkeypatch.setattr("dynamics.relate.pairwise._AT_ONCE", 1)
    parts = associate_pairs(x, y, np.arange(RUNS), Specification(), leading)
    for name in ("p_value", "p_familywise", "low", "high"):
        np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12)


@pytest.mark.parametrize("degree", [0, 1, DEGREE])
def test_a_polynomial_is_removed_as_by_least_squares(degree):
    values = np.random.default_rng(8).standard_normal((2, 12))
    time = np.arange(12.0)
    for row, rest in zip(values, detrended(values, degree), strict=True):
        np.testing.assert_allclose(rest, row - np.polyval(np.polyfit(time, row, degree), time), atol=1e-9)


def effective_written_out(x, y):
    """Slow twin of Pyper & Peterman's number of independent pairs."""
    count = len(x)
    inverse = 1 / count
    for lag in range(1, count // 5 + 1):
        product = 1.0
        for values in (x, y):
            pairs = sum(values[step] * values[step + lag] for step in range(count - lag))
            product *= count / (count - lag) * pairs / sum(value**2 for value in values)
        inverse += 2 / count * (1 - lag / count) * product
    return min(max(1 / inverse, 1), count) if inverse > 1 / count else count


@pytest.mark.parametrize("memory", [0.0, 0.9])
def test_autocorrelated_steps_count_for_fewer(memory):
    shocks = np.random.default_rng(9).standard_normal((2, 60))
    for step in range(1, 60):
        shocks[:, step] += memory * shocks[:, step - 1]
    series = shocks - shocks.mean(1, keepdims=True)
    count = effective_steps(*series)
    assert count == pytest.approx(effective_written_out(*series))
    assert (count < 20) == (memory > 0)


def test_one_run_has_no_interval_of_few_steps_and_no_correlation_of_a_constant():
    x = np.random.default_rng(10).standard_normal((2, 7))
    short = describe_run(*x)
    assert np.isfinite(short.coefficient)
    assert np.isnan(short.low)
    assert np.isnan(describe_run(x[0], np.full(7, 0.1)).coefficient)
