"""One record as one safetensors file: numbers as tensors, everything else as JSON in the file's metadata.

A tensor is called ``group/variable``. The metadata hold ``kind``, ``format`` and ``groups``: for each group its
attributes, which of its variables are coordinates, and for each variable its dimensions, its attributes, and its values
if they are text. Of K, symmetric, the upper triangle is kept in float32, row by row, and tr K in float64.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dynamics.store.disk import encoded_json, parsed_json, read_file

RECORD_KIND = "optimization-dynamics record"
RECORD_FORMAT = 2
#: Bytes; K of 300 matrices and 2,000 samples has 2.4e9.
_LIMIT = 2**32
_NAME = re.compile(r"step-([0-9]{12})\.safetensors")
_PACKED = ("sample", "sample_")


def record_name(step: int) -> str:
    """Return the name of a step's record; sorted by name is sorted by step.

    Raises:
        ValueError: If no training has that step.

    >>> record_name(50)
    'step-000000000050.safetensors'
    """
    if not 0 <= step < 10**12:
        raise ValueError(f"Expected a step from 0 to {10**12 - 1}, got {step}.")
    return f"step-{step:012d}.safetensors"


def record_step(name: str) -> int | None:
    """Return the step of which a file of this name is the record, ``None`` if it is none.

    >>> record_step("step-000000000050.safetensors"), record_step("step-50.safetensors")
    (50, None)
    """
    match = _NAME.fullmatch(name)
    return int(match[1]) if match else None


def encoded_record(step: int, groups: Mapping[str, xr.Dataset]) -> bytes:
    """Return a record as the content of a safetensors file.

    Args:
        step: A coordinate ``step`` of a group must be this step alone.
        groups: Name → numbers, booleans and text.

    Raises:
        ValueError: If a name or an array cannot be stored, or a group is of another step.
    """
    check_step(groups, step)
    tensors: dict[str, np.ndarray] = {}
    headers = {name: _encoded_group(_checked_name(name), dataset, tensors) for name, dataset in groups.items()}
    metadata = {"kind": RECORD_KIND, "format": str(RECORD_FORMAT), "groups": encoded_json(headers)}
    if sum(tensor.nbytes for tensor in tensors.values()) + len(metadata["groups"]) > _LIMIT:
        raise ValueError(f"Expected a record of at most {_LIMIT} bytes. Probe fewer samples, or watch fewer matrices.")
    return save(tensors, metadata)


def read_record(path: Path) -> dict[str, xr.Dataset]:
    """Return the groups of a record, in memory.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: Says in one line what is wrong with it.
    """
    step = record_step(path.name)
    assert step is not None, path
    try:
        return decoded_record(step, read_file(path, _LIMIT))
    except FileNotFoundError:
        raise
    except (OSError, MemoryError) as error:
        raise ValueError(getattr(error, "strerror", None) or type(error).__name__) from error


def decoded_record(step: int, content: bytes) -> dict[str, xr.Dataset]:
    """Return what :func:`encoded_record` made the content of.

    Raises:
        ValueError: Says in one line what is wrong with it.
    """
    try:
        tensors = load(content)
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__") or {}
        if metadata.get("kind") != RECORD_KIND or metadata.get("format") != str(RECORD_FORMAT):
            kind, version = str(metadata.get("kind"))[:40], str(metadata.get("format"))[:40]
            raise ValueError(f"its kind is {kind!r} and its format {version!r}, expected {RECORD_KIND!r} and '2'")
        headers = parsed_json(metadata["groups"], "its list of groups")
        groups = {name: _decoded_group(name, header, tensors) for name, header in headers.items()}
    except SafetensorError as error:
        raise ValueError(f"it is not a safetensors file ({error})") from error
    except (LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ValueError(f"its header is not that of a record ({type(error).__name__}: {error})") from error
    check_step(groups, step)
    return groups


def check_step(groups: Mapping[str, xr.Dataset], step: int) -> None:
    """Refuse numbers of another step.

    Raises:
        ValueError: Names the group and the steps.
    """
    for name, dataset in groups.items():
        if "step" in dataset.coords and (steps := np.ravel(dataset["step"].values).tolist()) != [step]:
            raise ValueError(f"'{name}' is of the steps {str(steps)[:40]}, expected step {step} alone")


def packed(
    gram: Float[np.ndarray, "*batch sample sample_"],
) -> tuple[Float[np.ndarray, "*batch pair"], Float[np.ndarray, "*batch"]]:
    """Return the upper triangle of K, row by row in float32, and tr K in float64 over the samples that have a number.

    >>> packed(np.array([[2.0, 1.0], [1.0, 4.0]]))
    (array([2., 1., 4.], dtype=float32), array(6.))
    """
    rows, columns = np.triu_indices(gram.shape[-1])
    trace = np.asarray(np.nansum(np.diagonal(gram, axis1=-2, axis2=-1), axis=-1, dtype=np.float64))
    with np.errstate(over="ignore"):  # becomes infinity, which the reader refuses by name
        return gram[..., rows, columns].astype(np.float32), trace


def unpacked(
    triangle: Float[np.ndarray, "*batch pair"], trace: Float[np.ndarray, "*batch"]
) -> Float[np.ndarray, "*batch sample sample_"]:
    """Return K in float64 from what :func:`packed` gave; its diagonal, rounded, is scaled to the exact trace.

    Raises:
        ValueError: If the triangle is not that of a square matrix, or its diagonal does not have that trace.

    >>> unpacked(np.array([2.0, 1.0, 4.0], dtype=np.float32), np.array(6.0))
    array([[2., 1.],
           [1., 4.]])
    """
    size = (math.isqrt(8 * triangle.shape[-1] + 1) - 1) // 2
    if size * (size + 1) // 2 != triangle.shape[-1]:
        raise ValueError(f"'gram' holds {triangle.shape[-1]} numbers, which are not the upper triangle of a matrix")
    rows, columns = np.triu_indices(size)
    gram = np.empty((*triangle.shape[:-1], size, size))
    gram[..., rows, columns] = gram[..., columns, rows] = triangle
    diagonal = np.diagonal(gram, axis1=-2, axis2=-1)
    rounded = np.nansum(diagonal, axis=-1)
    if not np.allclose(rounded, trace, rtol=1e-6, atol=1e-30):
        raise ValueError("'gram' has another trace than was noted with it")
    factor = np.divide(trace, rounded, out=np.ones_like(rounded), where=(rounded > 0) & np.isfinite(rounded))
    gram[..., np.arange(size), np.arange(size)] = diagonal * factor[..., None]
    return gram


def _encoded_group(group: str, dataset: xr.Dataset, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """Return the header of a group; its numbers are added to ``tensors``."""
    variables: dict[str, Any] = {}
    for name, variable in dataset.variables.items():
        key = f"{group}/{_checked_name(name)}"
        header: dict[str, Any] = {"dims": list(variable.dims), "attributes": variable.attrs}
        values = np.asarray(variable.values)
        if values.dtype.kind in "OT" and all(isinstance(value, str) for value in values.ravel().tolist()):
            values = values.astype(str)
        if values.dtype.kind == "U":
            header |= {"text": values.ravel().tolist(), "shape": list(values.shape)}
        elif values.dtype.kind not in "biuf" or values.dtype.itemsize > 8:
            raise ValueError(f"Expected numbers, booleans or text in '{name}', got {values.dtype}. Convert it first.")
        elif variable.dims[-2:] == _PACKED and values.dtype.kind == "f":
            header["trace"] = True
            tensors[key], tensors[f"{key}_trace"] = map(np.ascontiguousarray, packed(values))
        else:
            tensors[key] = values.astype(values.dtype.newbyteorder("="), order="C")
        variables[str(name)] = header
    coordinates = [str(name) for name in dataset.coords if name not in dataset.dims]
    return {"attributes": dataset.attrs, "coordinates": coordinates, "variables": variables}


def _decoded_group(group: str, header: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> xr.Dataset:
    variables = {}
    for name, column in header["variables"].items():
        if "text" in column:
            values = _text(name, column["text"], column["shape"])
        elif (key := f"{group}/{name}") not in tensors:
            raise ValueError(f"'{key}' is missing")
        elif column.get("trace"):
            values = unpacked(tensors[key], tensors[f"{key}_trace"])
        else:
            values = tensors[key].copy()  # what was loaded cannot be changed
        if values.dtype == np.bool_ and bool((values.view(np.uint8) > 1).any()):
            raise ValueError(f"'{group}/{name}' holds bytes that are neither true nor false")
        dims = [str(dim) for dim in column["dims"]]
        if len(dims) != values.ndim or len(set(dims)) < len(dims):
            raise ValueError(f"'{group}/{name}' has {values.ndim} dimensions and the names {str(dims)[:80]}")
        variables[name] = xr.Variable(dims, values, column["attributes"])
    coordinates = [name for name in header["coordinates"] if name in variables]
    return xr.Dataset(variables, attrs=header["attributes"]).set_coords(coordinates)


def _text(name: str, entries: Any, shape: Any) -> np.ndarray:
    if not (isinstance(entries, list) and all(isinstance(entry, str) for entry in entries)):
        raise ValueError(f"'{name}' holds something other than text")
    lengths: Sequence[int] = shape if isinstance(shape, list) else [-1]
    if not all(type(length) is int and length >= 0 for length in lengths) or math.prod(lengths) != len(entries):
        raise ValueError(f"'{name}' holds {len(entries)} texts, and its shape is {str(shape)[:40]}")
    return np.asarray(entries, dtype=str).reshape(lengths)


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name or "/" in name:
        raise ValueError(f"Expected a name without '/', got {name!r}. Rename it.")
    return name
