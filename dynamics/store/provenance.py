"""Where a result comes from: versions, commit, configuration, inputs, time."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dynamics._version import __version__
from dynamics.text import encodable

_LIBRARIES = ("torch", "numpy", "scipy", "safetensors", "xarray", "zarr")


def provenance(
    run: str, configuration: Mapping[str, Any], inputs: Sequence[Mapping[str, Any]], seed: int
) -> dict[str, Any]:
    """Root attributes of a result.

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
    """Commit of the toolkit's own checkout, ``""`` for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""  # no git on this machine: the version has to do
