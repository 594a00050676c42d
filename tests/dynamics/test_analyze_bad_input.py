"""The command line on runs that are damaged, empty or hostile: each problem is named, the rest is saved."""

import json
import os
import pickle

import numpy as np
import pytest
import torch

from dynamics import open_run, schema
from tests.command import analyze, assert_refused
from tests.runs import NAMES, adapter_config, random_factors, write_adapter, write_run, write_state

LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1000\n"


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run")


def test_no_such_folder(tmp_path):
    assert_refused(analyze(tmp_path / "nowhere"), 2, "nowhere")


def test_an_empty_folder(tmp_path):
    assert_refused(analyze(tmp_path), 2, "is empty", "Pass a Trainer output folder, or one checkpoint.")


def test_a_folder_without_checkpoints(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    assert_refused(analyze(tmp_path), 2, "No checkpoints in", "Pass a Trainer output folder, or one checkpoint.")


def test_no_matrix_has_the_name(run):
    assert_refused(analyze(run, "--matrices", "k_proj"), 2, "k_proj")


def damage_truncated(checkpoint):
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-40])


def damage_empty(checkpoint):
    (checkpoint / "adapter_model.safetensors").write_bytes(b"")


def damage_lfs(checkpoint):
    (checkpoint / "adapter_model.safetensors").write_text(LFS)


def damage_header(checkpoint):
    weights = checkpoint / "adapter_model.safetensors"
    weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])


def damage_config(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{not json")


def damage_no_config(checkpoint):
    (checkpoint / "adapter_config.json").unlink()


def damage_no_weights(checkpoint):
    (checkpoint / "adapter_model.safetensors").unlink()


def damage_kind(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))


def damage_unknown_kind(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps({"peft_type": "SOMETHING_NEW"}))


def damage_rank(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter_config(rank=3)))


def damage_dora(checkpoint):
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter_config(use_dora=True)))


DAMAGES = [value for name, value in list(globals().items()) if name.startswith("damage_")]


def test_damaged_checkpoints_are_named_and_the_rest_is_saved(tmp_path):
    """A whole checkpoint stands before and after each that is damaged."""
    damaged = {20 * (1 + place): damage for place, damage in enumerate(DAMAGES)}
    whole = [step - 10 for step in damaged] + [10 + max(damaged)]
    run = write_run(tmp_path / "run", sorted([*whole, *damaged]))
    for step, damage in damaged.items():
        damage(run / f"checkpoint-{step}")
    result = analyze(run, "--quiet", "--no-report")
    for step in damaged:
        assert_refused(result, 1, f"checkpoint-{step}")
    tree = open_run(run)
    schema.check(tree)
    assert set(whole) <= set(tree["update"]["step"].values.tolist())
    assert np.isfinite(tree["update"]["frobenius_norm"].sel(step=whole, kind="total")).all()


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.removeprefix("damage_"))
def test_a_damaged_adapter_alone(tmp_path, damage):
    damage(write_adapter(tmp_path / "adapter"))
    result = analyze(tmp_path / "adapter")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert all(len(line) < 600 for line in result.stderr.splitlines())
    assert not (tmp_path / "adapter" / "dynamics").exists()


def test_a_number_that_is_not_finite_is_exit_status_1(tmp_path):
    factors = random_factors()
    factors[NAMES[0]][0][0, 0] = torch.nan
    result = analyze(write_run(tmp_path / "run", {1: factors}), "--quiet", "--no-report")
    assert_refused(result, 1, NAMES[0], "checkpoint-1/adapter_model.safetensors")


def test_zero_updates_are_no_failure(tmp_path):
    factors = {name: (torch.zeros_like(left), right) for name, (left, right) in random_factors().items()}
    result = analyze(write_run(tmp_path / "run", {0: factors}))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "dynamics" / "analysis" / "report.html").exists()


class Payload:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_pickle_that_would_execute_code_is_not_executed(tmp_path):
    run, mark = write_run(tmp_path / "run", [1]), tmp_path / "executed"
    checkpoint = run / "checkpoint-2"
    checkpoint.mkdir()
    (checkpoint / "adapter_config.json").write_text(json.dumps(adapter_config()))
    torch.save({"x": Payload(mark)}, checkpoint / "adapter_model.bin")
    (checkpoint / "trainer_state.json").write_text("{}")
    assert_refused(analyze(run, "--quiet", "--no-report"), 1, "checkpoint-2/adapter_model.bin")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Payload(mark)))  # the payload works
    assert mark.exists()


def test_text_from_files_is_escaped_in_the_page(tmp_path):
    name = "model.layers.0.<script>alert(1)</script>"
    run = write_run(tmp_path / "run", {1: random_factors([name])}, config=adapter_config(target_modules=["<script>"]))
    assert analyze(run).returncode == 0
    page = (run / "dynamics" / "analysis" / "report.html").read_text()
    assert "<script>alert(1)" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_states_alone_are_not_a_run(tmp_path):
    write_state(tmp_path / "checkpoint-5", 5)
    assert_refused(analyze(tmp_path), 2, "checkpoint-5")


def damaged_run(folder):
    """An error, and a warning about another checkpoint."""
    run = write_run(folder)
    damage_truncated(run / "checkpoint-20")
    (run / "checkpoint-30" / "trainer_state.json").write_text("{")
    return run


@pytest.mark.parametrize(
    ("how", "told"), [([], ["error", "warning"]), (["--json"], ["error", "warning"]), (["--quiet"], ["error"])]
)
def test_errors_and_warnings_are_lines_on_stderr(tmp_path, how, told):
    run = damaged_run(tmp_path / "run")
    lines = analyze(run, "--no-report", *how).stderr.splitlines()
    assert [line.split(" ")[1] for line in lines] == told
    assert lines[0].startswith("OD101 error checkpoint-20/adapter_model.safetensors: ")
    remedies = {finding["code"]: finding["remedy"] for finding in json.loads(open_run(run).attrs["findings"])}
    assert all(line.endswith(remedies[line[:5]]) for line in lines)


def test_of_several_runs_each_line_names_its_run(tmp_path):
    run, other = damaged_run(tmp_path / "run"), write_run(tmp_path / "other", [1])
    lines = analyze(run, other, "--no-report", "--quiet", "--out", tmp_path / "out").stderr.splitlines()
    assert [line.partition(": ")[0] for line in lines] == ["OD101 error run, checkpoint-20/adapter_model.safetensors"]


def test_each_error_is_told_once(tmp_path):
    run = write_run(tmp_path / "run")
    for step in (10, 20):
        (run / f"checkpoint-{step}" / "adapter_model.safetensors").write_bytes(b"")
    result = analyze(run, "--no-report")
    errors = [line for line in result.stderr.splitlines() if " error " in line]
    assert len(errors) == 2
    assert all(line not in " ".join(result.stdout.split()) for line in errors)
    assert "Findings: 2 errors" in result.stdout
    assert "They are explained in summary.json." in " ".join(result.stdout.split())
