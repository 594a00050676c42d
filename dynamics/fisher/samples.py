"""What may be given as a Gram matrix K and as labels of its samples, and how it is read.

K = GGᵀ is unnormalised everywhere: rows of G are per-sample gradients, and the Fisher's eigenvalues are eig(K)/N.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from dynamics.schema import ALL, GLOBAL

#: K and Kᵀ may differ by this share of the largest entry: sums in float32 do.
_ASYMMETRY = 1e-4


def _array(values: Any) -> np.ndarray:
    """float64 from an array, a labelled array, a sequence, or a tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def blocks_of(gram: Any) -> tuple[list[str], Float[np.ndarray, "block sample sample"]]:
    """Names of blocks and their K, from whatever holds them.

    Args:
        gram: ``[sample, sample]``; or a mapping of block to such; or an object with such a mapping as ``.gram``.

    Returns:
        Names, and float64 ``[block, sample, sample]``, exactly symmetric. A block with a number that is not finite is
        NaN throughout: no statistic of it exists.

    Raises:
        ValueError: If there is no block, or one is not square, not symmetric, empty, or of another size than the rest.

    >>> names, stacked = blocks_of(np.eye(2))
    >>> names, stacked.shape
    (['global'], (1, 2, 2))
    """
    held = getattr(gram, "gram", gram)
    named: Mapping[str, Any] = held if isinstance(held, Mapping) else {GLOBAL: held}
    if not named:
        raise ValueError("Expected at least one block with its Gram matrix, got none.")
    arrays = {str(name): _array(values) for name, values in named.items()}
    samples = len(next(iter(arrays.values()))) if next(iter(arrays.values())).ndim else 0
    for name, array in arrays.items():
        if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
            raise ValueError(
                f"Expected the Gram matrix K = GGᵀ of block {name!r} as [sample, sample], got shape {array.shape}."
            )
        if len(array) != samples:
            raise ValueError(f"Expected {samples} samples in every block, got {len(array)} in {name!r}.")
    stacked = np.stack(list(arrays.values()))
    broken = np.array([not np.isfinite(array).all() for array in stacked])
    whole = np.where(broken[:, None, None], 0.0, stacked)
    transposed = whole.swapaxes(1, 2)
    apart = np.abs(whole - transposed).max((1, 2)) > _ASYMMETRY * np.abs(whole).max((1, 2))
    negative = np.diagonal(whole, axis1=1, axis2=2).min(1) < 0
    names = list(arrays)
    for name, lopsided, below in zip(names, apart.tolist(), negative.tolist(), strict=True):
        if lopsided:
            raise ValueError(f"Expected a symmetric K = GGᵀ, got one that is not for block {name!r}.")
        if below:
            raise ValueError(f"Expected squared norms on the diagonal of K = GGᵀ, got a negative one for {name!r}.")
    return names, np.where(broken[:, None, None], np.nan, (whole + transposed) / 2)


def vectors_of(values: Any, names: Sequence[str], samples: int, what: str) -> Float[np.ndarray, "block sample"]:
    """One vector over samples for each block: from an array for the only block, or a mapping.

    Raises:
        ValueError: If a block is missing or a vector has another length.
    """
    if values is None:
        raise ValueError(f"Expected {what} for each of the {len(names)} blocks, got none at all.")
    mapping = values if isinstance(values, Mapping) else dict.fromkeys(names[:1], values)
    missing = [name for name in names if name not in mapping]
    if missing:
        raise ValueError(f"Expected {what} for each of the {len(names)} blocks, got none for {missing[0]!r}.")
    arrays = [_array(mapping[name]) for name in names]
    for name, array in zip(names, arrays, strict=True):
        if array.shape != (samples,):
            raise ValueError(f"Expected {what} of block {name!r} with shape ({samples},), got {array.shape}.")
    return np.stack(arrays)


def numbers_of(values: Any, names: Sequence[str], what: str) -> Float[np.ndarray, " block"]:
    """One number for each block: a mapping, one number for the only block, or ``None`` for NaN.

    Raises:
        ValueError: If a block is missing, or one number stands for several blocks.
    """
    if values is None:
        return np.full(len(names), np.nan)
    if not isinstance(values, Mapping):
        if len(names) > 1:
            raise ValueError(
                f"Expected a mapping of {len(names)} blocks to their {what}, got one {type(values).__name__}."
            )
        return np.array([float(values)])
    missing = [name for name in names if name not in values]
    if missing:
        raise ValueError(f"Expected {what} for each of the {len(names)} blocks, got none for {missing[0]!r}.")
    return np.array([float(values[name]) for name in names])


def codes_of(labels: Sequence[Any] | np.ndarray | None, samples: int, what: str) -> Int[np.ndarray, " sample"]:
    """Labels as numbers 0, 1, …; without labels each sample has its own.

    Raises:
        ValueError: If there is not one label for each sample.

    >>> codes_of(["b", "a", "b"], 3, "group").tolist()
    [1, 0, 1]
    """
    if labels is None:
        return np.arange(samples)
    array = np.asarray(labels)
    if array.shape != (samples,):
        raise ValueError(f"Expected one {what} for each of {samples} samples, got labels of shape {array.shape}.")
    return np.unique(array, return_inverse=True)[1]


def members_of(tasks: Sequence[Any] | np.ndarray | None, samples: int) -> dict[str, np.ndarray]:
    """Which samples belong to each task, ``"all"`` first; a single task is ``"all"`` under its own name as well.

    Raises:
        ValueError: If there is not one label for each sample, or a task has the reserved name ``"all"``.

    >>> {name: chosen.tolist() for name, chosen in members_of(["x", "y", "x"], 3).items()}
    {'all': [True, True, True], 'x': [True, False, True], 'y': [False, True, False]}
    """
    everything = {ALL: np.ones(samples, dtype=bool)}
    if tasks is None:
        return everything
    labels = np.asarray(tasks).astype(str)
    if labels.shape != (samples,):
        raise ValueError(f"Expected one task for each of {samples} samples, got labels of shape {labels.shape}.")
    names = sorted(set(labels.tolist()))
    if ALL in names:
        raise ValueError(
            f"Expected tasks with names of their own, got {ALL!r}, which stands for all samples. Rename it."
        )
    return everything | {name: labels == name for name in names}


def require_exact(gram: Any) -> None:
    """Refuses a K that is an estimate from projected gradients, where directions or squares are needed.

    Raises:
        ValueError: If it is.
    """
    if getattr(gram, "projection", 0):
        raise ValueError(
            f"Expected K of whole gradients, got that of gradients projected to {gram.projection} numbers, which has "
            "other directions. Measure fewer blocks or samples at a time with projection=0."
        )


def own(given: Any, gram: Any, name: str) -> Any:
    """What was given, else what the Gram itself says, else ``None``."""
    return getattr(gram, name, None) if given is None else given
