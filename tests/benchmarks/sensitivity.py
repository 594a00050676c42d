"""Which directions of an adapter to keep: by effect on the loss, or by energy; on three adapters trained here.

    python -m tests.benchmarks.sensitivity [--steps 150]

A Llama of 0.4 million parameters learns Python source code, byte by byte. From it three adapters of rank 16 on all
linear layers are trained: on English prose (the language reference), on generated sums, and on generated dates in two
spellings. Held-out windows of 128 bytes, four neighbours a group, are measured by ``dynamics.sensitivity``: directions
are chosen on one half of the groups, and losses are those of the other half. All in about four minutes on one core.
"""

from __future__ import annotations

import argparse
import calendar
import time

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import set_seed

import dynamics
from dynamics.intervention.truncations import TRUNCATIONS
from examples.train_lora import BATCH, base_model, english_prose, pretrain, source_code, windows
from probes import Task

RANK, HELD_OUT, GROUP = 16, 96, 4
MONTHS = calendar.month_name[1:]


def sums(lines: int = 20_000) -> str:
    """Return sums of two numbers below a hundred."""
    a, b = np.random.default_rng(0).integers(0, 100, (2, lines))
    return "\n".join(f"{x}+{y}={x + y}" for x, y in zip(a, b, strict=True))


def dates(lines: int = 12_000) -> str:
    """Return dates in figures and in words."""
    generator = np.random.default_rng(1)
    years, months, days = (generator.integers(low, high, lines) for low, high in ((1900, 2100), (0, 12), (1, 29)))
    rows = zip(years, months, days, strict=True)
    return "\n".join(f"{year}-{month + 1:02}-{day:02} is {day} {MONTHS[month]} {year}" for year, month, day in rows)


def train(model: nn.Module, rows: Tensor, steps: int) -> None:
    """Train an adapter in place."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps + 1)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def table(name: str, model: nn.Module, rows: Tensor) -> str:
    """Return the rows of one adapter."""
    samples = [{"input_ids": row, "labels": row} for row in rows]
    task = Task(name, samples, loss="mean", group=[number // GROUP for number in range(len(rows))], batch_size=BATCH)
    start = time.process_time()
    result = dynamics.sensitivity(model, [task]).isel(step=0).sel(task="all")
    seconds = time.process_time() - start
    lines = []
    for truncation in TRUNCATIONS:
        row = result.sel(truncation=truncation)
        effect = [row[f"truncation_effect{end}"].item() for end in ("", "_low", "_high")]
        lines.append(
            f"| {name} | {truncation} | {row['directions'].item():.0f} | {row['parameters'].item():,.0f} | "
            f"{effect[0]:+.4f} ({effect[1]:+.4f} – {effect[2]:+.4f}) | "
            f"{row['predicted_truncation_effect'].item():+.4f} |"
        )
    whole = result["singular_value"].count().item()
    total = (result["out"] + result["in"]).values @ result["singular_value"].count("index").values
    lines.append(f"| {name} | whole: {result['loss'].item():.4f} nat | {whole} | {total:,} | | |")
    slope = (result["singular_value"] * result["loss_slope"]).sum().item()
    lines.append(f"  ({name}: Σσg = {slope:+.4f} nat; measured in {seconds:.0f} s)")
    return "\n".join(lines)


def main() -> None:
    """Train the base and the adapters, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150, help="of each adapter")
    parser.add_argument("--base-steps", type=int, default=400, help="of the base")
    args = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(0)
    base = base_model()
    pretrain(base, windows(source_code()), args.base_steps)
    state = {key: value.clone() for key, value in base.state_dict().items()}
    print("| adapter | kept | directions | parameters | effect on held-out loss, nat a byte | predicted |")
    print("|---|---|---|---|---|---|")
    for name, text in (("prose", english_prose()), ("sums", sums()), ("dates", dates())):
        set_seed(1)
        fresh = base_model()
        fresh.load_state_dict(state)
        lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, use_rslora=True, target_modules="all-linear")
        model = get_peft_model(fresh, lora)
        rows = windows(text)
        train(model, rows[:-HELD_OUT], args.steps)
        print(table(name, model, rows[-HELD_OUT:]), flush=True)


if __name__ == "__main__":
    main()
