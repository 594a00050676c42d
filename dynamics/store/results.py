"""A result tree on disk: how it is written, where it lies, how it is opened, and where it comes from."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr
from xarray.conventions import encode_dataset_coordinates

from dynamics._version import __version__
from dynamics.store.disk import is_folder, read_file
from dynamics.store.replace import ANALYSIS, PREVIOUS, RESULT
from dynamics.text import encodable

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

#: Folder of a run that holds its records and its analysis.
FOLDER = "dynamics"
#: Zarr format 2: its string and boolean types are specified, so that no reader, old or new, has to warn or guess.
_ZARR_FORMAT = 2
#: What a result is decoded by, in the past and now.
_CODECS = {"blosc", "gzip", "lz4", "vlen-utf8", "zlib", "zstd"}
#: Numbers that one file holds before they are compressed; Blosc takes less than 2**31.
_CHUNK_BYTES = 2**26
_METADATA_LIMIT = 2**28  # bytes; a result of a hundred runs has some ten million


def write_tree(tree: xr.DataTree, path: Path) -> None:
    """Write a tree as one Zarr store, its metadata consolidated; ``path`` must not exist.

    A result is hundreds of small arrays, and xarray takes milliseconds for each: zarr itself is given them, each as one
    chunk in the main, and in memory first, since it waits for a thread at each file. What is held beside the tree is
    the compressed result.

    Raises:
        ValueError: If an array holds neither numbers, booleans nor text.
    """
    # Here, not above: what only reads records does not need it.
    import zarr
    from numcodecs import Blosc
    from zarr.storage import MemoryStore

    files: dict[str, Buffer] = {}
    store = MemoryStore(files)
    for node in tree.subtree:
        variables, attributes = encode_dataset_coordinates(node.to_dataset(inherit=node is tree))
        place = "" if node is tree else node.relative_to(tree)
        group = zarr.create_group(store, path=place, zarr_format=_ZARR_FORMAT, attributes=_plain(attributes))
        for name, variable in variables.items():
            values = variable.values
            if values.dtype.kind not in "biufU":
                raise ValueError(f"Expected numbers, booleans or text in {name!r}, got {values.dtype}.")
            rows = max(1, min(len(values), _CHUNK_BYTES * len(values) // max(1, values.nbytes))) if values.ndim else 1
            array = group.create_array(
                str(name),
                shape=values.shape,
                dtype=values.dtype,
                chunks=(rows, *(max(1, size) for size in values.shape[1:]))[: values.ndim],
                compressors=Blosc(cname="lz4", clevel=5, shuffle=Blosc.SHUFFLE),
                fill_value=np.nan if values.dtype.kind == "f" else None,
                attributes=_plain({**variable.attrs, "_ARRAY_DIMENSIONS": list(variable.dims)}),
            )
            if values.size:
                array[...] = values
    zarr.consolidate_metadata(store, zarr_format=_ZARR_FORMAT)
    path.mkdir(parents=True)
    for name, content in files.items():
        file = path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.to_bytes())


def _plain(attributes: Mapping[Any, Any]) -> dict[str, Any]:
    """Return attributes with arrays and numbers of numpy as JSON has them."""
    return {
        str(key): value.tolist() if isinstance(value, np.ndarray | np.generic) else value
        for key, value in attributes.items()
    }


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
