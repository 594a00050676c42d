"""A result tree on disk: how it is written, where it lies, how it is opened, and where it comes from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numcodecs import Blosc
from xarray.conventions import encode_dataset_coordinates

from dynamics._version import __version__
from dynamics.store.disk import is_folder, read_file
from dynamics.store.replace import ANALYSIS, PREVIOUS, RESULT
from dynamics.text import encodable

#: Folder of a run that holds its records and its analysis.
FOLDER = "dynamics"
#: What a result is decoded by, in the past and now.
_CODECS = {"blosc", "gzip", "lz4", "vlen-utf8", "zlib", "zstd"}
#: Numbers that one file holds before they are compressed; Blosc takes less than 2**31.
_CHUNK_BYTES = 2**26
_METADATA_LIMIT = 2**28  # bytes; a result of a hundred runs has some ten million


def write_tree(tree: xr.DataTree, path: Path) -> None:
    """Write a tree as one Zarr store, its metadata consolidated; ``path`` must not exist.

    Format 2: its string and boolean types are specified, so that no reader, old or new, has to warn or guess.
    A result is hundreds of small arrays. xarray and zarr take milliseconds for each, and a second to write any: here
    each is one file of metadata, one of attributes, and mostly one of numbers.

    Raises:
        ValueError: If an array holds neither numbers, booleans nor text.
    """
    path.mkdir(parents=True)
    metadata: dict[str, Any] = {}

    def note(name: str, content: Mapping[str, Any]) -> None:
        metadata[name] = content
        (path / name).write_text(json.dumps(content, indent=2, default=_plain))

    for node in tree.subtree:
        group = "" if node is tree else f"{node.relative_to(tree)}/"
        variables, attributes = encode_dataset_coordinates(node.to_dataset(inherit=node is tree))
        (path / group).mkdir(exist_ok=True)
        note(f"{group}.zgroup", {"zarr_format": 2})
        note(f"{group}.zattrs", attributes)
        for name, variable in variables.items():
            (path / group / name).mkdir()
            note(f"{group}{name}/.zarray", _write_array(path / group / name, variable.values))
            note(f"{group}{name}/.zattrs", {**variable.attrs, "_ARRAY_DIMENSIONS": variable.dims})
    consolidated = {"metadata": metadata, "zarr_consolidated_format": 1}
    (path / ".zmetadata").write_text(json.dumps(consolidated, default=_plain))


def _write_array(folder: Path, values: np.ndarray) -> dict[str, Any]:
    """Write the chunks of an array, none where all is NaN, and return its metadata."""
    if values.dtype.kind not in "biufU":
        raise ValueError(f"Expected numbers, booleans or text in '{folder.name}', got {values.dtype}.")
    rows = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    length = max(1, min(len(rows), _CHUNK_BYTES * len(rows) // max(1, rows.nbytes)))
    compressor = Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE)
    for number, first in enumerate(range(0, len(rows), length)):
        chunk = rows[first : first + length]
        if chunk.size and not (chunk.dtype.kind == "f" and np.isnan(chunk).all()):
            whole = np.pad(chunk, [(0, length - len(chunk)), *[(0, 0)] * (chunk.ndim - 1)])  # the last one, too
            (folder / ".".join([str(number), *"0" * (chunk.ndim - 1)])).write_bytes(compressor.encode(whole))
    return {
        "shape": values.shape,
        "chunks": [length, *(max(1, size) for size in values.shape[1:])][: values.ndim],
        "dtype": rows.dtype.str,
        "fill_value": "NaN" if rows.dtype.kind == "f" else None,
        "order": "C",
        "filters": None,
        "dimension_separator": ".",
        "compressor": compressor.get_config(),
        "zarr_format": 2,
    }


def _plain(value: Any) -> Any:
    """Return an array or a number of numpy as JSON has it."""
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    raise TypeError(f"Expected an attribute that JSON can hold, got {type(value).__name__}.")


def read_tree(path: Path) -> xr.DataTree:
    """Open a stored tree; arrays are read when they are used.

    Raises:
        ValueError: If the folder is not a store that can be opened, or names a codec that no result has.
    """
    try:
        _refuse_codecs(path)
        return xr.open_datatree(path, engine="zarr", consolidated=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"Expected a result store at '{path}', but it does not open ({reason}). "
            "Analyse the run again: python -m dynamics.analyze RUN"
        ) from error


def _refuse_codecs(path: Path) -> None:
    """Refuse a stranger's store that would be decoded by anything but what zarr writes by itself: one codec unpickles.

    Raises:
        OSError: If the metadata cannot be read.
        ValueError: Names the codec.
    """
    for name, metadata in json.loads(read_file(path / ".zmetadata", _METADATA_LIMIT))["metadata"].items():
        if name.endswith(".zarray"):
            codecs = [metadata.get("compressor"), *(metadata.get("filters") or ())]
            for codec in codecs:
                if codec is not None and codec["id"] not in _CODECS:
                    raise ValueError(f"'{name}' names the codec {str(codec['id'])[:40]!r}")


def result_path(run: Path) -> Path | None:
    """Return where an analysis is stored; ``None`` without one. A link in its place is not followed.

    Where a result is being replaced, or a process was killed at that, it is the one before.

    Args:
        run: A run folder, an output folder, the folder of a result, or the store. Results of the first edition, which
            had no folder of their own, count where there is no other.
    """
    for folder in (run / FOLDER, run):
        for name in (ANALYSIS, PREVIOUS, ANALYSIS):  # again: it may have been replaced in between
            if is_folder(folder / name) and is_folder(folder / name / RESULT):
                return folder / name / RESULT
    for folder in (run / FOLDER, run):
        if is_folder(folder / RESULT):
            return folder / RESULT
    return run if run.suffix == ".zarr" and run.exists() else None


def encodable_dataset(dataset: xr.Dataset) -> xr.Dataset:
    """Return the same dataset with every text in it encodable."""
    texts = {
        name: (variable.dims, np.asarray(encodable(variable.values.tolist()), dtype=str), encodable(variable.attrs))
        for name, variable in dataset.variables.items()
        if variable.dtype.kind in "UO"
    }
    return dataset.assign_coords({k: v for k, v in texts.items() if k in dataset.coords}).assign(
        {k: v for k, v in texts.items() if k not in dataset.coords}
    )


_LIBRARIES = ("torch", "numpy", "scipy", "safetensors", "xarray", "zarr")


def provenance(
    run: str, configuration: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """Return the root attributes of a result.

    Args:
        run: The run's name, ``""`` for several.
        configuration: The resolved options, JSON-compatible.
        inputs: Fingerprints of the weight files: path, bytes, hash of the header.
        seed: Seed of everything drawn at random.
    """
    return {
        "run": encodable(run),
        "toolkit_version": __version__,
        "library_versions": json.dumps(_library_versions()),
        "git_commit": _git_commit(),
        "configuration": json.dumps(encodable(configuration)),
        "inputs": json.dumps(encodable(inputs)),
        "seed": seed,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _library_versions() -> dict[str, str]:
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = version(library)
        except PackageNotFoundError:
            versions[library] = "unknown"
    return versions


def _git_commit() -> str:
    """Return the commit of the toolkit's own checkout, ``""`` for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # no git on this machine: the version has to do
