"""Quantiles over matrices of the numbers that are there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float


def known_quantiles(
    values: Float[np.ndarray, "*batch matrix"], quantiles: Sequence[float]
) -> Float[np.ndarray, "*batch quantile"]:
    """Quantiles along the last axis of what is not NaN, linear between two numbers; NaN where there is nothing.

    As ``numpy.nanquantile``, which walks the rows one by one in Python: 500 steps of 224 matrices take it seconds.

    >>> known_quantiles(np.array([[1.0, np.nan, 3.0], [np.nan, np.nan, np.nan]]), [0.5])
    array([[ 2.],
           [nan]])
    """
    if values.size == 0:
        return np.full((*values.shape[:-1], len(quantiles)), np.nan)
    wanted = torch.tensor(quantiles, dtype=torch.float64)
    found = torch.nanquantile(torch.from_numpy(np.array(values, dtype=np.float64)), wanted, dim=-1)
    return np.moveaxis(found.numpy(), 0, -1)
