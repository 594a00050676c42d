"""Whether docs/compatibility.md is right: other tools' numbers beside ours, of one matrix. Needs the tools installed.

python -m tests.benchmarks.compatibility
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator

import torch
from torch import nn

import dynamics


def of_weightwatcher(weight: torch.Tensor) -> Iterator[tuple[str, float, float]]:
    """Its name, its number, ours."""
    import weightwatcher  # pyright: ignore[reportMissingImports]

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.float(), requires_grad=False)
    row = weightwatcher.WeightWatcher(model=nn.Sequential(layer)).analyze(mp_fit=False, plot=False).iloc[0]
    values = dynamics.singular_values(weight)
    rank = int((values > max(weight.shape) * torch.finfo(torch.float32).eps * values[0]).sum())
    yield "norm", row["norm"], float(values.square().sum())
    yield "spectral_norm", row["spectral_norm"], float(values[0] ** 2)
    yield "sv_max", row["sv_max"], float(values[0])
    yield "stable_rank", row["stable_rank"], float(dynamics.stable_rank(values))
    yield "matrix_rank", row["matrix_rank"], rank
    yield "entropy", row["entropy"], float(dynamics.spectral_entropy(values)) / math.log(rank)


def of_gradience(weight: torch.Tensor) -> Iterator[tuple[str, float, float]]:
    """Its functions of singular values."""
    from gradience.vnext.audit import lora_audit as audit  # pyright: ignore[reportMissingImports]

    values = dynamics.singular_values(weight)
    own = float(dynamics.effective_rank(values, weights="amplitude"))
    yield "effective_rank", audit._effective_rank_from_singular_values(values), own
    share = (values.square().cumsum(0) / values.square().sum() < 0.9).sum() + 1
    yield "energy_rank_90", audit._energy_rank(values, 0.9), float(share)


def main() -> None:
    """Print the table."""
    weight = torch.randn(120, 80, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.05, 80)
    print("| tool | its name | its number | ours | relative difference |\n|---|---|---|---|---|")
    for tool, compared in (("weightwatcher", of_weightwatcher), ("gradience", of_gradience)):
        if importlib.util.find_spec(tool) is None:
            print(f"| {tool} | not installed | | | |")
            continue
        for name, theirs, ours in compared(weight):
            print(f"| {tool} | `{name}` | {theirs:.6g} | {ours:.6g} | {abs(theirs / ours - 1):.1e} |")


if __name__ == "__main__":
    main()
