"""What remains of curves when runs and steps have had their say: two-way demeaning, and means over clusters of runs.

Measures and scores both move as training goes on, so over checkpoints nearly any two of them correlate. What all runs
do together at a step, and where a run lies as a whole, says nothing about whether the two go together; the rest may.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int


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
    """Mean over the runs of each cluster, in the order of their numbers.

    Runs of one model or one data set resemble each other; then clusters, not runs, are what was repeated.

    >>> cluster_means(np.array([[1.0], [3.0], [7.0]]), np.array([0, 0, 1]))
    array([[2.],
           [7.]])
    """
    return np.stack([values[..., cluster == number, :].mean(-2) for number in np.unique(cluster)], axis=-2)
