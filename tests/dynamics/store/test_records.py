"""What a training recorded of itself, checked and joined; a bad record costs only itself."""

import json
import re

import numpy as np
import pytest

from dynamics.findings import Finding, from_json, to_json
from dynamics.store.record_folders import record_folders
from dynamics.store.records import find_records, is_current, read_records
from tests.records import records_of, rewrite
from tests.runs import NAMES, write_records

BAD = "step-000000000010.safetensors"


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def store(run):
    return write_records(run)


def read(run, matrices=None):
    found, problems = find_records(run, matrices)
    assert problems == []
    assert found is not None
    return found


def spoil(store, step=10):
    """Make a record one that no recorder writes."""
    rewrite(store / f"step-{step:012d}.safetensors", lambda groups: groups["update"]["from_step"].values.fill(99))


def set_attributes(store, **changes):
    attributes = json.loads((store / "run.json").read_text())
    (store / "run.json").write_text(json.dumps(attributes | changes))


def test_records_are_joined_in_the_order_of_their_steps(run, store):
    found = read(run)
    assert found.path == store
    assert found.update["step"].values.tolist() == [5, 10, 15, 20]
    assert found.update["from_step"].values.tolist() == [0, 5, 10, 15]
    for step, record in records_of(store).records.items():
        for name in ("update", "gradient"):
            joined = getattr(found, name)["singular_value"].sel(step=step).values
            np.testing.assert_array_equal(joined, record[name]["singular_value"].values[0])


def test_without_a_store_there_is_nothing(run):
    run.mkdir()
    assert find_records(run) == (None, [])


def test_gradients_at_some_steps_or_none(run):
    write_records(run, gradients=[10])
    assert read(run).gradient["step"].values.tolist() == [10]
    write_records(run.parent / "other", gradients=[])
    assert read(run.parent / "other").gradient is None


def test_only_the_matrices_asked_for(run, store):
    found = read(run, r"layers\.1\..*v_proj")
    assert found.update["matrix"].values.tolist() == [NAMES[3]]
    assert found.gradient["matrix"].values.tolist() == [NAMES[3]]
    assert read(run, "nothing").update is None


@pytest.mark.parametrize("damaged", [False, True])
def test_a_pattern_that_is_none_is_refused(run, store, damaged):
    if damaged:
        (store / "run.json").write_text("{")
    message = "matrices='(' is not a regular expression (missing ), unterminated subpattern at position 0). Escape it"
    with pytest.raises(ValueError, match=re.escape(message)):
        find_records(run, "(")


def test_a_record_that_no_recorder_writes_is_named_and_the_others_are_used(run, store):
    spoil(store)
    rewrite(store / "step-000000000015.safetensors", lambda groups: groups.pop("gradient"))
    (store / "step-000000000020.safetensors").write_bytes(b"")
    found = read(run)
    assert found.update["step"].values.tolist() == [5, 15]
    assert found.gradient["step"].values.tolist() == [5]
    assert [(finding.code, finding.file) for finding in found.findings] == [
        ("OD309", f"dynamics/records/{BAD}"),
        ("OD309", "dynamics/records/step-000000000020.safetensors"),
    ]
    assert found.findings[0].message == (
        "The captured step cannot be used: 'update' is an increment since a later step."
    )
    assert found.findings[1].message.startswith("The captured step cannot be used: it is not a safetensors file (")
    assert found.stamp["broken"] == ["step-000000000010", "step-000000000020"]


def test_no_record_left(run, store):
    for step in (5, 10, 15, 20):
        spoil(store, step)
    found = read(run)
    assert (found.update, found.gradient, len(found.findings)) == (None, None, 4)
    assert found.input["step"] is None


def test_what_is_no_store_has_a_finding(run):
    (run / "dynamics" / "records").mkdir(parents=True)
    (run / "dynamics" / "records" / "notes.txt").touch()
    found, (finding,) = find_records(run)
    assert found is None
    assert (finding.code, finding.file) == ("OD309", "dynamics/records")
    assert finding.message == "It has the name of a folder of records, and no recorder wrote it; it is left out."


