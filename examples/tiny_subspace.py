"""Does the concentrated part of the updates do the work? Two tasks, three trainings each. A minute on a CPU.

Most of each step of SGD lies in few directions, the leading ones of the Fisher. Is that where the model learns? A small
network is trained three times from the same start: with its steps as they are (`full`), with only their part in the
leading directions (`on`), and without that part (`off`). On the first task, `on` stalls and `off` learns, as Song, Ahn
and Yun (2025, arXiv 2405.16002) found for the leading directions of the Hessian: along them, SGD goes back and forth.
On the second task it is the other way round. The share of the steps in these directions is large on both: it cannot
tell the two apart.

    python examples/tiny_subspace.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynamics import ProjectedUpdates
from probes import Task

INPUTS, OUTPUTS, WIDTH = 32, 4, 64
SCALES = 4.0 / torch.arange(1, INPUTS + 1)  # of the inputs: a few hold most of the variance, as in natural data
BATCH, TRAINED, PROBED, HELD_OUT = 250, 1_000, 200, 2_000
K, REFRESH = OUTPUTS, 20  # directions, and steps after which they are estimated again

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """What is to be learned.

    Args:
        name: Of the task.
        rows: From a number of rows and a generator to inputs and targets.
        rate: Learning rate.
        steps: Share of `--steps` that is trained.
        plain: Share of those that comes before any projection.
    """

    name: str
    rows: Callable[[int, torch.Generator], Rows]
    rate: float
    steps: float
    plain: float


def clusters(count: int, generator: torch.Generator) -> Rows:
    """Return points of 32 clusters, eight of each class, and their classes one-hot."""
    centres = torch.randn(8 * OUTPUTS, INPUTS, generator=torch.Generator().manual_seed(0))
    chosen = torch.randint(len(centres), (count,), generator=generator)
    points = centres[chosen] + 0.4 * torch.randn(count, INPUTS, generator=generator)
    return points * SCALES, nn.functional.one_hot(chosen % OUTPUTS, OUTPUTS).float()


def teacher(count: int, generator: torch.Generator) -> Rows:
    """Return points, and a linear function of the two inputs that vary most."""
    weights = torch.randn(2, OUTPUTS, generator=torch.Generator().manual_seed(9))
    points = torch.randn(count, INPUTS, generator=generator) * SCALES
    return points, points[:, :2] @ weights / 4


PROBLEMS = (
    Problem("clusters", clusters, rate=0.05, steps=1.0, plain=0.2),
    Problem("teacher", teacher, rate=0.01, steps=0.3, plain=0.0),
)


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return half the squared error of each row."""
    return (model(batch["x"]) - batch["y"]).square().sum(-1) / 2


def train(problem: Problem, keep: str, steps: int, seed: int) -> tuple[float, float, float]:
    """Train one network.

    Returns:
        Held-out loss where projecting begins, at the end, and the mean share of the steps in the leading directions.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(INPUTS, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, OUTPUTS)
    )
    generator = torch.Generator().manual_seed(seed)
    (x, y), probed, (held_x, held_y) = (problem.rows(n, generator) for n in (TRAINED, PROBED, HELD_OUT))
    samples = [{"x": row, "y": target} for row, target in zip(*probed, strict=True)]
    task = Task(problem.name, samples, loss=squares, batch_size=PROBED)
    projected = ProjectedUpdates([task], keep, k=K, refresh=REFRESH)
    optimizer = torch.optim.SGD(model.parameters(), lr=problem.rate)

    def held_out() -> float:
        with torch.no_grad():
            return squares(model, {"x": held_x, "y": held_y}).mean().item()

    total = max(2, round(problem.steps * steps))
    first = round(problem.plain * total)
    start, shares = held_out(), []
    for step in range(total):
        chosen = torch.randint(TRAINED, (BATCH,), generator=generator)
        squares(model, {"x": x[chosen], "y": y[chosen]}).mean().backward()
        if step < first:
            optimizer.step()
            start = held_out() if step == first - 1 else start
        else:
            with projected.step(model):
                optimizer.step()
            shares.append(projected.captured_share)
        optimizer.zero_grad()
    return start, held_out(), sum(shares) / len(shares)


def main() -> None:
    """Read the command line, train, and print what each part of the steps learned."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="optimizer steps of the longer task")
    parser.add_argument("--seeds", type=int, default=5, help="networks, each with data of its own")
    args = parser.parse_args()

    for problem in PROBLEMS:
        print(f"\n{problem.name}: held-out loss, mean of {args.seeds} seeds (lowest to highest)")
        print("steps   share in the leading directions   before             after")
        for keep in ("full", "on", "off"):
            runs = [train(problem, keep, args.steps, seed) for seed in range(args.seeds)]
            before, after, shares = zip(*runs, strict=True)
            print(f"{keep:5} {sum(shares) / len(shares):20.2f} {summary(before):>30} {summary(after):>25}")


def summary(losses: tuple[float, ...]) -> str:
    """Return the mean and the range of losses."""
    return f"{sum(losses) / len(losses):.3f} ({min(losses):.3f} to {max(losses):.3f})"


if __name__ == "__main__":
    main()
