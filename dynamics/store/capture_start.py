"""What the watched matrices were at the start of a training, beside its records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamics.store.durable import sync


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes tensors of any device as one safetensors file, on the disk when the call returns.

    Raises:
        OSError: If it cannot be written.
    """
    try:
        save_file(_separate(tensors), path)
    except SafetensorError as error:
        raise OSError(f"'{path}' cannot be written ({error}).") from error
    sync(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What ``write_tensors`` wrote, on the CPU; empty if nothing is there.

    Raises:
        ValueError: If it cannot be read.
    """
    if not os.path.lexists(path):
        return {}
    try:
        if path.is_symlink() or not path.is_file():
            raise OSError("it is no plain file")
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"Expected the start of the training in '{path}', but it does not open ({error}). "
            "Remove it, and increments begin at the next captured step."
        ) from error


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same numbers in memory that no two share, as safetensors asks."""
    found, seen = {}, set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        shared = storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes
        seen.add(storage.data_ptr())
        found[name] = tensor.clone() if shared else tensor
    return found
