"""Train a small Llama with LoRA on the CPU, in about two minutes, without a download.

A base model is first taught to continue Python source code; then its weights are frozen, and LoRA adapters teach it
English prose instead. The new domain is far enough from the old one for the update to have something to say. Both texts
ship with Python: the source of some standard library modules, and the sentences of the language reference in
`pydoc_data.topics`. Tokens are bytes, so there is no tokenizer.

    python examples/train_lora.py --out runs/pydoc_lora
    python -m dynamics.analyze runs/pydoc_lora
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import math
from pathlib import Path
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils.data import TensorDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments, set_seed

WINDOW = 128  # bytes that the model sees at once
BATCH = 16  # windows in an optimizer step
MODULES = ("argparse", "difflib", "doctest", "inspect", "optparse", "pickle", "subprocess", "tarfile", "typing")


def source_code() -> str:
    """Return the source text of `MODULES`, the base model's domain."""
    return "\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES)


def english_prose() -> str:
    """Return the sentences of Python's language reference, the fine-tuning domain.

    Topics quote each other, so each paragraph is kept once: a repeated one would otherwise stand in the training and in
    the evaluation text. Grammar and code do not end in a full stop or a colon, headings are short; both are left out.
    """
    paragraphs = (" ".join(block.split()) for text in topics.values() for block in text.split("\n\n"))
    return "\n".join(dict.fromkeys(p for p in paragraphs if len(p) > 80 and p.endswith((".", ":"))))


def windows(text: str) -> Tensor:
    """Cut the UTF-8 bytes of `text` into rows of tokens, `[windows, WINDOW]`; what does not fill a row is dropped."""
    tokens = torch.tensor(list(text.encode()))
    return tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)


def base_model() -> LlamaForCausalLM:
    """Return an untrained Llama of about 0.4 million parameters over the 256 byte values."""
    config = LlamaConfig(
        vocab_size=256, hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4
    )
    return LlamaForCausalLM(config)


def pretrain(model: LlamaForCausalLM, rows: Tensor, steps: int) -> float:
    """Teach `model` the domain of `rows` in place, and return its last training loss in nats per byte."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1)
    loss = torch.tensor(torch.nan)
    for _ in range(steps):
        batch = rows[torch.randint(len(rows), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return loss.item()


def collate(samples: list[tuple[Tensor]]) -> dict[str, Tensor]:
    """Stack windows into a batch `[samples, WINDOW]`; the model itself shifts the labels to the next byte."""
    batch = torch.stack([row for (row,) in samples])
    return {"input_ids": batch, "labels": batch}


def fine_tune(model: LlamaForCausalLM, rows: Tensor, args: argparse.Namespace) -> float:
    """Train LoRA adapters on nine tenths of `rows`, saving checkpoints, and return the loss on the last tenth."""
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"],
        r=args.rank,
        rank_pattern={"down_proj": 2 * args.rank},  # its input is twice as wide as the others'
        lora_alpha=2 * args.rank,
        use_rslora=True,  # scale α/√r: the one that keeps updates of different ranks comparable
    )
    interval = math.ceil(args.steps / args.checkpoints)
    training = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=BATCH,
        learning_rate=4e-3,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        logging_steps=max(1, interval // 5),
        eval_strategy="steps",
        eval_steps=interval,
        eval_on_start=True,  # what the base does without its adapters
        save_steps=interval,
        save_only_model=True,
        seed=args.seed,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
    )
    held_out = len(rows) // 10  # the end of the text: no window of it is trained on
    train, evaluation = TensorDataset(rows[:-held_out]), TensorDataset(rows[-held_out:])
    trainer = Trainer(get_peft_model(model, lora), training, collate, train, evaluation)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def positive(text: str) -> int:
    """Read a command-line number that must be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main() -> None:
    """Read the command line, train, and say how to analyse the result."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the checkpoints")
    parser.add_argument("--steps", type=positive, default=200, help="optimizer steps of LoRA")
    parser.add_argument("--checkpoints", type=positive, default=8, help="how many to save, the last step among them")
    parser.add_argument("--base-steps", type=positive, default=600, help="optimizer steps that make the base")
    parser.add_argument("--rank", type=positive, default=4, help="of LoRA; down_proj gets twice as much")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches")
    args = parser.parse_args()
    if any(args.out.glob("checkpoint-*")):  # two trainings would be interleaved by their step numbers
        parser.error(f"'{args.out}' already holds checkpoints. Pass a new folder, or delete that one.")

    set_seed(args.seed)
    model = base_model()
    print(f"1. A base of {model.num_parameters():,} weights learns Python source code in {args.base_steps} steps ...")
    loss = pretrain(model, windows(source_code()), args.base_steps)
    print(f"   loss {loss:.3f} nats per byte in its last batch")
    print(f"2. LoRA of rank {args.rank} (down_proj: {2 * args.rank}) learns English prose in {args.steps} steps ...")
    loss = fine_tune(model, windows(english_prose()), args)
    print(f"   loss {loss:.3f} nats per byte in text that it has not seen")
    print(f"3. See what that did to the weights:\n   python -m dynamics.analyze {args.out}")


if __name__ == "__main__":
    main()
