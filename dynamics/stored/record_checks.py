"""Whether a record is what a recorder writes: strangers' files are not believed, and a bad one costs only itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr

from dynamics.schema import KINDS, UPDATE_COORDINATES, Variable
from dynamics.spectra import raw

_FORMATS = ("F64", "F32", "BF16", "F16")
_STEP_COORDINATES = ("segment", "from_step")


def record_problems(record: Mapping[str, xr.Dataset]) -> Iterator[str]:
    """What is wrong with a record, in words that go on from its name; nothing if it can be used."""
    if "update" not in record:
        yield "it has no update"
    for group, known in (("update", raw.UPDATE), ("gradient", raw.GRADIENT)):
        if group in record:
            yield from (f"'{group}' {problem}" for problem in _dataset_problems(record[group], known))


def _dataset_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    per_step = [name for name in _STEP_COORDINATES if "kind" in known["count"].dims]
    per_matrix = [name for name, dim in UPDATE_COORDINATES.items() if dim == "matrix"]
    dims = {**dict.fromkeys(per_step, ("step",)), **dict.fromkeys(per_matrix, ("matrix",))}
    dims |= {name: (name,) for name in ("step", "matrix", "index")} | {name: each.dims for name, each in known.items()}
    for name, expected in dims.items():
        if name not in dataset.variables or dataset[name].dims != expected:
            yield f"lacks {name!r} with the dimensions {expected}"
            return
    texts = ("matrix", "role", "stack", "storage")
    kinds = {name: "U" if name in texts else "fiu" if name in known else "iu" for name in dims}
    yield from (f"holds no numbers in {name!r}" for name, kind in kinds.items() if dataset[name].dtype.kind not in kind)
    if per_step and tuple(dataset["kind"].values.tolist()) != KINDS:
        yield f"is not of the kinds {KINDS}"
    if dataset.sizes["step"] != 1:
        yield "is not of one step"
    elif per_step and int(dataset["from_step"].values[0]) >= int(dataset["step"].values[0]):
        yield "is an increment since a later step"
    if not dataset.indexes["matrix"].is_unique:
        yield "has two matrices of one name"
    if not set(dataset["storage"].values.tolist()) <= set(_FORMATS):
        yield f"is stored in a format that is none of {', '.join(_FORMATS)}"
    beyond = np.arange(dataset.sizes["index"]) >= dataset["count"].values[..., None]
    if np.isfinite(dataset["singular_value"].values[beyond]).any():
        yield "has more singular values than it counts"
