"""What chance gives where every token chooses k of E experts uniformly and independently."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

#: Share of cases that lie beyond a bound by chance.
LEVEL = 0.05


def dead_probability(
    tokens: Float[np.ndarray, "*layers"], k: Float[np.ndarray, "*layers"], experts: Float[np.ndarray, "*layers"]
) -> Float[np.ndarray, "*layers"]:
    """Return the probability that an expert gets no token, (1 − k/E)^T.

    Args:
        tokens: T.
        k: Experts of a token; a mean where it varies.
        experts: E.

    >>> dead_probability(np.array([10.0]), np.array([1.0]), np.array([2.0])).round(6)
    array([0.000977])
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.clip(1 - k / experts, 0.0, 1.0) ** tokens


def largest_share(
    tokens: Float[np.ndarray, "*layers"], k: Float[np.ndarray, "*layers"], experts: Float[np.ndarray, "*layers"]
) -> Float[np.ndarray, "*layers"]:
    """Return what the largest load exceeds in at most 5 % of cases: c/(T k), c the smallest with E P(X > c) ≤ 0.05.

    X, the tokens of one expert, is binomial with T trials and probability k/E, since a token chooses an expert once at
    most. The bound over experts is Bonferroni's: experts compete for tokens, so that it is nearly sharp.

    Args:
        tokens: T, rounded up.
        k: Experts of a token; a mean where it varies.
        experts: E.

    >>> largest_share(np.array([1000.0]), np.array([2.0]), np.array([8.0]))
    array([0.1425])
    """
    from scipy import stats  # only where there are experts, as it takes long to import

    count = np.ceil(tokens)
    with np.errstate(invalid="ignore", divide="ignore"):
        most = stats.binom.isf(LEVEL / experts, count, np.clip(k / experts, 0.0, 1.0))
        return np.where((count > 0) & (k > 0), most / (count * k), np.nan)
