"""The records of a training as they are written: one file a step, one sync, attributes and start beside them."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynamics.store import RecordWriter
from dynamics.store.record_writer import read_start
from tests.records import assert_holds, files, partial, record, records_of, update

ROOT = Path(__file__).parents[3]


def test_round_trip(writer):
    assert writer.steps == [50, 100]
    assert_holds(writer.path, 50, 100)
    assert sorted(files(writer.path)) == [
        ".lock",
        "run.json",
        "step-000000000050.safetensors",
        "step-000000000100.safetensors",
    ]


def test_a_record_is_one_sync(writer, monkeypatch):
    syncs, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (syncs.append(descriptor), sync(descriptor)))
    writer.write(150, record(150))
    assert len(syncs) == 1


@pytest.mark.parametrize("groups", [{"a/b": update(150)}, {"update": update(50)}])
def test_what_cannot_be_stored_is_refused_before_anything_is_written(writer, groups):
    before = files(writer.path)
    with pytest.raises(ValueError, match=r"Expected a name|is of the steps"):
        writer.write(150, groups)
    assert files(writer.path) == before


def test_a_step_is_written_once(writer):
    with pytest.raises(ValueError, match=r"Expected a step without a record, but step 50 is in '.*records' already"):
        writer.write(50, {"update": update(50)})
    assert_holds(writer.path, 50, 100)


@pytest.mark.parametrize("step", [-1, 10**12])
def test_a_step_that_no_training_has(writer, step):
    with pytest.raises(ValueError, match=f"Expected a step from 0 to 999999999999, got {step}"):
        writer.write(step, {})


def test_attributes_are_strict_json(writer):
    writer.annotate(
        {"loss": float("nan"), "seed": np.int64(3), "name": "caf\udce9", "kind": "mine", "rank": (1, [2.0])}
    )
    stored = json.loads((writer.path / "run.json").read_text(), parse_constant=pytest.fail)
    assert stored == writer.attributes == records_of(writer.path).attributes
    assert stored == {
        "preset": "standard",
        "loss": None,
        "seed": 3,
        "name": "caf\\udce9",
        "kind": "optimization-dynamics records",
        "rank": [1, [2.0]],
        "format": 2,
    }


def test_a_closed_writer_writes_nothing(writer):
    writer.close()
    writer.close()
    for write in (lambda: writer.write(150, record(150)), lambda: writer.annotate({}), lambda: writer.write_start({})):
        with pytest.raises(ValueError, match=r"are closed\. Open them again with resume\(\)"):
            write()


def test_resume_drops_what_came_after_and_merges_attributes(writer, folder):
    writer.close()
    with RecordWriter.resume(folder, 50, {"resumed": 50}) as resumed:
        assert resumed.steps == [50]
        assert resumed.attributes.items() >= {"preset": "standard", "resumed": 50}.items()
        resumed.write(75, record(75))
    assert_holds(writer.path, 50, 75)


def test_resume_begins_where_nothing_is(folder):
    with RecordWriter.resume(folder, 50, {"a": 1}) as writer:
        assert (writer.steps, writer.attributes["a"]) == ([], 1)


def test_resume_drops_a_later_record_that_is_a_link_without_following_it(writer, folder):
    (writer.path / "step-000000000150.safetensors").symlink_to(writer.path / "step-000000000050.safetensors")
    writer.close()
    RecordWriter.resume(folder, 100, {}).close()
    assert_holds(writer.path, 50, 100)


def test_resume_refuses_a_later_format(writer, folder):
    writer.close()
    (writer.path / "run.json").write_text('{"kind": "optimization-dynamics records", "format": 3}')
    before = files(folder)
    with pytest.raises(ValueError, match=r"are of format 3, and this version reads 2\. Upgrade optimization-dynamics"):
        RecordWriter.resume(folder, 0, {})
    assert files(folder) == before


def test_what_killed_writers_left_is_swept(writer, folder):
    writer.close()
    (writer.path / ".partial-1234").write_bytes(b"half")
    RecordWriter.resume(folder, 100, {}).close()
    assert partial(writer.path) == []


def test_start_round_trip(writer, folder):
    whole = torch.arange(6.0).reshape(2, 3)
    start = {"a": whole.bfloat16(), "view": whole[1:], "across": whole.T, "tied": whole, "empty": torch.zeros(0, 3)}
    start["tied too"] = start["tied"]
    writer.write_start({"other": whole})
    writer.write_start(start)
    writer.close()
    with RecordWriter.resume(folder, 50, {}) as resumed:
        got = resumed.read_start()
    assert got.keys() == start.keys()
    assert all(torch.equal(got[name], start[name]) and got[name].dtype == start[name].dtype for name in start)
    assert partial(writer.path) == []
    assert_holds(writer.path, 50)


@pytest.mark.parametrize("name", ["records", "capture.zarr"])
def test_a_start_in_a_folder_that_is_a_link_is_not_read(tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for start in ("start.safetensors", ".start.safetensors"):
        save_file({"a": torch.ones(1)}, elsewhere / start)
    (tmp_path / "dynamics").mkdir()
    (tmp_path / "dynamics" / name).symlink_to(elsewhere)
    assert read_start(tmp_path / "dynamics") == {}


def test_no_start(writer):
    assert writer.read_start() == {}


@pytest.mark.parametrize("make", [lambda path: path.write_bytes(b"nothing"), lambda path: path.symlink_to("run.json")])
def test_a_start_that_does_not_open(writer, make):
    make(writer.path / "start.safetensors")
    with pytest.raises(ValueError, match=r"does not open .*Remove it, and increments begin at the next captured step"):
        writer.read_start()


# A training that was begun with the first format


def test_a_training_of_the_first_format_goes_on(first_edition, tmp_path):
    folder = tmp_path / "run" / "dynamics"
    shutil.copytree(first_edition / "dynamics" / "capture.zarr", folder / "capture.zarr")
    save_file({"a": torch.ones(2)}, folder / "capture.zarr" / ".start.safetensors")
    before = files(folder / "capture.zarr")
    old = records_of(first_edition)
    with RecordWriter.resume(folder, 2, {"resumed": 2}) as writer:
        assert writer.steps == [1, 2]
        assert writer.attributes["run_id"] == old.attributes["run_id"]
        assert list(writer.read_start()) == list(read_start(folder)) == ["a"]
        writer.write(3, record(3))
        assert writer.steps == [1, 2, 3]
    assert list(records_of(tmp_path / "run").records) == [1, 2, 3]
    assert files(folder / "capture.zarr") == before
    with RecordWriter.resume(folder, 1, {}) as writer:
        assert writer.steps == [1]
    with RecordWriter.resume(folder, 4, {}) as writer:
        assert writer.steps == [1]  # what was dropped stays dropped


# A guest in somebody's training


def test_no_thread_stays_and_no_random_number_is_drawn(folder):
    # In a process of its own: here, the checker of signatures draws from ``random``.
    script = """
        import random, sys, threading
        from pathlib import Path
        import numpy as np, torch, xarray as xr
        from dynamics.store import RecordWriter

        def state():
            numbers = np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), random.getstate()
            return numbers, threading.enumerate(), "zarr" in sys.modules

        before = state()
        with RecordWriter.create(Path(sys.argv[1]), {}) as writer:
            writer.write(50, {"update": xr.Dataset({"norm": ("matrix", [1.0])}, coords={"matrix": ["a"]})})
            writer.write_start({"a": torch.ones(2)})
        print(state() == before)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    assert subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout == "True\n"


def test_reading_needs_no_torch():
    script = "import sys, dynamics.store.opening; print('torch' in sys.modules); dynamics.store.RecordWriter"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "False\n"
