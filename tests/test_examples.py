"""The example trains in earnest, and the run that ships with the project is a whole one, small and anonymous."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "train_lora.py"
SAMPLE = EXAMPLES / "runs" / "pydoc_lora"
SAMPLE_STEPS = list(range(25, 201, 25))
RUN_FILES = {"adapter_config.json", "adapter_model.safetensors", "trainer_state.json"}
ABSOLUTE_PATH = re.compile(r'"(?:/|~|\\\\|[A-Za-z]:[/\\])[^"]*"')  # as a JSON string, on any system


#: What makes the example small.
BRIEFLY = ("--steps", "3", "--checkpoints", "2", "--base-steps", "2", "--rank", "2")


def train(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the example as a user does; offline, so that a download would be an error.

    One thread: several that wait for each other on busy cores, as beside other tests, are many times slower.
    """
    pytest.importorskip("transformers", reason="the example trains with transformers: install the 'train' extra")
    pytest.importorskip("peft", reason="the example trains with peft: install the 'train' extra")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, check=False
    )


@pytest.fixture(scope="module")
def brief_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = tmp_path_factory.mktemp("example") / "run"
    return out, train("--out", str(out), *BRIEFLY)


@pytest.fixture
def example() -> ModuleType:
    """The script as a module; it is no package's, so it is loaded by its path."""
    pytest.importorskip("transformers", reason="the example imports transformers: install the 'train' extra")
    pytest.importorskip("peft", reason="the example imports peft: install the 'train' extra")
    spec = spec_from_file_location("train_lora", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def evaluation_losses(checkpoint: Path) -> dict[int, float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry}


def training_losses(checkpoint: Path) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def json_texts(checkpoint: Path) -> str:
    """All text of a checkpoint: both JSON files, and the key-value pairs and names in the header of its weights."""
    with safe_open(checkpoint / "adapter_model.safetensors", framework="pt") as weights:
        header = json.dumps([weights.metadata(), list(weights.keys())])
    return header + "".join((checkpoint / name).read_text() for name in ("adapter_config.json", "trainer_state.json"))


# ---- the script ----


def test_it_ends_well_and_says_how_to_analyse_the_run(brief_run):
    out, process = brief_run
    assert process.returncode == 0, process.stderr
    assert process.stdout.endswith(f"python -m dynamics.analyze {out}\n")


def test_it_saves_whole_checkpoints_the_last_step_among_them(brief_run):
    out, _ = brief_run
    assert {folder.name for folder in out.iterdir()} == {"checkpoint-2", "checkpoint-3"}
    assert {file.name for file in (out / "checkpoint-2").iterdir()} >= RUN_FILES
    assert {file.name for file in (out / "checkpoint-3").iterdir()} >= RUN_FILES


def test_down_proj_has_twice_the_rank(brief_run):
    out, _ = brief_run
    weights = load_file(out / "checkpoint-3" / "adapter_model.safetensors")
    assert weights["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (2, 96)
    assert weights["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"].shape == (4, 192)


def test_it_evaluates_before_training_and_at_each_checkpoint(brief_run):
    out, _ = brief_run
    assert list(evaluation_losses(out / "checkpoint-3")) == [0, 2, 3]


def test_the_same_seed_gives_the_same_weights(brief_run, example, tmp_path, monkeypatch):
    """In a process of its own and in this one, which has trained other models before."""
    out, _ = brief_run
    monkeypatch.setattr(sys, "argv", [SCRIPT.name, "--out", str(tmp_path / "again"), *BRIEFLY])
    example.main()
    first = (out / "checkpoint-3" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "again" / "checkpoint-3" / "adapter_model.safetensors").read_bytes() == first


def test_it_does_not_mix_two_trainings_in_one_folder(example, tmp_path, monkeypatch, capsys):
    (tmp_path / "checkpoint-5").mkdir()
    monkeypatch.setattr(sys, "argv", ["train_lora.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    message = f"error: '{tmp_path}' already holds checkpoints. Pass a new folder, or delete that one.\n"
    assert capsys.readouterr().err.endswith(message)


@pytest.mark.parametrize("number", ["0", "-1", "1.5", "many", ""])
def test_it_refuses_a_count_below_one(example, monkeypatch, capsys, number):
    monkeypatch.setattr(sys, "argv", ["train_lora.py", "--out", "unused", f"--steps={number}"])
    with pytest.raises(SystemExit, match="2"):
        example.main()
    message = f"error: argument --steps: expected a whole number of at least 1, got {number!r}\n"
    assert capsys.readouterr().err.endswith(message)


def test_no_paragraph_stands_in_both_the_training_and_the_evaluation_text(example):
    paragraphs = example.english_prose().split("\n")
    assert len(paragraphs) > 500
    assert len(set(paragraphs)) == len(paragraphs)


def test_windows_are_rows_of_bytes(example):
    text = "é" * 100 + "a" * 100  # 2 · 100 + 100 bytes: two windows of 128, and 44 dropped
    rows = example.windows(text)
    assert rows.shape == (2, 128)
    assert bytes(rows.flatten().tolist()) == text.encode()[:256]


# ---- the sample run ----


def test_the_sample_holds_what_a_run_needs_and_nothing_else():
    found = {str(file.relative_to(SAMPLE)) for file in SAMPLE.glob("checkpoint-*/*")}
    assert found == {f"checkpoint-{step}/{name}" for step in SAMPLE_STEPS for name in RUN_FILES}


def test_the_sample_is_smaller_than_a_megabyte():
    assert sum(file.stat().st_size for file in SAMPLE.glob("checkpoint-*/*")) < 1_000_000


@pytest.mark.parametrize("path", ["/home/me/run", "~/run", r"C:\\run", "C:/run", r"\\\\server\\run"])
def test_an_absolute_path_would_be_found(path):
    assert ABSOLUTE_PATH.search(f'{{"best_model_checkpoint": "{path}"}}')


@pytest.mark.parametrize("step", SAMPLE_STEPS)
def test_the_sample_names_no_machine(step):
    assert ABSOLUTE_PATH.findall(json_texts(SAMPLE / f"checkpoint-{step}")) == []


@pytest.mark.parametrize("step", SAMPLE_STEPS)
def test_the_state_of_a_sample_checkpoint_is_of_its_step(step):
    state = json.loads((SAMPLE / f"checkpoint-{step}" / "trainer_state.json").read_text())
    assert (state["global_step"], state["max_steps"]) == (step, 200)


def test_the_sample_learns():
    evaluation = evaluation_losses(SAMPLE / "checkpoint-200")
    training = training_losses(SAMPLE / "checkpoint-200")
    assert list(evaluation) == [0, *SAMPLE_STEPS]
    assert list(evaluation.values()) == sorted(evaluation.values(), reverse=True)
    assert evaluation[200] < 0.9 * evaluation[0]
    assert sum(training[-5:]) < 0.9 * sum(training[:5])


def test_the_sample_has_an_update_in_each_matrix_that_moves_between_checkpoints():
    first = load_file(SAMPLE / "checkpoint-25" / "adapter_model.safetensors")
    last = load_file(SAMPLE / "checkpoint-200" / "adapter_model.safetensors")
    assert len(last) == 2 * 5 * 4  # A and B, five matrices in each of four layers
    assert first.keys() == last.keys()
    assert all(weight.isfinite().all() for weight in last.values())
    assert all(torch.linalg.norm(last[name]) > torch.linalg.norm(first[name]) > 0 for name in last if "lora_B" in name)
