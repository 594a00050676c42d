"""Measures and scores of runs over steps whose association is known: many studies at once, [set, run, step].

The null kinds have independent x and y which both move with time, as measures and scores do.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dynamics.relate.correlation import (
    centred_curves,
    cluster_means,
    jackknife_interval,
    paired,
    standard_error,
    without_each,
)
from dynamics.relate.permutations import MaxT, pairings

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


def shared_volatility(generator: np.random.Generator, sets: int, runs: int, steps: int) -> Curves:
    """Independent random walks; how far a run moves in both is its own, e^N(0, 1), as with learning rates."""
    volatility = np.exp(generator.standard_normal((sets, runs, 1)))
    x, y = random_walks(generator, sets, runs, steps)
    return volatility * x, volatility * y


def one_lively_run(generator: np.random.Generator, sets: int, runs: int, steps: int) -> Curves:
    """Independent random walks; one run moves five times as far in both."""
    volatility = np.ones((runs, 1))
    volatility[0] = 5
    x, y = random_walks(generator, sets, runs, steps)
    return volatility * x, volatility * y


def learning_speeds(
    generator: np.random.Generator, sets: int, runs: int, steps: int, noise: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and the loss follow how far a run has come, 1 − e^{−vt}, at its own speed v: nothing else joins x and y.

    Powers of it between 1/2 and 2 bend x and y differently. ``noise`` is the standard deviation of the loss around
    3 − 2·progress.
    """
    speed = np.exp(0.7 * generator.standard_normal((sets, runs, 1)))
    progress = 1 - np.exp(-speed * 3 * np.arange(1, steps + 1) / steps)
    x, y = (
        progress ** generator.uniform(0.5, 2, (sets, 1, 1)) + 0.1 * generator.standard_normal((sets, runs, steps))
        for _ in range(2)
    )
    return x, y, 3 - 2 * progress + noise * generator.standard_normal((sets, runs, steps))


def groups_of_spread(
    generator: np.random.Generator, sets: int, first: int, second: int, spread: float, shift: float = 0.0
) -> Curves:
    """Normal values, [unit, set], of two groups, the first with ``spread`` times the standard deviation."""
    return (
        shift + spread * generator.standard_normal((first, sets)),
        generator.standard_normal((second, sets)),
    )


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


@dataclass(frozen=True)
class Decided:
    """p-value and interval of each study, ``[set]``."""

    p_value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def decided(
    x: np.ndarray,
    y: np.ndarray,
    loss: np.ndarray | None = None,
    *,
    slopes: bool = False,
    cluster: np.ndarray | None = None,
    draws: int = 1999,
) -> Decided:
    """The one association of each study, as ``associate`` decides the headline's, many studies at once."""
    if cluster is not None:
        x, y = (cluster_means(values, cluster) for values in (x, y))
    if loss is None:
        curves = [centred_curves(values, slopes=slopes) for values in (x, y)]
    else:
        curves = [np.stack([centred_curves(*pair) for pair in zip(values, loss, strict=True)]) for values in (x, y)]
    pairing = pairings(x.shape[1], draws=draws)
    tests = MaxT()
    for start in range(0, len(x), 100):
        products = np.einsum("pus,pvs->uvp", *(values[start : start + 100] for values in curves))
        tests.add(paired(products, pairing, studentise=True))
    test = tests.test()
    moved = [np.moveaxis(values, 0, -1) for values in curves]
    shares = (moved[0] * moved[1]).sum(1)
    low, high, p_value = jackknife_interval(shares.sum(0), without_each(*moved))
    reach = test.critical * standard_error(shares)
    low, high = np.minimum(low, shares.sum(0) - reach), np.maximum(high, shares.sum(0) + reach)
    return Decided(np.maximum(test.p_value, p_value), np.maximum(low, -1), np.minimum(high, 1))
