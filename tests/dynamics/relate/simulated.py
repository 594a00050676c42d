"""Measures and scores of runs over steps whose association is known: many studies at once, [set, run, step].

The null kinds have independent x and y which both move with time, as measures and scores do.
"""

from __future__ import annotations

import numpy as np

Curves = tuple[np.ndarray, np.ndarray]


def random_walks(generator: np.random.Generator, sets: int, runs: int, steps: int) -> Curves:
    """Independent Gaussian random walks."""
    walks = generator.standard_normal((2, sets, runs, steps)).cumsum(-1)
    return walks[0], walks[1]


def saturating_trends(generator: np.random.Generator, sets: int, runs: int, steps: int) -> Curves:
    """Curves a(1 − e^{−t/τ}) with a and τ of each run's own, independent between x and y, and a little noise."""
    time = np.arange(1, steps + 1) / steps
    height = generator.uniform(0.5, 1.5, (2, sets, runs, 1))
    pace = generator.uniform(0.1, 0.6, (2, sets, runs, 1))
    noise = 0.03 * generator.standard_normal((2, sets, runs, steps))
    curves = height * (1 - np.exp(-time / pace)) + noise
    return curves[0], curves[1]


def clustered_walks(generator: np.random.Generator, sets: int, clusters: int, seeds: int, steps: int) -> Curves:
    """Random walks of which the seeds of one cluster (a model, a data set) share nearly all; clusters independent."""
    common = np.repeat(generator.standard_normal((2, sets, clusters, steps)), seeds, axis=2)
    own = generator.standard_normal((2, sets, clusters * seeds, steps))
    walks = (common + 0.5 * own).cumsum(-1)
    return walks[0], walks[1]


def planted(generator: np.random.Generator, sets: int, runs: int, steps: int, correlation: float) -> Curves:
    """A common trend, run effects, and autocorrelated deviations of a given correlation between x and y."""
    shocks = generator.standard_normal((2, sets, runs, steps))
    for step in range(1, steps):
        shocks[..., step] = 0.6 * shocks[..., step - 1] + 0.8 * shocks[..., step]
    x = shocks[0]
    y = correlation * shocks[0] + np.sqrt(1 - correlation**2) * shocks[1]
    trend = 5 * (1 - np.exp(-np.arange(steps) / 5))
    effects = generator.standard_normal((2, sets, runs, 1))
    return x + trend + effects[0], y + 2 * trend + effects[1]


def correlated_pairs(generator: np.random.Generator, sets: int, units: int, correlation: float) -> Curves:
    """Normal x and y, [set, unit], of a given correlation."""
    x, noise = generator.standard_normal((2, sets, units))
    return x, correlation * x + np.sqrt(1 - correlation**2) * noise
