"""Watch a LoRA training while it runs: the Trainer with a `DynamicsCallback`. Seconds on a CPU, nothing to download.

A tiny Llama, built from a configuration, learns to repeat what it has just seen. What training does to its weights goes
into `OUT/dynamics/records/`, a summary into the training log, and from there into whatever the Trainer reports to.

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
from dynamics import DynamicsCallback

VOCABULARY, HALF = 64, 12


def repetitions(count: int, seed: int) -> TensorDataset:
    """Return rows of `HALF` random tokens, each followed by the same tokens again: `[count, 2 · HALF]`."""
    half = torch.randint(VOCABULARY, (count, HALF), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(torch.cat([half, half], dim=1))


def collate(samples: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """Stack rows into a batch; the first half cannot be predicted, so only the second is asked for."""
    rows = torch.stack([row for (row,) in samples])
    labels = rows.clone()
    labels[:, :HALF] = -100
    return {"input_ids": rows, "labels": labels}


def adapted_model() -> torch.nn.Module:
    """Return a random Llama with LoRA on all of its linear layers."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=8, lora_alpha=16)
    return get_peft_model(LlamaForCausalLM(config), lora)


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
        learning_rate=1e-2,
        max_grad_norm=1.0,
        logging_steps=10,
        save_steps=max(1, args.steps // 2),
        use_cpu=True,
        disable_tqdm=True,
        report_to=args.report_to,
    )
    callback = DynamicsCallback(args.out, preset=args.preset)
    trainer = Trainer(model, training, collate, repetitions(512, seed=1), callbacks=[callback])
    callback.attach(trainer)  # before the reporters, so that they see its numbers too
    trainer.train()

    update = dynamics.open_run(args.out)["update"].to_dataset().sel(kind="total")
    print("\nstep   ‖ΔW‖ of all matrices   effective rank (energy), median over matrices")
    for step in update["step"].values.tolist():
        at = update.sel(step=step)
        rank = at["effective_rank_energy"].median()
        print(f"{step:4d} {float(at['frobenius_norm_all']):14.3f} {float(rank):22.2f} of 8")
    print(f"\nSee all of it:\n   python -m dynamics.analyze {args.out}")


if __name__ == "__main__":
    main()
