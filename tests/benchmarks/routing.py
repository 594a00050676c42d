"""What counting the choices of routers costs a training: processor time of steps with and without, in turns.

    python -m tests.benchmarks.routing [--rounds 5] [--pairs 6]

A Mixtral of 8 layers with 16 experts each, two for a token, is trained on random tokens with LoRA on attention and
experts. In each pair one step is counted and recorded and one is not, in changing order. The last column is the extra
time of the steps that the standard schedule captures, over all of 100 and of 1,000 steps.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

from dynamics.recording import PRESETS
from dynamics.recording.routing import RoutingRecorder

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
    trained = model()
    optimizer = torch.optim.AdamW([parameter for parameter in trained.parameters() if parameter.requires_grad], lr=1e-4)
    recorder = RoutingRecorder(trained)
    words = torch.randint(VOCABULARY, (options.batch, options.tokens))
    recorder.arm(0)
    step(trained, optimizer, words)  # learns where choices are
    recorder.record()
    extras, plains = [], []
    for _ in range(options.rounds):
        seconds: dict[bool, list[float]] = {True: [], False: []}
        for pair in range(options.pairs):
            for counted in (pair % 2 == 0, pair % 2 == 1):
                begin = time.process_time()
                if counted:
                    recorder.arm(1)
                step(trained, optimizer, words)
                if counted:
                    recorder.record()
                seconds[counted].append(time.process_time() - begin)
        plains.append(statistics.median(seconds[False]))
        extras.append(statistics.median(one - other for one, other in zip(seconds[True], seconds[False], strict=True)))
    plain, extra = statistics.median(plains), statistics.median(extras)
    schedule = PRESETS["standard"].schedule
    shares = [sum(map(schedule, range(1, steps + 1))) / steps for steps in (100, 1000)]
    print("| a step | counted: more | of a captured step | of 100 steps | of 1,000 steps |\n|---|---|---|---|---|")
    print(
        f"| {plain:.2f} s | {1e3 * extra:.1f} ms ({1e3 * min(extras):.1f} to {1e3 * max(extras):.1f}) | "
        f"{extra / plain:.2%} | {' | '.join(f'{share * extra / plain:.3%}' for share in shares)} |"
    )


if __name__ == "__main__":
    main()
