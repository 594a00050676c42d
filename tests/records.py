"""Records of a training, and what a folder must hold when it holds them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dynamics.schema import INTERVENTION, INTERVENTION_FLAGS, label_arrays
from dynamics.store.record_file import encoded_record, read_record, record_step
from dynamics.store.record_folders import StoredRecords, record_folders, stored_records


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


def effects(
    step: int = 20,
    arms: Sequence[str] = ("full", "on", "off"),
    ks: Sequence[int] = (2,),
    scales: Sequence[float] = (0.5, 1.0),
    tasks: Sequence[str] = ("all", "a"),
    lacking: Sequence[str] = (),
) -> xr.Dataset:
    """The group ``intervention`` of one step, each number another one, without variables that begin so."""
    sizes = {"step": 1, "arm": len(arms), "k": len(ks), "scale": len(scales), "task": len(tasks)}
    arrays = {}
    for name, variable in INTERVENTION.items():
        shape = [sizes[dim] for dim in variable.dims]
        numbers = np.arange(np.prod(shape), dtype=np.float64).reshape(shape) + step
        arrays[name] = np.ones(shape, dtype=bool) if name in INTERVENTION_FLAGS else numbers
    kept = {name: values for name, values in arrays.items() if not name.startswith(tuple(lacking))}
    coords = {"step": [step], "arm": list(arms), "k": list(ks), "scale": list(scales), "task": list(tasks)}
    attributes = {"space": "tangent", "splits": 2, "groups": 8, "samples": 16, "norm_deviation": step * 1e-7}
    group = xr.Dataset(label_arrays(INTERVENTION, kept), coords, attributes)
    return group.assign_coords(from_step=("step", np.array([step - 10])))


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder: relative path -> content."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def records_of(run: Path) -> StoredRecords:
    """The records of a run, or those in a folder of them."""
    folders = record_folders(run)
    assert folders is not None, run
    return stored_records(folders)


def rewrite(path: Path, change: Callable[[dict[str, xr.Dataset]], object]) -> None:
    """Change the groups of a record in place, as a program that writes the format could."""
    step = record_step(path.name)
    assert step is not None
    groups = {name: dataset.copy(deep=True) for name, dataset in read_record(path).items()}
    change(groups)
    path.write_bytes(encoded_record(step, groups))


def rewrite_header(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change the header of a record in place: what safetensors knows of each tensor, and the groups in the metadata."""
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    metadata = header["__metadata__"]
    groups = json.loads(metadata["groups"])
    change(header, groups)
    if metadata is header.get("__metadata__"):
        metadata["groups"] = json.dumps(groups)
    made = json.dumps(header).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + content[end:])


def partial(path: Path) -> list[str]:
    """Names of incomplete files in a folder of records."""
    return sorted(entry.name for entry in path.iterdir() if entry.name.startswith(".partial"))


def assert_holds(path: Path, *steps: int) -> None:
    """All of these records, whole, and nothing else."""
    found = records_of(path)
    assert (list(found.records), found.broken) == (list(steps), {})
    for step, groups in found.records.items():
        for name, expected in record(step).items():
            xr.testing.assert_identical(groups[name], expected)
