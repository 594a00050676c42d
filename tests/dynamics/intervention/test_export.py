"""An arm on disk is an adapter that gives the arm's losses, wherever it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

import dynamics
from probes import gradient_gram
from probes.additions import added
from tests.families import FAMILIES
from tests.updates import adapted_model, dense_model, probe_tasks, texts, trained


def loss(model: nn.Module) -> float:
    ids = torch.stack([sample["input_ids"] for sample in texts(6, seed=9)])
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss.item()


@pytest.fixture(scope="module")
def arms():
    model, tasks = adapted_model(torch.float32), probe_tasks()
    change, _, _ = trained(model)
    gram = gradient_gram(model, tasks, update=change)
    names = ("full", "on", "off", "random", "sigma_top")
    return model, dynamics.counterfactuals(model, tasks, gram, change, k=2, arms=names)


@pytest.mark.parametrize(("arm", "rank"), [("full", 3), ("on", 6), ("off", 9), ("random", 6), ("sigma_top", 5)])
def test_peft_gives_the_losses_of_the_arm(arms, tmp_path: Path, arm: str, rank: int) -> None:
    model, counterfactuals = arms
    folder = counterfactuals.save(tmp_path / arm, arm)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] <= rank
    assert config["lora_alpha"] == config["r"]
    base = adapted_model(torch.float32).unload()
    loaded = PeftModel.from_pretrained(base, folder).eval()
    with added(model, counterfactuals.whole[arm]):
        expected = loss(model)
    assert loss(loaded) == pytest.approx(expected, rel=1e-5)
    assert expected != pytest.approx(loss(model), rel=1e-6)
    assert f"`{arm}`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_layers_of_other_kinds(family: str, tmp_path: Path) -> None:
    """Conv1D, convolutions and linear layers go where PEFT looks for them."""
    from dynamics.intervention.export import save_arm
    from probes import LowRankMatrix, watched_matrices

    made = FAMILIES[family]
    model, batch = made.model_and_batch()
    model = get_peft_model(model, made.lora(lora_dropout=0.0)).eval()
    generator = torch.Generator().manual_seed(0)
    change = {
        name: LowRankMatrix(*(0.1 * torch.randn(*size, generator=generator) for size in ((out, 1), (1, in_))))
        for name, (out, in_) in ((name, matrix.shape) for name, matrix in watched_matrices(model).items())
    }
    folder = save_arm(model, change, tmp_path / "arm", "full")
    loaded = PeftModel.from_pretrained(made.model(), folder).eval()
    with torch.no_grad():
        with added(model, change):
            expected = model(**batch).loss
        torch.testing.assert_close(loaded(**batch).loss, expected, rtol=1e-5, atol=1e-6)


def test_weights_saved_beside_an_adapter(tmp_path: Path) -> None:
    from tests.runs import llama

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model, tasks = get_peft_model(llama(), config).eval(), probe_tasks()
    change, _, _ = trained(model)
    assert "lm_head" in change
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    folder = arms.save(tmp_path / "on", "on")
    loaded = PeftModel.from_pretrained(llama(), folder).eval()
    with added(model, arms.whole["on"]):
        assert loss(loaded) == pytest.approx(loss(model), rel=1e-5)


def test_dense_arms_are_differences(tmp_path: Path) -> None:
    model, tasks = dense_model(torch.float32), probe_tasks()
    change, _, _ = trained(model)
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    folder = arms.save(tmp_path / "off", "off")
    with added(model, arms.whole["off"]):
        expected = loss(model)
    for name, difference in load_file(folder / "differences.safetensors").items():
        assert difference.dtype == torch.float32
        model.get_parameter(name).data += difference
    assert loss(model) == pytest.approx(expected, rel=1e-5)


def test_a_folder_that_holds_anything_is_refused(arms, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(FileExistsError, match="new or empty"):
        arms[1].save(tmp_path, "on")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_experts_cannot_be_written_as_an_adapter(tmp_path: Path) -> None:
    from dynamics.intervention.export import save_arm

    made = FAMILIES["mixtral"]
    model = get_peft_model(made.model(), made.lora())
    with pytest.raises(ValueError, match="cannot hold alone"):
        save_arm(model, {}, tmp_path / "arm", "full")
    assert not (tmp_path / "arm").exists()
