"""Speed and memory of ``python -m dynamics.analyze`` on a 7B-shaped run, beside gradience and the floor.

    python -m tests.benchmarks.analyze [--checkpoints 20] [--repeats 3] [--only peer|growth|engine]

Each line is measured in this one run, the contestants alternating; medians with the smallest and largest. Machines are
noisy: read the ratios. gradience reads one checkpoint at a time and reports totals only; dynamics reports totals,
increments, nulls and all measures of the whole run. Both are measured with ``OMP_NUM_THREADS=1`` and with defaults.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from dynamics.checkpoints import Trajectory, open_trajectory
from dynamics.spectra.path import training_path
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from dynamics.spectra.workers import single_threaded
from tests.benchmarks.seven_billion import write_run

#: A process starts with its parent's peak memory on its account, so the one that is measured has a small parent.
LAUNCHER = """
import os, resource, subprocess, sys, time
start = time.perf_counter()
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024)
sys.exit(status)
"""


def child(command: Sequence[str], threads: str = "") -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one whole process."""
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCHER, *command]
    variables = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    variables |= {"OMP_NUM_THREADS": threads} if threads else {}
    result = subprocess.run(launcher, capture_output=True, text=True, check=False, env=variables)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {result.stderr[-500:]}")
    seconds, peak = map(float, result.stdout.split())
    return seconds, peak


def analyze(run: Path, out: Path, threads: str = "") -> tuple[float, float]:
    """The whole command without figures and page."""
    command = ["-m", "dynamics.analyze", str(run), "--no-report", "--quiet", "--out", str(out)]
    return child([sys.executable, *command], threads)


def gradience(run: Path, threads: str = "") -> tuple[float, float]:
    """One audit for each checkpoint: seconds in all, the largest peak."""
    executable = str(Path(sys.executable).with_name("gradience"))
    folders = sorted(run.glob("checkpoint-*"))
    audits = [child([executable, "audit", "--peft-dir", str(one), "--json", "--layers"], threads) for one in folders]
    return sum(seconds for seconds, _ in audits), max(peak for _, peak in audits)


def engine(trajectory: Trajectory) -> float:
    """All spectra of the run and its path, in this process, with one worker: processor seconds."""
    start = time.process_time()
    _, _, grams = trajectory_spectra(trajectory, workers=1)
    training_path(trajectory, grams)
    return time.process_time() - start


def floor(trajectory: Trajectory) -> float:
    """A bare loop of what cannot be left out, nothing kept: all factors in float64, and one product a side."""
    start = time.process_time()
    with single_threaded(), ExitStack() as stack:
        opened = [stack.enter_context(checkpoint.open()) for checkpoint in trajectory.checkpoints]
        for name in opened[0]:
            matrices = [checkpoint[name] for checkpoint in opened]
            left = torch.cat([matrix.left_factor.mT.double() for matrix in matrices]).numpy()
            right = torch.cat([matrix.right_factor.double() for matrix in matrices]).numpy()
            left @ left.T, right @ right.T
    return time.process_time() - start


def row(label: str, values: Sequence[float], unit: str) -> str:
    return f"| {label} | {statistics.median(values):.2f} {unit} | {min(values):.2f} – {max(values):.2f} |"


def ratio(label: str, top: Sequence[float], bottom: Sequence[float]) -> str:
    return row(label, [a / b for a, b in zip(top, bottom, strict=True)], "×")


def repeat(times: int, *contestants: Callable[[], object]) -> list[list]:
    """Results of each contestant, taken in turns."""
    rounds = [[contestant() for contestant in contestants] for _ in range(times)]
    return [list(column) for column in zip(*rounds, strict=True)]


def compare_with_peer(run: Path, out: Path, repeats: int) -> None:
    """Both tools on the same run, in turns, with one thread and with defaults."""
    for threads, label in (("1", "OMP_NUM_THREADS=1"), ("", "defaults")):
        results = repeat(repeats, lambda t=threads: analyze(run, out, t), lambda t=threads: gradience(run, t))
        for tool, rounds in zip(("dynamics.analyze", "gradience audit, each checkpoint"), results, strict=True):
            print(row(f"{tool}, {label}", [seconds for seconds, _ in rounds], "s"))
            print(row("    peak memory", [peak for _, peak in rounds], "MiB"))
        ours, theirs = ([seconds for seconds, _ in rounds] for rounds in results)
        print(ratio(f"gradience / dynamics, {label}", theirs, ours), flush=True)


def growth(folder: Path, out: Path, counts: Sequence[int], repeats: int) -> None:
    """Time and memory at several numbers of checkpoints."""
    for count in counts:
        run = write_run(folder / f"run-{count}", count)
        (rounds,) = repeat(repeats, lambda run=run: analyze(run, out))
        print(row(f"dynamics.analyze, {count} checkpoints", [seconds for seconds, _ in rounds], "s"))
        print(row("    peak memory", [peak for _, peak in rounds], "MiB"), flush=True)
        shutil.rmtree(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--counts", type=int, nargs="*", default=[5, 10, 20, 40, 80])
    parser.add_argument("--only", choices=["engine", "peer", "growth"])
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run, out = write_run(folder / "run", options.checkpoints), folder / "out"
        trajectory = open_trajectory(run)
        print(
            f"7B-shaped adapter, {options.checkpoints} checkpoints × {len(trajectory.matrices)} matrices, r = 16, bf16;"
        )
        print(f"{os.cpu_count()} cores, torch {torch.__version__}\n\n| | median | range |\n|---|---|---|")
        if options.only in (None, "engine"):
            engines, floors = repeat(options.repeats, lambda: engine(trajectory), lambda: floor(trajectory))
            print(row("engine: all spectra and the path, processor time", engines, "s"))
            print(row("floor: float64 and one product a side", floors, "s"))
            print(ratio("engine / floor", engines, floors), flush=True)
        if options.only in (None, "peer"):
            compare_with_peer(run, out, options.repeats)
        if options.only in (None, "growth"):
            growth(folder, out, options.counts, options.repeats)
            helps = repeat(options.repeats, lambda: child([sys.executable, "-m", "dynamics.analyze", "--help"]))[0]
            print(row("dynamics.analyze --help", [seconds for seconds, _ in helps], "s"))


if __name__ == "__main__":
    main()
