"""Three stages on decentralised data (true, pseudo-IMAX, true annotations), beside as many updates on true ones alone.

1. Train on DMAX-plain: that is the study's own unit of that arm and seed.
2. Let this model annotate DMAX images for the tasks that they lack, and keep of each task the half of its answers of
   which it is surest (thresholds across tasks do not compare, as an answer's words differ). Train on these images with
   their own true entries and what was kept.
3. Train on true DMAX annotations again.

DMAX-long trains on true annotations in the second stage too; updates, learning rates and the entries of stages 1 and 3
are the same. The published work names three stages and pseudo-IMAX data: stages, filter and schedule here are ours.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from peft import PeftModel
from torch import nn
from transformers import VisionEncoderDecoderModel

from examples.imax.data import Annotated, Entry, arm, card
from examples.imax.model import fits, samples
from examples.imax.tasks import GRID, METRICS, SIDES, TASKS, Questions, box_of, described, questions, total
from examples.imax.train import FULL, Size, answered, complete, train

STRATEGIES = ("three-stage", "dmax-long")
KEPT = 0.5  # share of each task's answers that is kept: the surest
#: Questions that presuppose a finding; who does not know the image's findings cannot ask them.
_PRESUMING = ("where is the opacity", "where is the effusion", "in which zone")


def unit(name: str, seed: int, base: Path, first: Path, out: Path, size: Size = FULL) -> dict[str, Any]:
    """Stages two and three of one strategy and seed, from the trained DMAX-plain unit of that seed.

    Args:
        name: ``"three-stage"`` or ``"dmax-long"``.
        seed: Of the data and the order, as in the unit that it goes on from.
        base: Folder of the common base.
        first: Folder of that unit.
        out: Folder of the run.
        size: Of the study.

    Returns:
        What is in ``out/scores.json``; for the three stages with ``pseudo_labels``.

    Raises:
        ValueError: If there is no such strategy.
    """
    if name not in STRATEGIES:
        raise ValueError(f"Expected one of {', '.join(STRATEGIES)}, got {name!r}.")
    began = time.perf_counter()
    data = arm("dmax-plain", size.images, seed)
    bare = VisionEncoderDecoderModel.from_pretrained(base)
    model = PeftModel.from_pretrained(bare, first / f"checkpoint-{size.steps}", is_trainable=True)  # pyright: ignore[reportArgumentType]
    steps = size.steps // 2
    taken = steps * size.batch
    second, told = replace(data, entries=data.entries[:taken]), {}
    if name == "three-stage":
        second, labels = pseudo_annotated(model, data, taken, seed)
        told = {"pseudo_labels": labels, "pseudo_card": card(second)}
    third = replace(data, entries=data.entries[taken : 2 * taken])
    later = replace(size, learning_rate=size.learning_rate / 2)
    with TemporaryDirectory() as folder:
        train(model, samples(second), Path(folder), seed, later, steps, record=False)
    train(model, samples(third), out, seed, later, steps)
    return complete(name, seed, model, third, out, size, began, **told)


def pseudo_annotated(
    model: nn.Module, data: Annotated, entries: int, seed: int
) -> tuple[Annotated, dict[str, dict[str, float]]]:
    """Images with one task each, annotated by the model for the others.

    All questions that presuppose no finding are asked: places to describe lie in the lungs as the model sees them, in a
    third drawn at random.

    Args:
        model: That was trained on the data.
        data: Images with true entries of one task each.
        entries: How many entries are wanted; images are annotated, from the first on, until there are as many.
        seed: Of the thirds and of the order.

    Returns:
        The images with their own true entries and what was kept, in random order; and of each task the answers asked
        and kept, and the primary metric (against the truth, which the model does not see) of both.
    """
    random = np.random.default_rng([seed, 5])
    expected = len(data.entries) / len(data.truth) + KEPT * _asked_of_an_image()
    images = range(min(len(data.truth), round(entries / expected)))
    own: dict[int, str] = {entry.image: entry.task for entry in data.entries}
    zones = random.integers(3, size=(len(data.truth), 2))
    lungs = _seen_lungs(model, data, images)
    asked = [
        Entry(image, task, question, answer)
        for image in images
        for task in TASKS
        if task != own[image]
        for question, answer in open_questions(task, data, image, lungs[image], zones[image])
    ]
    said = answered(model, replace(data, entries=asked))
    kept, told = [], {}
    for task in TASKS:
        mine = [(entry, *answer) for entry, answer in zip(asked, said, strict=True) if entry.task == task]
        surest = sorted(mine, key=lambda each: -each[2])[: round(KEPT * len(mine))]
        written = [each for each in surest if each[1] and fits(each[0].question, each[1])]
        kept += [replace(entry, answer=text) for entry, text, _ in written]
        told[task] = {"asked": len(mine), "kept": len(written)}
        for which, part in (("asked", mine), ("kept", written)):
            fractions = [METRICS[task][0].of(text, entry.answer) for entry, text, _ in part]
            told[task][f"{METRICS[task][0].name} of {which}"] = total(fractions)[0] if len(part) > 1 else float("nan")
    true = [entry for entry in data.entries if entry.image in images]
    whole = [*true, *kept]
    return replace(data, name="pseudo-imax", entries=[whole[place] for place in random.permutation(len(whole))]), told


def open_questions(
    task: str, data: Annotated, image: int, lungs: Float[np.ndarray, "2 4"], zones: Int[np.ndarray, " 2"]
) -> Questions:
    """Questions of a task that can be asked of any image, whatever is in it, with the true answers."""
    if task == "generation":
        return described(data.truth, image, lungs, zones)
    return [pair for pair in questions(task, data.truth, image) if not pair[0].startswith(_PRESUMING)]


def _asked_of_an_image() -> float:
    """How many open questions of the tasks that it lacks an image is asked, about."""
    everything = {
        "calculation": 2,
        "report": 1,
        "grade": 1,
        "findings": 1,
        "comprehension": 3,
        "generation": 4,
        "vqa": 6,
    }
    return sum(everything.values()) * (1 - 1 / len(TASKS))


def _seen_lungs(model: nn.Module, data: Annotated, images: Sequence[int]) -> dict[int, Float[np.ndarray, "2 4"]]:
    """Boxes of both lungs as the model says, as fractions; where it says no box, the half of the image."""
    asked = [Entry(image, "comprehension", f"where is the {name} lung", "<0>") for image in images for name in SIDES]
    boxes: dict[int, list[list[float]]] = {image: [] for image in images}
    for entry, (text, _) in zip(asked, answered(model, replace(data, entries=asked)), strict=True):
        side = len(boxes[entry.image])
        lines = box_of(text) or [side * GRID // 2, 0, (side + 1) * GRID // 2, GRID]
        boxes[entry.image].append([line / GRID for line in lines])
    return {image: np.array(both) for image, both in boxes.items()}
