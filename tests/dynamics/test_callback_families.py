"""Every family is recorded whole, under the names of its live base model, and its names on disk are kept."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch.utils.data import Dataset
from transformers import Trainer

import dynamics
from dynamics import DynamicsCallback
from dynamics.store import read_capture
from probes.watched import find
from tests.families import FAMILIES
from tests.trainings import arguments

#: Of families whose weights are saved under other names than the live model's: a matrix, and its name on disk.
RENAMED = {
    "llava": {"model.language_model.layers.0.self_attn.q_proj": "language_model.model.layers.0.self_attn.q_proj"},
    "mixtral": {"model.layers.0.mlp.gate": "model.layers.0.block_sparse_moe.gate"},
}


class Repeated(Dataset):
    """One batch, again and again; the collator hands it over as it is."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.batch


def train(run, model, batch, **changes) -> DynamicsCallback:
    callback = DynamicsCallback(run, preset="standard", at=[1, 2])
    options = {
        "max_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
    }
    Trainer(
        model,
        arguments(run, **options, save_strategy="no", remove_unused_columns=False, **changes),
        lambda samples: samples[0],
        Repeated(batch),
        callbacks=[callback],
    ).train()
    return callback


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trainable_matrix_is_recorded(name, tmp_path):
    family = FAMILIES[name]
    model, batch = family.model_and_batch()
    live = {path.removesuffix(".weight") for path, _ in model.named_parameters()}
    torch.manual_seed(0)
    adapted = get_peft_model(model, family.lora())
    found = find(adapted)
    train(tmp_path, adapted, batch)
    tree = dynamics.open_run(tmp_path)
    recorded = tree["update"]["matrix"].values.tolist()
    assert set(recorded) == {each.name for each in found.watched}
    assert {matrix.partition("[")[0] for matrix in recorded} <= live
    attributes = read_capture(tmp_path / "dynamics" / "capture.zarr").attributes
    assert attributes["covered_share"] == found.covered_share == 1.0
    assert attributes["disk_names"] == {}  # PEFT saves adapters under live names
    assert (tree["update"]["frobenius_norm"].sel(kind="increment").values > 0).all()
    assert (tree["gradient"]["norm_before_clip"].values > 0).all()


@pytest.mark.parametrize("name", RENAMED)
def test_names_on_disk_are_kept_of_a_dense_training(name, tmp_path):
    model, batch = FAMILIES[name].model_and_batch()
    train(tmp_path, model, batch)
    capture = read_capture(tmp_path / "dynamics" / "capture.zarr")
    disk_names = capture.attributes["disk_names"]
    assert RENAMED[name].items() <= disk_names.items()
    assert set(disk_names) <= set(capture.records[2]["update"]["matrix"].values.tolist())
    model.save_pretrained(tmp_path / "saved")
    from safetensors import safe_open

    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        saved = {key.removesuffix(".weight") for key in file.keys()}  # noqa: SIM118
    on_disk = [name for names in disk_names.values() for name in ([names] if isinstance(names, str) else names)]
    assert {name.partition("[")[0] for name in on_disk} <= saved
