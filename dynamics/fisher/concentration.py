r"""How much of an update lies along the informative directions, from K and b = Gδ alone.

With K u_j = eig_j u_j the unit direction v_j = Gᵀu_j/√eig_j is never formed, but

.. math:: \langle δ, v_j \rangle = u_j^\top b / \sqrt{\mathrm{eig}_j}, \qquad
    δ^\top F δ = \lVert b \rVert^2 / N = \sum_j λ_j \langle δ, v_j \rangle^2 .

The probe samples must not have taken part in the steps that made δ: their own gradients would be found in it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from scipy import special

from dynamics.fisher.pairs import Estimate, Labels, counted_groups, diagonal_means, jackknifed
from dynamics.fisher.ratios import log, ratio
from dynamics.fisher.spectrum import inverse_roots


def captured(
    eigenvalues: Float[np.ndarray, "block sample"],
    vectors: Float[np.ndarray, "block sample sample"],
    update_product: Float[np.ndarray, "block sample"],
    update_norm: Float[np.ndarray, " block"],
    k: Sequence[int],
) -> Float[np.ndarray, "block k"]:
    """Share of ‖δ‖² in the k leading directions, Σ_{j≤k} ⟨δ, v_j⟩²/‖δ‖².

    Directions beyond the rank of K add nothing. Held-out samples estimate directions with error, which lowers the
    share: judge it against the null gradients' share in the same directions, not against 1.

    Args:
        eigenvalues, vectors: Of K/N, as ``fisher_eigenvectors`` returns them.
        update_product: b = Gδ.
        update_norm: ‖δ‖.
        k: Numbers of directions.

    Returns:
        NaN for k above the number of samples, a zero update, or a zero K.

    >>> captured(np.array([[2.0, 1.0]]), np.eye(2)[None], np.array([[2.0, 0.0]]), np.array([2.0]), [1, 2])
    array([[0.25, 0.25]])
    """
    samples = eigenvalues.shape[-1]
    along = np.einsum("bnj,bn->bj", vectors, update_product) * inverse_roots(eigenvalues * samples)
    shares = ratio(np.cumsum(along**2, axis=-1), update_norm[:, None] ** 2)
    shares = np.where(eigenvalues[:, :1] > 0, shares, np.nan)
    return np.stack([shares[:, n - 1] if n <= samples else np.full(len(shares), np.nan) for n in k], axis=-1)


def rayleigh_ratio(
    gram: Float[np.ndarray, "block sample sample"],
    update_product: Float[np.ndarray, "block sample"],
    update_norm: Float[np.ndarray, " block"],
    dimension: Float[np.ndarray, " block"],
    labels: Labels,
) -> Estimate:
    """(δᵀFδ/‖δ‖²)/(tr F/d) with its 95 % interval: 1 for an update of no particular direction, at most d·ρ.

    Numerator and denominator are unbiased for held-out samples; their ratio's logarithm is corrected for its bias, and
    its interval made, by the delete-one-group jackknife.

    Returns:
        Each ``[block]``; NaN where the dimension is not known or the update is zero.
    """
    scale = ratio(dimension, update_norm**2)
    squares, squares_without = diagonal_means(update_product**2, labels)
    norms, norms_without = diagonal_means(np.diagonal(gram, axis1=1, axis2=2), labels)
    estimate, groups = log(ratio(squares, norms)), counted_groups(gram, labels)
    found = jackknifed(estimate, log(ratio(squares_without, norms_without)), labels.holds, groups)
    return Estimate(*(np.exp(part[:, 0]) * scale for part in (found.estimate, found.low, found.high)))


def relative_rayleigh_ratio(
    eigenvalues: Float[np.ndarray, "block sample"],
    update_product: Float[np.ndarray, "block sample"],
    update_norm: Float[np.ndarray, " block"],
) -> Float[np.ndarray, " block"]:
    """(δᵀFδ/‖δ‖²)/λ_1, from 0 to 1: 1 if the update is the leading direction of these samples.

    >>> relative_rayleigh_ratio(np.array([[2.0, 1.0]]), np.array([[2.0, 0.0]]), np.array([1.0]))
    array([1.])
    """
    return ratio(ratio((update_product**2).mean(-1), update_norm**2), eigenvalues[:, 0])


def isotropic_null(
    dimension: Float[np.ndarray, " block"], k: Sequence[int], level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Share of a vector of random direction in k given ones: mean k/d and band, Beta(k/2, (d − k)/2).

    Returns:
        Mean, low, high, each ``[block, k]``; 1 where k reaches d, NaN where d is not known.

    >>> isotropic_null(np.array([100.0]), [10])[0]
    array([[0.1]])
    """
    size, count = np.broadcast_arrays(dimension[:, None], np.asarray(k, dtype=np.float64)[None])
    inside = size > count
    whole = np.where(np.isnan(size), np.nan, 1.0)
    first, second = count / 2, np.where(inside, size - count, 1.0) / 2
    bounds = [np.where(inside, special.betaincinv(first, second, q), whole) for q in ((1 - level) / 2, (1 + level) / 2)]
    return np.where(inside, ratio(count, size), whole), bounds[0], bounds[1]
