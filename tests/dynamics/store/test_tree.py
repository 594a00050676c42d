"""From raw numbers to the result of a run."""

import json

import pytest

from dynamics import schema
from dynamics.findings import Finding
from dynamics.spectra import raw
from dynamics.store.records import find_records
from dynamics.store.tree import Parts, result_tree
from tests.runs import NAMES, drifting, records, write_records


def checkpoints(steps, seed=0, names=NAMES):
    factors = drifting(steps, seed, names=names)
    return raw.concatenate([record["update"] for record in records(factors, from_start=False).values()])


@pytest.fixture
def captured(tmp_path):
    write_records(tmp_path / "run", gradients=[5, 10])
    return find_records(tmp_path / "run")[0]


def codes(tree, attribute="findings"):
    return [finding["code"] for finding in json.loads(tree.attrs[attribute])]


def test_checkpoints_alone():
    tree = result_tree(Parts("run", checkpoints([10, 20])), {"device": "cpu"})
    schema.check(tree)
    assert set(tree.children) == {"update", "null", "summary"}
    assert "captured" not in tree.attrs
    assert json.loads(tree.attrs["configuration"]) == {"device": "cpu"}


def test_records_alone(captured):
    tree = result_tree(Parts("run", None, captured), {})
    schema.check(tree)
    assert set(tree.children) == {"update", "null", "summary", "gradient", "null_gradient", "summary_gradient"}
    assert tree["update"]["step"].values.tolist() == [5, 10, 15, 20]
    assert tree["gradient"]["step"].values.tolist() == [5, 10]
    assert json.loads(tree.attrs["captured"]) == {**captured.stamp, "checkpoints": []}
    assert json.loads(tree.attrs["inputs"]) == [captured.input]


def test_both_keep_what_the_checkpoints_alone_say(captured):
    alone = checkpoints([10, 30])
    tree = result_tree(Parts("run", alone, captured, inputs=[{"path": "checkpoint-10", "step": 10}]), {})
    schema.check(tree)
    assert tree["update"]["step"].values.tolist() == [5, 10, 15, 20, 30]
    assert tree["checkpoints"].to_dataset().equals(alone)
    assert json.loads(tree.attrs["captured"])["checkpoints"] == [10, 30]
    assert [file["path"] for file in json.loads(tree.attrs["inputs"])] == ["checkpoint-10", "dynamics/records"]


def test_findings_are_those_of_the_checkpoints_then_of_the_records_then_of_the_numbers(tmp_path):
    own = Finding("OD304", "A gradient is not finite.").to_dict()
    write_records(tmp_path / "run", attributes={"findings": [own]})
    captured = find_records(tmp_path / "run")[0]
    of_checkpoints = [Finding("OD109", "One."), Finding("OD204", "An increment.")]
    tree = result_tree(Parts("run", checkpoints([10], seed=7), captured, findings=of_checkpoints), {})
    assert codes(tree)[:4] == ["OD109", "OD204", "OD304", "OD308"]
    assert codes(tree, "checkpoint_findings") == ["OD109", "OD204"]


@pytest.mark.parametrize(("names", "told"), [({NAMES[0]: "disk"}, []), ({}, []), (None, ["OD117"])])
def test_names_on_disk_are_no_finding_where_the_records_know_them(tmp_path, names, told):
    write_records(tmp_path / "run", attributes={"disk_names": names})
    captured = find_records(tmp_path / "run")[0]
    tree = result_tree(Parts("run", checkpoints([10]), captured, findings=[Finding("OD117", "As on disk.")]), {})
    assert [code for code in codes(tree) if code == "OD117"] == told


def test_checkpoints_are_merged_under_their_live_names(tmp_path):
    write_records(tmp_path / "run", attributes={"disk_names": {NAMES[0]: "model.0.disk"}})
    captured = find_records(tmp_path / "run")[0]
    on_disk = checkpoints([10, 30])
    on_disk = on_disk.assign_coords(matrix=["model.0.disk", *NAMES[1:]])
    tree = result_tree(Parts("run", on_disk, captured), {})
    assert tree["update"]["matrix"].values.tolist() == list(NAMES)
    assert (tree["update"]["count"].sel(kind="total") > 0).all()
    assert tree["checkpoints"]["matrix"].values.tolist()[0] == "model.0.disk"


def test_neither_is_refused():
    with pytest.raises(ValueError, match=r"^Expected checkpoints or captured steps, got neither\.$"):
        result_tree(Parts("run"), {})


def test_text_that_no_file_holds_is_escaped(captured):
    tree = result_tree(Parts("caf\udce9", None, captured), {"runs": ["caf\udce9"]})
    assert tree.attrs["run"] == "caf\\udce9"
    json.dumps(tree.attrs, ensure_ascii=False).encode()
