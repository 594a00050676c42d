"""What recording costs a training: whole trainings with and without the callback, in turns.

    python -m tests.benchmarks.capture [--steps 100] [--rounds 3] [--threads 2]

A Llama of 66 million parameters with LoRA of rank 16 on all linear layers (56 matrices) is trained by a Trainer on
random tokens, once without a callback and once for each preset at its default schedule, alternating; a fresh process
measures peak memory. Machines are noisy: read the ratios. Two ratios are printed. The first compares whole trainings,
and on a busy machine its spread is larger than what it measures. The second divides the time spent inside the callback
by the rest of the same training; the hooks' own calls during the backward passes of captured steps are in it. Where
that time goes is printed by phase, as processor time of all threads; what is left are checks of every step and tables.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from dynamics import DynamicsCallback
from dynamics.recording import PRESETS
from dynamics.recording.live import LiveSpectra
from dynamics.recording.step_gradients import StepGradients
from dynamics.recording.writer import Records
from probes.gradients import GradientNorms
from probes.watched import find_watched

RANK, VOCABULARY, WIDTH, LAYERS = 16, 8192, 768, 8
WITHOUT = "without"

#: A process starts with its parent's peak memory on its account, so the one that is measured has a small parent.
LAUNCHER = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(status)
"""


class RandomTokens(Dataset):
    """Sequences of random tokens, the same in every training."""

    def __init__(self, length: int, tokens: int) -> None:
        self._rows = torch.randint(VOCABULARY, (length, tokens), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


@dataclass
class Spent:
    """Seconds of one training: of all its steps, and inside the callback, by the clock and of all threads."""

    whole: float = 0.0
    inside: float = 0.0
    processor: float = 0.0
    phases: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))  # processor seconds


#: Phase → class and methods that are its work: the last within the training's own backward passes.
PHASES = {
    "gradients": (StepGradients, ("read", "record")),
    "spectra of updates": (LiveSpectra, ("measure",)),
    "copies": (LiveSpectra, ("advance",)),
    "writing": (Records, ("write", "annotate")),
    "log": (DynamicsCallback, ("on_log",)),
    "hooks in backward": (GradientNorms, ("_ask", "_end", "_measure_micro", "_measure")),
}
EVENTS = ("on_step_begin", "on_pre_optimizer_step", "on_step_end", "on_save", "on_log")


@contextmanager
def timed(spent: Spent) -> Iterator[None]:
    """Add up what the callback's events, the hooks and the phases take."""
    undo: list[tuple[type, str, Callable[..., Any]]] = []
    depth = 0  # of events within events: a step's end logs

    def wrap(owner: type, name: str, phase: str, *, counts: bool) -> None:
        original = getattr(owner, name)
        # Hooks run beside the threads of the training's own operations.
        clock = time.thread_time if owner is GradientNorms else time.process_time

        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            depth += counts
            start, processor_start = time.perf_counter(), clock()
            try:
                return original(*args, **kwargs)
            finally:
                seconds, processor = time.perf_counter() - start, clock() - processor_start
                depth -= counts
                spent.phases[phase] += processor
                if counts and depth == 0:
                    spent.inside += seconds
                    spent.processor += processor

        undo.append((owner, name, original))
        setattr(owner, name, run)

    for phase, (owner, names) in PHASES.items():
        for name in names:
            wrap(owner, name, phase, counts=owner in (DynamicsCallback, GradientNorms))
    for name in set(EVENTS) - set(PHASES["log"][1]):
        wrap(DynamicsCallback, name, name, counts=True)
    try:
        yield
    finally:
        for owner, name, original in reversed(undo):
            setattr(owner, name, original)


class Clock(TrainerCallback):
    """From the beginning of the first step to the end of the last."""

    seconds = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds = time.perf_counter() - self._start


