"""Matrices whose update is nearly nothing, or far too large, beside those of the same role in other layers.

The size of an update is the root mean square of its entries. Within a role sizes differ by a factor of up to about 5 in
real trainings, and more where layers are trained at different rates; so a matrix is told from the others by a factor of
30 and by 10 robust standard deviations of ln size, both from the median of the role's updates that are not zero. The
deviation is the median absolute one of the role, or of all roles if that is larger.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

#: Least factor between a matrix and the median of its role.
FACTOR = 30.0
#: Robust standard deviations of ln size between them.
DEVIATIONS = 10.0
#: Fewest matrices of a role with a median.
FEWEST = 3
#: Median absolute deviation → standard deviation of a Gaussian.
_GAUSSIAN = 1.4826
_EXPERT = re.compile(r"\[\*\]|(^|[._])experts?([._]|$)")


def is_expert(role: str) -> bool:
    """Return whether matrices of a role belong to experts, of which some are chosen rarely, or never.

    >>> is_expert("mlp.experts.*.up_proj"), is_expert("experts.gate_up_proj[*]"), is_expert("mlp.up_proj")
    (True, True, False)
    """
    return _EXPERT.search(role) is not None


def relative_sizes(sizes: Float[np.ndarray, " matrix"], roles: Sequence[str]) -> Float[np.ndarray, " matrix"]:
    """Return each size over the median of its role's sizes that are not zero; NaN in roles of fewer than 3.

    >>> relative_sizes(np.array([1.0, 2.0, 3.0, 5.0]), ["q", "q", "q", "v"])
    array([0.5, 1. , 1.5, nan])
    """
    relative = np.full(len(sizes), np.nan)
    for members, center, _ in _centers(sizes, roles):
        relative[members] = sizes[members] / np.exp(center)
    return relative


def outlying(sizes: Float[np.ndarray, " matrix"], roles: Sequence[str]) -> Int[np.ndarray, " matrix"]:
    """Return −1 for updates that are nearly zero beside their role's, 1 for those that are far too large, else 0.

    Experts are never too small: one that is chosen for one token in a thousand moves a thousand times less.

    Args:
        sizes: Not negative; 0 and NaN are not judged.
        roles: Role of each matrix.

    >>> outlying(np.array([1.0, 1.2, 0.9, 0.01, 50.0, 0.0]), ["q"] * 6).tolist()
    [0, 0, 0, -1, 1, 0]
    """
    outlier, names = np.zeros(len(sizes), dtype=np.int64), np.asarray(roles)
    for members, center, deviation in _centers(sizes, roles):
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.log(sizes[members]) - center
        beyond = np.isfinite(distance) & (np.abs(distance) > max(np.log(FACTOR), DEVIATIONS * deviation))
        outlier[members] = np.where(beyond, np.sign(np.nan_to_num(distance)), 0)
        if is_expert(str(names[members[0]])):
            outlier[members] = np.maximum(outlier[members], 0)
    return outlier


def _centers(sizes: np.ndarray, roles: Sequence[str]) -> list[tuple[np.ndarray, float, float]]:
    """Return members, median of ln size and its robust standard deviation, of each role with enough of them.

    The deviation is at least that of all roles together, since that of a few matrices is uncertain.
    """
    names, centers, distances = np.asarray(roles), [], []
    for role in dict.fromkeys(roles):
        members = np.nonzero(names == role)[0]
        present = sizes[members]
        logarithms = np.log(present[np.isfinite(present) & (present > 0)])
        if len(logarithms) >= FEWEST:
            center = float(np.median(logarithms))
            distances.append(np.abs(logarithms - center))
            centers.append((members, center))
    shared = float(np.median(np.concatenate(distances))) if distances else 0.0
    return [
        (members, center, _GAUSSIAN * max(shared, float(np.median(distance))))
        for (members, center), distance in zip(centers, distances, strict=True)
    ]
