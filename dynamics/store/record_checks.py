"""Whether a record is what a recorder writes: strangers' files are not believed, and a bad one costs only itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import xarray as xr

from dynamics.schema import DECOMPOSITIONS, KINDS, UPDATE_COORDINATES, WRAPPERS, Variable
from dynamics.spectra import raw
from dynamics.text import encodable

_FORMATS = ("F64", "F32", "BF16", "F16")
_TEXTS = ("matrix", "role", "stack", "storage")
_COUNTS = ("count", "factor_rank", "decomposition")
_STEP_COORDINATES = ("segment", "from_step")
_IS_OF: Mapping[str, Callable[[np.dtype], bool]] = {
    "text": lambda dtype: dtype.kind == "U",
    "whole numbers of 64 bits": lambda dtype: dtype == np.int64,
    "numbers": lambda dtype: dtype.kind == "f",
}
#: No training has as many steps, no matrix as many rows.
_LARGEST = 10**12
#: Chance is drawn from factors of that many columns, at the cost of its square; no adapter comes near.
_LARGEST_RANK = 4096
#: Beyond, the energy of a spectrum is no number any more.


def record_problems(record: Mapping[str, xr.Dataset]) -> Iterator[str]:
    """What is wrong with a record, in words that go on from its name; nothing if it can be used.

    Args:
        record: Name of the group → its numbers, as ``read_capture`` gives them.
    """
    if "update" not in record:
        yield "it has no update"
    for group, known in (("update", raw.UPDATE), ("gradient", raw.GRADIENT)):
        if group in record:
            yield from (f"'{group}' {problem}" for problem in _dataset_problems(record[group], known))


def _dataset_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    """Each check relies on those before it, so only the first problem is told."""
    # Records of earlier versions lack some variables.
    known = {name: variable for name, variable in known.items() if name in dataset.variables or name not in raw.ADDED}
    for check in (_layout_problems, _coordinate_problems, _spectrum_problems):
        if problem := next(check(dataset, known), None):
            yield problem
            return


def _layout_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    dims = _dimensions(known)
    for name, expected in dims.items():
        if name not in dataset.variables or dataset.variables[name].dims != expected:
            yield f"lacks {name!r} with the dimensions {expected}"
            return
    types = {name: "whole numbers of 64 bits" if name in _COUNTS or name not in known else "numbers" for name in dims}
    types |= dict.fromkeys(("kind", *_TEXTS), "text")
    yield from (
        f"holds no {types[name]} in {name!r}" for name in dims if not _IS_OF[types[name]](dataset.variables[name].dtype)
    )


def _dimensions(known: Mapping[str, Variable]) -> dict[str, tuple[str, ...]]:
    per_kind = "kind" in known["count"].dims
    axes = ("step", "matrix", "index", *(["kind"] if per_kind else []))
    return {
        **{name: (name,) for name in axes},
        **{name: (dim,) for name, dim in UPDATE_COORDINATES.items() if per_kind or name not in _STEP_COORDINATES},
        **{name: variable.dims for name, variable in known.items()},
    }


def _coordinate_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    if "kind" in dataset.dims and tuple(dataset.variables["kind"].values.tolist()) != KINDS:
        yield f"is not of the kinds {KINDS}"
    if dataset.sizes["step"] != 1:
        yield "is not of one step"
    smallest = {"from_step": -1, "layer": -1, "out": 1, "in": 1}
    for name in _dimensions(known):
        values = dataset.variables[name].values
        if values.dtype == np.int64 and values.size:
            least = smallest.get(name, 0)
            if not (least <= int(values.min()) and int(values.max()) < _LARGEST):
                yield f"has a number in {name!r} that is not from {least} to {_LARGEST - 1}"
    if "from_step" in dataset.coords and bool(dataset.variables["from_step"] >= dataset.variables["step"]):
        yield "is an increment since a later step"
    if not dataset.indexes["matrix"].is_unique:
        yield "has two matrices of one name"
    names = dataset.variables["matrix"].values.tolist()
    if any(name.startswith(WRAPPERS) for name in names):
        yield "has a matrix whose name begins with a wrapper's prefix"
    if names != encodable(names):
        yield "has a matrix whose name is no text"
    if not set(dataset.variables["storage"].values.tolist()) <= set(_FORMATS):
        yield f"is stored in a format that is none of {', '.join(_FORMATS)}"


def _spectrum_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    values, count, rank = (dataset.variables[name].values for name in ("singular_value", "count", "factor_rank"))
    shortest = np.minimum(dataset.variables["out"].values, dataset.variables["in"].values)
    factored = dataset.variables["adapter_rank"].values > 0
    # A dense matrix has as many as it is wide, factors as many as they have columns.
    possible = np.where(rank > 0, np.where(factored, np.minimum(rank, shortest), shortest), 0)
    if (count != possible).any() or count.max(initial=0) > values.shape[-1]:
        yield "does not count the singular values that its matrices have"
    if (rank[..., factored] > _LARGEST_RANK).any():
        yield f"has factors of more than {_LARGEST_RANK} columns"
    if "from_step" in dataset.coords and dataset.variables["from_step"].values[0] < 0 and count[:, 1].any():
        yield "has an increment since nothing"
    if "decomposition" in known and (dataset.variables["decomposition"].values >= len(DECOMPOSITIONS)).any():
        yield "has singular values that were found in an unknown way"
    inside = np.arange(values.shape[-1]) < count[..., None]
    if not np.isnan(values[~inside]).all():
        yield "has more singular values than it counts"
    missing = np.isnan(values) & inside
    if (missing.any(-1) & (missing.sum(-1) < count)).any():
        yield "lacks some of its singular values"
    sides = [np.isfinite(dataset.variables[name].values) for name in known if name.endswith("factor_value")]
    if any((~side[..., :-1] & side[..., 1:]).any() for side in sides):
        yield "has a gap in the singular values of its factors"
    if sides and (sum(side.sum(-1) for side in sides) > np.where(factored, rank[:, 1], 0)).any():
        yield "has more singular values of factors than its increments have columns"
    for name in (each for each in known if each not in _COUNTS):
        numbers = dataset.variables[name].values.astype(np.float64)
        least = -_LARGEST_NUMBER if name == "inner_product" else 0.0
        # A gradient that is not finite has a norm that says so.
        allowed = np.isnan(numbers) | (numbers >= least) & (numbers <= _LARGEST_NUMBER)
        if not (allowed | (np.isposinf(numbers) & name.startswith("norm"))).all():
            yield f"has a number in {name!r} that is not from {least:g} to {_LARGEST_NUMBER:g}"
    if (np.diff(np.where(inside, values, 0.0), axis=-1) > 0).any():
        yield "has singular values that are not in descending order"
