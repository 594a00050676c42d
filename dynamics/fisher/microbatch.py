"""From gradients of micro-batches to the Gram matrix of single samples."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def per_sample_gram(
    gram: Float[np.ndarray, "block batch batch"], sizes: Sequence[int] | np.ndarray
) -> Float[np.ndarray, "block batch batch"]:
    """K' = TKTᵀ with T = diag(√m)(I − 1wᵀ) + 1wᵀ, w = m/Σm: its spectrum is that of single samples' gradients.

    The mean ḡ of m independent samples has E ḡḡᵀ = Σ/m + μμᵀ: the centred part is m times too weak. Here it is
    strengthened and the mean put back. It is right for means of independent samples, not clipped, not accumulated, not
    averaged over processes.

    Args:
        gram: K of the micro-batches' mean gradients.
        sizes: Samples in each.

    Raises:
        ValueError: If there is not one size of at least 1 for each micro-batch.

    >>> per_sample_gram(np.eye(2)[None], [1, 1]).tolist()
    [[[1.0, 0.0], [0.0, 1.0]]]
    """
    counts = np.asarray(sizes, dtype=np.float64)
    if counts.shape != gram.shape[-1:] or (counts < 1).any():
        raise ValueError(f"Expected {gram.shape[-1]} micro-batch sizes of at least 1, got {counts.tolist()}.")
    mean = np.broadcast_to(counts / counts.sum(), gram.shape[1:])
    transform = np.sqrt(counts)[:, None] * (np.eye(len(counts)) - mean) + mean
    return transform @ gram @ transform.T