def test_a_link_to_a_store_is_not_followed(run, store, tmp_path):
    other = tmp_path / "other"
    (other / "dynamics").mkdir(parents=True)
    (other / "dynamics" / "records").symlink_to(store)
    found, (finding,) = find_records(other)
    assert (found, finding.code) == (None, "OD309")


@pytest.mark.parametrize("attributes", ["{", "[]", '{"kind": "something"}'])
def test_a_store_whose_attributes_are_damaged_has_a_finding(run, store, attributes):
    (store / "run.json").write_text(attributes)
    found, (finding,) = find_records(run)
    assert (found, finding.code, finding.file) == (None, "OD309", "dynamics/records")
    assert finding.message.startswith(f"Expected the records of a training in '{store}', but cannot read them (")


def test_a_store_of_a_later_format_has_a_finding(run, store):
    set_attributes(store, format=3)
    _, (finding,) = find_records(run)
    assert finding.message.endswith("and this version reads 2. Upgrade optimization-dynamics.")


# Names on disk.


def live_names(run, disk_names, **how):
    return dict(
        read_records(record_folders(write_records(run, attributes={"disk_names": disk_names}, **how))).live_names
    )


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
    store = write_records(run, attributes={"findings": [own.to_dict()]})
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
    assert from_json([junk]) == []


def test_only_what_has_its_type_is_taken_over():
    odd = {"code": "OD301", "message": "x", "remedy": 3, "file": None, "matrix": "a", "step": True, "evidence": [1]}
    assert from_json([odd]) == [Finding("OD301", "x", matrix="a")]
    whole = Finding("OD301", "x", "y", "f", "m", 3, {"a": 1})
    assert from_json(to_json([whole])) == [whole]


def test_gaps_are_told_once(run):
    gaps = [{"step": 7, "reason": "No space left"}, {"step": 9, "reason": "No space left"}, {"step": "x"}, 3]
    write_records(run, attributes={"gaps": gaps})
    (finding,) = read(run).findings
    assert (finding.code, finding.evidence) == ("OD305", {"steps": [7, 9], "reasons": ["No space left"]})
    assert finding.message == ("Steps that were due could not be captured, or not whole: 7, 9 (No space left).")
    told = Finding("OD305", "Told already.").to_dict()
    write_records(run.parent / "other", attributes={"gaps": gaps, "findings": [told]})
    assert [finding.message for finding in read(run.parent / "other").findings] == ["Told already."]


@pytest.mark.parametrize("value", [None, "x", 3, {"step": 3}, [[]]])
def test_attributes_of_another_type_are_no_findings(run, value):
    write_records(run, attributes={"gaps": value, "findings": value})
    assert read(run).findings == ()


# Whether it is what it was.


def test_a_store_is_what_it_was_until_something_changes(run, store):
    stamp = json.loads(json.dumps(read(run).stamp))
    assert is_current(stamp, record_folders(store))
    write_records(run, [5, 10, 15, 20, 25])
    assert not is_current(stamp, record_folders(store))


def test_a_record_that_is_gone_is_a_change(run, store):
    stamp = read(run).stamp
    (store / BAD).unlink()
    assert not is_current(stamp, record_folders(store))


def test_an_attribute_that_differs_is_a_change(run, store):
    stamp = read(run).stamp
    set_attributes(store, resumptions=[{"step": 5}])
    assert not is_current(stamp, record_folders(store))


def test_a_record_that_cannot_be_used_is_no_change(run, store):
    spoil(store)
    assert is_current(read(run).stamp, record_folders(store))


@pytest.mark.parametrize("stamp", [None, {}, [], "x", {"steps": None, "broken": []}, {"steps": [-1], "broken": []}])
def test_what_is_no_stamp_is_not_current(store, stamp):
    assert not is_current(stamp, record_folders(store))


def test_its_entry_among_the_inputs(run, store):
    found = read(run)
    assert found.input == {
        "path": "dynamics/records",
        "bytes": sum(part.nbytes for record in records_of(store).records.values() for part in record.values()),
        "header_sha256": found.stamp["attributes"],
        "step": 20,
        "captured_steps": 4,
    }
    assert json.loads(json.dumps(found.input)) == found.input
