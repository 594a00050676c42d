"""Where the records of a run are, in both formats, and how they are joined."""

import json
import os
import shutil

import pytest

from dynamics.store import RecordWriter
from dynamics.store import record_folders as module
from dynamics.store.record_folders import record_folders, stored_records
from tests.records import record, records_of


@pytest.fixture
def path(writer):
    writer.close()
    return writer.path


@pytest.mark.parametrize("place", ["run", "run/dynamics", "run/dynamics/records"])
def test_where_they_are_found(path, tmp_path, place):
    folders = record_folders(tmp_path / place)
    assert (folders.records, folders.capture, folders.path) == (path, None, path)


@pytest.mark.parametrize("make", [lambda path: path.mkdir(parents=True), lambda path: path.parent.mkdir()])
@pytest.mark.parametrize("name", ["records", "capture.zarr"])
def test_nothing_to_find(tmp_path, make, name):
    make(tmp_path / "dynamics" / name)
    assert record_folders(tmp_path) is None
    assert record_folders(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", ["records", "capture.zarr"])
def test_a_link_is_not_followed(path, tmp_path, first_edition, name):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / name).symlink_to(path if name == "records" else first_edition / "dynamics" / name)
    assert record_folders(tmp_path / "other") is None


def test_a_folder_called_records_is_anybodys(tmp_path):
    (tmp_path / "records").mkdir()
    (tmp_path / "records" / "song.flac").write_text("")
    (tmp_path / "records" / "run.json").write_text("{}")
    assert record_folders(tmp_path) is None


def test_a_broken_record_costs_only_itself(path):
    (path / "step-000000000100.safetensors").write_bytes(b"")
    found = records_of(path)
    assert (list(found.records), list(found.broken)) == ([50], [100])


def test_attributes_that_are_damaged_are_told(path):
    (path / "run.json").write_text("{")
    with pytest.raises(ValueError, match=r"Expected the records of a training in .*run\.json' is not valid JSON"):
        records_of(path)


def test_a_later_format(path):
    (path / "run.json").write_text(json.dumps({"kind": "optimization-dynamics records", "format": 3}))
    with pytest.raises(ValueError, match=r"are of format 3, and this version reads 2\. Upgrade optimization-dynamics"):
        records_of(path)


def test_what_is_not_a_record_is_passed_over(path):
    for name in ("step-50.safetensors", "step-0000000000500.safetensors", "step-000000000070.st", ".partial-1"):
        (path / name).write_bytes(b"")
    found = records_of(path)
    assert (list(found.records), found.broken) == ([50, 100], {})


def test_a_record_that_is_dropped_meanwhile_is_left_out(path, monkeypatch):
    read = module.read_record

    def drop_and_read(record):
        os.unlink(path / "step-000000000100.safetensors") if record.name.endswith("50.safetensors") else None
        return read(record)

    monkeypatch.setattr(module, "read_record", drop_and_read)
    found = records_of(path)
    assert (list(found.records), found.broken) == ([50], {})


# Both formats


@pytest.fixture
def both(first_edition, tmp_path):
    """Records of the first format of the steps 1, 2 and 4, resumed at step 2, and gone on from there."""
    folder = tmp_path / "both" / "dynamics"
    shutil.copytree(first_edition / "dynamics" / "capture.zarr", folder / "capture.zarr")
    with RecordWriter.resume(folder, 2, {}) as writer:
        for step in (3, 4):
            writer.write(step, record(step))
    return folder


def test_both_formats_are_joined_by_step_up_to_where_the_training_resumed(both, first_edition):
    found = records_of(both)
    assert list(found.records) == [1, 2, 3, 4]
    old = records_of(first_edition).records
    for step in (1, 2):
        assert all(found.records[step][name].identical(old[step][name]) for name in old[step])
    assert found.records[4]["update"].identical(record(4)["update"])


def test_where_both_have_a_step_records_win(both):
    attributes = json.loads((both / "records" / "run.json").read_text())
    (both / "records" / "run.json").write_text(json.dumps({**attributes, "capture_until": 4}))
    found = records_of(both)
    assert list(found.records) == [1, 2, 3, 4]
    assert found.records[4]["update"].identical(record(4)["update"])


@pytest.mark.parametrize(("place", "steps"), [("records", [3, 4]), ("capture.zarr", [1, 2, 4])])
def test_each_is_opened_alone(both, place, steps):
    assert list(stored_records(record_folders(both / place)).records) == steps


@pytest.mark.parametrize("until", ["2", None, [2]])
def test_a_limit_that_is_none_leaves_nothing_out(both, until):
    attributes = json.loads((both / "records" / "run.json").read_text())
    (both / "records" / "run.json").write_text(json.dumps({**attributes, "capture_until": until}))
    assert list(records_of(both).records) == [1, 2, 3, 4]
