"""Division and logarithm where the number may not exist: NaN then, without a warning, never 0 or infinity."""

from __future__ import annotations

from typing import Any

import numpy as np


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """numerator/denominator, NaN where the denominator is not positive.

    >>> ratio([1.0, 1.0], [2.0, 0.0])
    array([0.5, nan])
    """
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def log(values: Any) -> np.ndarray:
    """Natural logarithm, NaN where the value is not positive.

    >>> log([1.0, 0.0])
    array([ 0., nan])
    """
    array = np.asarray(values, np.float64)
    return np.log(array, out=np.full(array.shape, np.nan), where=array > 0)


def root(values: Any) -> np.ndarray:
    """Square root, NaN where the value is negative.

    >>> root([4.0, -1.0])
    array([ 2., nan])
    """
    array = np.asarray(values, np.float64)
    return np.sqrt(array, out=np.full(array.shape, np.nan), where=array >= 0)
