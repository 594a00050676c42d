"""What there is of a run to analyse, whichever of its folders is named."""

import re
import shutil
from pathlib import Path

import pytest

from dynamics.checkpoints import NotARun
from dynamics.store.tree import open_source, results_folder, run_folder, without_checkpoints
from tests.runs import NAMES, drifting, log_history, write_records, write_run, write_state


@pytest.fixture
def run(tmp_path):
    """Checkpoints and a capture of one training."""
    run = write_run(tmp_path / "run", drifting([10, 20]))
    write_records(run)
    return run


@pytest.fixture
def captured_only(tmp_path):
    run = tmp_path / "captured"
    write_records(run)
    return run


def test_checkpoints_and_records(run):
    source = open_source(run)
    assert source.trajectory.steps == (10, 20)
    assert source.records.stamp["steps"] == [5, 10, 15, 20]


def test_checkpoints_alone(run):
    shutil.rmtree(run / "dynamics")
    source = open_source(run)
    assert (source.trajectory.steps, source.records) == ((10, 20), None)


@pytest.mark.parametrize("place", ["", "dynamics", "dynamics/records"])
def test_records_alone_by_each_of_their_folders(captured_only, place):
    source = open_source(captured_only / place)
    assert source.trajectory.checkpoints == ()
    assert source.trajectory.name == "captured"
    assert source.records.stamp["steps"] == [5, 10, 15, 20]


def test_the_store_itself_is_analysed_without_the_checkpoints_beside_it(run):
    source = open_source(run / "dynamics" / "records")
    assert source.trajectory.checkpoints == ()
    assert source.trajectory.name == "run"


def test_matrices_are_chosen_in_both(run):
    source = open_source(run, r"q_proj")
    assert source.records.update["matrix"].values.tolist() == [NAMES[0], NAMES[2]]
    assert list(source.trajectory.matrices) == [NAMES[0], NAMES[2]]


def test_matrices_that_only_one_of_them_has(tmp_path):
    run = write_run(tmp_path / "run", drifting([10], names=NAMES[:1]))
    write_records(run, drifting([10], names=NAMES[1:2]))
    assert open_source(run, "v_proj").trajectory.checkpoints == ()
    assert open_source(run, "q_proj").records.update is None


def test_nothing_at_all(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(NotARun, match=r"' is empty \(looked for checkpoint-\*/ or "):
        open_source(tmp_path / "run")


def test_no_record_that_can_be_used_and_no_checkpoint(captured_only):
    for step in (5, 10, 15, 20):
        (captured_only / "dynamics" / "records" / f"step-{step:012d}.safetensors").write_bytes(b"")
    store = captured_only / "dynamics" / "records"
    words = f"The records in '{store}' hold no step that can be used; wait for the first, or train on."
    for place in (captured_only, store):
        with pytest.raises(NotARun, match=re.escape(words)) as refusal:
            open_source(place)
        assert [finding.code for finding in refusal.value.findings].count("OD309") == 4


def test_a_pattern_that_finds_nothing(captured_only):
    store = captured_only / "dynamics" / "records"
    with pytest.raises(NotARun, match=re.escape(f"matrices='x' matches none of the matrices recorded in '{store}'.")):
        open_source(captured_only, "x")


def test_what_stands_in_the_place_of_records_is_a_finding(run):
    store = run / "dynamics" / "records"
    (store / "run.json").write_text("{")
    source = open_source(run)
    assert source.records is None
    assert "OD309" in [finding.code for finding in source.trajectory.findings]


# The log of a training without checkpoints.


def test_the_runs_own_log_comes_before_those_of_its_checkpoints(captured_only):
    write_state(captured_only / "checkpoint-9", 9, log_history(5, loss=9.0))
    write_state(captured_only / "checkpoint-10", 10, log_history(10, loss=1.0))
    assert [entry.value for entry in without_checkpoints(captured_only).log if entry.name == "loss"] == [
        0.99**5,
        0.99**10,
    ]
    write_state(captured_only, 5, log_history(5, loss=2.0))
    assert [entry.value for entry in without_checkpoints(captured_only).log if entry.name == "loss"] == [2 * 0.99**5]


def test_a_log_that_does_not_parse_is_a_finding_and_the_next_is_read(captured_only):
    write_state(captured_only / "checkpoint-10", 10, log_history(10))
    (captured_only / "trainer_state.json").write_text("{")
    trajectory = without_checkpoints(captured_only)
    assert {entry.step for entry in trajectory.log} == {5, 10}
    (finding,) = trajectory.findings
    assert (finding.code, finding.file) == ("OD108", "trainer_state.json")


def test_no_log(captured_only):
    assert without_checkpoints(captured_only).log == ()


# Folders.


def test_the_run_of_each_of_its_folders(captured_only):
    for place in ("", "dynamics", "dynamics/records"):
        assert run_folder(captured_only / place) == captured_only
    assert run_folder(Path("somewhere/else")) == Path("somewhere/else")


def test_a_folder_that_is_called_like_ours_and_holds_nothing_is_a_run(tmp_path):
    (tmp_path / "dynamics").mkdir()
    assert run_folder(tmp_path / "dynamics") == tmp_path / "dynamics"
    assert results_folder(tmp_path / "dynamics") == tmp_path / "dynamics" / "dynamics"


def test_results_go_beside_the_records(captured_only):
    for place in ("", "dynamics", "dynamics/records"):
        assert results_folder(captured_only / place) == captured_only / "dynamics"


def test_a_store_that_was_copied_elsewhere(captured_only, tmp_path):
    copy = shutil.copytree(captured_only / "dynamics" / "records", tmp_path / "copies" / "imax")
    assert results_folder(copy) == tmp_path / "copies"
    assert open_source(copy).records.path == copy
    assert open_source(copy).trajectory.name == "imax"
