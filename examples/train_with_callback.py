"""Watch a LoRA training while it runs: the Trainer with a `DynamicsCallback`. Seconds on a CPU, nothing to download.

A tiny Llama, built from a configuration, can count; a LoRA teaches it to repeat what it has just seen. Does it still
count afterwards? What training does to its weights and to the losses of held-out samples goes into
`OUT/dynamics/records/`, a summary into the training log, and from there into whatever the Trainer reports to.
`--preset full` adds what gradients at the start predict, by layer.

    python examples/train_with_callback.py --out runs/watched
    python -m dynamics.analyze runs/watched
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

import dynamics
import probes
from dynamics import DynamicsCallback

VOCABULARY, HALF = 64, 12
#: Steps in which the base learns to count, and held-out rows of each task.
BASE_STEPS, HELD_OUT = 80, 32


def repetitions(count: int, seed: int) -> TensorDataset:
    """Return rows of `HALF` random tokens, each followed by the same tokens again: `[count, 2 · HALF]`."""
    half = torch.randint(VOCABULARY, (count, HALF), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(torch.cat([half, half], dim=1))


def collate(samples: list[tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """Stack rows into a batch; the first half cannot be predicted, so only the second is asked for."""
    rows = torch.stack([sample[0] for sample in samples])
    labels = rows.clone()
    labels[:, :HALF] = -100
    return {"input_ids": rows, "labels": labels}


def counting(count: int, seed: int) -> Tensor:
    """Return rows that count up by a step of 1, 2 or 3 from anywhere: `[count, 2 · HALF]`."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(VOCABULARY, (count, 1), generator=generator)
    return (first + torch.randint(1, 4, (count, 1), generator=generator) * torch.arange(2 * HALF)) % VOCABULARY


def adapted_model() -> torch.nn.Module:
    """Return a Llama that has learned to count, with LoRA on all of its linear layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    base = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for rows in counting(BASE_STEPS * 32, seed=0).split(32):
        base(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16)
    return get_peft_model(base, lora)


def held_out_tasks() -> list[probes.Task]:
    """Return what is learned, and what the base could do; the mean loss over the tokens that are asked for."""
    repeated = [{name: part[0] for name, part in collate([row]).items()} for row in repetitions(HELD_OUT, seed=2)]
    counted = [{"input_ids": row, "labels": row} for row in counting(HELD_OUT, seed=3)]
    return [
        probes.Task("repeat", repeated, loss="mean"),
        probes.Task("count", counted, loss="mean", retained=True),
    ]


def main() -> None:
    """Read the command line, train, and show what was recorded."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for checkpoints and records")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps")
    parser.add_argument("--preset", default="standard", help="economy, standard or full")
    parser.add_argument("--report-to", default="none", help="what the Trainer reports to, such as tensorboard")
    args = parser.parse_args()

    set_seed(0)
    model = adapted_model()
    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=max(1, args.steps // 2),
        use_cpu=True,
        disable_tqdm=True,
        report_to=args.report_to,
    )
    callback = DynamicsCallback(args.out, held_out_tasks(), preset=args.preset)
    trainer = Trainer(model, training, collate, repetitions(512, seed=1), callbacks=[callback])
    callback.attach(trainer)  # before the reporters, so that they see its numbers too
    trainer.train()

    tree = dynamics.open_run(args.out)
    update, change = tree["update"].to_dataset().sel(kind="total"), tree["loss"].to_dataset()["change"]
    print("\nstep   ‖ΔW‖ of all matrices   effective rank (energy), median   loss of repeat   loss of count")
    for step in update["step"].values.tolist():
        norm, rank = float(update["frobenius_norm_all"].sel(step=step)), update["effective_rank_energy"].sel(step=step)
        repeat, count = (float(change.sel(step=step, task=task)) for task in ("repeat", "count"))
        print(f"{step:4d} {norm:14.3f} {float(rank.median()):22.2f} of 8 {repeat:+20.3f} {count:+15.3f}")
    print(f"\nSee all of it:\n   python -m dynamics.analyze {args.out}")


if __name__ == "__main__":
    main()
