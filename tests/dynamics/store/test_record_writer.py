import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import zarr

from dynamics.store import CaptureStore, read_capture
from tests.records import assert_holds, files, gradient, hidden, record, update

ROOT = Path(__file__).parents[3]


def test_round_trip(store):
    assert store.steps == [50, 100]
    assert list(store.read(50)) == ["gradient", "update"]
    assert_holds(store.path, 50, 100)


def test_records_open_in_xarray_and_the_store_in_zarr(store):
    tree = xr.open_datatree(store.path / "step-000000000050", engine="zarr", consolidated=False)
    for name, expected in record(50).items():
        xr.testing.assert_identical(tree[name].to_dataset().load(), expected)
    root = zarr.open_group(store.path, mode="r", zarr_format=2)
    assert sorted(root.group_keys()) == ["step-000000000050", "step-000000000100"]
    assert dict(root.attrs) == {"preset": "standard", "kind": "optimization-dynamics capture", "format": 1}


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
def test_arrays_come_back_bit_by_bit(store, values):
    expected = xr.Dataset({"value": (tuple("xyz"[: values.ndim]), values)})
    store.write(150, {"other": expected})
    tree = xr.open_datatree(store.path / "step-000000000150", engine="zarr", consolidated=False)
    for got in (store.read(150)["other"], tree["other"].to_dataset().load()):
        xr.testing.assert_identical(got, expected)
        assert got["value"].dtype == values.dtype
        assert got["value"].values.tobytes() == values.tobytes()


def test_texts_of_any_length_and_foreign_byte_order(store):
    names = np.array(["a" * 300, "b"], dtype=object)
    store.write(150, {"other": xr.Dataset({"value": ("matrix", np.array([1, 2], dtype=">i8"))}, {"matrix": names})})
    got = store.read(150)["other"]
    assert got["matrix"].values.tolist() == ["a" * 300, "b"]
    assert got["value"].values.tolist() == [1, 2]


@pytest.mark.parametrize("matrices", [(), ("one",)])
def test_none_and_one_matrix(store, matrices):
    store.write(150, {"update": update(150, matrices)})
    xr.testing.assert_identical(store.read(150)["update"], update(150, matrices))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (
            {"update": xr.Dataset({"x": ("i", np.array([{}, 1]))})},
            "Expected numbers, booleans or text in 'x', got object",
        ),
        (
            {"update": xr.Dataset({"x": ("i", np.array([1j]))})},
            "Expected numbers, booleans or text in 'x', got complex128",
        ),
        ({"a/b": xr.Dataset()}, "Expected a name that a folder can have, got 'a/b'. Rename it."),
        ({"..": xr.Dataset()}, "Expected a name that a folder can have, got '..'. Rename it."),
        ({"update": xr.Dataset({"x/y": 1})}, "Expected a name that a folder can have, got 'x/y'. Rename it."),
        ({"update": xr.Dataset(coords={"a b": 1})}, "Expected names of coordinates without blanks, got ['a b']"),
        ({"update": xr.Dataset(attrs={"a": {1, 2}})}, "Expected attributes that JSON can hold"),
        ({"update": update(50)}, "'update' is of the steps [50], and was to be of step 150 alone"),
    ],
)
def test_what_has_no_place_is_refused_before_anything_is_written(store, groups, message):
    before = files(store.path)
    with pytest.raises(ValueError, match=re.escape(message)):
        store.write(150, groups)
    assert files(store.path) == before


def test_a_step_is_written_once_unless_replaced(store):
    with pytest.raises(ValueError, match=rf"Step 50 is in '{re.escape(str(store.path))}' already\. Pass replace=True"):
        store.write(50, {"update": update(50)})
    assert_holds(store.path, 50, 100)
    store.write(50, {"gradient": gradient(50)}, replace=True)
    assert list(store.read(50)) == ["gradient"]


@pytest.mark.parametrize("step", [-1, 10**12])
def test_a_step_that_no_training_has(store, step):
    with pytest.raises(ValueError, match=f"Expected a step from 0 to 999999999999, got {step}"):
        store.write(step, {})


