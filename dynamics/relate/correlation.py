"""Correlation of two sets of curves or numbers, under every pairing of their units at once.

Permuting whole units only permutes which rows of two centred matrices meet. So all that is ever needed is the matrix of
products C_ij = ⟨x_i, y_j⟩/(‖x‖‖y‖): the correlation under a pairing π is Σ_i C_{i,π(i)}.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from dynamics.relate.demeaning import two_way_demean

#: Less than this share of the original size left after centring is rounding: there is nothing to correlate.
_CONSTANT = 1e-12


def products_over_steps(
    x: Float[np.ndarray, "*sets unit step"], y: Float[np.ndarray, "*sets unit step"]
) -> Float[np.ndarray, "*sets unit unit_"]:
    """C of two-way demeaned curves; its trace is their correlation over units and steps.

    NaN if one of the two has nothing left after demeaning.

    >>> x = np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
    >>> round(float(np.trace(products_over_steps(x, 2 * x + 1))), 12)
    1.0
    """
    return _products(*two_way_demean(x, y), x, y)


def products_of_ranks(
    x: Float[np.ndarray, "*sets unit"], y: Float[np.ndarray, "*sets unit"]
) -> Float[np.ndarray, "*sets unit unit_"]:
    """C of ranks (ties share their mean rank); its trace is Spearman's correlation.

    >>> round(float(np.trace(products_of_ranks(np.array([1.0, 2.0, 9.0]), np.array([1.0, 0.5, 0.0])))), 12)
    -1.0
    """
    from scipy.stats import rankdata  # here: a second, which most analyses need not wait for

    return products_of_values(rankdata(x, axis=-1), rankdata(y, axis=-1))


def products_of_values(
    x: Float[np.ndarray, "*sets unit"], y: Float[np.ndarray, "*sets unit"]
) -> Float[np.ndarray, "*sets unit unit_"]:
    """C of numbers as they are; its trace is Pearson's correlation."""
    x, y = x[..., None], y[..., None]
    return _products(x - x.mean(-2, keepdims=True), y - y.mean(-2, keepdims=True), x, y)


def _products(centred_x: np.ndarray, centred_y: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    scale = _norm(centred_x, x) * _norm(centred_y, y)
    return centred_x @ np.swapaxes(centred_y, -1, -2) / scale


def _norm(centred: np.ndarray, original: np.ndarray) -> np.ndarray:
    norm = np.sqrt(np.square(centred).sum((-2, -1), keepdims=True))
    return np.where(norm > _CONSTANT * np.abs(original).max((-2, -1), keepdims=True), norm, np.nan)


def paired(
    products: Float[np.ndarray, "*sets unit unit"], pairing: Int[np.ndarray, "draw unit"]
) -> Float[np.ndarray, "draw ..."]:
    """Correlation under each pairing.

    >>> paired(np.array([[0.5, -0.5], [0.0, 0.5]]), np.array([[0, 1], [1, 0]]))
    array([ 1. , -0.5])
    """
    units = np.arange(pairing.shape[1])
    found = np.zeros((len(pairing), *products.shape[:-2]))
    for unit in units:  # a loop over units keeps memory at draws × sets
        found += np.moveaxis(products[..., unit, pairing[:, unit]], -1, 0)
    return found
