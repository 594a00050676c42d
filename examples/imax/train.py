"""The common base, and one unit of the study: an arm's LoRA fine-tuning from it, recorded and scored."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments, VisionEncoderDecoderModel, set_seed

from dynamics import DynamicsCallback, fisher_measures
from examples.imax.data import PILOTED, SCORED, Annotated, arm, card, held_out
from examples.imax.model import as_pixels, collate, confident_answers, new_model, probe_tasks, samples, sequence
from examples.imax.phantom import phantoms
from examples.imax.tasks import METRICS, TASKS, caption, total
from probes import ProbeGram, gradient_gram

CAPTIONS = 2_000_000  # first word of the seeds of images that only the base sees
PILOT_SEED = 100
BATCH = 32  # samples of which gradients are taken at once
ENDS = ("", "_low", "_high")


@dataclass(frozen=True)
class Size:
    """How large a study is.

    Args:
        images: Of IMAX; 7.5 entries each, each entry seen once.
        batch: Entries in an optimizer step.
        base_steps: Optimizer steps that teach the base to describe images.
        base_batch: Images in each of them.
        captures: In so many equal parts of the training the Fisher is measured, and once more just before its end.
        probes: Held-out entries of each task for it, a multiple of 7.
        scored: Held-out entries of each task for the scores, a multiple of 7.
        learning_rate: Of LoRA.
        own: Entries of an arm's own training data for the other Fisher, which shows what counting by entries does.
    """

    images: int = 1600
    batch: int = 32
    base_steps: int = 3000
    base_batch: int = 32
    captures: int = 3
    probes: int = 21
    scored: int = 420
    learning_rate: float = 5e-3
    own: int = 210

    @property
    def steps(self) -> int:
        """Optimizer steps of each arm."""
        return round(7.5 * self.images) // self.batch

    def captured(self, steps: int) -> list[int]:
        """Steps at which a training of so many is captured: the last increment is 1/25 of it.

        The Fisher of an increment is measured where it began, so that of the last one is of a model all but trained.

        >>> Size().captured(375)
        [125, 250, 360, 375]
        """
        parts = [round(steps * part / self.captures) for part in range(1, self.captures)]
        return [step for step in [*parts, steps - max(1, steps // 25), steps] if step > 0]


FULL = Size()
SMOKE = Size(images=20, batch=15, base_steps=4, base_batch=16, captures=1, probes=7, scored=7, own=30)


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
        random = np.random.default_rng([CAPTIONS, step])
        rows = [
            {"pixel_values": pixels, **sequence("", caption(truth, image, random))}
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


def train(
    model: nn.Module, rows: Sequence[Any], out: Path, seed: int, size: Size, steps: int, *, record: bool = True
) -> None:
    """Fine-tune with LoRA on samples, in an order that is the same for all arms of a seed; record it in ``out``.

    Warm-up over 1/20 of the steps, then a cosine; after the last step a checkpoint.
    """
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
    callbacks = []
    if record:
        probed = probe_tasks(held_out(size.probes), scored=False)
        callbacks = [DynamicsCallback(out, probed, at=size.captured(steps))]
    trained: Any = rows
    trainer = Trainer(model, training, collate, trained, callbacks=callbacks)  # pyright: ignore[reportArgumentType]
    for callback in callbacks:
        callback.attach(trainer)
    trainer.train()


def answered(model: nn.Module, data: Annotated, batch: int = 64) -> list[tuple[str, float]]:
    """The model's answer to each entry, and how sure it is: see :func:`examples.imax.model.confident_answers`."""
    model.eval()
    rows = samples(data)
    order = sorted(range(len(rows)), key=lambda number: len(rows[number]["labels"]))
    said = [("", 0.0)] * len(rows)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        found = confident_answers(model, collate([rows[each] for each in chosen]))
        for number, answer in zip(chosen, found, strict=True):
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


def own_fisher(model: nn.Module, data: Annotated, entries: int) -> dict[str, dict[str, float]]:
    """The Fisher on an arm's own training data, entries counted as if independent, and counted by their images.

    The entries are those of the first images, so that they lie in images as all of the arm's do. SE is compared at 16
    entries: any 16, or 16 of different images (mean over random subsets; NaN where there are fewer).

    Returns:
        For ``"by_entries"`` and ``"by_images"``: SE, SE of 16, ln participation ratio with its 95 % interval, and the
        number of what is counted as independent.
    """
    chosen = sorted(data.entries, key=lambda entry: entry.image)[:entries]
    rows = samples(replace(data, entries=chosen))
    batches = [collate(rows[start : start + BATCH]) for start in range(0, len(rows), BATCH)]
    k = gradient_gram(model, batches).gram["global"]
    images = [entry.image for entry in chosen]
    found = {}
    for name, groups in (("by_entries", ()), ("by_images", images)):
        measured = fisher_measures(ProbeGram({"global": k}, groups=groups)).sel(block="global", task="all")
        found[name] = {
            "independent": float(measured["groups"]),
            "spectral_entropy": float(measured["spectral_entropy"]),
            "spectral_entropy_of_16": float(measured["rarefied_spectral_entropy"].reindex(n=[16]).item()),
            **{f"ln_participation_ratio{end}": float(measured[f"ln_participation_ratio{end}"]) for end in ENDS},
        }
    return found


def unit(name: str, seed: int, base: Path, out: Path, size: Size = FULL) -> dict[str, Any]:
    """Train and score one arm of one seed; ``out/scores.json`` is written last, and says that the unit is complete.

    Args:
        name: The arm.
        seed: Of the data, the adapter and the order. That of the pilot is scored on images of its own.
        base: Folder of the common base.
        out: Folder of the run.
        size: Of the study.

    Returns:
        What is in ``scores.json``.
    """
    began = time.perf_counter()
    data = arm(name, size.images, seed)
    model = adapted(base, seed)
    train(model, samples(data), out, seed, size, size.steps)
    return complete(name, seed, model, data, out, size, began)


def complete(
    name: str, seed: int, model: nn.Module, data: Annotated, out: Path, size: Size, began: float, **more: Any
) -> dict[str, Any]:
    """Score what was trained, and write ``out/scores.json``; ``more`` is written into it too."""
    trained = time.perf_counter() - began
    test = held_out(size.scored, PILOTED if seed == PILOT_SEED else SCORED)
    found = {
        "arm": name,
        "seed": seed,
        "scores": scores([text for text, _ in answered(model, test)], test),
        "own_fisher": own_fisher(model, data, size.own),
        "card": card(data),
        "size": asdict(size),
        "seconds_training": trained,
        "seconds": time.perf_counter() - began,
        **more,
    }
    part = out / "scores.json.part"
    part.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    part.replace(out / "scores.json")
    return found
