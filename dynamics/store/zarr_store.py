"""A result tree on disk."""

from __future__ import annotations

from pathlib import Path

import xarray as xr

#: Zarr format 2: its string and boolean types are specified, so that no reader, old or new, has to warn or guess.
_ZARR_FORMAT = 2


def write_tree(tree: xr.DataTree, path: Path) -> None:
    """Writes a tree as one Zarr store; ``path`` must not exist."""
    tree.to_zarr(path, mode="w-", zarr_format=_ZARR_FORMAT, consolidated=True)


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
