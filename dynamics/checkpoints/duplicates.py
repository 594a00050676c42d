"""Find checkpoints that hold the same weights without reading all of them."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Weights
from dynamics.checkpoints.names import parse_key

#: How many tensors, and how many rows of each, are hashed to rule out most pairs.
_SAMPLED_TENSORS = 4
_SAMPLED_ROWS = 64

Files = Mapping[str, Weights]


def duplicates(checkpoints: Sequence[Files]) -> list[tuple[int, int]]:
    """Return pairs (earlier, later) of checkpoints with bitwise equal tensors; each later one occurs once.

    A few small tensors of each checkpoint are hashed; whole files are compared only where the hashes agree.

    Args:
        checkpoints: Adapter name → weights, one mapping for each checkpoint.
    """
    alike: dict[str, list[int]] = defaultdict(list)
    pairs: list[tuple[int, int]] = []
    for index, files in enumerate(checkpoints):
        if not files:
            continue
        try:
            group = alike[_sample(files)]
            twin = next((earlier for earlier in group if same_tensors(checkpoints[earlier], files)), None)
        except UnreadableFile:  # reported where its matrices are read
            continue
        if twin is None:
            group.append(index)
        else:
            pairs.append((twin, index))
    return pairs


def same_tensors(one: Files, other: Files) -> bool:
    """Return whether two checkpoints hold the same adapters with bitwise equal tensors; a missing file equals none."""
    if one.keys() != other.keys() or any(one[name].tensors != other[name].tensors for name in one):
        return False
    try:
        return all(_same_content(one[name], other[name]) for name in one)
    except UnreadableFile:  # reported where its matrices are read
        return False


def _same_content(one: Weights, other: Weights) -> bool:
    with one.open() as load, other.open() as load_other:
        return all(torch.equal(_bits(load(key)), _bits(load_other(key))) for key in _ordered_keys(one))


def _sample(files: Files) -> str:
    """Return a hash of the list of tensors and of the first rows of a few of them."""
    digest = hashlib.sha256()
    for name, file in sorted(files.items()):
        listing = sorted((key, info.dtype, info.shape) for key, info in file.tensors.items())
        digest.update(repr((name, listing)).encode())
        with file.open() as load:
            for key in _ordered_keys(file)[:_SAMPLED_TENSORS]:
                digest.update(_bits(_start(load(key))).numpy().tobytes())
    return digest.hexdigest()


def _ordered_keys(file: Weights) -> list[str]:
    """Return the keys of a file: factors that start at zero first (they differ earliest), small before large."""
    parts = {key: part.part if (part := parse_key(key)) else "" for key in file.tensors}
    return sorted(
        file.tensors, key=lambda key: (parts[key] not in ("B", "embedding_A", "E"), file.tensors[key].count, key)
    )


def _start(tensor: Tensor) -> Tensor:
    return tensor[:_SAMPLED_ROWS] if tensor.ndim else tensor


def _bits(tensor: Tensor) -> Tensor:
    # As bytes: NaN equals itself, 0 does not equal -0.
    return tensor.contiguous().reshape(-1).view(torch.uint8)
