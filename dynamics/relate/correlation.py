"""Correlation of two sets of curves or numbers, and its studentised value under every pairing of their units.

Permuting whole units only permutes which rows of two centred arrays meet. So all that is ever needed is the matrix of
products C_ij = ⟨x_i, y_j⟩/(‖x‖‖y‖): the correlation under a pairing π is r = Σ_i c_i with c_i = C_{i,π(i)}.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from dynamics.relate.demeaning import two_way_demean

#: Less than this share of the original size left after centring is rounding: there is nothing to correlate.
_CONSTANT = 1e-12
#: Covariates that are removed from curves: the loss and its powers, as long as each has so many numbers to itself.
_POWERS, _NUMBERS_EACH = 3, 8


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
        slopes: Whether each unit's own straight line in the step's place is removed too.

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
    """Orthonormal basis of the demeaned powers of a smoothed covariate, ``[unit · step, power]``."""
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
    from scipy.stats import rankdata  # here: a second, which most analyses need not wait for

    return centred_numbers(rankdata(values, axis=-1))


def centred_numbers(values: Float[np.ndarray, "*sets unit"]) -> Float[np.ndarray, "*sets unit 1"]:
    """Return centred numbers of unit norm; NaN if they do not vary."""
    columns = values[..., None]
    return _normed(columns - columns.mean(-2, keepdims=True), columns)


def _normed(centred: np.ndarray, original: np.ndarray) -> np.ndarray:
    norm = np.sqrt(np.square(centred).sum((-2, -1), keepdims=True))
    solid = norm > _CONSTANT * np.abs(original).max((-2, -1), keepdims=True)
    return centred / np.where(solid, norm, np.nan)


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
    """At least rounding, so that t of shares that do not differ is large, and the same under all such pairings."""
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
