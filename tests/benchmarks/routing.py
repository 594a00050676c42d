"""What counting the choices of routers costs a training: processor time of steps with and without, in turns.

    python -m tests.benchmarks.routing [--rounds 5] [--pairs 6]

A Mixtral of 8 layers with 16 experts each, two for a token, is trained on random tokens with LoRA on attention and
experts. In each pair one step is counted and recorded and one is not, in changing order. The difference of two steps is
noisier than what counting takes, so that the time inside hooks, arming and recording is taken as well; the last columns
are its share of a captured step, and of 100 and 1,000 steps at the standard schedule.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from dynamics.recording import PRESETS
from dynamics.recording.routing import RoutingRecorder
from probes.routers import Routing

VOCABULARY, WIDTH, LAYERS, EXPERTS = 8192, 512, 8, 16


def model() -> nn.Module:
    """The model in training."""
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=EXPERTS,
    )
    lora = LoraConfig(
        r=8,
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(0)
    return get_peft_model(MixtralForCausalLM(config), lora).train()


def step(trained: nn.Module, optimizer: torch.optim.Optimizer, words: Tensor) -> None:
    """One step of training."""
    trained(input_ids=words, attention_mask=torch.ones_like(words), labels=words).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=6, help="pairs of steps in a round")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    options = parser.parse_args()
    Routing._quiet = _timed(Routing._quiet)
    trained = model()
    optimizer = torch.optim.AdamW([parameter for parameter in trained.parameters() if parameter.requires_grad], lr=1e-4)
    recorder = RoutingRecorder(trained)
    words = torch.randint(VOCABULARY, (options.batch, options.tokens))
    counted_step(recorder, trained, optimizer, words)  # learns where choices are
    steps, extras, insides = [], [], []
    for _ in range(options.rounds):
        plain, more, inside = [], [], []
        for pair in range(options.pairs):
            seconds = {}
            for counted in (pair % 2 == 0, pair % 2 == 1):
                begin = time.process_time()
                if counted:
                    inside.append(counted_step(recorder, trained, optimizer, words))
                else:
                    step(trained, optimizer, words)
                seconds[counted] = time.process_time() - begin
            plain.append(seconds[False])
            more.append(seconds[True] - seconds[False])
        for results, values in ((steps, plain), (extras, more), (insides, inside)):
            results.append(statistics.median(values))
    schedule, one = PRESETS["standard"].schedule, statistics.median(steps)
    print("| a step | in hooks, arming and recording | with less without | captured step | 100 steps | 1,000 steps |")
    print("|---|---|---|---|---|---|")
    share = statistics.median(insides) / one
    of_steps = [share * sum(map(schedule, range(1, count + 1))) / count for count in (100, 1000)]
    print(
        f"| {one:.2f} s | {_range(insides)} | {_range(extras)} | "
        f"{' | '.join(f'{100 * part:.3f} %' for part in (share, *of_steps))} |"
    )


def counted_step(
    recorder: RoutingRecorder, trained: nn.Module, optimizer: torch.optim.Optimizer, words: Tensor
) -> float:
    """Processor seconds that a captured step spends on routing."""
    global _spent
    _spent, begin = 0.0, time.process_time()
    recorder.arm(1)
    armed = time.process_time()
    step(trained, optimizer, words)
    trained_by = time.process_time()
    recorder.record()
    return _spent + armed - begin + time.process_time() - trained_by


_spent = 0.0


def _timed(quiet: Callable[..., Any]) -> Callable[..., Any]:
    def make(self: Routing, hook: Callable[..., None]) -> Callable[..., None]:
        inner = quiet(self, hook)

        def run(*values: Any) -> None:
            global _spent
            begin = time.process_time()
            inner(*values)
            _spent += time.process_time() - begin

        return run

    return make


def _range(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ms ({1e3 * min(seconds):.1f} to {1e3 * max(seconds):.1f})"


if __name__ == "__main__":
    main()
