"""Every measure with every score: correlation, its interval, and the p-value that belongs to it.

Several runs: pairs with the same runs share their permutations (max-T). One run is one observation of how a measure and
a score move together: it is described, its trend removed and its autocorrelation counted, and gets no p-value.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from dynamics.relate.correlation import (
    CONFIDENCE,
    Grid,
    centred_curves,
    centred_numbers,
    centred_ranks,
    cluster_means,
    common_grid,
    jackknife_interval,
    paired,
    spearman_interval,
    standard_error,
    without_each,
)
from dynamics.relate.permutations import DRAWS, LEVEL, MaxT, pairings

Question = Literal["over_steps", "between_runs", "one_run"]
Coefficient = Literal["spearman", "pearson"]

#: Steps without which a question cannot be specification.
LEAST_STEPS = {"over_steps": 3, "between_runs": 1, "one_run": 6}
#: Units with which the smallest possible p is at most 0.05: 1/4! and, for ranks, 2/5!.
LEAST_UNITS = {"pearson": 4, "spearman": 5}

#: What each question's coefficient is.
METHODS = {
    ("over_steps", "pearson"): "Pearson's correlation over runs × steps after two-way (run, step) demeaning; "
    "whole runs permuted, statistic c̄/(s_c/√n) over runs",
    ("between_runs", "pearson"): "Pearson's correlation over runs at their last common step; runs permuted",
    ("between_runs", "spearman"): "Spearman's correlation over runs at their last common step; runs permuted",
    ("one_run", "pearson"): "Pearson's correlation over the steps of one run after removing a cubic trend; descriptive",
}
#: Statistics at a time: 32 MB.
_AT_ONCE = 2**22


@dataclass(frozen=True)
class Specification:
    """What every pair is asked.

    Args:
        question, coefficient: See :func:`dynamics.relate.associate`.
        covariate: ``[run, step]``, held equal over steps; ``None`` for nothing.
        slopes: Whether each run's own straight line over the steps is held equal.
    """

    question: Question = "over_steps"
    coefficient: Coefficient = "pearson"
    covariate: np.ndarray | None = None
    slopes: bool = False


@dataclass(frozen=True)
class PairBlock:
    """Measures and tasks that have the same runs and steps.

    Args:
        measures, tasks: Their numbers.
        grid: Runs and steps that count.
        x, y: Centred values of unit norm, ``[measure, unit, step]`` and ``[task, unit, step]``; of one run as they are.
    """

    measures: np.ndarray
    tasks: np.ndarray
    grid: Grid
    x: np.ndarray
    y: np.ndarray

    @property
    def units(self) -> int:
        return self.x.shape[1]

    @property
    def pairs(self) -> tuple[np.ndarray, ...]:
        """Index of its pairs in arrays ``[measure, task]``."""
        return np.ix_(self.measures, self.tasks)


def blocks(
    x: Float[np.ndarray, "run step measure"],
    y: Float[np.ndarray, "run step task"],
    cluster: Int[np.ndarray, " run"],
    specification: Specification,
) -> Iterator[PairBlock]:
    """Yield all pairs, those with the same missing values together.

    >>> rng = np.random.default_rng(0)
    >>> x = rng.standard_normal((5, 8, 1))
    >>> (block,) = blocks(x, 2 * x + np.arange(8)[:, None], np.arange(5), Specification())
    >>> round(float((block.x * block.y).sum()), 6)
    1.0
    """
    counted = (
        np.ones(x.shape[:2], dtype=bool) if specification.covariate is None else np.isfinite(specification.covariate)
    )
    for measures, of_x in _alike(x):
        for tasks, of_y in _alike(y):
            grid = common_grid(of_x & of_y & counted, LEAST_STEPS[specification.question])
            if grid.runs and specification.question == "between_runs":
                grid = Grid(grid.runs, grid.steps[-1:])
            chosen = np.ix_(grid.runs, grid.steps)
            units = cluster[list(grid.runs)]
            grids = [np.moveaxis(values[chosen], -1, 0) for values in (x[..., measures], y[..., tasks])]
            if grid.runs:
                grids = [cluster_means(values, units) for values in grids]
                covariate = (
                    None if specification.covariate is None else cluster_means(specification.covariate[chosen], units)
                )
                grids = [_centred(values, specification, covariate) for values in grids]
            yield PairBlock(measures, tasks, grid, *grids)


def _alike(values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return columns with the same missing values, and where these are present, ``[run, step]``."""
    columns = defaultdict(list)
    for column in range(values.shape[-1]):
        columns[np.isfinite(values[..., column]).tobytes()].append(column)
    return [(np.array(alike), np.isfinite(values[..., alike[0]])) for alike in columns.values()]


