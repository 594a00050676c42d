"""One measure and one score: what the question needs of them, its coefficient, and the interval of that."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from dynamics.relate.correlation import products_of_ranks, products_of_values, products_over_steps
from dynamics.relate.demeaning import cluster_means
from dynamics.relate.grids import Grid, common_grid
from dynamics.relate.intervals import jackknife_interval, spearman_interval
from dynamics.relate.one_run import describe_run

Question = Literal["over_steps", "between_runs", "one_run"]
Coefficient = Literal["spearman", "pearson"]

#: Steps without which a question cannot be asked.
LEAST_STEPS = {"over_steps": 3, "between_runs": 1, "one_run": 6}
#: Units with which the smallest possible p is at most 0.05: 1/4! and, for ranks, 2/5!.
LEAST_UNITS = {"pearson": 4, "spearman": 5}

#: What each question's coefficient is.
METHODS = {
    ("over_steps", "pearson"): "Pearson's correlation over runs × steps after two-way (run, step) demeaning; "
    "whole runs permuted",
    ("between_runs", "pearson"): "Pearson's correlation over runs at their last common step; runs permuted",
    ("between_runs", "spearman"): "Spearman's correlation over runs at their last common step; runs permuted",
    ("one_run", "pearson"): "Pearson's correlation over the steps of one run after removing a cubic trend; descriptive",
}


@dataclass(frozen=True)
class Pair:
    """What is known of one pair before any permutation.

    Args:
        grid: Runs and steps that count.
        products: C of :mod:`dynamics.relate.correlation`, one row a unit; ``None`` where no test can be made.
        coefficient, low, high, error: Correlation, its 95 % interval, and its standard error on Fisher's scale.
        effective_steps: N* of a single run, else NaN.
        reason: Why the coefficient is NaN, else ``""``.
    """

    grid: Grid
    products: np.ndarray | None = None
    coefficient: float = np.nan
    low: float = np.nan
    high: float = np.nan
    error: float = np.nan
    effective_steps: float = np.nan
    reason: str = ""


def pair_of(
    x: Float[np.ndarray, "run step"],
    y: Float[np.ndarray, "run step"],
    cluster: Int[np.ndarray, " run"],
    question: Question,
    coefficient: Coefficient,
) -> Pair:
    """The pair's coefficient and interval, from the runs and steps that x and y have in common.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((5, 8))
    >>> round(pair_of(x, 2 * x + np.arange(8), np.arange(5), "over_steps", "pearson").coefficient, 6)
    1.0
    """
    grid = common_grid(np.isfinite(x) & np.isfinite(y), LEAST_STEPS[question])
    if not grid.runs:
        return Pair(grid, reason=f"no run has {LEAST_STEPS[question]} steps with both")
    if question == "between_runs":
        grid = Grid(grid.runs, grid.steps[-1:])
    chosen = np.ix_(grid.runs, grid.steps)
    x, y = (cluster_means(values[chosen], cluster[list(grid.runs)]) for values in (x, y))
    return _one_run(grid, x, y) if question == "one_run" else _of_units(grid, x, y, question, coefficient)


def _one_run(grid: Grid, x: np.ndarray, y: np.ndarray) -> Pair:
    described = describe_run(x[0], y[0])
    numbers = [float(part) for part in (described.coefficient, described.low, described.high)]
    reason = "" if np.isfinite(numbers[0]) else "one of the two is constant after detrending"
    return Pair(grid, None, *numbers, effective_steps=float(described.effective_steps), reason=reason)


def _of_units(grid: Grid, x: np.ndarray, y: np.ndarray, question: Question, coefficient: Coefficient) -> Pair:
    if len(x) < 2:
        return Pair(grid, reason="there is only one independent unit")
    products = _products(x, y, question, coefficient)
    value = np.asarray(np.trace(products))
    if np.isnan(value):
        return Pair(grid, reason="one of the two does not vary")
    if coefficient == "spearman":
        ends = spearman_interval(value, len(x))
    else:
        kept = [np.arange(len(x)) != unit for unit in range(len(x))]
        left_out = [np.trace(_products(x[keep], y[keep], question, coefficient)) for keep in kept] if len(x) > 2 else []
        ends = jackknife_interval(value, np.array(left_out, dtype=np.float64))
    low, high, error = (float(end) for end in ends)
    return Pair(grid, products, float(np.clip(value, -1, 1)), low, high, error)


def _products(x: np.ndarray, y: np.ndarray, question: Question, coefficient: Coefficient) -> np.ndarray:
    if question == "over_steps":
        return products_over_steps(x, y)
    return (products_of_ranks if coefficient == "spearman" else products_of_values)(x[:, 0], y[:, 0])
