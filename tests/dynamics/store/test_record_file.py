"""A record is one file: what is written comes back bit by bit, and a damaged file is refused in one line."""

import json
import os
import re
from contextlib import suppress

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save
from safetensors.torch import load_file as load_in_torch

from dynamics.store.record_file import decoded_record, encoded_record, packed, read_record, unpacked
from tests.records import record, rewrite_header, update


def written(path, groups, step=50):
    path.write_bytes(encoded_record(step, groups))
    return read_record(path)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "step-000000000050.safetensors"


def test_round_trip(path):
    groups = written(path, record(50))
    assert list(groups) == ["update", "gradient"]
    for name, expected in record(50).items():
        xr.testing.assert_identical(groups[name], expected)


def test_every_reader_of_safetensors_opens_it(path):
    written(path, record(50))
    expected = record(50)["update"]["singular_value"].values
    np.testing.assert_array_equal(load_file(path)["update/singular_value"], expected)
    np.testing.assert_array_equal(load_in_torch(path)["update/singular_value"].numpy(), expected)


@pytest.mark.parametrize(
    "values",
    [
        np.array([True, False]),
        np.array([-1, 2], dtype=np.int8),
        np.array([1, 2], dtype=np.uint64),
        np.array([1, 2], dtype=np.float16),
        np.array([np.nan, -np.inf, -0.0], dtype=np.float32),
        np.array(["model.layers.0", "ä, 語 and 🦉", ""]),
        np.array([""]),
        np.array([], dtype=str),
        np.zeros((0, 3)),
        np.array(1.5),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    ],
    ids=lambda values: f"{values.dtype}{list(values.shape)}",
)
def test_arrays_come_back_bit_by_bit(path, values):
    expected = xr.Dataset({"value": (tuple("xyz"[: values.ndim]), values)})
    got = written(path, {"other": expected})["other"]
    xr.testing.assert_identical(got, expected)
    assert got["value"].dtype == values.dtype
    assert got["value"].values.tobytes() == values.tobytes()
    got["value"].values[...] = values  # what is read can be changed


def test_text_of_any_length_and_foreign_byte_order(path):
    names = np.array(["a" * 300, "b"], dtype=object)
    value = xr.Dataset({"value": ("matrix", np.array([1, 2], dtype=">i8"))}, {"matrix": names})
    got = written(path, {"other": value})["other"]
    assert got["matrix"].values.tolist() == ["a" * 300, "b"]
    assert got["value"].values.tolist() == [1, 2]


