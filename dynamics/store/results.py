"""A result tree on disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import xarray as xr
import zarr
from zarr.storage import MemoryStore

from dynamics.store.arrays import read_file

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

#: Zarr format 2: its string and boolean types are specified, so that no reader, old or new, has to warn or guess.
_ZARR_FORMAT = 2
#: What a result is decoded by, in the past and now.
_CODECS = {"blosc", "gzip", "lz4", "vlen-utf8", "zlib", "zstd"}
_METADATA_LIMIT = 2**28  # bytes; a result of a hundred runs has some ten million


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
    """Open a stored tree; arrays are read when they are used.

    Raises:
        ValueError: If the folder is not a store that can be opened, or names a codec that no result has.
    """
    try:
        _refuse_codecs(path)
        return xr.open_datatree(path, engine="zarr", consolidated=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Expected a result store at '{path}', but it does not open ({reason}). "
            "Analyse the run again: python -m dynamics.analyze RUN"
        ) from error


def _refuse_codecs(path: Path) -> None:
    """Refuse a stranger's store that would be decoded by anything but what zarr writes by itself: one codec unpickles.

    Raises:
        OSError: If the metadata cannot be read.
        ValueError: Names the codec.
    """
    for name, metadata in json.loads(read_file(path / ".zmetadata", _METADATA_LIMIT))["metadata"].items():
        if name.endswith(".zarray"):
            codecs = [metadata.get("compressor"), *(metadata.get("filters") or ())]
            for codec in codecs:
                if codec is not None and codec["id"] not in _CODECS:
                    raise ValueError(f"'{name}' names the codec {str(codec['id'])[:40]!r}")
