"""How much code a reader meets: files that run for three results, size, pronouns as variables, names defined twice.

A file counts as executed if one of its functions is called; imports do not count. Each path runs twice, and the second
time is counted.

    python -m tests.benchmarks.reading
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
import threading
import tokenize
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

from typer.testing import CliRunner

import dynamics
import probes
from tests.runs import write_run
from tests.trainings import Tokens, trainer

PACKAGES = tuple(Path(str(package.__file__)).parent for package in (dynamics, probes))
_PRONOUNS = "again captured each found gone here known labelled measured own place places said seen told"
PRONOUNS = frozenset(re.findall(r"\w+", _PRONOUNS))


def main() -> None:
    """Print the table."""
    sources = [path for package in PACKAGES for path in sorted(package.rglob("*.py"))]
    lines = sum(len(path.read_text().splitlines()) for path in sources)
    with tempfile.TemporaryDirectory() as folder:
        print("| | |\n|---|---|")
        print(f"| files executed for one adapter's spectra, no report | {executed(spectra, Path(folder))} |")
        print(f"| files executed for a batch → K | {executed(gram, Path(folder))} |")
        print(f"| files executed for scores → sentence | {executed(sentence, Path(folder))} |")
    print(f"| lines, files of the product | {lines:,}, {len(sources)} |")
    print(f"| pronouns as variables per 1,000 lines | {1000 * pronouns(sources) / lines:.1f} |")
    twice = defined_twice(sources)
    print(f"| public names defined twice | {len(twice)} |")
    if twice:
        print(f"\nDefined twice: {', '.join(sorted(twice))}")


def executed(path: Callable[[Path], None], folder: Path) -> int:
    """Return how many files of the product have a function that is called."""
    files: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            files.add(frame.f_code.co_filename)

    path(folder / f"{path.__name__}-1")
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        path(folder / f"{path.__name__}-2")
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return sum(any(package in Path(file).parents for package in PACKAGES) for file in files)


def spectra(folder: Path) -> None:
    """Analyse the checkpoints of one LoRA training."""
    analyze(str(write_run(folder)))


def gram(folder: Path) -> None:
    """Train for a few steps with probe samples."""
    rows = Tokens(72)  # the first 64 are trained on
    samples = [{**rows[index], "image": str(index)} for index in range(64, 72)]
    trainer(folder, [dynamics.DynamicsCallback(folder, [probes.Task("a", samples, group="image")])]).train()


def sentence(folder: Path) -> None:
    """Relate three runs to their scores."""
    runs = [write_run(folder / f"run{seed}", seed=seed) for seed in range(3)]
    steps = (10, 20, 30)
    rows = [f"{run.name},{step},qa/accuracy,{step * (1 + seed) % 7}" for seed, run in enumerate(runs) for step in steps]
    (folder / "scores.csv").write_text("\n".join(["run,step,task,score", *rows]) + "\n")
    analyze(*map(str, runs), "--scores", str(folder / "scores.csv"), "--out", str(folder / "out"))


def analyze(*arguments: str) -> None:
    """Run the command line in this process."""
    from dynamics.analyze import app

    result = CliRunner().invoke(app, [*arguments, "--no-report", "--quiet"])
    assert result.exit_code == 0, result.output


def pronouns(sources: list[Path]) -> int:
    """Return how often a pronoun or participle stands for a noun."""
    count = 0
    for path in sources:
        with path.open("rb") as file:
            count += sum(
                token.type == tokenize.NAME and token.string in PRONOUNS for token in tokenize.tokenize(file.readline)
            )
    return count


def defined_twice(sources: list[Path]) -> set[str]:
    """Return public functions and classes that two files or more define at their top level."""
    homes: dict[str, set[Path]] = defaultdict(set)
    for path in sources:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].add(path)
    return {name for name, files in homes.items() if len(files) > 1}


if __name__ == "__main__":
    main()
