"""What lies on disk: the records of a training, the results of analyses, and both as one tree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynamics.store.replace import OutputError, staged, write_text, writing
from dynamics.store.results import FOLDER, RESULT, encodable_dataset, provenance, read_tree, result_path, write_tree

if TYPE_CHECKING:
    from dynamics.store.opening import open_run
    from dynamics.store.record_writer import RecordsExist, RecordWriter

__all__ = [
    "FOLDER",
    "RESULT",
    "OutputError",
    "RecordWriter",
    "RecordsExist",
    "encodable_dataset",
    "open_run",
    "provenance",
    "read_tree",
    "result_path",
    "staged",
    "write_text",
    "write_tree",
    "writing",
]


def __getattr__(name: str) -> Any:
    if name in ("RecordWriter", "RecordsExist"):  # they need torch, which reading a result does not
        from dynamics.store import record_writer

        return getattr(record_writer, name)
    if name == "open_run":
        from dynamics.store.opening import open_run

        return open_run
    raise AttributeError(f"module 'dynamics.store' has no attribute {name!r}")