def test_attributes_are_strict_json(store):
    store.annotate({"loss": float("nan"), "seed": np.int64(3), "name": "caf\udce9", "kind": "mine", "rank": (1, [2.0])})
    stored = json.loads((store.path / ".zattrs").read_text(), parse_constant=pytest.fail)
    assert stored == store.attributes == read_capture(store.path).attributes
    assert stored == {
        "preset": "standard",
        "loss": None,
        "seed": 3,
        "name": "caf\\udce9",
        "kind": "optimization-dynamics capture",
        "rank": [1, [2.0]],
        "format": 1,
    }


def test_a_closed_store_writes_nothing(store):
    store.close()
    with pytest.raises(ValueError, match=r"is closed\. Open it again with resume\(\)"):
        store.write(150, record(150))


def test_resume_drops_what_came_after_and_merges_attributes(store, folder):
    store.close()
    with CaptureStore.resume(folder, 50, {"resumed": 50}) as resumed:
        assert resumed.steps == [50]
        assert resumed.attributes.items() >= {"preset": "standard", "resumed": 50}.items()
        resumed.write(75, record(75))
    assert_holds(store.path, 50, 75)


def test_resume_begins_where_nothing_is(folder):
    with CaptureStore.resume(folder, 50, {"a": 1}) as store:
        assert (store.steps, store.attributes["a"]) == ([], 1)


def test_resume_drops_a_later_record_that_is_a_link_without_following_it(store, folder):
    (store.path / "step-000000000150").symlink_to(store.path / "step-000000000050")
    store.close()
    CaptureStore.resume(folder, 100, {}).close()
    assert_holds(store.path, 50, 100)


def test_resume_refuses_a_later_format(store, folder):
    store.close()
    (store.path / ".zattrs").write_text('{"kind": "optimization-dynamics capture", "format": 2}')
    before = files(folder)
    with pytest.raises(ValueError, match=r"is of format 2, and this version reads 1\. Upgrade optimization-dynamics"):
        CaptureStore.resume(folder, 0, {})
    assert files(folder) == before


def test_left_overs_of_killed_writers_are_swept(store, folder):
    store.close()
    (store.path / ".partial-elsewhere-1-ab" / "record" / "update").mkdir(parents=True)
    CaptureStore.resume(folder, 100, {}).close()
    assert hidden(store.path) == []


def test_start_round_trip(store, folder):
    whole = torch.arange(6.0).reshape(2, 3)
    start = {"a": whole.bfloat16(), "view": whole[1:], "across": whole.T, "tied": whole, "empty": torch.zeros(0, 3)}
    start["tied too"] = start["tied"]
    store.write_start({"other": whole})
    store.write_start(start)
    store.close()
    with CaptureStore.resume(folder, 50, {}) as resumed:
        got = resumed.read_start()
    assert got.keys() == start.keys()
    assert all(torch.equal(got[name], start[name]) and got[name].dtype == start[name].dtype for name in start)
    assert hidden(store.path) == [".start.safetensors"]
    assert_holds(store.path, 50)


def test_no_start(store):
    assert store.read_start() == {}


def test_a_start_that_does_not_open(store):
    (store.path / ".start.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"does not open .*Remove it, and increments begin at the next captured step"):
        store.read_start()


def test_no_thread_stays_and_no_random_number_is_drawn(folder):
    # In a process of its own: here, the checker of signatures draws from ``random``.
    script = """
        import random, sys, threading
        from pathlib import Path
        import numpy as np, torch, xarray as xr
        from dynamics.store import CaptureStore

        def state():
            numbers = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()
            return numbers, threading.enumerate(), "zarr" in sys.modules

        before = state()
        with CaptureStore.create(Path(sys.argv[1]), {}) as store:
            store.write(50, {"update": xr.Dataset({"norm": ("matrix", [1.0])}, coords={"matrix": ["a"]})})
            store.write_start({"a": torch.ones(2)})
        print(state() == before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == "True\n"


def test_reading_needs_no_torch():
    script = "import sys, dynamics.store as s; s.read_capture; print('torch' in sys.modules); s.CaptureStore"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"
