"""What a training recorded of itself, checked and joined; a bad record costs only itself."""

import json
import re
import shutil

import numpy as np
import pytest

from dynamics.findings import Finding
from dynamics.store import read_capture
from dynamics.store.records import captured, find_captured, finding_of, is_current
from tests.captures import write_capture
from tests.runs import NAMES

BAD = "step-000000000010"


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(run):
    return write_capture(run)


def read(run, matrices=None):
    found, problems = find_captured(run, matrices)
    assert problems == []
    assert found is not None
    return found


def spoil(store, step=10, array="update/from_step", number=99):
    """Makes a record one that no recorder writes."""
    path = store / f"step-{step:012d}" / array / "0"
    path.write_bytes(np.int64(number).tobytes())


def set_attributes(store, **changes):
    attributes = json.loads((store / ".zattrs").read_text())
    (store / ".zattrs").write_text(json.dumps(attributes | changes))


def test_records_are_joined_in_the_order_of_their_steps(run, store):
    found = read(run)
    assert found.path == store
    assert found.update["step"].values.tolist() == [5, 10, 15, 20]
    assert found.update["from_step"].values.tolist() == [0, 5, 10, 15]
    for step, record in read_capture(store).records.items():
        for name in ("update", "gradient"):
            joined = getattr(found, name)["singular_value"].sel(step=step).values
            np.testing.assert_array_equal(joined, record[name]["singular_value"].values[0])


def test_without_a_store_there_is_nothing(run):
    run.mkdir()
    assert find_captured(run) == (None, [])


def test_gradients_at_some_steps_or_none(run):
    write_capture(run, gradients=[10])
    assert read(run).gradient["step"].values.tolist() == [10]
    write_capture(run.parent / "other", gradients=[])
    assert read(run.parent / "other").gradient is None


def test_only_the_matrices_asked_for(run, store):
    found = read(run, r"layers\.1\..*v_proj")
    assert found.update["matrix"].values.tolist() == [NAMES[3]]
    assert found.gradient["matrix"].values.tolist() == [NAMES[3]]
    assert read(run, "nothing").update is None


@pytest.mark.parametrize("damaged", [False, True])
def test_a_pattern_that_is_none_is_refused(run, store, damaged):
    if damaged:
        (store / ".zattrs").write_text("{")
    message = "matrices='(' is not a regular expression (missing ), unterminated subpattern at position 0). Escape it"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_captured(run, "(")


def test_a_record_that_no_recorder_writes_is_named_and_the_others_are_used(run, store):
    spoil(store)
    shutil.rmtree(store / "step-000000000015" / "gradient")
    (store / "step-000000000020" / "update" / "count" / "0.0.0").unlink()
    found = read(run)
    assert found.update["step"].values.tolist() == [5, 15]
    assert found.gradient["step"].values.tolist() == [5]
    assert [(finding.code, finding.file) for finding in found.findings] == [
        ("OD309", f"dynamics/capture.zarr/{BAD}"),
        ("OD309", "dynamics/capture.zarr/step-000000000020"),
    ]
    assert found.findings[0].message == (
        "The captured step cannot be used: 'update' is an increment since a later step."
    )
    assert found.findings[1].message == "The captured step cannot be used: 'count/0.0.0' is missing."
    assert found.stamp["broken"] == [BAD, "step-000000000020"]


def test_no_record_left(run, store):
    for step in (5, 10, 15, 20):
        spoil(store, step)
    found = read(run)
    assert (found.update, found.gradient, len(found.findings)) == (None, None, 4)
    assert found.input["step"] is None


def test_what_is_no_store_has_a_finding(run):
    (run / "dynamics" / "capture.zarr").mkdir(parents=True)
    (run / "dynamics" / "capture.zarr" / "notes.txt").touch()
    found, (finding,) = find_captured(run)
    assert found is None
    assert (finding.code, finding.file) == ("OD309", "dynamics/capture.zarr")
    assert finding.message == "It has the name of a capture store, and is none; it is left out."


def test_a_link_to_a_store_is_not_followed(run, store, tmp_path):
    other = tmp_path / "other"
    (other / "dynamics").mkdir(parents=True)
    (other / "dynamics" / "capture.zarr").symlink_to(store)
    found, (finding,) = find_captured(other)
    assert (found, finding.code) == (None, "OD309")


@pytest.mark.parametrize("attributes", ["{", "[]", '{"kind": "something"}'])
def test_a_store_whose_attributes_are_damaged_has_a_finding(run, store, attributes):
    (store / ".zattrs").write_text(attributes)
    found, (finding,) = find_captured(run)
    assert (found, finding.code, finding.file) == (None, "OD309", "dynamics/capture.zarr")
    assert finding.message.startswith(f"Expected a capture store at '{store}', but it is none (")


