"""What the noise scale of the training's own gradients costs: steps with and without its hooks, in turns.

    python -m tests.benchmarks.noise_scale [--pairs 30] [--threads 1]

The model of the table of recording (66 million parameters, LoRA of rank 16 on all linear layers), each step the sum of
two micro-batches of 4 × 128 tokens. The same model takes steps without hooks, and with the hooks that measure each
micro-batch's gradients and their sum at the end of each backward pass; what is read of them is part of the step. So
this is an upper limit: norms before clipping are in it. Times are those of the processor; each step with hooks is
divided by the one beside it. The last column spreads it over the steps that the preset does not capture.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynamics.recording import PRESETS
from probes.gradients import GradientNorms
from tests.benchmarks.capture import VOCABULARY, model

STEPS = 100


def step(
    net: nn.Module, optimizer: torch.optim.Optimizer, rows: Sequence[Tensor], norms: GradientNorms | None
) -> float:
    """Return the processor seconds of one optimizer step."""
    start = time.process_time()
    if norms is not None:
        norms.arm()
    for part in rows:
        net(input_ids=part, labels=part).loss.backward()
    if norms is not None:
        norms.disarm()
        norms.of_micro_batches()
        norms.before_clipping()
    optimizer.step()
    optimizer.zero_grad()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    net = model()
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    optimizer, norms = torch.optim.AdamW(trained, lr=1e-3), GradientNorms(trained)
    rows = torch.randint(VOCABULARY, (2, 4, 128)).unbind()
    for hooks in (None, norms):
        step(net, optimizer, rows, hooks)
    ratios, bare, armed = [], [], []
    for number in range(options.pairs):
        order = (None, norms) if number % 2 == 0 else (norms, None)
        seconds = {hooks is not None: step(net, optimizer, rows, hooks) for hooks in order}
        bare.append(seconds[False])
        armed.append(seconds[True])
        ratios.append(seconds[True] / seconds[False] - 1)
    quarters = statistics.quantiles(ratios, n=4)
    whole = sum(armed) / sum(bare) - 1
    print(f"{options.threads} threads, torch {torch.__version__}; a step takes {statistics.median(bare):.2f} s\n")
    print(
        "| | captured | a captured step | quartiles | all pairs together | over all steps |\n|---|---|---|---|---|---|"
    )
    for name in ("economy", "standard"):
        captured = sum(map(PRESETS[name].schedule, range(1, STEPS + 1)))
        middle = 100 * statistics.median(ratios)
        spread = f"{100 * quarters[0]:+.2f} to {100 * quarters[2]:+.2f} %"
        print(
            f"| {name} | {captured} of {STEPS} | {middle:+.2f} % | {spread} | {100 * whole:+.2f} % | "
            f"{middle * captured / STEPS:+.3f} % |"
        )


if __name__ == "__main__":
    main()
