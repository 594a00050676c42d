"""Writes runs of the shape that PEFT and the Trainer write, quickly, from given factors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

#: Name of the matrix -> (B, A): shapes (out, rank) and (rank, in).
Factors = Mapping[str, tuple[Tensor, Tensor]]

NAMES = tuple(f"model.layers.{layer}.self_attn.{role}" for layer in range(2) for role in ("q_proj", "v_proj"))


def random_factors(
    names: Sequence[str] = NAMES,
    out: int = 12,
    in_: int = 10,
    rank: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Gaussian factors for each name."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(out, rank, generator=generator, dtype=torch.float64).to(dtype),
            torch.randn(rank, in_, generator=generator, dtype=torch.float64).to(dtype),
        )
        for name in names
    }


def adapter_config(rank: int = 4, alpha: float = 8, **changes: Any) -> dict[str, Any]:
    """A LoRA ``adapter_config.json`` with the keys that matter; ``changes`` are set on top."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "v_proj"],
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "rank_pattern": {},
        "alpha_pattern": {},
        "bias": "none",
        "fan_in_fan_out": False,
        **changes,
    }


def adapter_tensors(factors: Factors, prefix: str = "base_model.model.") -> dict[str, Tensor]:
    """Factors under the keys that PEFT gives them."""
    tensors = {}
    for name, (left, right) in factors.items():
        tensors[f"{prefix}{name}.lora_A.weight"] = right.contiguous()
        tensors[f"{prefix}{name}.lora_B.weight"] = left.contiguous()
    return tensors


def write_adapter(
    folder: Path,
    factors: Factors | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    tensors: Mapping[str, Tensor] | None = None,
    extra: Mapping[str, Tensor] | None = None,
    binary: bool = False,
) -> Path:
    """One adapter folder: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

    Args:
        folder: Made if it is not there.
        factors: Matrices, written under PEFT's keys; by default random ones.
        config: The configuration; by default one whose rank is that of the first matrix. ``{}`` writes none.
        tensors: Written as they are, in place of factors.
        extra: Written beside the factors as they are.
        binary: Write ``adapter_model.bin``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        factors = random_factors() if factors is None else factors
        tensors = adapter_tensors(factors)
        if config is None:
            config = adapter_config(rank=next(iter(factors.values()))[0].shape[1])
    tensors = {key: tensor.contiguous() for key, tensor in {**tensors, **(extra or {})}.items()}
    if binary:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = adapter_config() if config is None else config
    if config:
        (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def log_history(until: int, every: int = 5, loss: float = 2.0, **scalars: float) -> list[dict[str, float]]:
    """A log whose loss falls from ``loss``; two logs of different ``loss`` are of different trainings."""
    return [
        {"epoch": step / 100, "learning_rate": 1e-4, "loss": loss * 0.99**step, "step": step, **scalars}
        for step in range(every, until + 1, every)
    ]


def write_state(folder: Path, step: int, log: Sequence[Mapping[str, Any]] | None = None, **changes: Any) -> Path:
    """``trainer_state.json`` of a checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {
        "best_metric": None,
        "best_model_checkpoint": None,
        "epoch": step / 100,
        "global_step": step,
        "log_history": log_history(step) if log is None else list(log),
        "logging_steps": 5,
        "max_steps": 100,
        "num_train_epochs": 1,
        "save_steps": 10,
        "total_flos": 1e6 * step,
        "train_batch_size": 4,
        **changes,
    }
    path = folder / "trainer_state.json"
    path.write_text(json.dumps(state))  # NaN is written bare, as the Trainer does
    return path


def write_run(
    folder: Path,
    steps: Sequence[int] | Mapping[int, Factors] = (10, 20, 30),
    config: Mapping[str, Any] | None = None,
    *,
    states: bool = True,
    seed: int = 0,
    **shape: Any,
) -> Path:
    """A Trainer output folder.

    Args:
        folder: Made if it is not there.
        steps: Steps with random factors that drift from one to the next, or step to factors.
        config: The same configuration for each checkpoint.
        states: Whether each checkpoint has a ``trainer_state.json`` of one training.
        seed: Of the random factors.
        **shape: ``names``, ``out``, ``in_``, ``rank``, ``dtype`` of the random factors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    runs = steps if isinstance(steps, Mapping) else _drifting(steps, seed, **shape)
    for step, factors in runs.items():
        checkpoint = write_adapter(folder / f"checkpoint-{step}", factors, config)
        if states:
            write_state(checkpoint, step)
    return folder


def _drifting(steps: Sequence[int], seed: int, **shape: Any) -> dict[int, dict[str, tuple[Tensor, Tensor]]]:
    start = random_factors(seed=seed, **shape)
    runs = {}
    for index, step in enumerate(steps):
        noise = random_factors(seed=seed + 1 + index, **shape)
        runs[step] = {
            name: (left * 0.1 * (1 + index) + noise[name][0] * 0.02, right + noise[name][1] * 0.02)
            for name, (left, right) in start.items()
        }
    return runs