def model() -> nn.Module:
    """The model in training."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH // 2 + 512,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
    )
    lora = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def train(contestant: str, options: argparse.Namespace) -> Spent:
    """Train once, with a preset or without a callback."""
    set_seed(0)
    spent = Spent()
    with tempfile.TemporaryDirectory() as folder, timed(spent):
        callback = None if contestant == WITHOUT else DynamicsCallback(folder, preset=contestant)
        clock = Clock()
        arguments = TrainingArguments(
            folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=1e-3,
            max_grad_norm=1.0,
            logging_steps=10,
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
        )
        data = RandomTokens(options.steps * options.batch, options.tokens)
        trainer = Trainer(model(), arguments, train_dataset=data, callbacks=[] if callback is None else [callback])
        trainer.add_callback(clock)
        if callback is not None:
            callback.attach(trainer)
        trainer.train()
    spent.whole = clock.seconds
    return spent


def peak_memory(contestant: str, options: argparse.Namespace) -> float:
    """Peak resident MiB of a short training in a process of its own."""
    arguments = [f"--only={contestant}", "--steps=2", f"--batch={options.batch}", f"--tokens={options.tokens}"]
    command = [sys.executable, "-m", "tests.benchmarks.capture", *arguments, f"--threads={options.threads}"]
    result = subprocess.run(
        [sys.executable, "-I", "-S", "-c", LAUNCHER, *command], capture_output=True, text=True, check=True
    )
    return float(result.stdout)


def row(label: str, values: Sequence[float], unit: str) -> str:
    return f"| {label} | {statistics.median(values):.2f} {unit} | {min(values):.2f} – {max(values):.2f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument(
        "--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory, too"
    )
    parser.add_argument("--only", help="one training of this contestant, for its memory")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only:
        train(options.only, options)
        return
    watched = find_watched(model())
    factors = {id(p): p for each in watched for p in each.sources}.values()
    total = sum(p.numel() for p in model().parameters())
    print(
        f"{total / 1e6:.0f} M parameters, {len(watched)} matrices, {options.batch} × {options.tokens} tokens a step, "
        f"{options.steps} steps, {options.threads} threads, torch {torch.__version__}\n"
    )
    print("| | median | range |\n|---|---|---|")
    contestants = [WITHOUT, *options.presets]
    rounds: list[dict[str, Spent]] = []
    for number in range(options.rounds):
        order = contestants if number % 2 == 0 else contestants[::-1]
        rounds.append({contestant: train(contestant, options) for contestant in order})
    plain = [each[WITHOUT].whole for each in rounds]
    print(row("one step without callback", [1e3 * seconds / options.steps for seconds in plain], "ms"))
    for preset in options.presets:
        taken = [each[preset] for each in rounds]
        captured = max(1, sum(map(PRESETS[preset].schedule, range(1, options.steps + 1))))
        each = f"{preset}: {captured} captured steps, each"
        print(row(each, [1e3 * one.inside / captured for one in taken], "ms"))
        print(row(f"{each}, processor", [1e3 * one.processor / captured for one in taken], "ms"))
        for phase in PHASES:
            print(row(f"… {phase}", [1e3 * one.phases[phase] / captured for one in taken], "ms"))
        wholes = [100 * (one.whole / bare - 1) for one, bare in zip(taken, plain, strict=True)]
        print(row(f"{preset}: whole training, over without", wholes, "%"))
        inside = [100 * one.inside / (one.whole - one.inside) for one in taken]
        print(row(f"{preset}: time inside the callback, of the rest", inside, "%"), flush=True)
    if not options.memory:
        return
    copy = sum(p.numel() * p.element_size() for p in factors) / 2**20
    print(f"\nOne copy of the watched factors: {copy:.1f} MiB.\n\n| peak memory | MiB | over without |\n|---|---|---|")
    bare = math.nan
    for contestant in contestants:
        peak = peak_memory(contestant, options)
        bare = peak if contestant == WITHOUT else bare
        print(f"| {contestant} | {peak:.0f} | {peak - bare:+.0f} |", flush=True)


if __name__ == "__main__":
    main()
