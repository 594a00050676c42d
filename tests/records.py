"""Records of a training, and what a capture store must hold when it holds them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray as xr

from dynamics.store import read_capture


def update(step: int, matrices: Sequence[str] = ("a.q", "ä.v")) -> xr.Dataset:
    """Made-up spectra of one step."""
    values = np.arange(2.0 * len(matrices) * 3).reshape(1, 2, len(matrices), 3) + step
    return xr.Dataset(
        {
            "singular_value": (("step", "kind", "matrix", "index"), values, {"units": "1", "long_name": "σ"}),
            "count": (("step", "kind", "matrix"), np.full(values.shape[:-1], 3)),
            "is_zero": (("step", "kind", "matrix"), values[..., 0] > step + 4),
        },
        coords={
            "step": [step],
            "kind": ["total", "increment"],
            "matrix": np.asarray(matrices, dtype=str),
            "index": np.arange(3),
            "from_step": ("step", [0]),
            "role": ("matrix", np.asarray(["mlp"] * len(matrices), dtype=str)),
        },
        attrs={"space": "weight"},
    )


def gradient(step: int) -> xr.Dataset:
    """Gradient norms of one step that are not known."""
    values = np.full((1, 2), np.nan)
    return xr.Dataset({"norm": (("step", "matrix"), values)}, coords={"step": [step], "matrix": ["a.q", "ä.v"]})


def record(step: int) -> dict[str, xr.Dataset]:
    """Both."""
    return {"update": update(step), "gradient": gradient(step)}


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder: relative path -> content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hidden(path: Path) -> list[str]:
    """What a store holds beside Zarr's own files and the records."""
    return sorted(entry.name for entry in path.iterdir() if entry.name.startswith(".") and ".z" not in entry.name)


def assert_holds(path: Path, *steps: int) -> None:
    """All of these records, whole, and nothing else."""
    capture = read_capture(path)
    assert (list(capture.records), capture.broken) == (list(steps), {})
    for step, groups in capture.records.items():
        for name, expected in record(step).items():
            xr.testing.assert_identical(groups[name], expected)
