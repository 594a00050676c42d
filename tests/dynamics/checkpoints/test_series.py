"""Adapter files in one folder as checkpoints: steps from their names or metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dynamics.checkpoints import NotARun, open_trajectory
from probes.low_rank import LowRankMatrix
from tests.runs import write_state


def write(folder: Path, name: str, seed: int = 0, suffixes: tuple[str, str] = ("down", "up"), **metadata: str) -> Path:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, 10, generator=generator), torch.randn(6, 4, generator=generator)
    keys = [f"lora_unet_q.lora_{suffix}.weight" for suffix in suffixes]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(dict(zip(keys, (down, up), strict=True)), folder / f"{name}.safetensors", metadata=metadata)
    return folder


@pytest.mark.parametrize("pattern", ["style-{:06d}", "style-step{:08d}", "style_{:09d}", "my-style-v2-{:06d}"])
def test_steps_are_the_numbers_in_the_names(pattern: str, tmp_path: Path) -> None:
    for step in (10, 2, 300):
        write(tmp_path, pattern.format(step), seed=step)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (2, 10, 300)
    assert "Steps are the numbers in the file names" in str(trajectory.findings)
    assert trajectory.checkpoints[1].inputs[0]["path"] == f"{pattern.format(10)}.safetensors"


def test_steps_of_the_metadata_count_first(tmp_path: Path) -> None:
    write(tmp_path, "style-000001", seed=1, ss_steps="150")
    write(tmp_path, "style-000002", seed=2, ss_steps="300")
    write(tmp_path, "style", seed=3, ss_steps="450")
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (150, 300, 450)
    assert "Steps are the numbers" not in str(trajectory.findings)


@pytest.mark.parametrize("steps", ["", "many", "-3", "1" * 30, "300"])
def test_metadata_that_give_no_step(steps: str, tmp_path: Path) -> None:
    write(tmp_path, "style-000001", seed=1, ss_steps=steps)
    write(tmp_path, "style-000002", seed=2, ss_steps="300")
    assert open_trajectory(tmp_path).steps == (1, 2)


def test_a_final_file_like_the_last_is_left_out(tmp_path: Path) -> None:
    write(tmp_path, "style-000001", seed=1)
    write(tmp_path, "style-000002", seed=2)
    write(tmp_path, "style", seed=2)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (1, 2)
    (note,) = [finding for finding in trajectory.findings if finding.code == "OD110"]
    assert (note.file, "the same weights as the last checkpoint" in note.message) == ("style.safetensors", True)


def test_a_final_file_of_an_unknown_step_is_said_to_be_left_out(tmp_path: Path) -> None:
    write(tmp_path, "style-000001", seed=1)
    write(tmp_path, "style", seed=2)
    (note,) = [finding for finding in open_trajectory(tmp_path).findings if finding.code == "OD110"]
    assert "its step is unknown, and its weights differ" in note.message


def test_a_lone_file_is_step_zero(tmp_path: Path) -> None:
    assert open_trajectory(write(tmp_path, "style")).steps == (0,)


def test_files_of_several_trainings_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "style-000001")
    write(tmp_path, "person")
    with pytest.raises(
        NotARun, match=r"holds adapters of 2 trainings, going by their names: person, style\. Put the files"
    ):
        open_trajectory(tmp_path)


def test_one_number_twice(tmp_path: Path, codes: Any) -> None:
    write(tmp_path, "style-000001", seed=1)
    write(tmp_path, "style-0000001", seed=2)
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (1,)
    assert "OD111" in codes(trajectory.findings)


def test_other_files_are_no_adapters(tmp_path: Path) -> None:
    write(tmp_path, "style")
    save_file({"emb_params": torch.ones(2, 3)}, tmp_path / "embedding.safetensors")
    assert open_trajectory(tmp_path).steps == (0,)


def test_a_broken_file_costs_its_step(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        write(tmp_path, f"style-{step:06d}", seed=step)
    (tmp_path / "style-000002.safetensors").write_bytes(b"")
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (1, 3)
    (error,) = [finding for finding in trajectory.findings if finding.code == "OD101"]
    assert (error.file, error.step) == ("style-000002.safetensors", 2)


def test_checkpoints_of_diffusers(tmp_path: Path) -> None:
    for step in (10, 20):
        folder = tmp_path / f"checkpoint-{step}"
        write(folder, "pytorch_lora_weights", step, ("A", "B"))
        write_state(folder, step)
    assert open_trajectory(tmp_path).steps == (10, 20)


def test_a_run_of_mlx(tmp_path: Path) -> None:
    factors = {
        step: {"q.lora_a": torch.full((10, 4), float(step)), "q.lora_b": torch.ones(4, 6)} for step in (100, 200)
    }
    for step, tensors in factors.items():
        save_file(tensors, tmp_path / f"{step:07d}_adapters.safetensors")
    save_file(factors[200], tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_parameters": {"rank": 4, "scale": 2.0}}))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (100, 200)
    with trajectory.checkpoints[0].open() as matrices:
        matrix = matrices["q"]
        assert isinstance(matrix, LowRankMatrix)
        assert torch.equal(matrix.to_dense(), torch.full((6, 10), 2.0 * 4 * 100, dtype=torch.float64))
    assert [finding.file for finding in trajectory.findings if finding.code == "OD110"] == ["adapters.safetensors"]