def test_a_store_of_a_later_format_has_a_finding(run, store):
    set_attributes(store, format=2)
    _, (finding,) = find_captured(run)
    assert finding.message.endswith("and this version reads 1. Upgrade optimization-dynamics.")


# Names on disk.


def live_names(run, disk_names, **how):
    return dict(captured(read_capture(write_capture(run, attributes={"disk_names": disk_names}, **how))).live_names)


def test_names_on_disk_are_turned_round(run):
    assert live_names(run, {NAMES[0]: "disk.a", NAMES[1]: "disk.b"}) == {"disk.a": NAMES[0], "disk.b": NAMES[1]}


@pytest.mark.parametrize(
    "names",
    [
        {NAMES[0]: "disk", NAMES[1]: "disk"},
        {NAMES[0]: NAMES[1]},
        {"module.x": "disk"},
        {NAMES[0]: None, NAMES[1]: ["disk"]},
        ["disk"],
        None,
    ],
    ids=["shared", "a live one as well", "a wrapper's", "no text", "a list", "nothing"],
)
def test_what_cannot_be_turned_round_is_not(run, names):
    assert live_names(run, names) == {}


# Findings of the training.


def test_findings_of_the_training_come_first(run):
    own = Finding("OD301", "It gets no gradient.", matrix=NAMES[0], evidence={"steps": [5]})
    store = write_capture(run, attributes={"findings": [own.to_dict()]})
    spoil(store)
    assert [finding.code for finding in read(run).findings] == ["OD301", "OD309"]
    assert read(run).findings[0] == own


@pytest.mark.parametrize(
    "junk",
    [
        None,
        "OD301",
        {},
        {"code": "OD301"},
        {"code": "OD999", "message": "x"},
        {"code": ["OD301"], "message": "x"},
        {"code": "OD301", "message": 3},
    ],
)
def test_what_is_no_finding_is_left_out(junk):
    assert finding_of(junk) is None


def test_only_what_has_its_type_is_taken_over():
    odd = {"code": "OD301", "message": "x", "remedy": 3, "file": None, "matrix": "a", "step": True, "evidence": [1]}
    assert finding_of(odd) == Finding("OD301", "x", matrix="a")
    assert finding_of(Finding("OD301", "x", "y", "f", "m", 3, {"a": 1}).to_dict()) == Finding(
        "OD301", "x", "y", "f", "m", 3, {"a": 1}
    )


def test_gaps_are_told_once(run):
    gaps = [{"step": 7, "reason": "No space left"}, {"step": 9, "reason": "No space left"}, {"step": "x"}, 3]
    write_capture(run, attributes={"gaps": gaps})
    (finding,) = read(run).findings
    assert (finding.code, finding.evidence) == ("OD305", {"steps": [7, 9], "reasons": ["No space left"]})
    assert finding.message == ("Steps that were due could not be captured, or not whole: 7, 9 (No space left).")
    told = Finding("OD305", "Told already.").to_dict()
    write_capture(run.parent / "other", attributes={"gaps": gaps, "findings": [told]})
    assert [finding.message for finding in read(run.parent / "other").findings] == ["Told already."]


@pytest.mark.parametrize("value", [None, "x", 3, {"step": 3}, [[]]])
def test_attributes_of_another_type_are_no_findings(run, value):
    write_capture(run, attributes={"gaps": value, "findings": value})
    assert read(run).findings == ()


# Whether it is what it was.


def test_a_store_is_what_it_was_until_something_changes(run, store):
    stamp = json.loads(json.dumps(read(run).stamp))
    assert is_current(stamp, store)
    write_capture(run, [5, 10, 15, 20, 25])
    assert not is_current(stamp, store)


def test_a_record_that_is_gone_is_a_change(run, store):
    stamp = read(run).stamp
    shutil.rmtree(store / BAD)
    assert not is_current(stamp, store)


def test_an_attribute_that_differs_is_a_change(run, store):
    stamp = read(run).stamp
    set_attributes(store, resumptions=[{"step": 5}])
    assert not is_current(stamp, store)


def test_a_record_that_cannot_be_used_is_no_change(run, store):
    spoil(store)
    assert is_current(read(run).stamp, store)


@pytest.mark.parametrize("stamp", [None, {}, [], "x", {"steps": None, "broken": []}, {"steps": [-1], "broken": []}])
def test_what_is_no_stamp_is_not_current(store, stamp):
    assert not is_current(stamp, store)


def test_its_entry_among_the_inputs(run, store):
    found = read(run)
    assert found.input == {
        "path": "dynamics/capture.zarr",
        "bytes": sum(part.nbytes for record in read_capture(store).records.values() for part in record.values()),
        "header_sha256": found.stamp["attributes"],
        "step": 20,
        "captured_steps": 4,
    }
    assert json.loads(json.dumps(found.input)) == found.input
