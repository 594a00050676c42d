"""A mixed model beside the permutation: score ~ measure + step + (1 | run), where there are runs enough."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

#: Variances between fewer runs than this are hardly known.
LEAST_RUNS = 8


@dataclass(frozen=True)
class MixedModel:
    """Slope of the standardised score on the standardised measure, with its Wald interval.

    Args:
        slope: Standard deviations of the score per standard deviation of the measure.
        low, high: 95 % interval if residuals are independent over steps, which they seldom are: too narrow then.
        converged: Whether the fit ended at a maximum; numbers are NaN if it failed altogether.
    """

    slope: float
    low: float
    high: float
    converged: bool


NOT_FITTED = MixedModel(math.nan, math.nan, math.nan, False)


def mixed_model(x: Float[np.ndarray, "run step"], y: Float[np.ndarray, "run step"]) -> MixedModel:
    """Fits y ~ x + step + (1 | run) by REML; the step is a factor, so that its curve may have any shape.

    Its slope mixes what happens within runs and between them, and its interval trusts the residuals: for independent
    random walks or saturating trends of 10 runs by 10 steps it excludes 0 in about a third of cases. Therefore it
    stands beside the permutation of whole runs, for comparison with published analyses, and has no p-value.

    Args:
        x: The measure.
        y: The score.

    Returns:
        ``NOT_FITTED`` for fewer than eight runs, fewer than two steps, or constant x or y.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((10, 4))
    >>> model = mixed_model(x, x + rng.standard_normal((10, 1)) + 0.1 * rng.standard_normal((10, 4)))
    >>> model.converged, bool(model.low < model.slope < model.high)
    (True, True)
    """
    runs, steps = x.shape
    if runs < LEAST_RUNS or steps < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return NOT_FITTED
    from statsmodels.regression.mixed_linear_model import MixedLM

    standard = [((values - values.mean()) / values.std()).ravel() for values in (x, y)]
    at_step = np.tile(np.eye(steps)[:, 1:], (runs, 1))
    design = np.column_stack([standard[0], np.ones(runs * steps), at_step])
    with warnings.catch_warnings():
        # What statsmodels warns about (no maximum, a variance at its boundary) is in ``converged`` or harmless.
        warnings.simplefilter("ignore")
        try:
            fit = MixedLM(standard[1], design, groups=np.repeat(np.arange(runs), steps)).fit(reml=True)
            low, high = np.asarray(fit.conf_int())[0]
        except np.linalg.LinAlgError:
            return NOT_FITTED
    return MixedModel(float(fit.params[0]), float(low), float(high), bool(fit.converged))
