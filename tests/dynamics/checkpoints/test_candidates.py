"""What lies in one folder, told by the names of its files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.checkpoints.candidates import CheckpointFolder, candidate, entries, of_file
from tests.dynamics.checkpoints.test_folders import FIRST, LAST, assert_updates
from tests.runs import write_run
from tests.whole_models import write_distributed


def folder_of(root: Path, *files: str) -> CheckpointFolder:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return candidate(root, 10, entries(root))


def test_the_safetensors_of_an_adapter_go_before_its_bin(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, "adapter_model.bin", "adapter_model.safetensors", "adapter_config.json")
    (adapter,) = checkpoint.adapters
    assert (adapter.name, adapter.weights) == ("default", tmp_path / "adapter_model.safetensors")
    assert adapter.config == tmp_path / "adapter_config.json"
    assert checkpoint.whole is None


def test_named_adapters_lie_in_subfolders(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, "adapter_model.safetensors", "style/adapter_model.safetensors")
    assert [adapter.name for adapter in checkpoint.adapters] == ["default", "style"]


def test_a_subfolder_with_a_training_state_is_another_run(tmp_path: Path) -> None:
    best = ("best/adapter_model.safetensors", "best/trainer_state.json")
    assert [adapter.name for adapter in folder_of(tmp_path, "adapter_model.bin", *best).adapters] == ["default"]


def test_a_whole_model_goes_before_weights_of_other_names(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, "mm_projector.bin", "model.safetensors", "optimizer.pt")
    assert checkpoint.whole == tmp_path / "model.safetensors"
    assert checkpoint.beside == (tmp_path / "mm_projector.bin",)
    assert checkpoint.holds_weights


def test_weights_below_the_folder_the_trained_ones_first(tmp_path: Path) -> None:
    checkpoint = folder_of(tmp_path, "critic/model.safetensors", "unet/model.safetensors", "unet_ema/model.safetensors")
    assert checkpoint.whole == tmp_path / "unet/model.safetensors"
    assert checkpoint.others == (tmp_path / "critic", tmp_path / "unet_ema")


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state_0.pth", "tokenizer.bin", "wandb/model.safetensors"])
def test_no_weights(name: str, tmp_path: Path) -> None:
    assert not folder_of(tmp_path, name).holds_weights


@pytest.mark.parametrize("has_state", [False, True])
def test_one_file_as_a_checkpoint(has_state: bool, tmp_path: Path) -> None:
    (tmp_path / "trainer_state.json").write_text("{}")
    path = tmp_path / "lora-000010.safetensors"
    checkpoint = of_file(tmp_path, 10, path, entries(tmp_path), has_state=has_state)
    assert [adapter.weights for adapter in checkpoint.adapters] == [path]
    assert (checkpoint.state is not None) == has_state


def test_the_trainer_s_state_is_no_weights(tmp_path: Path) -> None:
    write_run(tmp_path, {10: FIRST, 20: LAST})
    states = ("optimizer.pt", "scheduler.pt", "rng_state_0.pth", "training_args.bin", "optimizer.bin", "scaler.pt")
    for step in (10, 20):
        for name in (*states, "random_states_0.pkl", "sampler.bin"):
            torch.save({"state": torch.ones(3, 3)}, tmp_path / f"checkpoint-{step}" / name)
        write_distributed(tmp_path / f"checkpoint-{step}" / "optimizer_0", {"state": torch.ones(3, 3)})
    trajectory = open_trajectory(tmp_path)
    assert_updates(trajectory.checkpoints[1], LAST)
    assert {finding.code for finding in trajectory.findings} == {"OD117"}
