"""One checkpoint folder: sums of its adapters, and weights beside what is analysed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dynamics.checkpoints import open_trajectory
from tests.dynamics.checkpoints.test_folders import FIRST, LAST, assert_updates, products, with_code
from tests.dynamics.checkpoints.test_open import only
from tests.runs import adapter_config, adapter_tensors, random_factors, write_adapter, write_run, write_state
from tests.whole_models import write_model

A, B = torch.randn(4, 16), torch.randn(24, 4)


# --- several adapters --------------------------------------------------------------------------


def several(folder: Path, steps: tuple[int, ...] = (10, 20), **shape: Any) -> Path:
    for step in steps:
        write_adapter(folder / f"checkpoint-{step}", random_factors(["q"], seed=step))
        write_adapter(folder / f"checkpoint-{step}" / "style", random_factors(["q"], seed=step + 1, **shape))
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_of_adapters(dtype: torch.dtype, tmp_path: Path) -> None:
    trajectory = open_trajectory(several(tmp_path, rank=2, dtype=dtype))
    assert trajectory.matrices == ("q", "q@default", "q@style")
    assert trajectory.checkpoints[0].shapes["q"].rank == 6
    with trajectory.checkpoints[0].open() as matrices:
        expected = matrices["q@default"].to_dense() + matrices["q@style"].to_dense()
        torch.testing.assert_close(matrices["q"].to_dense(), expected, rtol=1e-14, atol=1e-14)
    assert "right only if all of them are active" in only(trajectory, "OD121").message


def test_sum_of_adapters_of_one_scale_keeps_the_stored_dtype(tmp_path: Path) -> None:
    trajectory = open_trajectory(several(tmp_path))
    with trajectory.checkpoints[0].open() as matrices:
        assert matrices["q"].dtype == torch.float32


def test_no_sum_without_all_adapters(tmp_path: Path) -> None:
    several(tmp_path)
    (tmp_path / "checkpoint-20" / "style" / "adapter_config.json").write_text("{")
    trajectory = open_trajectory(tmp_path)
    assert list(trajectory.checkpoints[1].shapes) == ["q@default"]
    assert only(trajectory, "OD102").file == "checkpoint-20/style/adapter_config.json"


def test_one_named_adapter_needs_no_at(tmp_path: Path) -> None:
    write_adapter(tmp_path / "checkpoint-10" / "style", random_factors(["q"]))
    assert open_trajectory(tmp_path).matrices == ("q",)


# --- weights beside those that are analysed --------------------------------------------------------


def write_llava(folder: Path, step: int, name: str = "non_lora_trainables.bin") -> Path:
    write_adapter(folder, FIRST if step == 10 else LAST)
    write_state(folder, step)
    tensors = {
        "base_model.model.model.mm_projector.0.weight": torch.full((6, 4), float(step)),
        "base_model.model.model.mm_projector.0.bias": torch.ones(6),
    }
    save_file(tensors, folder / name) if name.endswith(".safetensors") else torch.save(tensors, folder / name)
    return folder


NAMES_BESIDE = ("non_lora_trainables.bin", "mm_projector.bin", "non_lora_state_dict.bin", "vit.safetensors", "score.pt")


@pytest.mark.parametrize("name", NAMES_BESIDE)
def test_trained_weights_beside_an_adapter_are_named(name: str, tmp_path: Path) -> None:
    for step in (10, 20):
        write_llava(tmp_path / f"checkpoint-{step}", step, name)
    trajectory = open_trajectory(tmp_path)
    assert_updates(trajectory.checkpoints[1], LAST)
    (warning,) = with_code(trajectory.findings, "OD128")
    assert (warning.file, warning.severity) == (f"checkpoint-10/{name}", "warning")
    assert warning.evidence == {"matrices": ["model.mm_projector.0"], "tensors": 2, "steps": [10, 20]}
    assert warning.message.endswith(": 2 tensors (1 weight matrix: model.mm_projector.0).")
    assert "(--base)" in warning.remedy


@pytest.mark.parametrize("name", NAMES_BESIDE)
def test_trained_weights_beside_an_adapter_are_read_with_the_base(name: str, tmp_path: Path) -> None:
    for step in (10, 20):
        write_llava(tmp_path / "run" / f"checkpoint-{step}", step, name)
    write_model(tmp_path / "base", {"model.mm_projector.0.weight": torch.ones(6, 4)})
    trajectory = open_trajectory(tmp_path / "run", base=tmp_path / "base")
    assert with_code(trajectory.findings, "OD128") == []
    held = products(trajectory.checkpoints[1])
    assert held["model.mm_projector.0"].unique().tolist() == [20.0]
    assert trajectory.checkpoints[1].shapes["model.mm_projector.0"].holds == "weight"
    assert trajectory.base is not None
    assert products(trajectory.base)["model.mm_projector.0"].unique().tolist() == [1.0]
    paths = {str(entry["path"]) for entry in trajectory.checkpoints[1].inputs}
    assert paths == {"checkpoint-20/adapter_model.safetensors", f"checkpoint-20/{name}"}


def test_weights_beside_an_adapter_at_the_end_of_the_run_are_named(tmp_path: Path) -> None:
    """Also where the adapter itself is left out, since it is that of the last checkpoint."""
    write_run(tmp_path, {10: FIRST, 20: LAST})
    write_llava(tmp_path, 20)
    (warning,) = with_code(open_trajectory(tmp_path).findings, "OD128")
    assert warning.file == "non_lora_trainables.bin"


def test_a_training_of_the_projector_alone(tmp_path: Path) -> None:
    for step in (10, 20):
        write_state(tmp_path / f"checkpoint-{step}", step)
        tensors = {
            "model.mm_projector.0.weight": torch.full((6, 4), float(step)),
            "model.mm_projector.0.bias": torch.ones(6),
        }
        torch.save(tensors, tmp_path / f"checkpoint-{step}" / "mm_projector.bin")
    trajectory = open_trajectory(tmp_path)
    assert (trajectory.steps, trajectory.matrices) == ((10, 20), ("model.mm_projector.0",))
    assert products(trajectory.checkpoints[1])["model.mm_projector.0"].unique().tolist() == [20.0]


def test_copies_beside_an_adapter_are_notes(tmp_path: Path) -> None:
    write_adapter(tmp_path, FIRST)
    torch.save({"layers.0.q.lora_a.weight": torch.ones(2, 2)}, tmp_path / "adapter_model.pt")
    save_file({"other.weight": torch.ones(2, 2)}, tmp_path / "model_ema.safetensors")
    notes = with_code(open_trajectory(tmp_path).findings, "OD126")
    assert [note.file for note in notes] == ["adapter_model.pt", "model_ema.safetensors"]
    assert "in another format" in notes[0].message
    assert "an average of weights (EMA)" in notes[1].message


def test_weights_beside_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    write_adapter(tmp_path, FIRST)
    torch.save({"model": {"v_head.weight": torch.ones(1, 4)}}, tmp_path / "value_head.pt")
    (warning,) = with_code(open_trajectory(tmp_path).findings, "OD128")
    assert warning.file == "value_head.pt"
    assert "It does not hold a dictionary of tensors." in warning.message


@pytest.mark.parametrize("form", ["short", "with the adapter's name", "twice"])
def test_a_saved_module_under_each_of_its_keys(form: str, tmp_path: Path) -> None:
    head = torch.randn(20, 8)
    prefix = "base_model.model.lm_head"
    tensors = adapter_tensors(random_factors(["q"]))
    extra = {
        "short": {f"{prefix}.modules_to_save.weight": head},
        "with the adapter's name": {f"{prefix}.modules_to_save.default.weight": head},
        "twice": {
            f"{prefix}.modules_to_save.weight": head,
            f"{prefix}.weight": head.clone(),
            f"{prefix}.original_module.weight": torch.zeros(20, 8),
        },
    }[form]
    if form == "with the adapter's name":
        tensors = {key.replace(".weight", ".default.weight"): tensor for key, tensor in tensors.items()}
    write_adapter(tmp_path / "run", tensors={**tensors, **extra}, config=adapter_config())
    write_model(tmp_path / "base", {"lm_head.weight": torch.zeros(20, 8)})
    trajectory = open_trajectory(tmp_path / "run", base=tmp_path / "base")
    assert set(trajectory.matrices) == {"lm_head", "q"}
    assert torch.equal(products(trajectory.checkpoints[0])["lm_head"], head.double())


def test_layers_of_a_saved_module_stay_apart(tmp_path: Path) -> None:
    layers = {
        f"base_model.model.classifier.modules_to_save.{name}.weight": torch.ones(3, 3) for name in ("dense", "out")
    }
    write_adapter(tmp_path / "run", random_factors(["q"]), extra=layers)
    write_model(tmp_path / "base", {f"classifier.{name}.weight": torch.zeros(3, 3) for name in ("dense", "out")})
    trajectory = open_trajectory(tmp_path / "run", base=tmp_path / "base")
    assert set(trajectory.matrices) == {"classifier.dense", "classifier.out", "q"}