def _centred(values: np.ndarray, specification: Specification, covariate: np.ndarray | None) -> np.ndarray:
    if specification.question == "one_run":
        return values
    if specification.question == "over_steps":
        return centred_curves(values, covariate, slopes=specification.slopes)
    return (centred_ranks if specification.coefficient == "spearman" else centred_numbers)(values[..., 0])


@dataclass(frozen=True)
class Associations:
    """Numbers of all pairs, ``[measure, task]``; NaN where a reason says why.

    Args:
        coefficient: Correlation.
        low, high: 95 % interval, which excludes 0 exactly where the p-value that decides is at most 0.05.
        p_value: The larger of the permutation's and that of the interval of :mod:`dynamics.relate.correlation`.
        p_familywise: The same with the p-value of the largest statistic of each permutation over all pairs.
        smallest_p: The least that the p-value alone could have been.
        smallest_p_adjusted: The least that the p-value that decides could have been.
        n_runs, n_units, n_steps: Runs, independent units and steps that count.
        effective_steps: N* of a single run, else NaN.
        reason: Why there is no coefficient, else ``""``.
    """

    coefficient: Float[np.ndarray, "measure task"]
    low: Float[np.ndarray, "measure task"]
    high: Float[np.ndarray, "measure task"]
    p_value: Float[np.ndarray, "measure task"]
    p_familywise: Float[np.ndarray, "measure task"]
    smallest_p: Float[np.ndarray, "measure task"]
    smallest_p_adjusted: Float[np.ndarray, "measure task"]
    n_runs: Int[np.ndarray, "measure task"]
    n_units: Int[np.ndarray, "measure task"]
    n_steps: Int[np.ndarray, "measure task"]
    effective_steps: Float[np.ndarray, "measure task"]
    reason: np.ndarray


