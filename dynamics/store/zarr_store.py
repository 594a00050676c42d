"""A result tree on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr
import zarr
from zarr.storage import MemoryStore

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

#: Zarr format 2: its string and boolean types are specified, so that no reader, old or new, has to warn or guess.
_ZARR_FORMAT = 2


def write_tree(tree: xr.DataTree, path: Path) -> None:
    """Writes a tree as one Zarr store; ``path`` must not exist.

    A result is hundreds of small files, and zarr waits for a thread at each: into memory first, it takes a quarter of
    the time. What is held beside the tree is the compressed result. Consolidated once, where xarray would read all
    metadata again at each group.
    """
    files: dict[str, Buffer] = {}
    store = MemoryStore(files)
    tree.to_zarr(store, mode="w-", zarr_format=_ZARR_FORMAT, consolidated=False)
    zarr.consolidate_metadata(store, zarr_format=_ZARR_FORMAT)
    path.mkdir(parents=True)
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.to_bytes())


def read_tree(path: Path) -> xr.DataTree:
    """Opens a stored tree; arrays are read when they are used.

    Raises:
        ValueError: If the folder is not a store that can be opened.
    """
    try:
        return xr.open_datatree(path, engine="zarr", consolidated=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Expected a result store at '{path}', but it does not open ({reason}). "
            "Analyse the run again: python -m dynamics.analyze RUN"
        ) from error
