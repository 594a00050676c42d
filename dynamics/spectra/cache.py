"""Cache of tensors that take long to compute, on disk under a key of their content, for other runs of the same base.

It lies in ``$XDG_CACHE_HOME/optimization-dynamics``, by default in ``~/.cache``. Deleting it costs nothing but time. A
file that cannot be read, or holds something else, counts as missing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from tempfile import NamedTemporaryFile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

_FOLDER = "optimization-dynamics"


def cache_folder() -> Path:
    """Return the folder of the cache."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / _FOLDER


def content_key(tensor: Tensor, *more: object) -> str:
    """Return a key of a tensor's numbers, format and shape, and of whatever else the result depends on.

    >>> [content_key(torch.ones(2)) == content_key(torch.ones(size)) for size in (2, 3)]
    [True, False]
    """
    plain = tensor.detach().cpu().contiguous()
    digest = sha256(repr((str(plain.dtype), tuple(plain.shape), *more)).encode())
    digest.update(plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return digest.hexdigest()


def cached_tensors(key: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor] | None:
    """Read what is stored under a key; ``None`` unless it has exactly these names and shapes, and finite numbers."""
    try:
        tensors = load_file(cache_folder() / f"{key}.safetensors")
    except (OSError, SafetensorError, ValueError):
        return None
    if {name: tuple(tensor.shape) for name, tensor in tensors.items()} != dict(shapes):
        return None
    return tensors if all(bool(tensor.isfinite().all()) for tensor in tensors.values()) else None


def write_tensors(key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Store tensors under a key, whole or not at all, and return whether that was possible."""
    try:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with NamedTemporaryFile(dir=folder, suffix=".partial", delete=False) as file:
            temporary = Path(file.name)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
            temporary.replace(folder / f"{key}.safetensors")
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError):
        return False
    return True
