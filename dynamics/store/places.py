"""Where results lie."""

from __future__ import annotations

from pathlib import Path

from dynamics.store.ownership import is_folder
from dynamics.store.replace import complete

RESULT = "analysis.zarr"
FOLDER = "dynamics"


def result_path(run: Path) -> Path | None:
    """Return where an analysis is stored; ``None`` without one. A link in the place of the store is not followed.

    Args:
        run: A run folder with ``dynamics/analysis.zarr``, a folder with ``analysis.zarr``, or the store.
    """
    for store in (run / FOLDER / RESULT, run / RESULT):
        if is_folder(complete(store)):
            return complete(store)
    return complete(run) if run.suffix == ".zarr" and complete(run).exists() else None
