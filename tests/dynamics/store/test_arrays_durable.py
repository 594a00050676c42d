"""A disk that does not take a record: the others stay."""

import errno
import os

import numpy as np
import pytest
import torch
import xarray as xr

from dynamics.store import CaptureStore, arrays, capture_store, read_capture
from tests.records import assert_holds, files, gradient, hidden, record, update


def failing(monkeypatch, call):
    """The given call of fsync, counted from 0, finds the disk full."""
    calls = iter(range(10**6))
    sync = os.fsync

    def fsync(descriptor):
        if next(calls) == call:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(arrays.os, "fsync", fsync)


@pytest.fixture
def syncs(store, monkeypatch):
    """How many times one record is synced."""
    count = []
    sync = os.fsync
    with monkeypatch.context() as patch:
        patch.setattr(arrays.os, "fsync", lambda descriptor: (count.append(1), sync(descriptor)))
        store.write(1, record(1))
    return len(count)


@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_a_full_disk_costs_only_the_record_in_flight(store, syncs, monkeypatch, replaced, share):
    before = files(store.path)
    step = 50 if replaced else 150
    new = {"update": update(step).assign_attrs(space="other"), "gradient": gradient(step)}
    with monkeypatch.context() as patch:
        failing(patch, round(share * (syncs - 1)))  # the last is that of the store's folder, after the renaming
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            store.write(step, new, replace=replaced)
    assert files(store.path) == before
    assert hidden(store.path) == []
    store.write(150, record(150))
    assert_holds(store.path, 1, 50, 100, 150)


def test_a_limit_on_the_size_of_files(store):
    resource = pytest.importorskip("resource")
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = files(store.path)
    large = {"gradient": xr.Dataset({"gram": (("sample", "sample_"), np.zeros((99, 99)))})}
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, old[1]))
    try:
        with pytest.raises(OSError, match="large"):
            store.write(150, large)
        with pytest.raises(OSError, match="large"):
            store.write_start({"a": torch.zeros(4096)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert files(store.path) == before
    store.write(150, record(150))
    assert_holds(store.path, 50, 100, 150)


def test_attributes_that_do_not_fit_leave_the_old_ones(store, monkeypatch):
    with monkeypatch.context() as patch:
        failing(patch, 0)
        with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
            store.annotate({"new": 1})
    assert store.attributes == read_capture(store.path).attributes
    assert "new" not in store.attributes


def test_dropping_that_stops_half_way_leaves_the_first_records(store, monkeypatch):
    store.close()
    with monkeypatch.context() as patch:
        patch.setattr(capture_store, "sync", lambda path: exit_at(path, "step-000000000100"))
        with pytest.raises(SystemExit):
            CaptureStore.resume(store.path.parent, 10, {})
    assert_holds(store.path, 50)
    CaptureStore.resume(store.path.parent, 10, {}).close()
    assert_holds(store.path)


def exit_at(path, name):
    """The end of the process at the first moment at which a record is gone."""
    assert not (path / name).exists()
    raise SystemExit
