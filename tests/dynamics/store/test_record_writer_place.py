"""Which folder a capture may take, and who is at work in it."""

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import zarr

from dynamics.store import CaptureExists, CaptureStore, capture_path, staged
from tests.records import assert_holds, files, hidden, record

ROOT = Path(__file__).parents[3]


def test_create_refuses_a_capture(store, folder):
    store.close()
    before = files(folder)
    message = (
        f"'{store.path}' holds 2 captured steps, the last of them 100. Resume that training, or choose another folder."
    )
    with pytest.raises(CaptureExists, match=f"^{re.escape(message)}$"):
        CaptureStore.create(folder, {})
    assert files(folder) == before


@pytest.mark.parametrize(
    "opened", [lambda folder: CaptureStore.create(folder, {}), lambda f: CaptureStore.resume(f, 9, {})]
)
def test_one_writer_at_a_time(folder, opened):
    with CaptureStore.create(folder, {}) as store:
        with pytest.raises(CaptureExists, match=r"is being written by another recorder\. Close that one first"):
            opened(folder)
        store.write(50, record(50))
    assert_holds(store.path, 50)


def test_a_start_without_records_is_begun_anew(folder):
    with CaptureStore.create(folder, {"old": 1}) as store:
        store.write_start({"a": torch.ones(2)})
    with CaptureStore.create(folder, {"new": 2}) as store:
        assert "old" not in store.attributes
        assert store.read_start() == {}


@pytest.mark.parametrize("left", [[], [".zgroup"], [".zgroup", ".partial-host-1-ab"]])
@pytest.mark.parametrize("begin", [lambda f: CaptureStore.create(f, {}), lambda f: CaptureStore.resume(f, 0, {})])
def test_a_start_that_was_killed_is_no_capture_and_is_begun_anew(folder, left, begin):
    (folder / "capture.zarr").mkdir(parents=True)
    for name in left:
        (folder / "capture.zarr" / name).write_text("")
    assert capture_path(folder.parent) is None
    with begin(folder) as store:
        store.write(50, record(50))
    assert_holds(store.path, 50)
    assert hidden(store.path) == []
    assert zarr.open_group(store.path, mode="r", zarr_format=2)["step-000000000050/update/count"].shape == (1, 2, 2)


def make_file(path):
    path.write_text("mine")


def make_link(path):
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def make_zarr(path):
    zarr.create_group(path, zarr_format=2, attributes={"kind": "mine"})


def make_folder(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def make_without_attributes(path):
    (path / "step-000000000050").mkdir(parents=True)


FOREIGN = [make_file, make_link, make_zarr, make_folder, make_without_attributes]


@pytest.mark.parametrize("make", FOREIGN)
@pytest.mark.parametrize("begin", [lambda f: CaptureStore.create(f, {}), lambda f: CaptureStore.resume(f, 0, {})])
def test_what_is_foreign_is_refused_and_left_alone(folder, make, begin):
    folder.mkdir(parents=True)
    make(folder / "capture.zarr")
    before = sorted(folder.rglob("*")), files(folder)
    with pytest.raises(
        CaptureExists, match=r"stands where the capture must go.*Choose another folder, or move it away"
    ):
        begin(folder)
    assert (sorted(folder.rglob("*")), files(folder)) == before


@pytest.mark.parametrize("begin", [lambda f: CaptureStore.create(f, {}), lambda f: CaptureStore.resume(f, 0, {})])
def test_a_folder_that_is_a_link_is_not_written_through(folder, tmp_path, begin):
    (tmp_path / "elsewhere").mkdir()
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CaptureExists, match=r"dynamics' is a link, and no capture is written through one\. Choose"):
        begin(folder)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_forked_process_neither_writes_nor_keeps_the_lock(folder):
    script = """
        import os, sys, time
        from pathlib import Path
        from dynamics.store import CaptureStore
        store = CaptureStore.create(Path(sys.argv[1]), {})
        if os.fork() == 0:
            try:
                store.annotate({"child": 1})
            except ValueError as error:
                print("closed" in str(error), os.getpid(), flush=True)
            time.sleep(60)
        time.sleep(60)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as trainer:
        closed, child = trainer.stdout.readline().split()
        try:
            with pytest.raises(CaptureExists):
                CaptureStore.resume(folder, 0, {})
            trainer.kill()
            trainer.wait()
            CaptureStore.resume(folder, 0, {}).close()  # while the child, a data loader say, is still there
        finally:
            trainer.kill()
            os.kill(int(child), 9)
    assert closed == "True"


def test_an_analysis_leaves_the_capture_alone(store, folder):
    before = files(store.path)
    for _ in range(2):  # the second replaces what the first wrote, and removes what it does not write again
        with staged(folder, names=["analysis.zarr", "summary.json"], folders=["figures"]) as partial:
            (partial / "analysis.zarr").mkdir()
            (partial / "analysis.zarr" / ".zattrs").write_text('{"findings": "[]"}')
            (partial / "summary.json").write_text("{}")
        assert files(store.path) == before
    store.write(150, record(150))
    with staged(folder) as partial:
        (partial / "summary.json").write_text("{}")
    assert not (folder / "analysis.zarr").exists()
    assert_holds(store.path, 50, 100, 150)
