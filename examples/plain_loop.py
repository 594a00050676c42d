"""Watch any training loop: a `Recorder` in plain PyTorch, with accumulation and clipping. Seconds on a CPU.

The two steps that matter are inside `recorder.step(...)`: gradients are read as the optimizer takes them, weights after
it has changed them. Nothing here is Hugging Face's; a loop of Accelerate, Lightning or your own looks the same.

    python examples/plain_loop.py --out runs/plain
    python -m dynamics.analyze runs/plain
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import nn

import dynamics

ACCUMULATED = 2  # batches in an optimizer step


def main() -> None:
    """Read the command line, train, and show what was recorded."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the records")
    parser.add_argument("--steps", type=int, default=100, help="optimizer steps")
    args = parser.parse_args()

    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3)).requires_grad_(False)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    with dynamics.Recorder(args.out, model, preset="standard", every=20) as recorder:
        for step in range(1, args.steps + 1):
            with recorder.step(step, optimizer):
                for _ in range(ACCUMULATED):
                    inputs = torch.randn(32, 16)
                    loss = (model(inputs) - teacher(inputs)).square().mean() / ACCUMULATED
                    loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if step in recorder.steps:
                norm, rank = (recorder.scalars[f"total/{name}"] for name in ("frobenius_norm", "effective_rank_energy"))
                print(f"step {step:3d}   ‖ΔW‖ {norm:.3f}   effective rank (energy) {rank:.2f}, median over matrices")
    print(f"\nSee all of it:\n   python -m dynamics.analyze {args.out}")


if __name__ == "__main__":
    main()
