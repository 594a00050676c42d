"""The command line on what a training captured: its output, its exit status, and nothing of a stranger's record."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from dynamics import open_run, schema
from dynamics.findings import Finding
from tests.command import analyze
from tests.records import rewrite, rewrite_header
from tests.runs import NAMES, drifting, write_records, write_run, write_state
from tests.trees import HOSTILE

STORE = Path("dynamics") / "records"


def summary_of(*arguments):
    """The summary on stdout, strict JSON; status 0."""
    result = analyze(*arguments, "--json", "--no-report")
    assert result.returncode == 0, result.stderr

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(result.stdout, parse_constant=refuse)


def codes(summary):
    return [finding["code"] for finding in summary["findings"]]


@pytest.fixture
def captured(tmp_path):
    """A capture alone."""
    run = tmp_path / "captured"
    write_records(run)
    return run


@pytest.fixture
def run(tmp_path):
    """A capture and checkpoints of one training."""
    run = write_run(tmp_path / "run", drifting([10, 20, 30]))
    write_records(run)
    return run


def test_a_capture_alone(captured):
    write_state(captured, 20)
    result = analyze(captured)
    assert (result.returncode, result.stderr) == (0, "")
    text = " ".join(result.stdout.split())
    assert "captured: Recorded at 4 steps, without checkpoints (steps 5 to 20); 4 weight matrices" in text
    assert "At step 20 the median gradient norm of a matrix is" in text
    assert result.stdout.rstrip().endswith(str(captured / "dynamics" / "analysis" / "report.html"))
    tree = open_run(captured)
    schema.check(tree)
    assert tree["update"]["from_step"].values.tolist() == [0, 5, 10, 15]
    assert tree["training"]["log_step"].values.tolist() == [5, 10, 15, 20]
    page = (captured / "dynamics" / "analysis" / "report.html").read_text()
    assert "What did the gradients look like?" in page
    assert (captured / "dynamics" / "analysis" / "figures" / "gradient_norm.svg").is_file()
    assert (captured / STORE / "step-000000000005.safetensors").is_file()


def test_a_capture_and_checkpoints(run):
    summary = summary_of(run)
    assert summary["steps"] == [5, 10, 15, 20, 30]
    assert summary["captured"] == {"steps": 4, "checkpoints": 3}
    assert summary["segments"] == [{"segment": 0, "steps": [5, 10, 15, 20, 30]}]
    assert summary["gradient"]["step"] == 20
    assert not {"OD308", "OD309", "OD112"} & set(codes(summary))
    written = json.loads((run / "dynamics" / "analysis" / "summary.json").read_text())
    assert written == summary
    paths = [file["path"] for file in json.loads(open_run(run).attrs["inputs"])]
    assert paths[-1] == "dynamics/records"
    assert len(paths) == 4
    # The result beside the capture is not taken for something to analyse.
    assert {**summary_of(run), "created": ""} == {**summary, "created": ""}


def test_a_capture_of_another_training(tmp_path):
    run = write_run(tmp_path / "run", drifting([10, 20, 30], seed=0))
    write_records(run, seed=7)
    result = analyze(run, "--no-report")
    assert result.returncode == 0
    (line,) = [each for each in result.stderr.splitlines() if each.startswith("OD308 warning")]
    assert "At steps 10, 20 the update captured during training is not the one in the checkpoint" in line
    tree = open_run(run)
    schema.check(tree)
    assert tree["update"]["segment"].values.tolist() == [1, 1, 1, 1, 0]


@pytest.mark.parametrize("place", ["dynamics", STORE], ids=["its folder", "the store"])
def test_the_store_itself_or_its_folder_for_the_run(captured, place):
    summary = summary_of(captured / place)
    assert (summary["run"], summary["steps"]) == ("captured", [5, 10, 15, 20])
    assert (captured / "dynamics" / "analysis").is_dir()
    assert sorted(entry.name for entry in captured.iterdir()) == ["dynamics"]
    schema.check(open_run(captured))


def test_only_the_matrices_asked_for(run):
    assert summary_of(run, "--matrices", "q_proj")["matrices"] == 2
    tree = open_run(run)
    for group in ("update", "gradient", "checkpoints"):
        assert tree[group]["matrix"].values.tolist() == [NAMES[0], NAMES[2]]


def test_no_matrix_has_the_name(captured):
    result = analyze(captured, "--matrices", "nothing")
    assert result.returncode == 2
    assert f"matrices='nothing' matches none of the matrices recorded in '{captured / STORE}'." in result.stderr


def test_several_runs_with_captures(run, captured, tmp_path):
    out = tmp_path / "both"
    result = analyze(f"imax={run}", f"dmax={captured}", "--out", out, "--no-report")
    assert result.returncode == 0, result.stderr
    tree = open_run(out)
    schema.check(tree)
    assert {name: child["update"].sizes["step"] for name, child in tree["runs"].children.items()} == {
        "run": 5,
        "captured": 4,
    }
    assert {name: child.attrs["label"] for name, child in tree["runs"].children.items()} == {
        "run": "imax",
        "captured": "dmax",
    }
    assert all("gradient" in child.children for child in tree["runs"].children.values())


def test_findings_of_the_training_are_those_of_the_analysis(captured):
    own = [Finding("OD301", "It gets no gradient.", matrix=NAMES[0]).to_dict()]
    attributes = {"findings": own, "gaps": [{"step": 7, "reason": "No space left on device"}]}
    shutil.rmtree(captured)
    write_records(captured, attributes=attributes)
    result = analyze(captured, "--no-report")
    assert result.returncode == 0  # warnings are no errors
    assert [line.split(":")[0] for line in result.stderr.splitlines()] == [
        f"OD301 warning {NAMES[0]}",
        "OD305 warning Steps that were due could not be captured, or not whole",
    ]


def cut_short(record):
    record.write_bytes(record.read_bytes()[:-8])


def not_written_out(record):
    record.write_bytes(b"")


def linked(record):
    moved = record.parents[3] / "elsewhere"
    shutil.move(record, moved)
    record.symlink_to(moved)


def huge(record):
    rewrite_header(record, lambda header, _: header["update/out"].update(shape=[10**12]))


def of_another_kind(record):
    rewrite_header(record, lambda header, _: header["__metadata__"].update(kind="something else"))


def other_dimensions(record):
    rewrite_header(record, lambda _, groups: groups["update"]["variables"]["count"].update(dims=["task", "kind", "a"]))


def other_type(record):
    rewrite(record, lambda groups: groups["update"].update({"count": groups["update"]["count"].astype(float)}))


def no_numbers(record):
    rewrite(record, lambda groups: groups["update"]["singular_value"].values.fill(np.inf))


def a_rank_that_fills_the_memory(record):
    rewrite(record, lambda groups: groups["update"]["factor_rank"].values.fill(10**9))


def not_json(record):
    rewrite_header(record, lambda header, _: header.update(__metadata__={"groups": '{"space": ' * 10**4}))


DAMAGES = (
    cut_short,
    not_written_out,
    linked,
    huge,
    of_another_kind,
    other_dimensions,
    other_type,
    no_numbers,
    a_rank_that_fills_the_memory,
    not_json,
)


def test_records_of_strangers_cost_only_themselves(tmp_path):
    run = tmp_path / "run"
    bad = {10 * (1 + number): damage for number, damage in enumerate(DAMAGES)}
    write_records(run, sorted([5, *bad, 105, 110]))
    for step, damage in bad.items():
        damage(run / STORE / f"step-{step:012d}.safetensors")
    rewrite_header(
        run / STORE / "step-000000000110.safetensors",
        lambda _, groups: groups["update"]["variables"]["count"]["attributes"].update(units=float("nan")),
    )
    result = analyze(run, "--no-report", "--json")
    assert result.returncode == 0
    assert [line.split(": ")[0] for line in result.stderr.splitlines()] == [
        f"OD309 warning dynamics/records/step-{step:012d}.safetensors" for step in bad
    ]
    assert result.stderr.count(": The captured step cannot be used: ") == len(bad)
    tree = open_run(run)
    schema.check(tree)
    assert tree["update"]["step"].values.tolist() == [5, 105, 110]
    assert tree["update"]["from_step"].values.tolist() == [0, -1, 105]


def test_text_of_records_is_escaped_in_the_page(tmp_path):
    run = tmp_path / "run"
    names = (f"{HOSTILE}.0.q", f"{HOSTILE}.1.q")
    finding = Finding("OD301", HOSTILE, HOSTILE, file=HOSTILE, matrix=HOSTILE, evidence={HOSTILE: HOSTILE}).to_dict()
    attributes = {
        "findings": [finding],
        "gaps": [{"step": 1, "reason": HOSTILE}],
        "configuration": json.dumps({HOSTILE: HOSTILE}),
        "disk_names": {HOSTILE: HOSTILE},
    }
    write_records(run, drifting([5, 10], names=names), attributes=attributes)
    assert analyze(run).returncode == 0
    page = (run / "dynamics" / "analysis" / "report.html").read_text()
    assert "<script>alert" not in page
    assert page.count("<script") == 1
    assert "&lt;script&gt;alert" in page
    for figure in (run / "dynamics" / "analysis" / "figures").iterdir():
        assert "<script" not in figure.read_text()


def test_a_capture_without_a_step_and_no_checkpoint(tmp_path):
    store = write_records(tmp_path / "run", [])
    result = analyze(tmp_path / "run")
    assert result.returncode == 2
    assert f"The records in '{store}' hold no step that can be used; wait for the first" in result.stderr
    assert not (tmp_path / "run" / "dynamics" / "analysis").exists()


def test_a_capture_without_a_step_beside_checkpoints(tmp_path):
    run = write_run(tmp_path / "run", drifting([10, 20]))
    write_records(run, [])
    summary = summary_of(run)
    assert summary["steps"] == [10, 20]
    assert summary["captured"] == {"steps": 0, "checkpoints": 2}


def test_a_store_that_is_none_beside_checkpoints(tmp_path):
    run = write_run(tmp_path / "run", drifting([10, 20]))
    path = write_records(run)
    for record in path.glob("step-*"):
        record.unlink()
    (path / "run.json").write_text("{")
    result = analyze(run, "--no-report")
    assert result.returncode == 0
    (line,) = result.stderr.splitlines()
    assert re.match(
        r"OD309 warning dynamics/records: It has the name of a folder of records, and no recorder wrote it", line
    )
    assert open_run(run)["update"]["step"].values.tolist() == [10, 20]


@pytest.mark.parametrize("place", ["", STORE], ids=["the run", "the store"])
def test_a_store_that_is_none_alone(captured, place):
    (captured / STORE / "run.json").write_text('{"kind": "optimization-dynamics records", "format": 99}')
    result = analyze(captured / place)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "are of format 99, and this version reads 2. Upgrade optimization-dynamics." in result.stderr
