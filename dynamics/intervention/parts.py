r"""Parts of an update along directions of the samples' gradients, as weights of the samples.

With K = GGᵀ, b = Gδ and K u_j = eig_j u_j, the projection of δ on the span of directions v_j = Gᵀu_j/√eig_j is

.. math:: \Pi δ = G^\top w, \qquad w = \sum_j u_j \frac{u_j^\top b}{\mathrm{eig}_j}, \qquad
          \lVert Πδ \rVert^2 = w^\top K w = \sum_j \frac{(u_j^\top b)^2}{\mathrm{eig}_j}

which is the gradient of Σ w_i ℓ_i: one backward pass of a weighted loss, and never more than G's span. The remainder is
δ − Πδ.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

#: Eigenvalues of K below this share of the largest are rounding, or become it where gradients are summed in single
#: precision: nothing is projected on their directions.
RESOLVED = 1e-8


@dataclass(frozen=True)
class Part:
    """A part of an update, Gᵀw.

    Args:
        weights: w, one for each sample.
        energy: ‖Gᵀw‖².
        directions: Number of directions behind it: fewer than asked for where K has no more.
    """

    weights: Float[np.ndarray, " sample"]
    energy: float
    directions: int


def leading_part(
    gram: Float[np.ndarray, "sample sample"],
    product: Float[np.ndarray, " sample"],
    k: int,
    resolved: float = RESOLVED,
) -> Part:
    """Return the part in the k leading directions.

    Args:
        gram: K.
        product: b = Gδ.
        k: Number of directions.
        resolved: Eigenvalues below this share of the largest are rounding.

    Raises:
        ValueError: If a number of K is not finite.

    >>> leading_part(np.diag([4.0, 1.0]), np.array([2.0, 3.0]), 1)
    Part(weights=array([0.5, 0. ]), energy=1.0, directions=1)
    """
    values, vectors = _directions(gram, resolved)
    return _part(values[:k], vectors[:, :k], product)


def bottom_part(
    gram: Float[np.ndarray, "sample sample"],
    product: Float[np.ndarray, " sample"],
    k: int,
    resolved: float = RESOLVED,
) -> Part:
    """Return the part in the k last directions that K resolves.

    >>> bottom_part(np.diag([4.0, 1.0]), np.array([2.0, 3.0]), 1).energy
    9.0
    """
    values, vectors = _directions(gram, resolved)
    first = max(len(values) - k, 0)
    return _part(values[first:], vectors[:, first:], product)


def random_part(
    gram: Float[np.ndarray, "sample sample"],
    product: Float[np.ndarray, " sample"],
    k: int,
    generator: np.random.Generator,
    resolved: float = RESOLVED,
) -> Part:
    r"""Return the part in k random orthonormal directions of the gradients' span, Haar-distributed.

    With a = Λ^{-1/2}Uᵀb the update's coordinates in the span and Q ``(rank, k)`` orthonormal, w = UΛ^{-1/2}QQᵀa.

    >>> part = random_part(np.eye(3), np.array([1.0, 2.0, 2.0]), 3, np.random.default_rng(0))
    >>> round(part.energy, 9), part.directions
    (9.0, 3)
    """
    values, vectors = _directions(gram, resolved)
    k = min(k, len(values))
    coordinates = (vectors.T @ product) / np.sqrt(values)
    basis = np.linalg.qr(generator.standard_normal((len(values), k)))[0]
    projected = basis @ (basis.T @ coordinates)
    return Part(vectors @ (projected / np.sqrt(values)), float((projected**2).sum()), k)


def direction_weights(
    gram: Float[np.ndarray, "sample sample"], k: int, resolved: float = RESOLVED
) -> tuple[Float[np.ndarray, " direction"], Float[np.ndarray, "direction sample"]]:
    """Return the k leading eigenvalues of K, and the weights of samples whose weighted gradient is each direction.

    v_j = Gᵀu_j/√eig_j: row j of the weights is u_j/√eig_j. Fewer than k where K has no more.

    >>> direction_weights(np.diag([4.0, 1.0]), 1)[1]
    array([[0.5, 0. ]])
    """
    values, vectors = _directions(gram, resolved)
    return values[:k], (vectors[:, :k] / np.sqrt(values[:k])).T


def _directions(gram: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Return eigenvalues, descending, and eigenvectors of K, as far as they are resolved."""
    if not np.isfinite(gram).all():
        raise ValueError(
            "Expected finite numbers in K = GGᵀ, got some that are not. Leave out the samples they are of."
        )
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1], vectors[:, ::-1]
    resolved = values > share * max(float(values[0]), 0.0) if len(values) else np.zeros(0, dtype=bool)
    return values[resolved], vectors[:, resolved]


def _part(values: np.ndarray, vectors: np.ndarray, product: np.ndarray) -> Part:
    along = vectors.T @ product
    return Part(vectors @ (along / values), float((along**2 / values).sum()), len(values))
