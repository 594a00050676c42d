"""Dense updates: exact spectra beside torch's SVD, intruders beside PEFT's search, and a whole pair of checkpoints.

    python -m tests.benchmarks.dense [--rounds 3] [--threads 2] [--model tinyllama] [--layers 22] [--top K]

1. The exact spectrum of a float32 matrix of 2048 × 5632 and of 4096 × 4096, by the Gram of the shorter side in float64,
   beside `torch.linalg.svdvals` in float32: contestants in turns, ratio of each round, median and range, and by how
   much effective ranks differ.
2. The intruder dimensions of a LoRA of rank 16 on a weight of 2048 × 2048 that has none, beside PEFT's
   `reduce_intruder_dimension`, which then does nothing but search: processor time, in turns.
3. A checkpoint of TinyLlama's or of a 7B Llama's shapes (random bfloat16 weights, `--layers` of its 22 or 32 layers, no
   embeddings; 0.8 GB of disk a layer and pair of the 7B) and its base, analysed as a whole process: wall-clock and
   processor time, and peak memory without mapped files. If weightwatcher is installed, the spectra of as many
   TinyLlama weights by its `analyze`, for stable rank, spectral norm and entropy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from safetensors.torch import save_file
from torch import Tensor, nn

from dynamics.spectra.against_base import intruders
from dynamics.spectra.base_directions import decompose_leading
from dynamics.spectra.dense import dense_spectrum
from dynamics.spectra.measures import effective_rank
from probes import LowRankMatrix
from tests.benchmarks.seven_billion import SHAPES

SIZES = ((2048, 5632), (4096, 4096))
HIDDEN, INNER, KEY = 2048, 5632, 256
#: Matrices of one layer.
MODELS = {
    "tinyllama": {
        "self_attn.q_proj": (HIDDEN, HIDDEN),
        "self_attn.k_proj": (KEY, HIDDEN),
        "self_attn.v_proj": (KEY, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN),
        "mlp.gate_proj": (INNER, HIDDEN),
        "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER),
    },
    "7b": SHAPES,
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


def intruder_search(rounds: int) -> None:
    """Intruders with and without their null beside PEFT's search, in turns."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(2048, 2048, bias=False)
    sides = (torch.linalg.qr(torch.randn(2048, 2048, generator=generator)).Q for _ in range(2))
    left, right = sides
    layer.weight.data = (left * torch.arange(1, 2049) ** -0.3) @ right.mT
    weight = layer.weight.detach().clone()
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=16, target_modules=["0"]))
    adapter = model.base_model.model[0]
    adapter.lora_B["default"].weight.data = 1e-3 * torch.randn(2048, 16, generator=generator)
    update = LowRankMatrix(adapter.lora_B["default"].weight, adapter.lora_A["default"].weight, 0.5)

    def ours(draws: int) -> None:
        intruders(update, weight, decompose_leading(weight, 10), draws=draws)

    contestants: dict[str, Callable[[], object]] = {
        "ours, without a null": lambda: ours(0),
        "ours, with a null of 4 draws": lambda: ours(4),
        "PEFT": lambda: reduce_intruder_dimension(model, logging_sink=None),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, search in contestants.items():
            start = time.process_time()
            search()
            times[name].append(time.process_time() - start)
            model.set_adapter("default")
            if "intruder_reduced" in model.peft_config:
                model.delete_adapter("intruder_reduced")
    print("\n| intruders at 2048 × 2048 | processor time | PEFT over ours |")
    print("|---|---|---|")
    for name, spent in times.items():
        ratios = [theirs / own for theirs, own in zip(times["PEFT"], spent, strict=True)]
        spread = f"{statistics.median(ratios):.1f}× ({min(ratios):.1f} – {max(ratios):.1f})"
        print(f"| {name} | {statistics.median(spent):.2f} s | {spread} |")


def write_checkpoints(folder: Path, shapes: Mapping[str, tuple[int, int]], layers: int) -> None:
    """A base and one checkpoint in bfloat16, a file for each layer: the same rows, begun at another."""
    generator = torch.Generator().manual_seed(0)
    base = {role: (0.02 * torch.randn(*shape, generator=generator)).bfloat16() for role, shape in shapes.items()}
    moved = {
        role: (value.float() + 1e-3 * torch.randn(value.shape, generator=generator)).bfloat16()
        for role, value in base.items()
    }
    for name, tensors in (("base", base), ("run/checkpoint-100", moved)):
        (folder / name).mkdir(parents=True)
        places = {}
        for layer in range(layers):
            file = f"model-{layer + 1:05d}-of-{layers:05d}.safetensors"
            named = {f"model.layers.{layer}.{role}.weight": value.roll(layer, 0) for role, value in tensors.items()}
            save_file(named, folder / name / file, metadata={"format": "pt"})
            places |= dict.fromkeys(named, file)
        (folder / name / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


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


def whole_checkpoint(model: str, layers: int, top: int | None) -> None:
    """The command as a process of its own, and weightwatcher on the same weights."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_checkpoints(folder, MODELS[model], layers)
        size = sum(file.stat().st_size for file in (folder / "run").rglob("*.safetensors")) / 2**30
        command = [sys.executable, "-m", "dynamics.analyze", folder / "run", "--base", folder / "base", "--no-report"]
        command += [] if top is None else ["--top", str(top)]
        start = time.perf_counter()
        peak = own_memory_of(subprocess.Popen([*map(str, command), "--quiet"]))
        ours = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent = used.ru_utime + used.ru_stime
        print(f"\n{layers} layers of {model}, {7 * layers} matrices, {size:.2f} GiB in bfloat16:")
        print(
            f"  {' '.join(map(str, command[2:]))}: {ours:.0f} s, {spent:.0f} s of processor time, peak {peak:.2f} GiB"
        )
        if model != "tinyllama" or importlib.util.find_spec("weightwatcher") is None:
            return
        theirs = weightwatcher_seconds(sorted((folder / "run" / "checkpoint-100").glob("*.safetensors")))
        print(f"  weightwatcher analyze: {theirs:.0f} s, {theirs / ours:.1f} times as long")


def weightwatcher_seconds(files: Sequence[Path]) -> float:
    """Its `analyze` of the same weights as linear layers, without fits and plots."""
    import weightwatcher  # pyright: ignore[reportMissingImports]
    from safetensors.torch import load_file

    model = nn.Module()
    for key, value in (pair for file in files for pair in load_file(file).items()):
        layer = nn.Linear(value.shape[1], value.shape[0], bias=False)
        layer.weight = nn.Parameter(value.float(), requires_grad=False)
        model.add_module(key.replace(".", "_"), layer)
    start = time.perf_counter()
    weightwatcher.WeightWatcher(model=model).analyze(mp_fit=False, plot=False)
    return time.perf_counter() - start


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of single matrices; 0 leaves them out")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=MODELS, default="tinyllama")
    parser.add_argument("--layers", type=int, default=22, help="of the model's; 0 leaves the checkpoints out")
    parser.add_argument("--top", type=int, help="only so many leading singular values of the checkpoints")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.rounds:
        single_matrices(args.rounds)
        intruder_search(args.rounds)
    if args.layers:
        whole_checkpoint(args.model, args.layers, args.top)


if __name__ == "__main__":
    main()
