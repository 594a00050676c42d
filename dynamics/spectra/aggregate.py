r"""Many matrices as one: exact measures of their direct sum, from each matrix's own.

The update of a whole model is the direct sum of its matrices' updates: its spectrum is all spectra together. With
w_l = ‖ΔW_l‖_F²/Σ‖ΔW‖_F² the chain rule of entropy gives, exactly,

.. math:: SE(\oplus_l) = H(w) + \sum_l w_l\, SE_l, \qquad 1/PR(\oplus_l) = \sum_l w_l^2 / PR_l.

An average of entropies over matrices of different shape and size has no such meaning and is not offered.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from scipy.special import xlogy


def _shares(energy: Float[np.ndarray, "*batch matrix"]) -> Float[np.ndarray, "*batch matrix"]:
    total = energy.sum(-1, keepdims=True)
    return np.divide(energy, total, out=np.full_like(energy, np.nan), where=total > 0)


def _weighted(share: np.ndarray, value: np.ndarray) -> np.ndarray:
    """share·value, 0 where the share is 0: a zero update has no entropy, and none to contribute."""
    return np.where(share == 0, 0.0, share * value)


def entropy_of_direct_sum(
    energy: Float[np.ndarray, "*batch matrix"], entropy: Float[np.ndarray, "*batch matrix"]
) -> Float[np.ndarray, "*batch"] | np.float64:
    """H(w) + Σ w_l SE_l in nats.

    Args:
        energy: ‖ΔW_l‖_F²; 0 for a matrix that is not there, NaN for one that could not be measured.
        entropy: Energy entropy of each matrix in nats; may be NaN where the energy is 0.

    Returns:
        NaN where all energies are 0 or one is NaN.

    >>> entropy_of_direct_sum(np.array([2.0, 2.0]), np.array([0.0, np.log(2)])) / np.log(2)
    np.float64(1.5)
    """
    share = _shares(energy)
    return (-xlogy(share, share) + _weighted(share, entropy)).sum(-1)


def participation_ratio_of_direct_sum(
    energy: Float[np.ndarray, "*batch matrix"], participation_ratio: Float[np.ndarray, "*batch matrix"]
) -> Float[np.ndarray, "*batch"] | np.float64:
    """1/Σ(w_l²/PR_l); arguments as in :func:`entropy_of_direct_sum`.

    >>> participation_ratio_of_direct_sum(np.array([1.0, 1.0]), np.array([2.0, 2.0]))
    np.float64(4.0)
    """
    share = _shares(energy)
    return 1 / _weighted(share, share / participation_ratio).sum(-1)
