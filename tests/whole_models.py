"""Writes the weights of whole models as transformers and torch write them, quickly, from given tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.runs import write_state

Tensors = Mapping[str, Tensor]


def model_tensors(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 2) -> dict[str, Tensor]:
    """A small language model: embedding, attention, norms, output layer; keys as transformers writes them."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, Sequence[int]] = {"model.embed_tokens.weight": (20, 8), "lm_head.weight": (20, 8)}
    for layer in range(layers):
        shapes[f"model.layers.{layer}.self_attn.q_proj.weight"] = (8, 8)
        shapes[f"model.layers.{layer}.mlp.up_proj.weight"] = (12, 8)
        shapes[f"model.layers.{layer}.input_layernorm.weight"] = (8,)
    return {
        key: torch.randn(list(shape), generator=generator, dtype=torch.float64).to(dtype)
        for key, shape in shapes.items()
    }


#: Names of the matrices of ``model_tensors()``, in the reader's order.
MATRICES = (
    "lm_head",
    "model.embed_tokens",
    "model.layers.0.mlp.up_proj",
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.self_attn.q_proj",
)


def write_model(folder: Path, tensors: Tensors | None = None, style: str = "safetensors", **config: Any) -> Path:
    """One folder with the weights of a whole model.

    Args:
        folder: Made if it is not there.
        tensors: Key to tensor; by default those of ``model_tensors()``.
        style: ``safetensors``, ``bin``, ``sharded`` (safetensors), ``sharded bin``, or ``distributed`` (torch DCP as
            the Trainer writes it under FSDP).
        **config: Written to ``config.json``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = model_tensors() if tensors is None else tensors
    if style == "safetensors":
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
    elif style == "bin":
        torch.save(dict(tensors), folder / "pytorch_model.bin")
    elif style == "distributed":
        write_distributed(folder / "pytorch_model_fsdp_0", {"model": dict(tensors)})
    else:
        write_shards(folder, tensors, binary=style.endswith("bin"))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_shards(folder: Path, tensors: Tensors, count: int = 3, *, binary: bool = False) -> Path:
    """Tensors dealt out over shards; gives the index."""
    stem, suffix = ("pytorch_model", "bin") if binary else ("model", "safetensors")
    listed = {}
    for shard in range(count):
        name = f"{stem}-{shard + 1:05d}-of-{count:05d}.{suffix}"
        own = {key: tensor for i, (key, tensor) in enumerate(tensors.items()) if i % count == shard}
        if binary:
            torch.save(own, folder / name)
        else:
            save_file(own, folder / name, metadata={"format": "pt"})
        listed |= dict.fromkeys(own, name)
    index = folder / f"{stem}.{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": listed}))
    return index


def write_distributed(folder: Path, state: Mapping[str, Any]) -> Path:
    """A distributed checkpoint of one process."""
    import torch.distributed.checkpoint as distributed  # slow to import, and seldom needed

    folder.mkdir(parents=True, exist_ok=True)
    distributed.save(dict(state), checkpoint_id=folder, no_dist=True)
    return folder


def write_dense_run(
    folder: Path, steps: Mapping[int, Tensors] | Sequence[int] = (10, 20), style: str = "safetensors"
) -> Path:
    """A Trainer output folder of full checkpoints, each with a ``trainer_state.json`` of one training."""
    runs = steps if isinstance(steps, Mapping) else {step: model_tensors(seed=step) for step in steps}
    for step, tensors in runs.items():
        write_model(folder / f"checkpoint-{step}", tensors, style)
        write_state(folder / f"checkpoint-{step}", step)
    return folder
