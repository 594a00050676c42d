"""A disk that does not take a record: the others stay."""

import errno
import os

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics.store import RecordWriter
from tests.records import assert_holds, files, partial, record, records_of


@pytest.fixture
def full_disk(monkeypatch):
    """No call of ``fsync`` finds room."""

    def refuse(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuse)
        yield patch


def test_a_full_disk_costs_only_the_record_in_flight(writer, full_disk):
    before = files(writer.path)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        writer.write(150, record(150))
    assert files(writer.path) == before
    full_disk.undo()
    writer.write(150, record(150))
    assert_holds(writer.path, 50, 100, 150)


def test_a_record_that_cannot_be_renamed_leaves_nothing(writer, monkeypatch):
    before = files(writer.path)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.ESTALE, "Stale file handle")))
    with pytest.raises(OSError, match="Stale"):
        writer.write(150, record(150))
    assert files(writer.path) == before


def test_a_limit_on_the_size_of_files(writer):
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = files(writer.path)
    large = {"gradient": xr.Dataset({"numbers": (("a", "b"), np.zeros((99, 99)))})}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(OSError, match="large"):
            writer.write(150, large)
        with pytest.raises(OSError, match="large"):
            writer.write_start({"a": torch.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert files(writer.path) == before
    writer.write(150, record(150))
    assert_holds(writer.path, 50, 100, 150)


def test_attributes_that_do_not_fit_leave_the_old_ones(writer, full_disk):
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        writer.annotate({"new": 1})
    assert writer.attributes == records_of(writer.path).attributes
    assert "new" not in writer.attributes
    assert partial(writer.path) == []


def test_dropping_that_stops_half_way_leaves_the_first_records(writer, monkeypatch):
    writer.close()
    unlink = type(writer.path).unlink

    def stop(path, **how):
        unlink(path, **how)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(type(writer.path), "unlink", stop)
        with pytest.raises(SystemExit):
            RecordWriter.resume(writer.path.parent, 10, {})
    assert_holds(writer.path, 50)
    RecordWriter.resume(writer.path.parent, 10, {}).close()
    assert_holds(writer.path)
