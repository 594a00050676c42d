"""Results on disk: Zarr, provenance, atomic outputs."""

from dynamics.store.open_run import FOLDER, RESULT, open_run
from dynamics.store.ownership import OutputError
from dynamics.store.plain_text import encodable, encodable_dataset
from dynamics.store.provenance import provenance
from dynamics.store.staging import staged, write_text, writing
from dynamics.store.zarr_store import read_tree, write_tree

__all__ = [
    "FOLDER",
    "RESULT",
    "OutputError",
    "encodable",
    "encodable_dataset",
    "open_run",
    "provenance",
    "read_tree",
    "staged",
    "write_text",
    "write_tree",
    "writing",
]