@pytest.mark.parametrize("matrices", [(), ("one",)])
def test_none_and_one_matrix(path, matrices):
    xr.testing.assert_identical(written(path, {"update": update(50, matrices)})["update"], update(50, matrices))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ({"a": xr.Dataset({"x": ("i", np.array([{}, 1]))})}, "Expected numbers, booleans or text in 'x', got object"),
        ({"a": xr.Dataset({"x": ("i", np.array([1j]))})}, "Expected numbers, booleans or text in 'x', got complex128"),
        ({"a/b": xr.Dataset()}, "Expected a name without '/', got 'a/b'. Rename it."),
        ({"": xr.Dataset()}, "Expected a name without '/', got ''. Rename it."),
        ({"a": xr.Dataset({"x/y": 1})}, "Expected a name without '/', got 'x/y'. Rename it."),
        ({"a": xr.Dataset(attrs={"a": {1, 2}})}, "Expected attributes that JSON can hold"),
        ({"update": update(50)}, "'update' is of the steps [50], expected step 150 alone"),
    ],
)
def test_what_cannot_be_stored_is_refused(groups, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        encoded_record(150, groups)


# K


def gram(samples=5, blocks=2, missing=(), seed=0):
    rows = np.random.default_rng(seed).normal(size=(1, blocks, samples, 40)) * 1e-3
    k = np.einsum("sbnd,sbmd->sbnm", rows, rows)
    k[..., missing, :] = k[..., :, missing] = np.nan
    return xr.Dataset({"gram": (("step", "block", "sample", "sample_"), k)}, {"step": [50]})


@pytest.mark.parametrize("missing", [(), (0, 3)])
def test_k_comes_back_rounded_to_float32_with_its_exact_trace(path, missing):
    expected = gram(missing=list(missing))
    got = written(path, {"fisher": expected})["fisher"]["gram"]
    assert got.dtype == np.float64
    np.testing.assert_allclose(got.values, expected["gram"].values, rtol=2e-7, atol=1e-12)
    np.testing.assert_array_equal(got.values, got.values.swapaxes(2, 3))
    traces = (np.nansum(np.diagonal(k, axis1=2, axis2=3), -1) for k in (got.values, expected["gram"].values))
    np.testing.assert_allclose(*traces, rtol=1e-15)


def test_k_is_kept_as_its_upper_triangle(path):
    written(path, {"fisher": gram()})
    tensors = load_file(path)
    k = gram()["gram"].values
    assert tensors["fisher/gram"].dtype == np.float32
    np.testing.assert_array_equal(tensors["fisher/gram"], k[..., *np.triu_indices(5)].astype(np.float32))
    np.testing.assert_array_equal(tensors["fisher/gram_trace"], np.trace(k, axis1=2, axis2=3))


@pytest.mark.parametrize("samples", [0, 1, 2, 7])
def test_triangles_of_all_sizes(samples):
    k = gram(samples)["gram"].values
    np.testing.assert_allclose(unpacked(*packed(k)), k, rtol=2e-7, atol=1e-12)


def test_a_k_of_zeros():
    np.testing.assert_array_equal(unpacked(*packed(np.zeros((2, 3, 3)))), 0)


# Damaged files


def header_change(name, **changes):
    return lambda header, _: header[name].update(changes)


def variable_change(name, **changes):
    return lambda _, groups: groups["update"]["variables"][name].update(changes)


HEADERS = {
    "another kind": (lambda header, _: header["__metadata__"].update(kind="x"), "its kind is 'x' and its format '2'"),
    "a later format": (lambda header, _: header["__metadata__"].update(format="3"), "and its format '3', expected"),
    "no metadata": (lambda header, _: header.pop("__metadata__"), "its kind is 'None'"),
    "no groups": (
        lambda header, _: header.update(__metadata__={"kind": "optimization-dynamics record", "format": "2"}),
        "its header is not that of a record (KeyError: 'groups')",
    ),
    "groups that are a list": (
        lambda header, _: header.update(
            __metadata__={"kind": "optimization-dynamics record", "format": "2", "groups": "[]"}
        ),
        "its header is not that of a record",
    ),
    "deep JSON": (
        lambda header, _: header.update(
            __metadata__={"kind": "optimization-dynamics record", "format": "2", "groups": '{"a":' * 9**5}
        ),
        "its list of groups is not valid JSON",
    ),
    "a huge shape": (header_change("update/count", shape=[2**40, 2**40]), "it is not a safetensors file"),
    "an unknown type": (header_change("update/count", dtype="O"), "it is not a safetensors file"),
    "a type of another size": (header_change("update/count", dtype="F8_E4M3"), "it is not a safetensors file"),
    "a negative shape": (header_change("update/count", shape=[-1, -2]), "it is not a safetensors file"),
    "a variable that is missing": (
        lambda _, groups: groups["update"]["variables"].update(more={"dims": [], "attributes": {}}),
        "'update/more' is missing",
    ),
    "no names of dimensions": (variable_change("count", dims=[]), "'update/count' has 3 dimensions and the names []"),
    "one name twice": (variable_change("count", dims=["step", "step", "a"]), "has 3 dimensions and the names"),
    "other lengths": (variable_change("count", dims=["step", "matrix", "index"]), "conflicting sizes"),
    "attributes that are none": (variable_change("count", attributes=3), "its header is not that of a record"),
    "text that is none": (variable_change("matrix", text=[1, 2]), "'matrix' holds something other than text"),
    "text of another shape": (variable_change("matrix", shape=[3]), "'matrix' holds 2 texts, and its shape is [3]"),
    "text of a negative shape": (variable_change("matrix", shape=[-1, -2]), "'matrix' holds 2 texts"),
    "numbers for a triangle": (variable_change("count", trace=True), "its header is not that of a record"),
}


@pytest.mark.parametrize("damage", HEADERS)
def test_a_damaged_header_is_refused(path, damage):
    change, reason = HEADERS[damage]
    path.write_bytes(encoded_record(50, record(50)))
    rewrite_header(path, change)
    with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
        read_record(path)
    assert "\n" not in str(refusal.value)


FILES = {
    "empty": (lambda path: path.write_bytes(b""), "it is not a safetensors file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:-1]), "it is not a safetensors file"),
    "too long": (lambda path: path.write_bytes(path.read_bytes() + b"1"), "it is not a safetensors file"),
    "a long header": (lambda path: path.write_bytes(b"\xff" * 16), "it is not a safetensors file"),
    "a link": (
        lambda path: path.rename(path.with_name("x")) and path.symlink_to("x"),
        "is a link, which is not follow",
    ),
    "a named pipe": (lambda path: path.unlink() or os.mkfifo(path), "is not a regular file"),
    "a folder": (lambda path: path.unlink() or path.mkdir(), "is not a regular file"),
    "of another step": (lambda path: path.write_bytes(encoded_record(99, record(99))), "'update' is of the steps [99]"),
    "a file of more than it may have": (lambda path: os.truncate(path, 2**33), "is not a regular file of at most"),
}


@pytest.mark.parametrize("damage", FILES)
def test_a_damaged_file_is_refused(path, damage):
    change, reason = FILES[damage]
    path.write_bytes(encoded_record(50, record(50)))
    change(path)
    with pytest.raises(ValueError, match=re.escape(reason)) as refusal:
        read_record(path)
    assert "\n" not in str(refusal.value)


def test_what_is_not_there(path):
    with pytest.raises(FileNotFoundError):
        read_record(path)


@pytest.mark.parametrize(("name", "change"), [("gram", lambda k: k[..., :-1]), ("gram_trace", lambda trace: 2 * trace)])
def test_a_triangle_that_is_none(path, name, change):
    path.write_bytes(encoded_record(50, {"fisher": gram()}))
    tensors = load_file(path)
    metadata = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])["__metadata__"]
    tensors[f"fisher/{name}"] = np.ascontiguousarray(change(tensors[f"fisher/{name}"]))
    path.write_bytes(save(tensors, metadata))
    with pytest.raises(ValueError, match=r"^'gram' h"):
        read_record(path)


def test_bytes_that_are_neither_true_nor_false(path):
    path.write_bytes(encoded_record(50, {"a": xr.Dataset({"x": ("i", np.array([True, False]))})}))
    path.write_bytes(path.read_bytes()[:-2] + b"\x02\x00")
    with pytest.raises(ValueError, match="'a/x' holds bytes that are neither true nor false"):
        read_record(path)


CONTENT = encoded_record(50, {**record(50), "fisher": gram()})


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, len(CONTENT) - 1), byte=st.integers(0, 255))
def test_no_byte_can_stop_the_reading(place, byte):
    with suppress(ValueError):  # anything else would end the reading of all records
        decoded_record(50, CONTENT[:place] + bytes([byte]) + CONTENT[place + 1 :])


def test_what_is_not_finite_in_attributes_is_unknown(path):
    attributes = {"loss": float("nan"), "seed": np.int64(3), "name": "caf\udce9", "rank": (1, [2.0])}
    got = written(path, {"a": xr.Dataset(attrs=attributes)})["a"].attrs
    assert got == {"loss": None, "seed": 3, "name": "caf\\udce9", "rank": [1, [2.0]]}
