"""Results made when they are opened: merged anew they are those of a fresh analysis."""

import json
import re
import shutil

import pytest
import xarray as xr

from dynamics import open_run, schema
from dynamics.pipeline import analyze_run, measure
from dynamics.store.record_folders import record_folders
from dynamics.store.tree import open_source, records_alone, reopened
from tests.runs import NAMES, drifting, write_records, write_run


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """Checkpoints and a capture of one training, analysed while it was at step 15."""
    run = write_run(tmp_path_factory.mktemp("analysed") / "run", drifting([10, 20, 30]))
    write_records(run, [5, 10, 15])
    with pytest.warns(DeprecationWarning, match="use analyze_run"):
        analyze_run(run, report=False, labels={"": "imax"})
    return run


@pytest.fixture
def run(analysed, tmp_path):
    return shutil.copytree(analysed, tmp_path / "run")


def assert_same_result(found, expected):
    """All groups and attributes but those that say when and where it was made."""
    assert set(found.children) == set(expected.children)
    for name in expected.children:
        xr.testing.assert_allclose(found[name].to_dataset().load(), expected[name].to_dataset().load(), rtol=1e-9)
    for name in expected.attrs.keys() - {"created", "configuration"}:
        assert _findings_apart(found.attrs[name]) == _findings_apart(expected.attrs[name]), name


def _findings_apart(value):
    """Findings in any order, evidence to nine digits."""
    try:
        content = json.loads(value)
    except (TypeError, ValueError):
        return value
    return sorted(re.sub(r"(\d\.\d{9})\d+", r"\1", json.dumps(each)) for each in content) if content else content


def fresh(run, matrices=None):
    """What an analysis of the run as it is now says; not written, which takes most of the time."""
    source = open_source(run, matrices)
    return measure(source.trajectory, records=source.records)


@pytest.mark.parametrize("analysed_with", ["no capture", "an earlier capture"])
def test_a_capture_that_has_gone_on_is_merged_as_a_fresh_analysis_would(run, analysed_with):
    if analysed_with == "no capture":
        shutil.rmtree(run / "dynamics")
        analyze_run(run, report=False)
    write_records(run, [5, 10, 15, 20, 25])
    opened = open_run(run)
    schema.check(opened)
    assert opened["update"]["step"].values.tolist() == [5, 10, 15, 20, 25, 30]
    assert opened["update"]["from_step"].values.tolist() == [0, 5, 10, 15, 20, 20]
    assert_same_result(opened, fresh(run))


def test_what_was_found_of_scores_stays_with_the_association(run, tmp_path):
    rows = "".join(f"run,{step},vqa,{0.1 * place}\n" for place, step in enumerate((10, 20, 30), 1))
    (tmp_path / "scores.csv").write_text(f"run,step,task,score\n{rows}")
    analyze_run(run, report=False, scores=[tmp_path / "scores.csv"])
    write_records(run, [5, 10, 15, 20, 25])
    opened = open_run(run)
    assert "association" in opened.children
    assert "OD505" in {finding["code"] for finding in json.loads(opened.attrs["findings"])}


def test_a_capture_that_went_on_without_checkpoints(tmp_path):
    write_records(tmp_path / "run", [5, 10])
    analyze_run(tmp_path / "run", report=False)
    write_records(tmp_path / "run", [5, 10, 15])
    opened = open_run(tmp_path / "run")
    assert opened["update"]["step"].values.tolist() == [5, 10, 15]
    assert_same_result(opened, fresh(tmp_path / "run"))


def test_records_that_were_dropped_are_gone(run):
    (run / "dynamics" / "records" / "step-000000000015.safetensors").unlink()
    opened = open_run(run)
    assert opened["update"]["step"].values.tolist() == [5, 10, 20, 30]
    assert_same_result(opened, fresh(run))


def test_what_is_current_is_not_merged_again(run):
    stored = xr.open_datatree(run / "dynamics" / "analysis" / "analysis.zarr", engine="zarr")
    assert reopened(stored, record_folders(run)) is stored


def test_the_matrices_of_the_analysis_are_those_of_the_merge(run):
    analyze_run(run, report=False, matrices="q_proj")
    write_records(run, [5, 10, 15, 20])
    opened = open_run(run)
    assert opened["update"]["matrix"].values.tolist() == [NAMES[0], NAMES[2]]
    assert_same_result(opened, fresh(run, "q_proj"))


def test_label_and_configuration_stay(run):
    before = open_run(run).attrs
    write_records(run, [5, 10, 15, 20])
    after = open_run(run).attrs
    assert after["label"] == "imax"
    assert json.loads(after["configuration"]) == json.loads(before["configuration"])


def test_a_record_that_is_damaged_meanwhile_is_told_and_the_others_are_used(run):
    (run / "dynamics" / "records" / "step-000000000015.safetensors").write_text("{")
    opened = open_run(run)
    # Nothing has changed by name: the analysis has the record as it was.
    assert 15 in opened["update"]["step"].values
    write_records(run, [5, 10, 20])
    opened = open_run(run)
    schema.check(opened)
    assert opened["update"]["step"].values.tolist() == [5, 10, 20, 30]
    assert [finding["code"] for finding in json.loads(opened.attrs["findings"])].count("OD309") == 1


@pytest.mark.parametrize("damage", ["attributes", "every record"])
def test_a_capture_that_cannot_be_used_any_more_leaves_the_analysis_and_a_finding(run, damage):
    store = run / "dynamics" / "records"
    if damage == "attributes":
        (store / "run.json").write_text("{")
    else:
        (store / "step-000000000005.safetensors").unlink()
        for step in (10, 15):
            (store / f"step-{step:012d}.safetensors").write_bytes(b"")
    opened = open_run(run)
    schema.check(opened)
    assert opened["update"]["step"].values.tolist() == [5, 10, 15, 20, 30]
    told = [finding for finding in json.loads(opened.attrs["findings"]) if finding["code"] == "OD309"]
    assert len(told) == (1 if damage == "attributes" else 2)


def test_several_runs_are_left_as_they_are(run):
    analyze_run([run], report=False)
    write_records(run, [5, 10, 15, 20])
    assert open_run(run)["runs/run/update"]["step"].values.tolist() == [5, 10, 15, 20, 30]


def test_a_capture_without_a_step(tmp_path):
    store = write_records(tmp_path / "run", [])
    message = (
        f"The records in '{store}' hold no step that can be used. Wait for the first one, or analyse checkpoints "
        f"with: python -m dynamics.analyze {tmp_path / 'run'}"
    )
    with pytest.raises(FileNotFoundError, match=re.escape(message)):
        records_alone(tmp_path / "run", record_folders(store))


@pytest.mark.parametrize("configuration", ["{", "[]", None, 3, {"preset": "full"}])
def test_the_configuration_is_the_recorders(tmp_path, configuration):
    store = write_records(tmp_path / "run", attributes={"configuration": configuration})
    tree = records_alone(tmp_path / "run", record_folders(store))
    expected = configuration if isinstance(configuration, dict) else {}
    assert json.loads(tree.attrs["configuration"]) == expected
