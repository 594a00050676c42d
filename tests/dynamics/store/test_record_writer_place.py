"""Which folder records may be written into, and who is at work in it."""

import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from dynamics.store import RecordsExist, RecordWriter, staged
from dynamics.store.record_folders import record_folders
from tests.records import assert_holds, files, partial, record

ROOT = Path(__file__).parents[3]


def test_create_refuses_records(writer, folder):
    writer.close()
    before = files(folder)
    message = (
        f"'{writer.path}' holds 2 captured steps, the last of them 100. Resume that training, or choose another folder."
    )
    with pytest.raises(RecordsExist, match=f"^{re.escape(message)}$"):
        RecordWriter.create(folder, {})
    assert files(folder) == before


@pytest.mark.parametrize(
    "opened", [lambda folder: RecordWriter.create(folder, {}), lambda f: RecordWriter.resume(f, 9, {})]
)
def test_one_writer_at_a_time(folder, opened):
    with RecordWriter.create(folder, {}) as writer:
        with pytest.raises(RecordsExist, match=r"is being written by another recorder\. Close that one first"):
            opened(folder)
        writer.write(50, record(50))
    assert_holds(writer.path, 50)


def test_a_start_without_records_is_begun_anew(folder):
    with RecordWriter.create(folder, {"old": 1}) as writer:
        writer.write_start({"a": torch.ones(2)})
    with RecordWriter.create(folder, {"new": 2}) as writer:
        assert "old" not in writer.attributes
        assert writer.read_start() == {}


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "start.safetensors", ".partial-ab"]])
@pytest.mark.parametrize("begin", [lambda f: RecordWriter.create(f, {}), lambda f: RecordWriter.resume(f, 0, {})])
def test_a_start_that_was_killed_is_begun_anew(folder, left, begin):
    (folder / "records").mkdir(parents=True)
    for name in left:
        (folder / "records" / name).write_text("")
    assert record_folders(folder.parent) is None
    with begin(folder) as writer:
        writer.write(50, record(50))
    assert_holds(writer.path, 50)
    assert partial(writer.path) == []


def make_file(path):
    path.write_text("mine")


def make_link(path):
    (path.parent / "elsewhere").mkdir()
    path.symlink_to(path.parent / "elsewhere")


def make_others(path):
    path.mkdir()
    (path / "run.json").write_text('{"kind": "mine"}')


def make_folder(path):
    path.mkdir()
    (path / "notes.txt").write_text("mine")


FOREIGN = [make_file, make_link, make_others, make_folder]


@pytest.mark.parametrize("make", FOREIGN)
@pytest.mark.parametrize("begin", [lambda f: RecordWriter.create(f, {}), lambda f: RecordWriter.resume(f, 0, {})])
def test_what_is_foreign_is_refused_and_left_alone(folder, make, begin):
    folder.mkdir(parents=True)
    make(folder / "records")
    before = sorted(folder.rglob("*")), files(folder)
    with pytest.raises(RecordsExist, match=r"stands where the records must go.*Choose another folder, or move it away"):
        begin(folder)
    assert (sorted(folder.rglob("*")), files(folder)) == before


@pytest.mark.parametrize("begin", [lambda f: RecordWriter.create(f, {}), lambda f: RecordWriter.resume(f, 0, {})])
def test_a_folder_that_is_a_link_is_not_written_through(folder, tmp_path, begin):
    (tmp_path / "elsewhere").mkdir()
    folder.parent.mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RecordsExist, match=r"dynamics' is a link, and no records are written through one\. Choose"):
        begin(folder)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_forked_process_neither_writes_nor_keeps_the_lock(folder):
    script = """
        import os, sys, time
        from pathlib import Path
        from dynamics.store import RecordWriter
        store = RecordWriter.create(Path(sys.argv[1]), {})
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
            with pytest.raises(RecordsExist):
                RecordWriter.resume(folder, 0, {})
            trainer.kill()
            trainer.wait()
            RecordWriter.resume(folder, 0, {}).close()  # while the child, a data loader say, is still there
        finally:
            trainer.kill()
            os.kill(int(child), 9)
    assert closed == "True"


def test_records_of_the_first_format_are_refused_too(first_edition, folder):
    shutil.copytree(first_edition / "dynamics" / "capture.zarr", folder / "capture.zarr")
    before = files(folder)
    with pytest.raises(RecordsExist, match=r"capture\.zarr' holds 3 captured steps, the last of them 4\. Resume that"):
        RecordWriter.create(folder, {})
    assert files(folder) == before


def test_a_record_that_no_run_json_goes_with_is_refused(folder):
    (folder / "records").mkdir(parents=True)
    (folder / "records" / "step-000000000050.safetensors").write_bytes(b"")
    before = files(folder)
    with pytest.raises(RecordsExist, match="holds 1 captured step, the last of them 50"):
        RecordWriter.create(folder, {})
    with pytest.raises(ValueError, match=r"cannot read them \(No such file.*restore its run\.json"):
        RecordWriter.resume(folder, 0, {})
    assert files(folder) == before


def test_a_file_of_the_user_in_the_folder_is_refused_where_records_begin(folder):
    with RecordWriter.create(folder, {}) as writer:
        (writer.path / "notes.txt").write_text("mine")
    with pytest.raises(RecordsExist, match=r"records' holds 'notes\.txt', which no recorder wrote"):
        RecordWriter.create(folder, {})


def test_an_analysis_leaves_the_records_alone(writer, folder):
    before = files(writer.path)
    for _ in range(2):  # the second replaces what the first wrote
        with staged(folder) as stage:
            (stage / "analysis.zarr").mkdir()
            (stage / "analysis.zarr" / ".zattrs").write_text('{"findings": "[]"}')
        assert files(writer.path) == before
    writer.write(150, record(150))
    assert_holds(writer.path, 50, 100, 150)
