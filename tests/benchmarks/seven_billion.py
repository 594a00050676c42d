"""Runs of the shape of a 7B model's adapter: 32 layers × q, k, v, o, gate, up, down; r = 16; bf16."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

LAYERS, RANK, ALPHA = 32, 16, 32
SHAPES = {
    **{f"self_attn.{role}_proj": (4096, 4096) for role in "qkvo"},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


def write_run(folder: Path, checkpoints: int, seed: int = 0) -> Path:
    """A run whose factors take a step of a tenth of their size between checkpoints, like a training's early phase."""
    generator = torch.Generator().manual_seed(seed)
    factors = {key: torch.randn(shape, generator=generator) for key, shape in _keys()}
    for index in range(1, checkpoints + 1):
        checkpoint = folder / f"checkpoint-{100 * index}"
        checkpoint.mkdir(parents=True)
        for factor in factors.values():
            factor += 0.1 * torch.randn(factor.shape, generator=generator)
        tensors = {key: factor.bfloat16() for key, factor in factors.items()}
        save_file(tensors, checkpoint / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "r": RANK,
            "lora_alpha": ALPHA,
            "target_modules": sorted(r.split(".")[1] for r in SHAPES),
        }
        (checkpoint / "adapter_config.json").write_text(json.dumps(config))
    return folder


def _keys() -> Iterator[tuple[str, tuple[int, int]]]:
    for layer in range(LAYERS):
        for role, (out, in_) in SHAPES.items():
            name = f"base_model.model.model.layers.{layer}.{role}"
            yield f"{name}.lora_A.weight", (RANK, in_)
            yield f"{name}.lora_B.weight", (out, RANK)
