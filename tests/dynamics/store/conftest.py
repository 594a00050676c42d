"""Records to begin with: two written now, and three of the first format as they are kept."""

import pytest

from dynamics.store import RecordWriter
from tests.golden_inputs import DATA, unpack
from tests.records import record


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "dynamics"


@pytest.fixture
def writer(folder):
    """An open writer with two records."""
    with RecordWriter.create(folder, {"preset": "standard"}) as writer:
        writer.write(50, record(50))
        writer.write(100, record(100))
        yield writer


@pytest.fixture(scope="session")
def first_edition(tmp_path_factory):
    """A run as the first edition left it: ``capture.zarr`` of the steps 1, 2 and 4, and results beside it."""
    unpack(DATA / "first_format.tar.xz", folder := tmp_path_factory.mktemp("first"))
    return folder / "run"
