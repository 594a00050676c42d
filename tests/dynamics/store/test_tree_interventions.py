"""What the numbers of interventions tell is told of a result, once."""

import json

import numpy as np
import xarray as xr

from dynamics import analyze_run, open_run
from dynamics.schema import SHARPNESS, label_arrays
from dynamics.store.record_folders import record_folders
from dynamics.store.tree import reopened
from tests.interventions import CASES, intervention, with_intervention
from tests.records import effects, rewrite
from tests.runs import write_records, write_run


def codes(tree):
    return [finding["code"] for finding in json.loads(tree.attrs["findings"]) if finding["code"].startswith("OD7")]


def test_findings_follow_from_the_numbers_of_records(tmp_path):
    store = write_records(tmp_path / "run", [10, 20])
    for step in (10, 20):
        group = effects(step)
        group["resolved"][:] = step == 20
        rewrite(store / f"step-{step:012d}.safetensors", lambda groups, group=group: groups.update(intervention=group))
    assert codes(open_run(tmp_path / "run")) == ["OD701"]
    assert codes(analyze_run(tmp_path / "run", report=False)) == ["OD701"]
    (store / "step-000000000010.safetensors").unlink()  # with it goes what was told of it
    assert codes(open_run(tmp_path / "run")) == []


def test_findings_about_checkpoints_are_told_once_when_records_come(tmp_path):
    run = write_run(tmp_path / "run", [100])
    stored = analyze_run(run, report=False)
    group = intervention(CASES["unresolved"]).assign_coords(from_step=("step", [0]), recorded=("step", [False]))
    told = {"code": "OD701", "message": "As it was told before."}
    stored = with_intervention(stored, group)
    stored.attrs["findings"] = json.dumps([*json.loads(stored.attrs["findings"]), told])
    write_records(run, [110])
    tree = reopened(stored, record_folders(run))
    assert tree["update"]["step"].values.tolist() == [100, 110]
    assert codes(tree) == ["OD701"]
    assert told["message"] not in tree.attrs["findings"]


def test_a_step_beyond_the_edge_is_told_anew(tmp_path):
    run = write_run(tmp_path / "run", [100])
    stored = analyze_run(run, report=False)
    ends = {"": 24.0, "_low": 21.0, "_high": 27.0}
    arrays = {f"critical_sharpness{end}": np.array([[value]]) for end, value in ends.items()}
    group = label_arrays(SHARPNESS, {**arrays, "learning_rate": np.array([0.1])})
    stored["sharpness"] = xr.DataTree(xr.Dataset(group, {"step": [100], "task": ["all"]}))
    write_records(run, [110])
    assert codes(reopened(stored, record_folders(run))) == ["OD706"]
