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
from dynamics.intervention.export import save_arm
from dynamics.intervention.update_vectors import weighted_sum
from probes import LowRankMatrix, gradient_gram, watched_matrices
from probes.additions import added
from tests.families import FAMILIES
from tests.runs import llama
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
    assert f"at the start of an increment plus the part `{arm}`" in (folder / "README.md").read_text()


@pytest.mark.parametrize("family", ["gpt2", "vit"])
def test_layers_of_other_kinds(family: str, tmp_path: Path) -> None:
    """Conv1D, convolutions and linear layers go where PEFT looks for them."""
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


def test_weights_saved_beside_an_adapter_are_in_every_arm(tmp_path: Path) -> None:
    """As they were where the update began, if the arm does not change them."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    model, tasks = get_peft_model(llama(num_hidden_layers=2), config).eval(), probe_tasks()
    model.get_parameter("base_model.model.lm_head.modules_to_save.default.weight").data *= 1.5
    change, _, _ = trained(model)
    gram = gradient_gram(model, tasks, update=change)
    arms = dynamics.counterfactuals(model, tasks, gram, change, k=2, arms=["layer:1"])
    loaded = PeftModel.from_pretrained(llama(num_hidden_layers=2), arms.save(tmp_path / "arm", "layer:1")).eval()
    with added(model, arms.whole["layer:1"]):
        assert loss(loaded) == pytest.approx(loss(model), rel=1e-5)


def test_changes_of_adapted_matrices_may_be_dense(tmp_path: Path) -> None:
    model, tasks = adapted_model(torch.float32), probe_tasks()
    change = {name: matrix.to_dense() for name, matrix in trained(model)[0].items()}
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    folder = arms.save(tmp_path / "off", "off")
    assert json.loads((folder / "adapter_config.json").read_text())["r"] <= 9
    loaded = PeftModel.from_pretrained(adapted_model(torch.float32).unload(), folder).eval()
    with added(model, arms.whole["off"]):
        assert loss(loaded) == pytest.approx(loss(model), rel=1e-5)


def test_an_arm_of_another_length(arms, tmp_path: Path) -> None:
    model, counterfactuals = arms
    folder = counterfactuals.save(tmp_path / "half", "full", scale=0.5)
    loaded = PeftModel.from_pretrained(adapted_model(torch.float32).unload(), folder).eval()
    with added(model, weighted_sum([(0.5, counterfactuals.whole["full"])])):
        assert loss(loaded) == pytest.approx(loss(model), rel=1e-5)
    assert "`0.5 · full`" in (folder / "README.md").read_text()


def frozen_layer() -> nn.Module:
    model = adapted_model(torch.float32, layers=2)
    for name, parameter in model.named_parameters():
        if ".layers.1." in name:
            parameter.requires_grad_(False)
    return model


def trained_biases() -> nn.Module:
    return get_peft_model(FAMILIES["vit"].model(), FAMILIES["vit"].lora(bias="all"))


def some_tokens() -> nn.Module:
    """Activated LoRA: its changes count after certain tokens only."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", alora_invocation_tokens=[1])
    return get_peft_model(llama(), config)


@pytest.mark.parametrize("make", [frozen_layer, trained_biases, some_tokens])
def test_what_an_adapter_would_leave_behind_is_refused(make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing else beside the base"):
        save_arm(make(), {}, tmp_path / "arm", "full")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("make", [lambda: adapted_model(torch.float32), lambda: dense_model(torch.float32)])
def test_a_change_of_nothing_in_the_model_is_refused(make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="such as"):
        save_arm(make(), {"model.layers.9": torch.ones(1, 1)}, tmp_path / "arm", "full")


def test_the_configuration_is_the_active_adapters(tmp_path: Path) -> None:
    model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], revision="old"), adapter_name="a")
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"], revision="new"))
    model.set_adapter("b")
    config = json.loads((save_arm(model, {}, tmp_path / "arm", "full") / "adapter_config.json").read_text())
    assert config["revision"] == "new"


def test_a_folder_is_filled_whole_or_not_at_all(arms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path, *arguments: object, **options: object) -> None:
        raise OSError("no room")

    (tmp_path / "empty").mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", fail)
        for name in ("new", "empty"):
            with pytest.raises(OSError, match="no room"):
                arms[1].save(tmp_path / name, "full")
    assert [file.name for file in tmp_path.iterdir()] == ["empty"]
    assert not [*(tmp_path / "empty").iterdir()]
    (tmp_path / "link").symlink_to("empty")
    arms[1].save(tmp_path / "link", "full")
    assert (tmp_path / "empty" / "adapter_config.json").is_file()


def test_dense_arms_are_differences(tmp_path: Path) -> None:
    model, tasks = dense_model(torch.float32), probe_tasks()
    change, _, _ = trained(model)
    arms = dynamics.counterfactuals(model, tasks, gradient_gram(model, tasks, update=change), change, k=2)
    folder = arms.save(tmp_path / "off", "off")
    with added(model, arms.whole["off"]):
        expected = loss(model)
    assert "Add them to the model at the start of the increment" in (folder / "README.md").read_text()
    for name, difference in load_file(folder / "differences.safetensors").items():
        assert difference.dtype == torch.float32
        model.get_parameter(name).data += difference
    assert loss(model) == pytest.approx(expected, rel=1e-5)


def test_a_folder_that_holds_anything_is_refused(arms, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("")
    for folder in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(FileExistsError, match="new or empty"):
            arms[1].save(folder, "on")
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_experts_cannot_be_written_as_an_adapter(tmp_path: Path) -> None:
    made = FAMILIES["mixtral"]
    model = get_peft_model(made.model(), made.lora())
    with pytest.raises(ValueError, match="cannot hold alone"):
        save_arm(model, {}, tmp_path / "arm", "full")
    assert not (tmp_path / "arm").exists()
