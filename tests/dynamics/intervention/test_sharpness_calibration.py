"""Intervals hold the critical step of the population; tests/benchmarks/sharpness.py says the same of 400 draws."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from tests.dynamics.intervention.quadratics import CASES, tally

DRAWS = 60
#: Of 60 draws, the most that may be wrong at 5 %: one of a thousand test suites would fail.
MOST = stats.binom.ppf(0.999, DRAWS, 0.05) / DRAWS


@pytest.mark.parametrize(
    "name",
    [
        "samples agree",
        "gradients vary as much as their mean",
        "gradients vary four times as much",
        "heavy tails (Student's t, 3 degrees of freedom)",
        "no quadratic: a quartic term of the quadratic's size",
    ],
)
def test_intervals_hold_the_step_of_the_population(name: str) -> None:
    result = tally(CASES[name], DRAWS, 24, np.random.default_rng(0))
    assert result.holds[result.resolved].mean() >= 1 - MOST
    assert result.resolved.mean() > 0.8
    assert np.nanmedian(result.estimate) == pytest.approx(1.0, abs=0.1)


def test_few_groups_that_disagree_are_not_resolved() -> None:
    result = tally(CASES["gradients vary four times as much"], DRAWS, 8, np.random.default_rng(0))
    assert result.resolved.mean() < 0.7


def test_down_the_gradient_of_the_same_samples_the_step_seems_longer() -> None:
    """The pitfall that the documentation names: this must fail, or the tests above show nothing."""
    result = tally(CASES["down the samples' own gradient"], DRAWS, 24, np.random.default_rng(0))
    assert np.nanmedian(result.estimate) > 1.2
