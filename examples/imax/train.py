"""The common base, and one unit of the study: an arm's LoRA fine-tuning from it, recorded and scored."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, VisionEncoderDecoderModel, set_seed

from dynamics import DynamicsCallback
from examples.imax.data import Annotated, arm, card, held_out
from examples.imax.model import answers, as_pixels, collate, new_model, probe_tasks, samples, sequence
from examples.imax.phantom import phantoms
from examples.imax.tasks import METRICS, TASKS, caption, total

CAPTIONS = 2_000_000  # first word of the seeds of images that only the base sees


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Args:
        images: Of IMAX; 7.5 entries each, each entry seen once.
        batch: Entries in an optimizer step.
        base_steps: Optimizer steps that teach the base to describe images.
        base_batch: Images in each of them.
        captures: How many times the Fisher is measured, evenly over the training.
        probes: Held-out entries of each task for it, a multiple of 7.
        scored: Held-out entries of each task for the scores, a multiple of 7.
        learning_rate: Of LoRA.
    """

    images: int = 1600
    batch: int = 32
    base_steps: int = 2400
    base_batch: int = 32
    captures: int = 3
    probes: int = 21
    scored: int = 210
    learning_rate: float = 2e-3

    @property
    def steps(self) -> int:
        """Optimizer steps of each arm."""
        return round(7.5 * self.images) // self.batch


FULL = Size()
SMOKE = Size(images=40, batch=20, base_steps=8, base_batch=16, captures=1, probes=7, scored=7)


def teach_base(folder: Path, size: Size) -> dict[str, Any]:
    """Teach a new model to describe images, each seen once, and save it where all units find it.

    Returns:
        The loss of the last steps, and the seconds that it took.
    """
    began = time.perf_counter()
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=size.base_steps, pct_start=0.1)
    losses = []
    for step in range(size.base_steps):
        images, truth = phantoms(size.base_batch, [CAPTIONS, step])
        rows = [
            {"pixel_values": pixels, **sequence("", caption(truth, image))}
            for image, pixels in enumerate(as_pixels(images))
        ]
        loss = model(**collate(rows)).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0:
            print(f"base: step {step}, loss {loss.item():.3f}", flush=True)
    model.save_pretrained(folder)
    return {"loss": sum(losses[-20:]) / len(losses[-20:]), "seconds": time.perf_counter() - began}


def adapted(base: Path, seed: int) -> nn.Module:
    """The base with a new LoRA on every linear layer; the same for all arms of a seed."""
    set_seed(seed)
    lora = LoraConfig(
        target_modules="all-linear", exclude_modules=r".*pooler.*", r=8, lora_alpha=16
    )  # no pooler is used
    return get_peft_model(VisionEncoderDecoderModel.from_pretrained(base), lora)  # pyright: ignore[reportArgumentType]


def train(model: nn.Module, data: Annotated, out: Path, seed: int, size: Size, *, record: bool = True) -> None:
    """Fine-tune on an arm's entries, each once, in an order that is the same for all arms of a seed."""
    steps = size.steps
    captured = [max(1, round(steps * part / size.captures)) for part in range(1, size.captures + 1)]
    training = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=size.batch,
        learning_rate=size.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, steps // 20),
        logging_steps=max(1, steps // 10),
        save_steps=steps,
        save_only_model=True,
        remove_unused_columns=False,
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    rows: Any = samples(data)
    callbacks = []
    if record:
        callbacks = [DynamicsCallback(out, probe_tasks(held_out(size.probes)), preset="full", at=captured)]
    trainer = Trainer(model, training, collate, rows, callbacks=callbacks)  # pyright: ignore[reportArgumentType]
    for callback in callbacks:
        callback.attach(trainer)
    trainer.train()


def answered(model: nn.Module, data: Annotated, batch: int = 64) -> list[str]:
    """The model's answer to each entry."""
    model.eval()
    rows = samples(data)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["labels"]))
    said = [""] * len(rows)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        for number, answer in zip(chosen, answers(model, collate([rows[each] for each in chosen])), strict=True):
            said[number] = answer
    return said


def scores(said: Sequence[str], data: Annotated) -> dict[str, dict[str, dict[str, float]]]:
    """Score and standard error of answers, by task and metric."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for task in TASKS:
        pairs = [(one, entry.answer) for one, entry in zip(said, data.entries, strict=True) if entry.task == task]
        found[task] = {}
        for metric in METRICS[task]:
            score, error = total([metric.of(one, other) for one, other in pairs])
            found[task][metric.name] = {"score": score, "standard_error": error, "entries": len(pairs)}
    return found


def unit(name: str, seed: int, base: Path, out: Path, size: Size = FULL) -> dict[str, Any]:
    """Train and score one arm of one seed; ``out/scores.json`` is written last, and says that the unit is complete.

    Args:
        name: The arm.
        seed: Of the data, the adapter and the order.
        base: Folder of the common base.
        out: Folder of the run.
        size: Of the study.

    Returns:
        What is in ``scores.json``.
    """
    torch.set_num_threads(1)
    began = time.perf_counter()
    data = arm(name, size.images, seed)
    model = adapted(base, seed)
    train(model, data, out, seed, size)
    trained = time.perf_counter() - began
    test = held_out(size.scored, part=1)
    found = {
        "arm": name,
        "seed": seed,
        "scores": scores(answered(model, test), test),
        "card": card(data),
        "size": asdict(size),
        "seconds_training": trained,
        "seconds": time.perf_counter() - began,
    }
    part = out / "scores.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(out / "scores.json")
    return found
