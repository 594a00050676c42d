"""Small arrays as groups of Zarr format 2: one chunk each, not compressed.

Written and read here rather than by the zarr library, which takes 24 ms to make a record of 32 such arrays in memory,
17 s to read 500 of them, and starts threads that stay, in a training that is not ours. What is written opens in every
Zarr reader. What is read comes from strangers: only such arrays are taken, so nothing can name a codec (the library's
would unpickle), no link is followed, and no size is believed that the file does not have.

Files that are on the disk, not only in its cache, when the call returns.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import stat
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dynamics.text import encodable

GROUP = b'{"zarr_format": 2}'
_DIMENSIONS = "_ARRAY_DIMENSIONS"  # xarray's names for what Zarr has no word for
_COORDINATES = "coordinates"
_DTYPE = re.compile(r"\|b1|\|[iu]1|<[iu][248]|<f[248]|<U[1-9][0-9]{0,7}")
_METADATA_LIMIT = 2**24  # bytes; ours have a few hundred
_LENGTH_LIMIT = 2**48  # of a dimension; beyond, an empty array would overflow numpy's integers


def encoded_groups(groups: Mapping[str, xr.Dataset]) -> dict[str, bytes]:
    """A Zarr group of groups as files: relative path -> content.

    Raises:
        ValueError: If a name or an array has no place in such a store.
    """
    files = {".zgroup": GROUP}
    for name, dataset in groups.items():
        files |= {f"{_name(name)}/{path}": content for path, content in _encoded_dataset(dataset).items()}
    return files


def encoded_attributes(attributes: Mapping[Any, Any]) -> bytes:
    """Strict JSON: what is not finite is null, arrays are lists.

    Raises:
        ValueError: If something has no place in JSON.
    """
    try:
        return json.dumps(_plain(encodable(attributes)), allow_nan=False, indent=1).encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"Expected attributes that JSON can hold ({error}). Turn them into text first.") from error


def read_groups(folder: Path) -> dict[str, xr.Dataset]:
    """The groups below a folder, in memory.

    Raises:
        OSError: If a file is not there or cannot be read.
        ValueError: If something is not as ``encoded_groups`` writes it.
    """
    _read_json(folder / ".zgroup")
    return {name: _read_dataset(folder / name) for name in _folders(folder)}


def read_attributes(path: Path) -> dict[str, Any]:
    """The content of a ``.zattrs``; texts encodable, no number that is not finite.

    Raises:
        OSError: If it is not there or cannot be read.
        ValueError: If it holds anything else.
    """
    return _read_json(path)


def _encoded_dataset(dataset: xr.Dataset) -> dict[str, bytes]:
    inner = [_name(name) for name in dataset.coords if name not in dataset.dims]
    if any(re.search(r"\s", name) for name in inner):
        raise ValueError(f"Expected names of coordinates without blanks, got {inner}. Rename them.")
    group = {**dataset.attrs, _COORDINATES: " ".join(inner)} if inner else dataset.attrs
    files = {".zgroup": GROUP, ".zattrs": encoded_attributes(group)}
    for name, variable in dataset.variables.items():
        values = _storable(_name(name), variable.values)
        files[f"{name}/.zarray"] = _array_metadata(values)
        files[f"{name}/.zattrs"] = encoded_attributes({**variable.attrs, _DIMENSIONS: list(variable.dims)})
        if values.size:
            files[f"{name}/{_chunk(values.ndim)}"] = values.tobytes()
    return files


def _array_metadata(values: np.ndarray) -> bytes:
    metadata = {
        "chunks": [max(1, length) for length in values.shape],
        "compressor": None,
        "dimension_separator": ".",
        "dtype": values.dtype.str,
        "fill_value": None,
        "filters": None,
        "order": "C",
        "shape": list(values.shape),
        "zarr_format": 2,
    }
    return json.dumps(metadata).encode()


def _chunk(dimensions: int) -> str:
    """Name of the one chunk."""
    return ".".join("0" * dimensions) or "0"


def _storable(name: str, values: Any) -> np.ndarray:
    """Little-endian, texts of fixed length."""
    values = np.asarray(values)
    if values.dtype.kind in "OT" and all(isinstance(each, str) for each in values.ravel().tolist()):
        values = values.astype(str)
    if values.dtype.kind == "U":
        values = values.astype(f"<U{max(1, values.dtype.itemsize // 4)}")
    values = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
    if not _DTYPE.fullmatch(values.dtype.str):
        raise ValueError(f"Expected numbers, booleans or text in '{name}', got {values.dtype}. Convert it first.")
    return values


def _read_dataset(folder: Path) -> xr.Dataset:
    _read_json(folder / ".zgroup")
    attributes = read_attributes(folder / ".zattrs")
    coordinates = str(attributes.pop(_COORDINATES, "")).split()
    variables = {name: _read_variable(folder / name) for name in _folders(folder)}
    return xr.Dataset(variables, attrs=attributes).set_coords([name for name in coordinates if name in variables])


def _read_variable(folder: Path) -> xr.Variable:
    metadata, attributes = _read_json(folder / ".zarray"), read_attributes(folder / ".zattrs")
    dimensions, shape, dtype = attributes.pop(_DIMENSIONS, None), metadata.get("shape"), metadata.get("dtype")
    if not (isinstance(dtype, str) and _DTYPE.fullmatch(dtype)):
        raise ValueError(f"'{folder.name}' has the type {str(dtype)[:40]!r}: neither numbers nor booleans nor text")
    if not (isinstance(shape, list) and all(type(length) is int and 0 <= length < _LENGTH_LIMIT for length in shape)):
        raise ValueError(f"'{folder.name}' has no shape")
    whole = {
        "chunks": [max(1, length) for length in shape],
        "compressor": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
        "zarr_format": 2,
    }
    if not whole.items() <= metadata.items():
        raise ValueError(f"'{folder.name}' is compressed or in several chunks, as no capture writes it")
    if not (isinstance(dimensions, list) and len(dimensions) == len(shape) == len({*map(str, dimensions)})):
        raise ValueError(f"'{folder.name}' has {len(shape)} dimensions, and not as many names for them")
    size = math.prod(shape) * np.dtype(dtype).itemsize
    content = read_file(folder / _chunk(len(shape)), size) if size else b""
    if len(content) != size:
        raise ValueError(f"'{folder.name}' has {len(content)} bytes of {size}")
    if _has_impossible(content, dtype):
        raise ValueError(f"'{folder.name}' holds what is no {'text' if 'U' in dtype else 'boolean'}")
    values = np.frombuffer(content, dtype).reshape(shape).astype(np.dtype(dtype).newbyteorder("="))
    return xr.Variable([str(name) for name in dimensions], values, attributes)


def _has_impossible(content: bytes, dtype: str) -> bool:
    """Whether bytes stand for no value of their type, on which Python itself would stumble."""
    if dtype == "|b1":
        return bool(np.any(np.frombuffer(content, "u1") > 1))
    return "U" in dtype and bool(np.any(np.frombuffer(content, "<u4") > sys.maxunicode))


def read_file(path: Path, limit: int = _METADATA_LIMIT) -> bytes:
    """The content of a plain file that is no link and no longer than ``limit`` bytes.

    Raises:
        OSError: If it is not there or cannot be read.
        ValueError: If it is something else.
    """
    # Without O_NONBLOCK, opening a named pipe would wait for its writer.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    with open(descriptor, "rb", buffering=0) as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or status.st_size > limit:
            raise ValueError(f"'{path.name}' is no plain file of at most {limit} bytes")
        return file.read()


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = encodable(json.loads(read_file(path), parse_constant=lambda _: None))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"'{path.parent.name}/{path.name}' does not parse ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"'{path.parent.name}/{path.name}' holds no names")
    return content


def _folders(folder: Path) -> list[str]:
    """Names of the folders in a folder, hidden ones aside.

    Raises:
        ValueError: If one is a link.
    """
    with os.scandir(folder) as entries:
        found = sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    if links := [entry.name for entry in found if entry.is_symlink()]:
        raise ValueError(f"'{links[0]}' is a link")
    return [entry.name for entry in found if entry.is_dir(follow_symlinks=False)]


def _name(name: Any) -> str:
    """A name that is one hop in a path."""
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\0][^/\\\0]*", name):
        raise ValueError(f"Expected a name that a folder can have, got {name!r}. Rename it.")
    return name


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, list | tuple) else value


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes files below ``folder``, then brings them and every folder they made to the disk.

    All are written before the first is synced, so that the disk can take them together.

    Args:
        folder: Where; made if it is not there.
        files: Relative path, with ``/`` -> content.

    Raises:
        OSError: If one cannot be written; what was written until then stays.
    """
    folders = {folder} | {parent for name in files for parent in (folder / name).parents if folder in parent.parents}
    for each in sorted(folders):
        each.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    for name in files:
        sync(folder / name)
    for each in folders:
        sync(each)


def move(source: Path, target: Path) -> None:
    """Renames within one file system, a file over another one; lasting when the call returns.

    Raises:
        OSError: If it cannot be renamed.
    """
    os.replace(source, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Brings a file, or the list of names in a folder, to the disk.

    Raises:
        OSError: If the disk did not take it.
    """
    folder = path.is_dir()
    if folder and os.name == "nt":
        return  # Windows opens no folders, and keeps their names without being asked
    descriptor = os.open(path, os.O_RDWR if not folder else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (folder and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network file systems sync no folders
            raise
    finally:
        os.close(descriptor)
