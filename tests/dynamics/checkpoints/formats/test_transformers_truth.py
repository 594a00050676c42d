"""Whole models as transformers saves them: the matrices of the live model, under its names."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamics.checkpoints import open_trajectory
from probes import watched_matrices

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")

SMALL: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def llama(**changes: Any) -> Any:
    config = transformers.LlamaConfig(vocab_size=40, num_key_value_heads=1, **{**SMALL, **changes})
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    )


def t5() -> Any:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def vit() -> Any:
    config = transformers.ViTConfig(image_size=16, patch_size=8, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config)


def whisper() -> Any:
    config = transformers.WhisperConfig(
        vocab_size=40, num_mel_bins=8, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_source_positions=10,
        max_target_positions=10, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
        suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


MODELS: dict[str, Callable[[], Any]] = {
    "Llama": llama,
    "Llama, tied": lambda: llama(num_hidden_layers=2, tie_word_embeddings=True),
    "GPT-2": gpt2,
    "T5": t5,
    "Whisper": whisper,
}


def saved(make: Callable[[], Any], folder: Path, shard: str) -> dict[str, torch.Tensor]:
    """The matrices of a live model, which is saved."""
    torch.manual_seed(0)
    model = make()
    for parameter in model.parameters():
        parameter.requires_grad_(True)  # Whisper freezes some
    model.save_pretrained(folder, max_shard_size=shard)
    live = watched_matrices(model)
    return {name: matrix.detach() for name, matrix in live.items() if isinstance(matrix, torch.Tensor)}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("shard", ["10GB", "3KB"], ids=["one file", "shards"])
def test_the_matrices_of_the_live_model(make: Callable[[], Any], shard: str, tmp_path: Path) -> None:
    live = saved(make, tmp_path, shard)
    trajectory = open_trajectory(tmp_path, base=tmp_path)
    assert set(trajectory.matrices) == set(live)
    with trajectory.checkpoints[0].open() as matrices:
        assert all(torch.equal(matrices[name], matrix) for name, matrix in live.items())


def test_a_family_that_is_renamed_on_disk(tmp_path: Path) -> None:
    """The same matrices, kernels and position embeddings among them; the callback keeps the map of names."""
    live = saved(vit, tmp_path, "3KB")
    trajectory = open_trajectory(tmp_path, base=tmp_path)
    assert len(trajectory.matrices) == len(live)
    with trajectory.checkpoints[0].open() as matrices:
        stored = list(matrices.values())
        for matrix in live.values():
            assert any(each.shape == matrix.shape and torch.equal(each, matrix) for each in stored)
