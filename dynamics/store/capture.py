"""The first format of records, ``capture.zarr``: a Zarr group of groups, one a step. It is read, and never written.

Each array is one chunk, not compressed. It is read here rather than by the zarr library: what comes from strangers may
name a codec (one of zarr's unpickles), lead out of the folder by a link, or claim a size that its file does not have.
"""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dynamics.store.disk import read_file, read_json_file
from dynamics.store.record_file import check_step

CAPTURE = "capture.zarr"
CAPTURE_KIND = "optimization-dynamics capture"
CAPTURE_FORMAT = 1
#: Beside the first format's records: the watched matrices at the start.
CAPTURE_START = ".start.safetensors"
_STEP = re.compile(r"step-([0-9]{12})")
_DIMENSIONS = "_ARRAY_DIMENSIONS"  # xarray's names for what Zarr has no word for
_COORDINATES = "coordinates"
_DTYPE = re.compile(r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<U[1-9][0-9]{0,7}")
_LENGTH_LIMIT = 2**48  # of a dimension; beyond, an empty array would overflow numpy's integers


def is_capture(path: Path) -> bool:
    """Tell whether a folder says that it holds records of the first format, or holds some."""
    if capture_steps(path):
        return True
    try:
        return read_json_file(path / ".zattrs").get("kind") == CAPTURE_KIND
    except (OSError, ValueError):
        return False


def capture_steps(path: Path) -> list[int]:
    """Return the steps of which there are records in a folder, ascending; none where there is no such folder."""
    try:
        return sorted(int(match[1]) for name in os.listdir(path) if (match := _STEP.fullmatch(name)))
    except OSError:
        return []


def capture_record(path: Path, step: int) -> Path:
    """Return the folder that is the record of a step."""
    return path / f"step-{step:012d}"


def capture_attributes(path: Path) -> dict[str, Any]:
    """Return what was noted about the whole training.

    Raises:
        ValueError: If these are not records of the first format.
    """
    try:
        attributes = read_json_file(path / ".zattrs")
        if attributes.get("kind") != CAPTURE_KIND:
            raise ValueError(f"the kind in its .zattrs is {str(attributes.get('kind'))[:80]!r}, not {CAPTURE_KIND!r}")
        if attributes.get("format") != CAPTURE_FORMAT:
            raise ValueError(f"its format is {str(attributes.get('format'))[:40]}, not {CAPTURE_FORMAT}")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(
            f"Expected records of the first format in '{path}', but cannot read them ({reason}). "
            "Restore its .zattrs from a copy, or move it away."
        ) from error
    return attributes


def read_capture_record(path: Path) -> dict[str, xr.Dataset]:
    """Return the groups of one record of the first format, in memory.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: Says in one line what is wrong with it.
    """
    match = _STEP.fullmatch(path.name)
    assert match, path
    if not os.path.lexists(path):
        raise FileNotFoundError(path)
    if path.is_symlink():
        raise ValueError("it is a link")
    try:
        read_json_file(path / ".zgroup")
        groups = {name: _dataset(path / name) for name in _folders(path)}
    except FileNotFoundError as error:
        missing = Path(error.filename or path)
        raise ValueError(f"'{missing.parent.name}/{missing.name}' is missing") from error
    except (OSError, MemoryError) as error:
        raise ValueError(getattr(error, "strerror", None) or type(error).__name__) from error
    check_step(groups, int(match[1]))
    return groups


def _dataset(folder: Path) -> xr.Dataset:
    read_json_file(folder / ".zgroup")
    attributes = read_json_file(folder / ".zattrs")
    coordinates = str(attributes.pop(_COORDINATES, "")).split()
    variables = {name: _variable(folder / name) for name in _folders(folder)}
    return xr.Dataset(variables, attrs=attributes).set_coords([name for name in coordinates if name in variables])


def _variable(folder: Path) -> xr.Variable:
    metadata, attributes = read_json_file(folder / ".zarray"), read_json_file(folder / ".zattrs")
    dimensions, shape, dtype = attributes.pop(_DIMENSIONS, None), metadata.get("shape"), metadata.get("dtype")
    if not (isinstance(dtype, str) and _DTYPE.fullmatch(dtype)):
        raise ValueError(f"'{folder.name}' has the type {str(dtype)[:40]!r}, not numbers, booleans or text")
    if not (isinstance(shape, list) and all(type(length) is int and 0 <= length < _LENGTH_LIMIT for length in shape)):
        raise ValueError(f"'{folder.name}' has no shape")
    expected = {
        "chunks": [max(1, length) for length in shape],
        "compressor": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
        "zarr_format": 2,
    }
    if not expected.items() <= metadata.items():
        raise ValueError(f"'{folder.name}' is compressed or in several chunks, as no recorder wrote it")
    if not (isinstance(dimensions, list) and len(dimensions) == len(shape) == len({*map(str, dimensions)})):
        raise ValueError(f"'{folder.name}' has {len(shape)} dimensions, and not as many names for them")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    content = read_file(folder / (".".join("0" * len(shape)) or "0"), size) if size else b""
    if len(content) != size:
        raise ValueError(f"'{folder.name}' has {len(content)} bytes of {size}")
    if dtype == "|b1" and bool(np.any(np.frombuffer(content, "u1") > 1)):
        raise ValueError(f"'{folder.name}' holds bytes that are neither true nor false")
    if "U" in dtype and bool(np.any(np.frombuffer(content, "<u4") > sys.maxunicode)):
        raise ValueError(f"'{folder.name}' holds numbers that are no characters")
    values = np.frombuffer(content, dtype).reshape(shape).astype(np.dtype(dtype).newbyteorder("="))
    return xr.Variable([str(name) for name in dimensions], values, attributes)


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, but for hidden ones.

    Raises:
        ValueError: If one is a link.
    """
    with os.scandir(folder) as scan:
        entries = sorted((entry for entry in scan if not entry.name.startswith(".")), key=lambda entry: entry.name)
    if links := [entry.name for entry in entries if entry.is_symlink()]:
        raise ValueError(f"'{links[0]}' is a link")
    return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