def associate_pairs(
    x: Float[np.ndarray, "run step measure"],
    y: Float[np.ndarray, "run step task"],
    cluster: Int[np.ndarray, " run"],
    specification: Specification,
    leading: Bool[np.ndarray, "measure task"],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Associations:
    """Relate every measure to every score.

    Pairs of the same runs share their permutations, so that the largest statistic of each permutation adjusts all of
    them at once, however much measures and tasks resemble each other. Where pairs have different runs there are several
    such families, and their adjusted p-values are multiplied by the number of families (Bonferroni).

    Args:
        x, y: Measures and scores; NaN where missing.
        cluster: Number of each run's independent unit.
        specification: What every pair is asked.
        leading: The pair that was named before looking, which is decided by its p-value alone.
        draws, seed: Of random permutations.
    """
    shape = x.shape[-1], y.shape[-1]
    numbers = {name: np.full(shape, np.nan) for name in Associations.__annotations__}
    numbers |= {name: np.zeros(shape, dtype=np.int64) for name in ("n_runs", "n_units", "n_steps")}
    numbers["reason"] = np.full(shape, "", dtype=object)
    families = defaultdict(list)
    for block in blocks(x, y, cluster, specification):
        _count(block, numbers)
        if specification.question == "one_run" and block.grid.runs:
            _describe(block, numbers)
        elif not block.grid.runs:
            least = LEAST_STEPS[specification.question]
            numbers["reason"][block.pairs] = f"no run has {'a step' if least == 1 else f'{least} steps'} with both"
        elif block.units < 2:
            numbers["reason"][block.pairs] = "there is only one independent unit"
        else:
            families[block.grid.runs].append(block)
    for family in families.values():
        _test(family, len(families), specification, leading, numbers, draws, seed)
    numbers["reason"] = numbers["reason"].astype(str)
    return Associations(**numbers)


def coefficients(
    x: Float[np.ndarray, "run step measure"],
    y: Float[np.ndarray, "run step task"],
    cluster: Int[np.ndarray, " run"],
    specification: Specification,
) -> Float[np.ndarray, "measure task"]:
    """Return the correlations alone."""
    values = np.full((x.shape[-1], y.shape[-1]), np.nan)
    for block in blocks(x, y, cluster, specification):
        if block.grid.runs and block.units > 1:
            values[block.pairs] = np.einsum("mus,tus->mt", block.x, block.y)
    return values


def _count(block: PairBlock, numbers: dict[str, np.ndarray]) -> None:
    numbers["n_runs"][block.pairs] = len(block.grid.runs)
    numbers["n_units"][block.pairs] = block.units if block.grid.runs else 0
    numbers["n_steps"][block.pairs] = len(block.grid.steps)


def _describe(block: PairBlock, numbers: dict[str, np.ndarray]) -> None:
    described = describe_run(block.x[:, None, 0], block.y[None, :, 0])
    for name, column in vars(described).items():
        numbers[name][block.pairs] = column
    constant = np.isnan(described.coefficient)
    numbers["reason"][block.pairs] = np.where(constant, "one of the two is constant after detrending", "")


def _test(
    family: list[PairBlock],
    families: int,
    specification: Specification,
    leading: np.ndarray,
    numbers: dict[str, np.ndarray],
    draws: int,
    seed: int,
) -> None:
    """Fill in the numbers of blocks that have the same runs."""
    pairing = pairings(family[0].units, draws=draws, seed=seed)
    studentise = specification.question == "over_steps"
    tests = MaxT()
    parts = []
    for block in family:
        for x, measure in zip(block.x, block.measures, strict=True):
            for start in range(0, len(block.tasks), max(1, _AT_ONCE // len(pairing))):
                part = slice(start, start + max(1, _AT_ONCE // len(pairing)))
                products = np.einsum("us,tvs->uvt", x, block.y[part])
                tests.add(paired(products, pairing, studentise=studentise))
                parts.append((measure, block.tasks[part], _estimates(x, block.y[part], specification)))
    measures = np.concatenate([np.full(len(tasks), measure) for measure, tasks, _ in parts])
    pairs = measures, np.concatenate([tasks for _, tasks, _ in parts])
    correlation, error, low, high, p_interval = np.concatenate([estimates for *_, estimates in parts], axis=1)
    test = tests.test(families)
    alone = leading[pairs]
    critical = np.where(alone, test.critical, test.critical_familywise)
    if studentise:
        reach = critical * error
        ends = np.clip(correlation - reach, -1, 1), np.clip(correlation + reach, -1, 1)
    else:
        z, reach = (np.arctanh(np.clip(value, -1 + 1e-12, 1 - 1e-12)) for value in (correlation, critical))
        ends = np.tanh(z - reach), np.tanh(z + reach)
    smallest = np.where(alone, test.smallest_p, test.smallest_familywise)
    decidable = smallest <= LEVEL
    numbers["coefficient"][pairs] = np.clip(correlation, -1, 1)
    numbers["low"][pairs] = np.where(decidable, np.minimum(low, ends[0]), np.nan)
    numbers["high"][pairs] = np.where(decidable, np.maximum(high, ends[1]), np.nan)
    numbers["p_value"][pairs] = np.maximum(test.p_value, p_interval)
    numbers["p_familywise"][pairs] = np.maximum(test.p_familywise, p_interval)
    numbers["smallest_p"][pairs] = test.smallest_p
    numbers["smallest_p_adjusted"][pairs] = smallest
    numbers["reason"][pairs] = np.where(np.isnan(correlation), "one of the two does not vary", "")


def _estimates(x: np.ndarray, y: np.ndarray, specification: Specification) -> np.ndarray:
    """Return correlation of x with each y, its error, interval and p-value without permutations, ``[5, task]``."""
    curves = x[..., None], np.moveaxis(y, 0, -1)
    shares = (curves[0] * curves[1]).sum(1)
    correlation = shares.sum(0)
    if specification.coefficient == "spearman":
        ends = spearman_interval(correlation, len(x))
    else:
        ends = jackknife_interval(correlation, without_each(*curves))
    return np.array([correlation, standard_error(shares), *ends])


# One run

#: Degree of the polynomial in the step's number that is removed. With a straight line, two independent saturating
#: curves still "correlate" at the 5 % level in 96 % of cases; with a cubic in 4 to 8 %.
DEGREE = 3


@dataclass(frozen=True)
class RunDescription:
    """Correlation of what is left after detrending; the interval holds for this run's fluctuations only.

    Args:
        coefficient: Pearson's correlation of the residuals.
        low, high: 95 % interval from the effective number of steps.
        effective_steps: N* of Pyper & Peterman, at most the number of steps.
    """

    coefficient: Float[np.ndarray, "*sets"]
    low: Float[np.ndarray, "*sets"]
    high: Float[np.ndarray, "*sets"]
    effective_steps: Float[np.ndarray, "*sets"]


def detrended(values: Float[np.ndarray, "*sets step"], degree: int = DEGREE) -> Float[np.ndarray, "*sets step"]:
    """Return values less their least-squares polynomial in the step's number (first, second, …).

    >>> np.abs(detrended(np.array([1.0, 4.0, 9.0, 16.0, 25.0]), degree=2)).max() < 1e-12
    np.True_
    """
    time = np.linspace(-1, 1, values.shape[-1])
    basis = np.linalg.qr(np.vander(time, min(degree, len(time) - 1) + 1))[0]
    return values - (values @ basis) @ basis.T


def effective_steps(
    x: Float[np.ndarray, "*#sets step"], y: Float[np.ndarray, "*#sets step"]
) -> Float[np.ndarray, "*#sets"]:
    """Return the number of independent pairs with as much information.

    1/N* = 1/N + (2/N) Σ_j (1 − j/N) ρ_xx(j) ρ_yy(j).
    Pyper & Peterman 1998, lags up to N/5, autocorrelations weighted by N/(N − j). Between 1 and N.

    Args:
        x, y: Series around zero.

    >>> rng = np.random.default_rng(0)
    >>> slow = rng.standard_normal((2, 200)).cumsum(1)
    >>> bool(effective_steps(*slow) < 40)
    True
    """
    count = x.shape[-1]
    lag = np.arange(1, max(1, count // 5) + 1)
    product = _autocorrelation(x, lag) * _autocorrelation(y, lag)
    inverse = 1 / count + 2 / count * ((1 - lag / count) * (count / (count - lag)) ** 2 * product).sum(-1)
    return np.asarray(np.clip(1 / np.where(inverse > 1 / count, inverse, 1 / count), 1, count))


def _autocorrelation(values: np.ndarray, lag: np.ndarray) -> np.ndarray:
    count = values.shape[-1]
    energy = np.square(values).sum(-1)
    products = [(values[..., : count - shift] * values[..., shift:]).sum(-1) for shift in lag]
    return np.stack(products, axis=-1) / np.where(energy > 0, energy, np.nan)[..., None]


def describe_run(x: Float[np.ndarray, "*#sets step"], y: Float[np.ndarray, "*#sets step"]) -> RunDescription:
    """Return the detrended association of two series of one run.

    The interval is Fisher's with N* − 3 − degree degrees of freedom, NaN where that is below 1, as it is for fewer than
    eight steps.

    >>> rng = np.random.default_rng(1)
    >>> x = rng.standard_normal(30)
    >>> round(float(describe_run(x, 2 * x + np.arange(30.0) ** 2).coefficient), 6)
    1.0
    """
    left = detrended(x), detrended(y)
    norms = [np.sqrt(np.square(part).sum(-1)) for part in left]
    sizes = [np.abs(part).max(-1) for part in (x, y)]
    solid = [norm > 1e-12 * size for norm, size in zip(norms, sizes, strict=True)]
    coefficient = (left[0] * left[1]).sum(-1) / np.where(solid[0] & solid[1], norms[0] * norms[1], np.nan)
    steps = effective_steps(*left)
    freedom = steps - 3 - DEGREE
    reach = special.ndtri(0.5 + CONFIDENCE / 2) / np.sqrt(np.where(freedom >= 1, freedom, np.nan))
    z = np.arctanh(np.clip(coefficient, -1 + 1e-12, 1 - 1e-12))
    return RunDescription(
        np.asarray(coefficient), np.asarray(np.tanh(z - reach)), np.asarray(np.tanh(z + reach)), np.asarray(steps)
    )
