"""How near the change of a retained loss comes to what gradients at the start predict, in a training of a LoRA.

A Llama built from a configuration learns one language, which becomes the retained task; then a LoRA learns another
language on top of it. At each step the whole update is scaled by λ, and the observed change of the mean loss is fitted
by a line and a square: the first order can be right where the square is small beside the line. Of texts like
those that the base learned the retained loss has hardly a slope, so that the second order is all; of others, here such
that follow their language more strictly, it has.

python -m tests.benchmarks.losses [--table steps] [--table scales]
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from dynamics.fisher.samples import SampleGroups
from dynamics.intervention.effects import effects
from dynamics.recording.loss_probe import losses_along, predictions, zero_start
from probes import LowRankMatrix, Task, watched_matrices
from probes.undisturbed import swapped
from probes.update_slopes import losses_of
from tests.benchmarks.calibration import Row, main

VOCABULARY, LENGTH, SAMPLES = 48, 24, 96
#: Steps of the training whose updates are looked at, and shares of an update.
STEPS, SCALES = (1, 2, 4, 8, 16, 32, 64, 128), (0.125, 0.25, 0.5, 0.75, 1.0)


class Update(NamedTuple):
    """What one update does to one task.

    Args:
        observed: Change of the mean loss at each scale.
        low, high: Its 95 % interval at scale 1.
        first: To first order at scale 1.
        curvature: δᵀFδ.
    """

    observed: np.ndarray
    low: float
    high: float
    first: float
    curvature: float

    @property
    def fit(self) -> tuple[float, float]:
        """Return line and square of the fit of the changes at all scales."""
        scales = np.array(SCALES)
        line, square = np.linalg.lstsq(np.stack([scales, scales**2], 1), self.observed, rcond=None)[0]
        return float(line), float(square)


def language(count: int, seed: int, shift: int, kept_share: float = 0.8) -> Tensor:
    """Texts in which a token is followed by its double plus a shift, in so many of all places."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(VOCABULARY, (count, LENGTH), generator=generator)
    kept = torch.rand(count, LENGTH, generator=generator) < kept_share
    for place in range(1, LENGTH):
        rows[:, place] = torch.where(kept[:, place], (2 * rows[:, place - 1] + shift) % VOCABULARY, rows[:, place])
    return rows


def task(name: str, rows: Tensor, **options: Any) -> Task:
    """Held-out texts, mean loss over tokens."""
    return Task(name, [{"input_ids": row, "labels": row} for row in rows], loss="mean", batch_size=48, **options)


def learn(model: torch.nn.Module, texts: Tensor, steps: int, lr: float) -> Iterator[int]:
    """Train by AdamW on batches of 32; yield after each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for step in range(1, steps + 1):
        batch = texts[torch.arange(32 * step, 32 * step + 32) % len(texts)]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


@cache
def training() -> dict[int, dict[str, Update]]:
    """Return the updates of the steps, by task."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    for _ in learn(base, language(2048, 1, 1), 150, 3e-3):
        pass
    lora = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], r=4, lora_alpha=8)
    model = get_peft_model(base, lora)
    tasks = [
        task("retained, stricter", language(SAMPLES, 13, 1, 0.98), retained=True),
        task("retained, as learned", language(SAMPLES, 12, 1), retained=True),
        task("new", language(SAMPLES, 11, 5)),
    ]
    at_start = {one.name: losses_of(model, one) for one in tasks}
    updates = {}
    for step in learn(model, language(2048, 2, 5), STEPS[-1], 1e-3):
        if step in STEPS:
            updates[step] = measured(model, tasks, at_start)
    return updates


def measured(model: Any, tasks: list[Task], at_start: dict[str, Tensor]) -> dict[str, Update]:
    """Return what the present update does to each task."""
    changes = {
        name: LowRankMatrix(matrix.left.detach().clone(), matrix.right.detach().clone())
        for name, matrix in watched_matrices(model).items()
        if isinstance(matrix, LowRankMatrix)
    }
    rows, problem = losses_along(model, tasks, changes, SCALES)
    assert not problem, problem
    values = zero_start(model)
    with swapped([p for p, _ in values], [value for _, value in values]):
        tables = predictions(model, tasks, changes)
    assert not tables.reason, tables.reason
    start = torch.cat([at_start[one.name] for one in tasks])
    differences = torch.stack(rows) - start
    updates = {}
    for number, one in enumerate(tasks):
        part = differences[:, number * SAMPLES : (number + 1) * SAMPLES].numpy()
        whole = effects(part[-1:], SampleGroups.of_one_task(np.arange(SAMPLES)))
        first = float(sum(tables.slopes[one.name].values()).mean())  # pyright: ignore[reportAttributeAccessIssue]
        curvature = float(tables.quadratics[one.name].mean())
        updates[one.name] = Update(part.mean(1), float(whole.low[0, 0]), float(whole.high[0, 0]), first, curvature)
    return updates


def over_steps(_: np.random.Generator, sets: int) -> Iterator[Row]:
    """The whole update of each step: observed and predicted change, and whether the first order can be right."""
    del sets
    yield "task", "step", "observed (95 %)", "first order", "off", "second order", "off", "fitted square / line"
    for name in training()[1]:
        for step, updates in training().items():
            update = updates[name]
            observed, second = update.observed[-1], update.first + update.curvature / 2
            line, square = update.fit
            yield (
                name,
                str(step),
                f"{observed:+.3g} ({update.low:+.2g} to {update.high:+.2g})",
                f"{update.first:+.3g}",
                f"{100 * abs(update.first / observed - 1):.0f} %",
                f"{second:+.3g}",
                f"{100 * abs(second / observed - 1):.0f} %",
                f"{100 * abs(square / line):.0f} %",
            )


def over_scales(_: np.random.Generator, sets: int) -> Iterator[Row]:
    """Shares λ of the update of two steps: observed, first and second order."""
    del sets
    yield "task", "step", "", *(f"λ = {scale:g}" for scale in SCALES)
    for name in list(training()[1])[:2]:
        for step in (8, 32):
            update = training()[step][name]
            line = [update.first * scale for scale in SCALES]
            both = [value + update.curvature * scale**2 / 2 for value, scale in zip(line, SCALES, strict=True)]
            for label, values in (("observed", update.observed), ("first order", line), ("second order", both)):
                yield name, str(step), label, *(f"{value:+.3g}" for value in values)


#: Each gives a table: headings first, then its rows.
TABLES = {"steps": over_steps, "scales": over_scales}

if __name__ == "__main__":
    main(TABLES, __doc__, sets=1)
