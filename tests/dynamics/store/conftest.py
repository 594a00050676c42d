"""A capture store to begin with."""

import pytest

from dynamics.store import CaptureStore
from tests.records import record


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "dynamics"


@pytest.fixture
def store(folder):
    """An open store with two records."""
    with CaptureStore.create(folder, {"preset": "standard"}) as store:
        store.write(50, record(50))
        store.write(100, record(100))
        yield store
