"""What the Fisher's measures of one step cost, by samples and blocks: time of the processor, and memory on top of K.

    python -m tests.benchmarks.fisher [--samples 64 512 1024] [--blocks 28] [--threads 1]

Three tasks, groups of 1 to 8 samples that may have several tasks, gradients with a power-law spectrum and lognormal
norms. Each size is measured in a process of its own: `fisher_measures` alone (spectra and their intervals), then
`measure_fisher` whole (with concentration and tasks), as `dynamics.analyze` calls it. K is in float32, as records have
it. `--threads` cores are lent to the process, and as many threads to each library.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from dynamics.fisher import fisher_measures, measure_fisher
from dynamics.fisher.dataset import gram_of
from tests.dynamics.fisher.simulated import gradients, norms, power_law

STEP, BATCH_SIZE = 100, 32


def record(samples: int, blocks: int) -> xr.Dataset:
    """One step of a training, as a record has it."""
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 9, samples)
    group = np.repeat(np.arange(samples), sizes)[:samples]
    task = rng.integers(0, 3, samples)
    order = np.argsort(task, kind="stable")
    group, task = group[order], task[order]
    spectrum = power_law(2 * samples)
    k = np.empty((1, blocks, samples, samples), np.float32)
    b = np.empty((1, blocks, samples))
    for block in range(blocks - 1):
        common = gradients(rng, 1, samples, spectrum)[0][group]
        mean = 0.2 * gradients(rng, 1, 3, spectrum)[0][task]
        rows = mean + np.sqrt(0.4) * common + np.sqrt(0.6) * gradients(rng, 1, samples, spectrum)[0]
        rows *= np.sqrt(norms(rng, "lognormal", 1, samples)[0])
        k[0, block] = rows @ rows.T
        b[0, block] = rows @ gradients(rng, 1, 1, spectrum)[0, 0]
    k[0, -1], b[0, -1] = k[0, :-1].sum(0), b[0, :-1].sum(0)
    update = np.append(np.full(blocks - 1, spectrum.sum()), (blocks - 1) * spectrum.sum())
    return xr.Dataset(
        {
            "gram": (("step", "block", "sample", "sample_"), k),
            "update_product": (("step", "block", "sample"), b),
            "update_norm_squared": (("step", "block"), update[None]),
            "share_outside_space": (("step", "block"), np.full((1, blocks), 0.02)),
            "dimension": (("step", "block"), np.full((1, blocks), 1e5)),
            "loss": (("step", "sample"), rng.uniform(1, 2, (1, samples))),
        },
        coords={
            "step": [STEP],
            "block": [*(f"layers.{number}" for number in range(blocks - 1)), "global"],
            "evaluated_at_step": ("step", [STEP - 10]),
            "sample_task": ("sample", np.array(["caption", "report", "vqa"])[task]),
            "sample_group": ("sample", [f"image {number}" for number in group]),
            "sample_id": ("sample", [str(number) for number in range(samples)]),
        },
        attrs={
            "space": "tangent",
            "fisher": "empirical",
            "unit": "sequence",
            "reduction": "sum",
            "batch_size": BATCH_SIZE,
        },
    )


def used(function: Callable[[], object]) -> tuple[float, float, float]:
    """Return wall-clock time, time of the processor, and the highest memory above that before, in MiB."""
    before, peak, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    wall, processor = time.perf_counter(), time.process_time()
    function()
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    done.set()
    watcher.join()
    return wall, processor, peak[0] - before


def resident() -> float:
    """Return the memory of this process in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def measure(samples: int, blocks: int) -> None:
    """Print one row."""
    whole = record(samples, blocks)
    small = record(16, 2)
    measure_fisher(small)  # imports, first calls
    rows = used(lambda: fisher_measures(gram_of(whole.isel(step=0)))), used(lambda: measure_fisher(whole))
    columns = [f"{wall:.2f} s | {processor:.2f} s | +{memory:.0f} MiB" for wall, processor, memory in rows]
    print(f"| {samples} | {' | '.join(columns)} | {whole['gram'].nbytes / 2**20:.0f} MiB |", flush=True)


def main() -> None:
    """Measure each size in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512, 1024])
    parser.add_argument("--blocks", type=int, default=28, help="the one of all together included")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
        measure(options.samples[0], options.blocks)
        return
    heading = "fisher_measures | processor | memory | measure_fisher | processor | memory"
    print(f"{options.blocks} blocks, {options.threads} threads\n")
    print(f"| samples | {heading} | K of one step |\n|{'---|' * 8}", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "OPENBLAS_NUM_THREADS": str(options.threads)}
    for samples in options.samples:
        arguments = ["--samples", str(samples), "--blocks", str(options.blocks), "--threads", str(options.threads)]
        command = [sys.executable, "-m", "tests.benchmarks.fisher", *arguments, "--here"]
        subprocess.run(command, check=True, env=environment)


if __name__ == "__main__":
    main()
