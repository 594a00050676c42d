"""Results on disk: Zarr, provenance, atomic outputs; and the records of a training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamics.store.capture import Capture, CaptureExists, capture_path, read_capture
from dynamics.store.replace import OutputError, staged, write_text, writing
from dynamics.store.results import FOLDER, RESULT, encodable_dataset, provenance, read_tree, result_path, write_tree
from dynamics.text import encodable

if TYPE_CHECKING:
    from dynamics.store.capture_store import CaptureStore
    from dynamics.store.opening import open_run

__all__ = [
    "FOLDER",
    "RESULT",
    "Capture",
    "CaptureExists",
    "CaptureStore",
    "OutputError",
    "capture_path",
    "encodable",
    "encodable_dataset",
    "open_run",
    "provenance",
    "read_capture",
    "read_tree",
    "result_path",
    "staged",
    "write_text",
    "write_tree",
    "writing",
]


def __getattr__(name: str) -> Any:
    if name == "CaptureStore":  # the only one that needs torch, which reading a result does not
        from dynamics.store.capture_store import CaptureStore

        return CaptureStore
    if name == "open_run":
        from dynamics.store.opening import open_run

        return open_run
    raise AttributeError(f"module 'dynamics.store' has no attribute {name!r}")
