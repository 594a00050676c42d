"""Speed and memory of ``python -m dynamics.analyze`` on a 7B-shaped run, beside gradience and the QR floor.

    python -m tests.benchmarks.analyze [--checkpoints 20] [--repeats 3]

Each line is measured in this one run, the contestants alternating; medians with the smallest and largest. Machines are
noisy: read the ratios. gradience reads one checkpoint at a time and reports totals only; dynamics reports totals,
increments, nulls and all measures of the whole run.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import torch

from dynamics.checkpoints import Trajectory, open_trajectory
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from tests.benchmarks.seven_billion import write_run

#: A process starts with its parent's peak memory on its account, so the one that is measured has a small parent.
LAUNCHER = """
import os, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(status)
"""


def child(command: Sequence[str]) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one whole process."""
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    result = subprocess.run(launcher, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr[-500:]}")
    seconds, peak = map(float, result.stdout.split())
    return seconds, peak


def analyze(run: Path, out: Path) -> tuple[float, float]:
    """The whole command without figures and page."""
    return child([sys.executable, "-m", "dynamics.analyze", str(run), "--no-report", "--quiet", "--out", str(out)])


def gradience(run: Path) -> tuple[float, float]:
    """One audit for each checkpoint: seconds in all, the largest peak."""
    executable = str(Path(sys.executable).with_name("gradience"))
    folders = sorted(run.glob("checkpoint-*"))
    each = [child([executable, "audit", "--peft-dir", str(folder), "--json", "--layers"]) for folder in folders]
    return sum(seconds for seconds, _ in each), max(peak for _, peak in each)


def engine(trajectory: Trajectory) -> float:
    """All spectra of the run, in this process."""
    start = time.perf_counter()
    trajectory_spectra(trajectory)
    return time.perf_counter() - start


def floor(trajectory: Trajectory) -> float:
    """A bare loop of QR decompositions of [B₁, ΔB] and [A₀ᵀ, ΔAᵀ], nothing kept; torch's own threads."""
    start = time.perf_counter()
    for before, now in pairwise(trajectory.checkpoints):
        with before.open() as old, now.open() as new:
            for name in new:
                left, right = new[name].left_factor.double(), new[name].right_factor.double()
                left_before, right_before = old[name].left_factor.double(), old[name].right_factor.double()
                torch.linalg.qr(torch.cat([left, left - left_before], 1), mode="r")
                torch.linalg.qr(torch.cat([right_before, right - right_before], 0).mT, mode="r")
    return time.perf_counter() - start


def row(label: str, values: Sequence[float], unit: str) -> str:
    return f"| {label} | {statistics.median(values):.2f} {unit} | {min(values):.2f} – {max(values):.2f} |"


def ratio(label: str, top: Sequence[float], bottom: Sequence[float]) -> str:
    each = [a / b for a, b in zip(top, bottom, strict=True)]
    return row(label, each, "×")


def repeat(times: int, *contestants: Callable[[], object]) -> list[list]:
    """Results of each contestant, taken in turns."""
    rounds = [[contestant() for contestant in contestants] for _ in range(times)]
    return [list(column) for column in zip(*rounds, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-gradience", action="store_true")
    options = parser.parse_args()
    counts = [options.checkpoints // 4, options.checkpoints // 2, options.checkpoints]
    with tempfile.TemporaryDirectory() as folder:
        runs = {count: write_run(Path(folder) / f"run-{count}", count) for count in counts}
        run, out = runs[counts[-1]], Path(folder) / "out"
        trajectory = open_trajectory(run)
        print(
            f"7B-shaped adapter, {counts[-1]} checkpoints × {len(trajectory.matrices)} matrices, r = 16, bf16; ", end=""
        )
        print(f"{os.cpu_count()} cores, torch {torch.__version__}\n\n| | median | range |\n|---|---|---|")

        engines, floors = repeat(options.repeats, lambda: engine(trajectory), lambda: floor(trajectory))
        print(row("engine: all spectra, in process", engines, "s"))
        print(row("floor: bare QR loop", floors, "s"))
        print(ratio("engine / floor", engines, floors), flush=True)

        wholes = repeat(options.repeats, *[lambda each=each: analyze(each, out) for each in runs.values()])
        for count, results in zip(counts, wholes, strict=True):
            print(row(f"dynamics.analyze, {count} checkpoints", [seconds for seconds, _ in results], "s"))
            print(row(f"    peak memory, {count} checkpoints", [peak for _, peak in results], "MiB"), flush=True)
        if not options.without_gradience:
            peers = [gradience(run)]
            print(row(f"gradience audit --json --layers × {counts[-1]}", [seconds for seconds, _ in peers], "s"))
            print(row("    peak memory", [peak for _, peak in peers], "MiB"))
            print(ratio("gradience / dynamics", [peers[0][0]], [statistics.median(s for s, _ in wholes[-1])]))
        helps = repeat(options.repeats, lambda: child([sys.executable, "-m", "dynamics.analyze", "--help"]))[0]
        print(row("dynamics.analyze --help", [seconds for seconds, _ in helps], "s"))


if __name__ == "__main__":
    main()
