"""Do updates follow informative directions, and do two tasks share them? About two minutes on a CPU, no download.

A small Llama over bytes learns Python source code and English prose at once, with LoRA. Probe samples of both tasks,
held out, are given to the callback, which measures the Fisher where each recorded increment began. The same can be
asked afterwards, of the checkpoints alone: `load` gives model and tasks for each.

    python examples/two_tasks.py --out runs/two_tasks
    python -m dynamics.analyze runs/two_tasks
    cd examples && python -m dynamics.analyze ../runs/two_tasks --probe two_tasks:load
"""

from __future__ import annotations

import argparse
import importlib
import inspect
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

from dynamics import DynamicsCallback
from probes import Task

WINDOW = 64  # bytes that the model sees at once
BATCH = 16  # windows in an optimizer step
PROBES = 48  # windows of each task that are held out and probed
MODULES = ("argparse", "difflib", "doctest", "inspect", "optparse", "pickle", "subprocess", "tarfile", "typing")


def documents() -> dict[str, dict[str, str]]:
    """Return the text of each document of each task: modules of the standard library, topics of its reference."""
    code = {name: inspect.getsource(importlib.import_module(name)) for name in MODULES}
    prose = {
        name: " ".join(" ".join(block.split()) for block in text.split("\n\n") if len(block) > 80)
        for name, text in topics.items()
    }
    return {"code": code, "prose": {name: text for name, text in prose.items() if len(text) > 4 * WINDOW}}


def samples(task: str, texts: dict[str, str]) -> list[dict[str, Any]]:
    """Cut documents into windows; each window knows its document, the group that it belongs to."""
    found: list[dict[str, Any]] = []
    for document, text in texts.items():
        tokens = torch.tensor(list(text.encode()))
        rows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
        found += [{"input_ids": row, "labels": row, "document": f"{task}/{document}"} for row in rows]
    return found


def split() -> tuple[Any, list[Task]]:
    """Return windows to train on, as many of each task, and one task each of windows that are held out."""
    train: list[dict[str, Any]] = []
    tasks = []
    shuffled = torch.Generator().manual_seed(1)
    parts = {task: samples(task, texts) for task, texts in documents().items()}
    count = min(map(len, parts.values()))
    for task, found in parts.items():
        chosen = [found[place] for place in torch.randperm(len(found), generator=shuffled)[:count]]
        tasks.append(Task(task, chosen[:PROBES], group="document", batch_size=16))
        train += chosen[PROBES:]
    return train, tasks


def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Stack windows into a batch `[rows, WINDOW]`; the model itself shifts the labels to the next byte."""
    return {name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels")}


def taught_base(train: list[dict[str, Any]], steps: int) -> LlamaForCausalLM:
    """Return a Llama of about 0.4 million parameters that has seen both tasks for a while."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = collate([train[place] for place in torch.randint(len(train), (BATCH,))])
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def load(folder: str) -> tuple[PeftModel, list[Task], int, float]:
    """Return the model at a checkpoint, the tasks, samples an optimizer step, and momentum: what `--probe` asks for."""
    base = LlamaForCausalLM.from_pretrained(Path(folder).parent / "base")
    return PeftModel.from_pretrained(base, folder, is_trainable=True), split()[1], BATCH, 0.9  # the Trainer's AdamW


def main() -> None:
    """Read the command line, train, and say how to see what was recorded."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for checkpoints and records")
    parser.add_argument("--steps", type=int, default=120, help="optimizer steps of LoRA")
    parser.add_argument("--base-steps", type=int, default=300, help="optimizer steps that make the base")
    args = parser.parse_args()

    set_seed(0)
    train, tasks = split()
    base = taught_base(train, args.base_steps)
    base.save_pretrained(args.out / "base")
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16)
    every = max(1, args.steps // 6)
    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=2e-3,
        logging_steps=every,
        save_steps=every,
        save_only_model=True,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    callback = DynamicsCallback(args.out, tasks, every=every)
    trainer = Trainer(get_peft_model(base, lora), training, collate, train, callbacks=[callback])
    callback.attach(trainer)
    trainer.train()
    print(f"\nSee all of it:\n   python -m dynamics.analyze {args.out}")


if __name__ == "__main__":
    main()
