"""Eigenvalues of the Fisher matrix F = GᵀG/N from K = GGᵀ: both have the same, but for zeros and the factor N."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

from dynamics.fisher.ratios import ratio

#: An eigenvalue may lie below zero by this share of the trace, as rounding in float32 makes it; then it is 0.
_ROUNDING = 1e-4
#: Directions whose eigenvalue is below this share of the largest one are rounding.
RESOLVED = 1e-10


def centred(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample sample"]:
    """HKH with H = I − 11ᵀ/N: the Gram matrix of the gradients minus their mean, so that eig/N are those of F − ḡḡᵀ.

    >>> centred(np.array([[[1.0, 1.0], [1.0, 1.0]]])).tolist()
    [[[0.0, 0.0], [0.0, 0.0]]]
    """
    rows = gram.mean(-1, keepdims=True)
    return gram - rows - rows.swapaxes(1, 2) + gram.mean((1, 2), keepdims=True)


def directional(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample sample"]:
    """K_ij/√(K_ii K_jj), the cosines: the Gram matrix of gradients g/‖g‖. A sample without gradient stays without.

    >>> directional(np.array([[[4.0, 1.0], [1.0, 1.0]]]))[0].tolist()
    [[1.0, 0.5], [0.5, 1.0]]
    """
    norms = np.diagonal(gram, axis1=1, axis2=2)
    scale = np.where(norms == 0, 0.0, ratio(1.0, np.sqrt(norms)))
    return gram * scale[:, :, None] * scale[:, None, :]


def fisher_eigenvalues(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample"]:
    """eig(K)/N, descending, in squared units of the gradient; negative rounding is 0.

    The plug-in spectrum: of N samples, at most N values. The largest are too large in expectation and the entropy of
    all is too small (Anderson 1963; Miller 1955).

    Returns:
        NaN for a block with NaN.

    Raises:
        ValueError: If a matrix is not positive semi-definite.

    >>> fisher_eigenvalues(np.array([[[4.0, 0.0], [0.0, 2.0]]]))
    array([[2., 1.]])
    """
    broken, whole = _whole(gram)
    return _not_negative(np.linalg.eigvalsh(whole)[:, ::-1] / gram.shape[-1], broken)


def fisher_eigenvectors(
    gram: Float[np.ndarray, "block sample sample"],
) -> tuple[Float[np.ndarray, "block sample"], Float[np.ndarray, "block sample sample"]]:
    """:func:`fisher_eigenvalues` and the eigenvectors of K, one a column, in the same order.

    Column u_j belongs to the direction v_j = Gᵀu_j/√eig_j of parameter space, which is never formed.
    """
    broken, whole = _whole(gram)
    values, vectors = np.linalg.eigh(whole)
    vectors = np.where(broken[:, None, None], np.nan, vectors[:, :, ::-1])
    return _not_negative(values[:, ::-1] / gram.shape[-1], broken), vectors


def inverse_roots(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, "block index"]:
    """1/√λ, and 0 for directions that are rounding: what scales u_j to a direction of unit length.

    >>> inverse_roots(np.array([[4.0, 0.0]]))
    array([[0.5, 0. ]])
    """
    kept = eigenvalues > RESOLVED * eigenvalues[:, :1]
    roots = np.where(kept, 1 / np.sqrt(np.where(kept, eigenvalues, 1.0)), 0.0)
    return np.where(np.isnan(eigenvalues), np.nan, roots)


def eigenvalue_errors(
    eigenvalues: Float[np.ndarray, "block sample"],
    vectors: Float[np.ndarray, "block sample sample"],
    membership: Float[np.ndarray, "sample group"],
) -> Float[np.ndarray, "block sample"]:
    """Standard error of each ln λ_j, by the infinitesimal jackknife over groups.

    λ_j is the mean over samples of their squared projections on v_j, N λ_j u_ij²; its derivative with respect to a
    sample's weight is that projection (Hellmann–Feynman). The bias of λ_j is not part of it.

    Returns:
        NaN for fewer than two groups and for zero eigenvalues.
    """
    groups = membership.shape[1]
    if groups < 2:
        return np.full(eigenvalues.shape, np.nan)
    share = membership.T @ vectors**2  # of λ_j, by group; they sum to 1
    weight = membership.sum(0) / len(membership)
    error = np.sqrt(groups / (groups - 1) * ((share - weight[:, None]) ** 2).sum(1))
    return np.where(eigenvalues > RESOLVED * eigenvalues[:, :1], error, np.nan)


def _whole(gram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    broken = np.array([not np.isfinite(block).all() for block in gram])
    return broken, np.where(broken[:, None, None], 0.0, gram)


def _not_negative(values: np.ndarray, broken: np.ndarray) -> np.ndarray:
    size = np.abs(values).sum(-1)
    lowest = ratio(values.min(-1), size)
    if (lowest < -_ROUNDING).any():
        raise ValueError(
            "Expected a positive semi-definite K = GGᵀ, got one with an eigenvalue of "
            f"{np.nanmin(lowest):.2g} of its trace. Give the Gram matrix of gradients, unchanged."
        )
    return np.where(broken[:, None], np.nan, np.maximum(values, 0.0))
