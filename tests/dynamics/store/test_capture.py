"""A capture store comes from strangers, and may be read while it is written."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from dynamics.store import CaptureStore, capture_path, read_capture
from dynamics.store import capture as capture_reading

BAD = "step-000000000100"


def record(step):
    dataset = xr.Dataset(
        {"norm": (("step", "matrix"), np.array([[1.0, 2.0]]) * step), "flag": ("matrix", [True, False])},
        coords={"step": [step], "matrix": ["a", "b"]},
    )
    return {"update": dataset}


@pytest.fixture
def path(tmp_path):
    """A store with three records; the middle one will be damaged."""
    with CaptureStore.create(tmp_path / "run" / "dynamics", {}) as store:
        for step in (50, 100, 150):
            store.write(step, record(step))
    return store.path


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def outside(path):
    """A complete record of step 100 elsewhere, by another writer."""
    with CaptureStore.create(path.parents[4] / "outside", {}) as store:
        store.write(100, record(100))
    return store.path / BAD


def make_link(path):
    target = outside(path).joinpath(*path.parts[path.parts.index(BAD) + 1 :])
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.symlink_to(target)


DAMAGES = {
    "no group": ("", lambda path: shutil.rmtree(path) or path.mkdir(), f"'{BAD}/.zgroup' is missing"),
    "a file": ("", lambda path: shutil.rmtree(path) or path.touch(), "Not a directory"),
    "a link": ("", lambda path: make_link(path / ""), "it is a link"),
    "a linked group": ("update", lambda path: make_link(path), "'update' is a link"),
    "a linked array": ("update/norm", make_link, "'norm' is a link"),
    "a linked file": ("update/norm/0.0", make_link, "Too many levels of symbolic links"),
    "no numbers": ("update/norm/0.0", lambda path: path.unlink(), "'norm/0.0' is missing"),
    "too few": ("update/norm/0.0", lambda path: path.write_bytes(b"1234"), "'norm' has 4 bytes of 16"),
    "too many": ("update/norm/0.0", lambda path: path.write_bytes(b"1" * 17), "no plain file of at most 16 bytes"),
    "a named pipe": ("update/norm/0.0", lambda path: path.unlink() or os.mkfifo(path), "no plain file"),
    "a folder": ("update/norm/0.0", lambda path: path.unlink() or path.mkdir(), "directory"),
    "objects": ("update/norm/.zarray", lambda path: change(path, dtype="|O"), "'norm' has the type '|O'"),
    "structures": ("update/norm/.zarray", lambda path: change(path, dtype=[["a", "<f8"]]), "neither numbers nor"),
    "half a type": ("update/norm/.zarray", lambda path: change(path, dtype="<f3"), "neither numbers nor"),
    "no letters": ("update/norm/.zarray", lambda path: change(path, dtype="<U0"), "neither numbers nor"),
    "a pickle": ("update/norm/.zarray", lambda path: change(path, filters=[{"id": "pickle"}]), "is compressed or in"),
    "compressed": ("update/norm/.zarray", lambda path: change(path, compressor={"id": "zlib"}), "is compressed or in"),
    "two chunks": ("update/norm/.zarray", lambda path: change(path, chunks=[1, 1]), "is compressed or in several"),
    "a huge shape": (
        "update/norm/.zarray",
        lambda path: change(path, shape=[2**40, 2**40], chunks=[2**40, 2**40]),
        "'norm' has 16 bytes of",
    ),
    "a huge empty shape": ("update/norm/.zarray", lambda path: change(path, shape=[10**30, 0]), "'norm' has no shape"),
    "a negative shape": ("update/norm/.zarray", lambda path: change(path, shape=[-1, -2]), "'norm' has no shape"),
    "no JSON": ("update/norm/.zarray", lambda path: path.write_text("{"), "'norm/.zarray' does not parse"),
    "a list": ("update/norm/.zarray", lambda path: path.write_text("[]"), "'norm/.zarray' holds no names"),
    "deep JSON": ("update/.zattrs", lambda path: path.write_text('{"a":' * 9**5), "'update/.zattrs' does not parse"),
    "long JSON": ("update/.zattrs", lambda path: path.write_bytes(b" " * 2**25), "no plain file of at most 16777216"),
    "no UTF-8": ("update/.zattrs", lambda path: path.write_bytes(b'{"\xff": 1}'), "'update/.zattrs' does not parse"),
    "no names": ("update/norm/.zattrs", lambda path: path.write_text("{}"), "has 2 dimensions, and not as many names"),
    "one name twice": (
        "update/norm/.zattrs",
        lambda path: change(path, _ARRAY_DIMENSIONS=["step", "step"]),
        "has 2 dimensions, and not as many names",
    ),
    "other lengths": (
        "update/norm/.zattrs",
        lambda path: change(path, _ARRAY_DIMENSIONS=["matrix", "step"]),
        "conflicting sizes",
    ),
    "no character": (
        "update/matrix/0",
        lambda path: path.write_bytes(b"\xff" * 8),
        "'matrix' holds what is no text",
    ),
    "neither true nor false": (
        "update/flag/0",
        lambda path: path.write_bytes(b"\x01\x02"),
        "'flag' holds what is no boolean",
    ),
    "another step": (
        "update/step/0",
        lambda path: path.write_bytes(np.int64(99).tobytes()),
        "'update' is of the steps [99], and was to be of step 100 alone",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_record_costs_only_itself(path, damage):
    where, make, reason = DAMAGES[damage]
    make(path / BAD / where)
    capture = read_capture(path)
    assert list(capture.records) == [50, 150]
    assert list(capture.broken) == [BAD]
    assert reason in capture.broken[BAD]
    assert "\n" not in capture.broken[BAD]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    with CaptureStore.create(tmp_path_factory.mktemp("run"), {}) as store:
        for step in (50, 100):
            store.write(step, record(step))
    return store.path


@settings(max_examples=100)
@given(data=st.data())
def test_no_byte_can_stop_the_reading(data, shared):
    file = data.draw(st.sampled_from(sorted(path for path in (shared / BAD).rglob("*") if path.is_file())))
    content = file.read_bytes()
    place, byte = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 255))
    file.write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
    try:
        capture = read_capture(shared)
    finally:
        file.write_bytes(content)
    assert 50 in capture.records
    assert (100 in capture.records) != (BAD in capture.broken)


def test_any_json_may_be_an_attribute(path):
    content = '{"kind": "optimization-dynamics capture", "format": 1, "a": NaN, "b": [{"c": "\\ud800"}], "d": 1e999}'
    (path / ".zattrs").write_text(content)
    attributes = read_capture(path).attributes
    assert attributes["a"] is None
    assert attributes["b"] == [{"c": "\\ud800"}]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file or directory"),
        ("{}", "its .zattrs says the kind 'None', not 'optimization-dynamics capture'"),
        ('{"kind": 7}', "its .zattrs says the kind '7', not"),
        ("[]", "'capture.zarr/.zattrs' holds no names"),
        ("{", "'capture.zarr/.zattrs' does not parse"),
    ],
)
def test_no_capture_store(path, content, reason):
    (path / ".zattrs").unlink() if content is None else (path / ".zattrs").write_text(content)
    message = f"Expected a capture store at '{path}', but it is none ({reason}"
    with pytest.raises(ValueError, match=re.escape(message) + r".*Pass the folder that DynamicsCallback wrote"):
        read_capture(path)
    assert capture_path(path.parents[1]) == path  # it has records: they are not passed over in silence


def test_a_later_format(path):
    change(path / ".zattrs", format=2)
    message = f"The capture store '{path}' is of format 2, and this version reads 1. Upgrade optimization-dynamics."
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        read_capture(path)


def test_what_is_not_a_record_is_passed_over(path):
    for name in ("step-50", "step-0000000000500", "notes", ".partial-host-1-ab", "step-00000000005x"):
        shutil.copytree(path / "step-000000000050", path / name)
    capture = read_capture(path)
    assert (list(capture.records), capture.broken) == ([50, 100, 150], {})


@pytest.mark.parametrize("place", ["run", "run/dynamics", "run/dynamics/capture.zarr"])
def test_where_it_is_found(path, tmp_path, place):
    assert capture_path(tmp_path / place) == path


@pytest.mark.parametrize("make", [lambda path: path.mkdir(parents=True), lambda path: path.parent.mkdir()])
def test_nothing_to_find(tmp_path, make):
    make(tmp_path / "dynamics" / "capture.zarr")
    assert capture_path(tmp_path) is None
    assert capture_path(tmp_path / "nowhere") is None


def test_a_link_is_no_capture_of_the_run(path, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "capture.zarr").symlink_to(path)
    assert capture_path(tmp_path / "other") is None


# --- while a writer is at work


def during(monkeypatch, action):
    """Does something once, in the middle of reading the record of step 100."""
    read = capture_reading.read_groups

    def read_groups(folder):
        if folder.name == BAD:
            monkeypatch.undo()
            action()
            return read(folder)
        return read(folder)

    monkeypatch.setattr(capture_reading, "read_groups", read_groups)


def test_a_record_that_is_dropped_meanwhile_is_left_out(path, monkeypatch):
    during(monkeypatch, lambda: CaptureStore.resume(path.parent, 50, {}).close())
    capture = read_capture(path)
    assert (list(capture.records), capture.broken) == ([50], {})


def test_a_record_that_is_replaced_meanwhile_is_the_new_one_whole(path, monkeypatch):
    def replace():
        with CaptureStore.resume(path.parent, 150, {}) as store:
            new = record(100)
            store.write(100, {"update": new["update"] * 7, "gradient": new["update"]}, replace=True)

    during(monkeypatch, replace)
    capture = read_capture(path)
    assert list(capture.records[100]) == ["gradient", "update"]
    assert capture.records[100]["update"]["norm"].values.tolist() == [[700.0, 1400.0]]
    assert capture.broken == {}
