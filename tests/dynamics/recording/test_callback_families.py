"""Every family is recorded whole, under the names of its live base model, and its names on disk are kept.

The families and their LoRA are those of tests/families.py; a Trainer takes two steps on one batch.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer

from dynamics import DynamicsCallback
from dynamics.store.record_folders import StoredRecords
from dynamics.store.records import read_records
from tests.families import FAMILIES
from tests.records import records_of
from tests.runs import arguments

#: Family → (recorded matrices, share of the trainable numbers that belong to them).
RECORDED = {
    "llava": (28, 1.0),
    "qwen2_5_vl": (26, 1.0),
    "internvl": (28, 1.0),
    "paligemma": (27, 1.0),
    "idefics3": (27, 1.0),
    "smolvlm": (27, 1.0),
    "gemma3": (26, 1.0),
    "mllama": (33, 1.0),
    "gpt2": (8, 1.0),
    "llama": (14, 1.0),
    "bert": (14, 1.0),
    "t5": (32, 1.0),
    "vit": (5, 1.0),
    "mixtral": (16, 1.0),
}
#: Of families whose weights are saved under other names than the live model's: a matrix, and its name on disk.
RENAMED = {
    "llava": {"model.language_model.layers.0.self_attn.q_proj": "language_model.model.layers.0.self_attn.q_proj"},
    "mixtral": {"model.layers.0.mlp.gate": "model.layers.0.block_sparse_moe.gate"},
}


class Repeated(Dataset):
    """One batch, again and again; the collator hands it over as it is."""

    def __init__(self, batch: dict[str, Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.batch


def train(run: Path, model: nn.Module, batch: dict[str, Tensor], **changes: object) -> StoredRecords:
    """Two steps, both captured; what was recorded."""
    options = {"max_steps": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_grad_norm": 0}
    options |= {"save_strategy": "no", "remove_unused_columns": False, **changes}
    callback = DynamicsCallback(run, at=[1, 2])
    Trainer(model, arguments(run, **options), lambda samples: samples[0], Repeated(batch), callbacks=[callback]).train()
    return records_of(run)


def test_the_table_lists_every_family() -> None:
    assert RECORDED.keys() == FAMILIES.keys()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trainable_matrix_is_recorded(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    model, batch = family.model_and_batch()
    live = {path.removesuffix(".weight") for path, _ in model.named_parameters()}
    torch.manual_seed(0)

    capture = train(tmp_path, get_peft_model(model, family.lora()), batch)

    matrices = capture.records[2]["update"]["matrix"].values.tolist()
    assert (len(matrices), capture.attributes["covered_share"]) == RECORDED[name]
    assert {matrix.partition("[")[0] for matrix in matrices} <= live
    assert [finding["code"] for finding in capture.attributes["findings"]] == []
    assert (capture.attributes["gaps"], capture.attributes["disk_names"]) == ([], {})  # PEFT saves live names
    for record in capture.records.values():
        largest = record["update"]["singular_value"].sel(kind="increment", index=0)
        assert (largest.values > 0).all()
        assert (record["gradient"]["norm_before_clip"].values > 0).all()
        assert record["gradient"]["matrix"].values.tolist() == matrices


@pytest.mark.parametrize("name", RENAMED)
def test_names_on_disk_are_kept_and_lead_back(name: str, tmp_path: Path) -> None:
    """From each matrix of a checkpoint to the one that was recorded, as an analysis of both goes."""
    model, batch = FAMILIES[name].model_and_batch()

    capture = train(tmp_path, model, batch, save_strategy="steps", save_steps=2)

    recorded = set(capture.records[2]["update"]["matrix"].values.tolist())
    disk_names = capture.attributes["disk_names"]
    assert RENAMED[name].items() <= disk_names.items()
    assert set(disk_names) <= recorded
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    saved = {key.removesuffix(".weight") for key, tensor in weights.items() if tensor.ndim > 1}
    live_names = read_records(capture.folders).live_names
    found = {live_names.get(matrix, matrix) for matrix in saved}
    in_pieces = {live: pieces for live, pieces in disk_names.items() if isinstance(pieces, list)}
    assert recorded - found == set(in_pieces) == {matrix for matrix in recorded if "gate_up_proj" in matrix}
    assert found - recorded == {piece for pieces in in_pieces.values() for piece in pieces}
