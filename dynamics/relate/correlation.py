"""Correlation of two sets of curves or numbers, and its studentised value under every pairing of their units.

Measures and scores both move as training goes on, so over checkpoints nearly any two of them correlate. What all runs
do together at a step, and where a run lies as a whole, says nothing about whether the two go together; the rest may.
So curves are demeaned by run and by step, over the runs and steps that both have.

Permuting whole units only permutes which rows of two centred arrays meet. So all that is ever needed is the matrix of
products C_ij = ⟨x_i, y_j⟩/(‖x‖‖y‖): the correlation under a pairing π is r = Σ_i c_i with c_i = C_{i,π(i)}. Its 95 %
interval rests on the units (runs, or clusters of runs), of which there are few.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

#: Less than this share of the original size left after centring is rounding: there is nothing to correlate.
_CONSTANT = 1e-12
#: Covariates that are removed from curves: the loss and its powers, as long as each has so many numbers to itself.
_POWERS, _NUMBERS_EACH = 3, 8


# Runs and steps that two variables have in common


@dataclass(frozen=True)
class Grid:
    """Numbers of runs and steps of which every run has a value at every step."""

    runs: tuple[int, ...]
    steps: tuple[int, ...]


def common_grid(present: Bool[np.ndarray, "run step"], least_steps: int) -> Grid:
    """Return the largest set of runs, leaving out the sparsest first, that has ``least_steps`` steps in common.

    The run is what was repeated: a run is left out only where keeping it would leave too few steps; steps are left out
    where a kept run lacks them. Of two runs as sparse, the later one goes.

    Args:
        present: Where both variables are finite.
        least_steps: Steps that the question needs.

    Returns:
        An empty grid where not even one run has so many steps.

    >>> common_grid(np.array([[True, True, False], [True, True, True], [False, False, True]]), 2)
    Grid(runs=(0, 1), steps=(0, 1))
    """
    runs = [run for run in range(len(present)) if present[run].any()]
    while runs:
        steps = np.flatnonzero(present[runs].all(0))
        if len(steps) >= least_steps:
            return Grid(tuple(runs), tuple(steps.tolist()))
        runs.remove(min(reversed(runs), key=lambda run: int(present[run].sum())))
    return Grid((), ())


# What is left of curves


def two_way_demean(values: Float[np.ndarray, "*sets run step"]) -> Float[np.ndarray, "*sets run step"]:
    """Return curves without their run means and step means: x_rs − x̄_r − x̄_s + x̄.

    Whatever trend the runs share, of any shape, is gone, and so are the differences between whole runs. NaN stays where
    it makes a mean unknown: give complete grids.

    Args:
        values: Any number of grids of runs by steps.

    >>> two_way_demean(np.array([[0.0, 1.0], [0.0, 3.0]]))
    array([[ 0.5, -0.5],
           [-0.5,  0.5]])
    >>> two_way_demean(np.array([[5.0, 6.0], [7.0, 8.0]]))  # the two runs differ by a constant: nothing is left
    array([[0., 0.],
           [0., 0.]])
    """
    rows = values - values.mean(-1, keepdims=True)
    return rows - rows.mean(-2, keepdims=True)


def cluster_means(
    values: Float[np.ndarray, "*sets run step"], cluster: Int[np.ndarray, " run"]
) -> Float[np.ndarray, "*sets cluster step"]:
    """Return means over the runs of each cluster, in the order of the clusters' numbers.

    Runs of one model or one data set resemble each other; then clusters, not runs, are what was repeated.

    >>> cluster_means(np.array([[1.0], [3.0], [7.0]]), np.array([0, 0, 1]))
    array([[2.],
           [7.]])
    """
    return np.stack([values[..., cluster == number, :].mean(-2) for number in np.unique(cluster)], axis=-2)


def centred_curves(
    values: Float[np.ndarray, "*sets unit step"],
    covariate: Float[np.ndarray, "unit step"] | None = None,
    *,
    slopes: bool = False,
) -> Float[np.ndarray, "*sets unit step"]:
    """Return two-way demeaned curves of unit norm; NaN if nothing is left of them.

    Args:
        values: Complete grids.
        covariate: Held equal: smoothed over steps (1-2-1, twice: a logged loss is noisy, and noise leaves part of it
            in), the least-squares fit of its first three powers (fewer on small grids), pooled over units, is removed
            too (Frisch & Waugh 1933).
        slopes: Whether each unit's own straight line in the step's number is removed too.

    >>> x = centred_curves(np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
    >>> y = centred_curves(np.array([[1.0, 3.0, 1.0], [1.0, 1.0, 3.0], [1.0, 1.0, 1.0]]))
    >>> round(float((x * y).sum()), 12)
    1.0
    """
    curves = two_way_demean(values)
    if slopes:
        line = np.linspace(-1, 1, values.shape[-1])
        curves = curves - (curves @ line)[..., None] * line / (line @ line)
    if covariate is not None:
        basis = _powers(covariate)
        flat = curves.reshape(*curves.shape[:-2], -1)
        curves = (flat - (flat @ basis) @ basis.T).reshape(curves.shape)
    return _normed(curves, values)


def _powers(covariate: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of the demeaned powers of a smoothed covariate, ``[unit · step, power]``."""
    units, steps = covariate.shape
    for _ in range(2):
        beyond = np.pad(covariate, ((0, 0), (1, 1)), mode="edge")
        covariate = (beyond[:, :-2] + 2 * covariate + beyond[:, 2:]) / 4
    count = max(1, min(_POWERS, (units - 1) * (steps - 1) // _NUMBERS_EACH))
    spread = covariate.std()
    standard = (covariate - covariate.mean()) / (spread if spread > 0 else 1.0)
    columns = two_way_demean(np.stack([standard**power for power in range(1, count + 1)]))
    left, sizes, _ = np.linalg.svd(columns.reshape(count, -1).T, full_matrices=False)
    return left[:, sizes > _CONSTANT * max(sizes.max(), 1.0)]


def centred_ranks(values: Float[np.ndarray, "*sets unit"]) -> Float[np.ndarray, "*sets unit 1"]:
    """Return centred ranks of unit norm; ties share their mean rank, and NaN is all that is left of a constant.

    >>> ranks = [centred_ranks(np.array(values)) for values in ([1.0, 2.0, 9.0], [1.0, 0.5, 0.0])]
    >>> round(float((ranks[0] * ranks[1]).sum()), 12)
    -1.0
    """
    ranks = np.full(values.shape, 0.5)
    for unit in np.moveaxis(values[..., None], -2, 0):
        ranks += (values > unit) + (values == unit) / 2
    return centred_numbers(np.where(np.isnan(values).any(-1, keepdims=True), np.nan, ranks))


def centred_numbers(values: Float[np.ndarray, "*sets unit"]) -> Float[np.ndarray, "*sets unit 1"]:
    """Return centred numbers of unit norm; NaN if they do not vary."""
    columns = values[..., None]
    return _normed(columns - columns.mean(-2, keepdims=True), columns)


def _normed(centred: np.ndarray, original: np.ndarray) -> np.ndarray:
    norm = np.sqrt(np.square(centred).sum((-2, -1), keepdims=True))
    solid = norm > _CONSTANT * np.abs(original).max((-2, -1), keepdims=True)
    return centred / np.where(solid, norm, np.nan)


# Correlations under pairings


def paired(
    products: Float[np.ndarray, "unit unit pair"], pairing: Int[np.ndarray, "draw unit"], *, studentise: bool
) -> Float[np.ndarray, "draw pair"]:
    """Return the correlation r under each pairing of the units, or t = c̄/(s_c/√n) with c_i the share of unit i in r.

    Where units differ in how much they vary, and do so in both variables, r is more variable as observed than under
    permutation; t is not (DiCiccio & Romano 2017).

    >>> products = np.array([[0.5, -0.5], [0.25, 0.5]])[..., None]
    >>> paired(products, np.array([[0, 1], [1, 0]]), studentise=False).ravel()
    array([ 1.  , -0.25])
    """
    sums, squares = (np.zeros((len(pairing), products.shape[-1])) for _ in range(2))
    for unit, partners in enumerate(pairing.T):  # a loop over units keeps memory at draws × pairs
        shares = products[unit][partners]
        sums += shares
        if studentise:
            squares += np.square(shares)
    if not studentise:
        return sums
    return sums / _spread(sums, squares, pairing.shape[1])


def standard_error(shares: Float[np.ndarray, "unit pair"]) -> Float[np.ndarray, " pair"]:
    """Return the standard error s_c·√n of a correlation that is the sum of n units' shares.

    >>> standard_error(np.array([[0.1], [0.3]])).round(6)
    array([0.2])
    """
    return _spread(shares.sum(0), np.square(shares).sum(0), len(shares))


def _spread(sums: np.ndarray, squares: np.ndarray, units: int) -> np.ndarray:
    """Return at least rounding, so that t of shares that do not differ is large, and equal under all such pairings."""
    variance = np.maximum(squares - sums**2 / units, 0.0) / max(units - 1, 1)
    return np.maximum(np.sqrt(units * variance), 1e-8)


def without_each(
    x: Float[np.ndarray, "unit step #pair"], y: Float[np.ndarray, "unit step #pair"]
) -> Float[np.ndarray, "unit pair"]:
    """Return the correlation without each unit, the others centred anew.

    With a_i, b_i and c_i the units' shares in ‖x‖² = 1, ‖y‖² = 1 and r, and κ = n/(n − 1), it is
    (r − κ c_i)/√((1 − κ a_i)(1 − κ b_i)).

    >>> x = np.array([-3.0, 1.0, 2.0]).reshape(3, 1, 1) / np.sqrt(14)
    >>> without_each(x, x).ravel().round(6)
    array([1., 1., 1.])
    """
    inflation = len(x) / (len(x) - 1)
    shares, of_x, of_y = (inflation * np.sum(product, axis=1) for product in (x * y, x * x, y * y))
    correlation = shares.sum(0) / inflation
    norm = np.sqrt(np.maximum((1 - of_x) * (1 - of_y), 0.0))
    return np.where(norm > _CONSTANT, (correlation - shares) / np.where(norm > _CONSTANT, norm, 1.0), np.nan)


# Intervals

#: Confidence of every interval of this room.
CONFIDENCE = 0.95
#: Correlations are kept this far from ±1 before Fisher's z.
_EDGE = 1e-12

Ends = tuple[np.ndarray, np.ndarray, np.ndarray]


def jackknife_interval(estimate: Float[np.ndarray, "*sets"], left_out: Float[np.ndarray, "unit ..."]) -> Ends:
    """Return low end, high end and p-value of a correlation, by leaving out each unit in turn.

    On Fisher's scale z = artanh r: z ± t·√((n − 1)/n · Σ (z_i − z̄)²), Student's t with n − 1 degrees of freedom
    (Tukey 1958). Whole runs are left out, so steps of one run may depend on each other in any way. In simulations with
    4 to 20 runs it covers the truth in 0.94 to 0.97 of cases, where BCa bootstraps over runs reach 0.85 to 0.94; where
    runs differ much in how far both variables move, in 0.88 to 0.92.

    Args:
        estimate: Correlation of all units.
        left_out: Correlation without each unit; NaN where nothing is left. Fewer than three units, or a NaN, give no
            interval, and p = 1.

    >>> low, high, p = jackknife_interval(np.array(0.5), np.array([0.4, 0.5, 0.6]))
    >>> bool(low < 0.5 < high), bool(p < 0.05) == bool(low > 0)
    (True, True)
    """
    units = len(left_out)
    z, without = _z(estimate), _z(left_out)
    if units < 3:
        return _no_interval(z)
    error = np.asarray(np.sqrt((units - 1) / units * np.square(without - without.mean(0)).sum(0)))
    return _interval(z, error, units - 1.0)


def spearman_interval(estimate: Float[np.ndarray, "*sets"], units: int) -> Ends:
    """Return low end, high end and p-value of a rank correlation (Bonett & Wright 2000).

    z ± 1.96·√((1 + r²/2)/(n − 3)). A correlation of ±1 is taken as the middle of the last step of its scale,
    1 − 6/(n³ − n), because full agreement of a few ranks does not say that the truth is 1.

    Args:
        estimate: Spearman's correlation.
        units: How many units it is of; fewer than four give no interval, and p = 1.

    >>> [round(float(end), 2) for end in spearman_interval(np.array(1.0), 5)[:2]]
    [0.16, 1.0]
    """
    if units < 4:
        return _no_interval(_z(estimate))
    most = 1 - 6 / (units**3 - units)
    shrunk = np.asarray(np.clip(estimate, -most, most))
    return _interval(_z(shrunk), np.asarray(np.sqrt((1 + shrunk**2 / 2) / (units - 3))), np.inf)


def _interval(z: np.ndarray, error: np.ndarray, freedom: float) -> Ends:
    """Return the ends z ± t·error, and the p-value that is at most 0.05 exactly where these exclude 0."""
    error = np.maximum(error, _EDGE)
    reach = special.stdtrit(freedom, 0.5 + CONFIDENCE / 2) * error
    tail = 2 * special.stdtr(freedom, -np.abs(z) / error)
    p_value = np.where(np.isnan(error) & ~np.isnan(z), 1.0, tail)
    return np.asarray(np.tanh(z - reach)), np.asarray(np.tanh(z + reach)), p_value


def _z(correlation: np.ndarray) -> np.ndarray:
    return np.asarray(np.arctanh(np.clip(correlation, -1 + _EDGE, 1 - _EDGE)))


def _no_interval(z: np.ndarray) -> Ends:
    return np.full_like(z, np.nan), np.full_like(z, np.nan), np.where(np.isnan(z), np.nan, 1.0)
