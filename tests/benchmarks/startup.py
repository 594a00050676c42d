"""What a small analysis costs before and beside its arithmetic: the run that comes with the repository.

    python -m tests.benchmarks.startup [--rounds 5] [--beside OTHER_CHECKOUT]

The command runs as a whole process, with and without figures and page, and with ``--help``; with ``--beside`` also from
another checkout, in turns. Wall and processor seconds, medians with the smallest and largest; one thread. The first
round, which compiles the modules, does not count.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "--help": ["--help"],
    "--no-report": ["examples/runs/pydoc_lora", "--quiet", "--no-report"],
    "with report": ["examples/runs/pydoc_lora", "--quiet"],
}
#: Lines of ``-X importtime``: microseconds of a module itself, and its package.
IMPORT = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| +(\w+)")


def child(tree: Path, folder: Path, arguments: list[str], *options: str) -> tuple[float, float, str]:
    """Return wall and processor seconds of one whole process, and what it wrote on stderr."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    environment["PYTHONPYCACHEPREFIX"] = str(folder / "compiled")
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, *options, "-m", "dynamics.analyze", *arguments]
    if "--help" not in arguments:
        command += ["--out", str(folder / "out")]
    result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result.stderr


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} – {max(values):.2f})"


def main() -> None:
    """Read the command line and print two tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--beside", type=Path, help="another checkout of the repository")
    options = parser.parse_args()
    trees = [ROOT] if options.beside is None else [ROOT, options.beside.resolve()]
    times: dict[tuple[Path, str], list[tuple[float, float]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as place:
        folders = {tree: Path(place) / str(index) for index, tree in enumerate(trees)}
        for turn in range(options.rounds + 1):
            for name, arguments in COMMANDS.items():
                for tree in trees if turn % 2 else trees[::-1]:
                    wall, processor, _ = child(tree, folders[tree], arguments)
                    times[tree, name] += [(wall, processor)] * (turn > 0)
        print("| | wall s | processor s |\n|---|---|---|")
        for (tree, name), taken in times.items():
            walls, processors = zip(*taken, strict=True)
            print(
                f"| {name}{'' if tree == ROOT else ', beside'} | {spread(list(walls))} | {spread(list(processors))} |"
            )
        _, _, lines = child(ROOT, folders[ROOT], COMMANDS["--no-report"], "-X", "importtime")
    shares: dict[str, float] = defaultdict(float)
    for microseconds, package in IMPORT.findall(lines):
        shares[package] += int(microseconds) / 1e6
    print(f"\n| imports without report | {sum(shares.values()):.2f} s |\n|---|---|")
    for package, seconds in sorted(shares.items(), key=lambda item: -item[1])[:8]:
        print(f"| {package} | {seconds:.2f} |")


if __name__ == "__main__":
    main()
