"""Tiny trainings by the Trainer, the same to the last bit whenever they are run with the same arguments."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

VOCABULARY = 32


class Tokens(Dataset):
    """Random sequences, always the same."""

    def __init__(self, length: int = 64) -> None:
        self._rows = torch.randint(VOCABULARY, (length, 8), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def llama(**changes: Any) -> LlamaForCausalLM:
    """Two layers, with dropout."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, attention_dropout=0.1, **{**sizes, **changes})
    return LlamaForCausalLM(config)


def lora_llama(**changes: Any) -> nn.Module:
    """The same with LoRA on every linear layer, and dropout in it."""
    lora = {"r": 3, "lora_alpha": 6, "lora_dropout": 0.1, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return get_peft_model(llama(), LoraConfig(**{**lora, **changes}))


def arguments(out: Path, **changes: Any) -> TrainingArguments:
    """Eight steps of two accumulated batches, clipped, saved every four."""
    chosen: dict[str, Any] = {
        "max_steps": 8,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.2,
        "logging_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 3,
        **changes,
    }
    return TrainingArguments(str(out), **chosen)


def trainer(
    out: Path, callbacks: Sequence[TrainerCallback] = (), model: nn.Module | None = None, **changes: Any
) -> Trainer:
    """A Trainer that has not trained yet, and a seed from which everything follows."""
    set_seed(5)
    model = lora_llama() if model is None else model
    set_seed(5)
    return Trainer(model, arguments(out, **changes), train_dataset=Tokens(), callbacks=list(callbacks))


def random_states() -> list[Any]:
    """Of torch and NumPy; equal lists are equal states."""
    name, keys, *rest = np.random.get_state()  # noqa: NPY002
    return [torch.get_rng_state().tolist(), name, keys.tolist(), rest]


def losses(history: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without the callback's numbers and without times."""
    kept = [
        {name: value for name, value in entry.items() if not name.startswith(("dynamics/", "train_"))}
        for entry in history
    ]
    return [entry for entry in kept if set(entry) - {"epoch", "step", "total_flos"}]
