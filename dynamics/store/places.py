"""Where results lie."""

from __future__ import annotations

from pathlib import Path

from dynamics.store.staging import complete

RESULT = "analysis.zarr"
FOLDER = "dynamics"


def result_path(run: Path) -> Path | None:
    """Where an analysis is stored; None without one.

    Args:
        run: A run folder with ``dynamics/analysis.zarr``, a folder with ``analysis.zarr``, or the store.
    """
    for place in (run / FOLDER / RESULT, run / RESULT, *([run] if run.suffix == ".zarr" else [])):
        if complete(place).exists():
            return complete(place)
    return None
