"""What an intervention costs: the default arms of one increment beside forward passes over the same probe samples.

    python -m tests.benchmarks.intervention [--rounds 5] [--threads 1]

The model of :mod:`tests.benchmarks.gram` (a Llama of 6 layers, 512 wide, LoRA of rank 16 on all linear layers), 64
sequences of 64 tokens in batches of 8, in 32 groups. Each round takes one forward pass over all samples, K and b, and
the intervention, in turns; a line is the ratio to the forward pass, median and range. Then the memory of the arms of
one fold, in adapters of rank r.
"""

from __future__ import annotations

import argparse
import statistics

import torch

import dynamics
from probes import LowRankMatrix, Task, gradient_gram
from probes.blocks import trained_parameters
from tests.benchmarks.gram import VOCABULARY, model, timed

SAMPLES, TOKENS, GROUPS, K = 64, 64, 32, 8


def tasks() -> list[Task]:
    """One task of random text."""
    rows = torch.randint(VOCABULARY, (SAMPLES, TOKENS), generator=torch.Generator().manual_seed(3))
    samples = [{"input_ids": row, "labels": row, "document": number % GROUPS} for number, row in enumerate(rows)]
    return [Task("text", samples, group="document")]


def update(net: torch.nn.Module) -> dict[str, LowRankMatrix]:
    """A random change of a hundredth of each factor."""
    from probes.watched import find

    generator = torch.Generator().manual_seed(4)
    changes = {}
    for watched in find(net).watched:
        matrix = watched.read()
        assert isinstance(matrix, LowRankMatrix)
        left, right = (
            0.01 * torch.randn(part.shape, generator=generator) * part.std()
            for part in (matrix.left_factor.detach(), matrix.right_factor.detach())
        )
        columns = torch.cat([left, matrix.left_factor.detach()], 1)
        changes[watched.name] = LowRankMatrix(columns, torch.cat([matrix.right_factor.detach(), right]), matrix.scale)
    return changes


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    net, probes = model(), tasks()
    change = update(net)

    def forward() -> None:
        with torch.no_grad():
            for batch in probes[0].batches():
                probes[0].losses(net, batch)

    forward()
    costs: dict[str, list[float]] = {"K and b": [], "intervention": []}
    for _ in range(options.rounds):
        plain, _ = timed(forward)
        gram_seconds, gram = timed(lambda: gradient_gram(net, probes, update=change))
        arms = dynamics.counterfactuals(net, probes, gram, change, k=K)
        seconds, _ = timed(lambda arms=arms: dynamics.intervene(net, probes, arms))
        costs["K and b"].append(gram_seconds / plain)
        costs["intervention"].append(seconds / plain)
    for name, ratios in costs.items():
        middle = statistics.median(ratios)
        print(
            f"{name:14s} {middle:5.1f} forward passes ({min(ratios):.1f} to {max(ratios):.1f}, {options.rounds} rounds)"
        )
    adapter = sum(parameter.numel() * 4 for parameter in trained_parameters(net).values())
    parts = dynamics.counterfactuals(net, probes, gradient_gram(net, probes, update=change), change, k=K).folds[0].arms
    held = {
        id(factor): factor.numel() * factor.element_size()
        for arm in ("on", "random", "off")
        for matrix in parts[arm].values()
        if isinstance(matrix, LowRankMatrix)
        for factor in (matrix.left_factor, matrix.right_factor)
    }
    print(f"arms of a fold, with the update: {sum(held.values()) / adapter:.1f} adapters of rank r")


if __name__ == "__main__":
    main()
