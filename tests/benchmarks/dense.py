"""Dense updates: exact spectra beside torch's SVD, and a whole checkpoint beside weightwatcher, if it is installed.

    python -m tests.benchmarks.dense [--rounds 3] [--threads 2] [--layers 22]

1. The exact spectrum of a float32 matrix of 2048 × 5632 and of 4096 × 4096, by the Gram of the shorter side in float64,
   beside `torch.linalg.svdvals` in float32: contestants in turns, ratio of each round, median and range, and by how
   much effective ranks differ.
2. A checkpoint of TinyLlama's shapes (random bfloat16 weights, `--layers` of its 22 layers, no embeddings) and its
   base, analysed as a whole process: time, and peak memory beside its bound, the two largest tensors in float64 and
   1 GiB.
   Then the spectra of as many weights by weightwatcher's `analyze`, for stable rank, spectral norm and entropy.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dynamics.spectra.dense import dense_spectrum
from dynamics.spectra.measures import effective_rank

SIZES = ((2048, 5632), (4096, 4096))
HIDDEN, INNER, KEY = 2048, 5632, 256
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY, HIDDEN),
    "self_attn.v_proj": (KEY, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def seconds(function: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Wall-clock time, and what came out."""
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


def single_matrices(rounds: int) -> None:
    """Exact spectra beside torch's, in turns."""
    print("| matrix | ours, float64 | svdvals, float32 | svdvals over ours | effective ranks differ by |")
    print("|---|---|---|---|---|")
    for out, in_ in SIZES:
        matrix = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)) * torch.linspace(1, 0.01, in_)
        ours, theirs, difference = [], [], 0.0
        for _ in range(rounds):
            own, values = seconds(lambda: dense_spectrum(matrix).values)  # noqa: B023
            other, single = seconds(lambda: torch.linalg.svdvals(matrix).double())  # noqa: B023
            ours.append(own)
            theirs.append(other)
            for weights in ("energy", "amplitude"):
                ranks = [float(effective_rank(each, weights=weights)) for each in (values, single)]
                difference = max(difference, abs(ranks[0] / ranks[1] - 1))
        ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
        print(
            f"| {out} × {in_} | {statistics.median(ours):.2f} s | {statistics.median(theirs):.2f} s "
            f"| {statistics.median(ratios):.1f}× ({min(ratios):.1f} – {max(ratios):.1f}) | {difference:.1e} |"
        )


def write_checkpoints(folder: Path, layers: int) -> None:
    """A base and one checkpoint, layer by layer, in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"model.layers.{layer}.{role}.weight": (0.02 * torch.randn(*shape, generator=generator)).bfloat16()
        for layer in range(layers)
        for role, shape in LAYER.items()
    }
    for name, change in (("base", 0.0), ("run/checkpoint-100", 1e-3)):
        (folder / name).mkdir(parents=True)
        moved = {
            key: (value.float() + change * torch.randn(value.shape, generator=generator)).bfloat16()
            for key, value in tensors.items()
        }
        save_file(moved, folder / name / "model.safetensors", metadata={"format": "pt"})


def own_memory_of(process: subprocess.Popen[bytes]) -> float:
    """Peak memory of a process in GiB, sampled until it ends; pages of the mapped weight files are not its own."""
    peak = 0
    while process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = max([peak, *(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))])
        time.sleep(0.02)
    if process.returncode:
        raise RuntimeError(f"The analysis ended with exit status {process.returncode}.")
    return peak / 2**20


def whole_checkpoint(layers: int) -> None:
    """The command as a process of its own, and weightwatcher on the same weights."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_checkpoints(folder, layers)
        size = sum(file.stat().st_size for file in (folder / "run").rglob("*.safetensors")) / 2**30
        command = [sys.executable, "-m", "dynamics.analyze", folder / "run", "--base", folder / "base", "--no-report"]
        start = time.perf_counter()
        peak = own_memory_of(subprocess.Popen([*map(str, command), "--quiet"]))
        ours = time.perf_counter() - start
        bound = 2 * 8 * HIDDEN * INNER / 2**30 + 1
        print(f"\n{layers} layers of TinyLlama, {7 * layers} matrices, {size:.2f} GiB in bfloat16:")
        print(f"  dynamics.analyze --base: {ours:.0f} s, peak {peak:.2f} GiB (bound {bound:.2f} GiB)")
        if importlib.util.find_spec("weightwatcher") is None:
            print("  weightwatcher is not installed")
            return
        theirs = weightwatcher_seconds(folder / "run" / "checkpoint-100" / "model.safetensors")
        print(f"  weightwatcher analyze: {theirs:.0f} s, {theirs / ours:.1f} times as long")


def weightwatcher_seconds(file: Path) -> float:
    """Its `analyze` of the same weights as linear layers, without fits and plots."""
    import weightwatcher  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    model = nn.Module()
    for key, value in load_file(file).items():
        layer = nn.Linear(value.shape[1], value.shape[0], bias=False)
        layer.weight = nn.Parameter(value.float(), requires_grad=False)
        model.add_module(key.replace(".", "_"), layer)
    start = time.perf_counter()
    weightwatcher.WeightWatcher(model=model).analyze(mp_fit=False, plot=False)
    return time.perf_counter() - start


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=22, help="of TinyLlama's 22; 0 leaves the checkpoint out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    single_matrices(args.rounds)
    if args.layers:
        whole_checkpoint(args.layers)


if __name__ == "__main__":
    main()
