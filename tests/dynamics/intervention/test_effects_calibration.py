"""What is said of known populations: no effect is called one, and directions must come from other groups.

tests/benchmarks/counterfactuals.py says the same of 400 draws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from tests.dynamics.intervention.simulated import (
    Case,
    agreeing_gradients,
    bounce,
    landing,
    newton_step,
    small_gradient_step,
    tally,
)

DRAWS = 60
#: Of 60 draws, the most that may be wrong at 5 %: one of a thousand test suites would fail.
MOST = stats.binom.ppf(0.999, DRAWS, 0.05) / DRAWS


def of_one_direction(case: Callable[[np.random.Generator], Case]) -> Callable[[np.random.Generator], Case]:
    return lambda rng: replace(case(rng), k=(1,))


@pytest.mark.parametrize("case", [small_gradient_step, agreeing_gradients])
def test_a_gradient_step_pays_its_norm_and_is_said_to(case: Callable[[np.random.Generator], Case]) -> None:
    result = tally(case, DRAWS, seed=0)
    assert (result.more + result.less).mean(0).max() <= MOST
    for holds in (result.holds_on, result.holds_off, result.holds_excess, result.holds_share):
        assert np.nanmean(holds, axis=0).min() >= 1 - MOST
    np.testing.assert_allclose(np.median(result.share - result.captured, axis=0), 0, atol=0.02)


def test_a_gradient_step_seems_to_pay_more_with_directions_of_the_same_samples() -> None:
    """The trap that cross-fitting avoids: this must fail, or the test above shows nothing."""
    fitted, leaked = (
        tally(small_gradient_step, 30, seed=1, cross_fitted=cross_fitted) for cross_fitted in (True, False)
    )
    assert fitted.more.mean(0).max() <= 0.1
    assert leaked.more.mean(0).min() >= 0.5
    assert leaked.holds_excess.mean(0).max() <= 0.5


def test_a_newton_like_step_pays_more_along_its_leading_directions() -> None:
    result = tally(newton_step, 20, seed=2)
    assert result.more.mean(0).min() >= 0.7
    assert result.less.max() == 0
    assert np.nanmean(result.holds_share, axis=0).min() >= 0.7


def test_a_bounce_is_concentrated_but_its_leading_part_does_not_lower_the_loss() -> None:
    result = tally(of_one_direction(bounce), 8, seed=3)
    assert np.median(result.captured) == pytest.approx(0.74, abs=0.05)
    assert result.lowers.mean() <= 0.1
    assert result.less.mean() == 1
    # First order says the opposite: the leading part would do all of the work, ten times over.
    assert np.median(result.first_order_share) > 5


def test_the_same_update_from_further_out_lands_and_its_leading_part_does_the_work() -> None:
    result = tally(of_one_direction(landing), 8, seed=4)
    assert np.median(result.captured) == pytest.approx(0.71, abs=0.05)
    assert result.lowers.min() == result.more.min() == 1
    assert np.median(result.share) == pytest.approx(0.94, abs=0.03)
