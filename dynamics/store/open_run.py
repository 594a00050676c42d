"""A run's stored result, wherever it lies."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

import xarray as xr

from dynamics.store.staging import complete
from dynamics.store.zarr_store import read_tree

RESULT = "analysis.zarr"
FOLDER = "dynamics"


def open_run(run: str | PathLike[str]) -> xr.DataTree:
    """Opens what is stored for a run.

    Args:
        run: A run folder with ``dynamics/analysis.zarr``, an output folder with ``analysis.zarr``, or the store.

    Returns:
        The result tree; its layout is in ``dynamics.schema``. Arrays are read when they are used.

    Raises:
        FileNotFoundError: If nothing is stored; the message has the command that makes it.
        ValueError: If the store does not open.

    Example: the effective rank of one matrix over the steps::

        tree = dynamics.open_run("runs/imax")
        tree["update"]["effective_rank_energy"].sel(kind="total", matrix="model.layers.0.self_attn.q_proj")
    """
    folder = Path(run)
    for place in (folder / FOLDER / RESULT, folder / RESULT, *([folder] if folder.suffix == ".zarr" else [])):
        if complete(place).exists():
            return read_tree(complete(place))
    raise FileNotFoundError(
        f"No stored result for '{folder}' (looked for {FOLDER}/{RESULT} and {RESULT}). "
        f"Make one with: python -m dynamics.analyze {folder}"
    )
