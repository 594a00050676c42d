"""Freeze what analyses give, and compare later results with it bit for bit: for changes that must change no number.

    python -m tests.goldens freeze DIR              # by the code that is believed: inputs, and their results
    python -m tests.goldens compare DIR [NAME ...]  # by the code in question: exit status 1 if a number differs
    python -m tests.goldens keep                    # by the code that is believed: what test_goldens.py compares with

An input is made once, with fixed seeds, and is never written to: each analysis gets a copy. Compared are names,
dimensions, dtypes, coordinates and values of all variables, codes, severities, places and evidence of findings, and the
numbers of ``summary.json`` and ``rank_pattern.json``. Prose and provenance are not. Two inputs, ``recorded`` and
``probed``, train or run a model anew, so that they tell what the recorder and the probes do, too; they are equal to the
last bit on one machine and one thread.

It uses the public interface alone, so that it outlives the rooms behind it.
"""

from __future__ import annotations

import argparse
import inspect
import os
import shutil
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: sums are the same only in the same order

import torch
import xarray as xr

import dynamics
from tests.golden_differences import Dump, Intended, differences, dump, judged, renamed
from tests.golden_inputs import (
    DATA,
    GROUPS,
    MAKERS,
    load,
    make_capture,
    make_capture_checkpoints,
    make_two_tasks,
)

#: Every difference from the frozen results that is meant.
INTENDED: tuple[Intended, ...] = ()
#: Input to analyses that are compared by a test, too.
KEPT = {"pydoc_lora": ("some_matrices",), "kohya": ("run",), "first_format": ("analysed", "capture", "stored")}


@dataclass(frozen=True)
class Result:
    """What one analysis gave: the tree it returned, what is opened afterwards, and its folder."""

    tree: xr.DataTree
    opened: xr.DataTree
    written: Path


def analysed(
    run: Path | Mapping[str, Path],
    *,
    out: Path | None = None,
    labels: Mapping[str, str] | None = None,
    probe: Any = None,
    **options: Any,
) -> Result:
    """Analyse by the public interface, whether it takes keywords, or ``options`` and ``labels`` as it did first."""
    parameters = inspect.signature(dynamics.analyze_run).parameters
    chosen: dict[str, Any] = {"device": "cpu", "report": False, **options}
    keywords: dict[str, Any] = {"out": out} if out is not None else {}
    keywords |= {"probe": probe} if probe is not None else {}
    if "base" in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        keywords |= chosen
    else:
        keywords["options"] = dynamics.Options(**chosen)  # type: ignore[attr-defined]
    target: Any = run
    if labels is not None and "labels" in parameters:
        keywords["labels"] = labels
    elif labels is not None and isinstance(run, Mapping):
        target = {
            label: [run[name] for name in run if labels[name] == label] for label in dict.fromkeys(labels.values())
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        tree = dynamics.analyze_run(target, **keywords)
    where = out if out is not None else run
    assert isinstance(where, Path)
    return Result(tree, dynamics.open_run(where), where)


def opened(path: Path) -> Result:
    """Open what lies there, and analyse nothing."""
    tree = dynamics.open_run(path)
    return Result(tree, tree, path)


def _pydoc_lora(folder: Path) -> dict[str, Callable[[], Result]]:
    return {
        "run": lambda: analysed(folder / "run"),
        "one_checkpoint": lambda: analysed(folder / "run" / "checkpoint-200", out=folder / "one"),
        "some_matrices": lambda: analysed(folder / "run", out=folder / "some", matrices=r"layers\.1.*q_proj"),
    }


def _one(folder: Path) -> dict[str, Callable[[], Result]]:
    return {"run": lambda: analysed(folder / "run")}


def _with_base(folder: Path) -> dict[str, Callable[[], Result]]:
    base = str(folder / "base")
    return {
        "base": lambda: analysed(folder / "run", base=base, intruders=True, weights=True),
        "no_base": lambda: analysed(folder / "run", out=folder / "alone"),
    }


def _six_runs(folder: Path) -> dict[str, Callable[[], Result]]:
    runs = {name: folder / name for name in GROUPS}
    scores = (str(folder / "scores.csv"),)
    several = {"labels": GROUPS, "scores": scores}
    return {
        "groups": lambda: analysed(runs, out=folder / "groups", **several),
        "given_loss": lambda: analysed(runs, out=folder / "loss", given="loss", matrices=r"layers\.1", **several),
        "given_trend": lambda: analysed(
            runs,
            out=folder / "trend",
            given="trend",
            lower=("vqa/accuracy",),
            headline="total/stable_rank",
            matrices="q_proj",
            **several,
        ),
        "one_run": lambda: analysed(folder / "imax_s1", out=folder / "single", scores=scores),
    }


def _first_format(folder: Path) -> dict[str, Callable[[], Result]]:
    """Records, and an analysis of them, as the first edition left them in ``RUN/dynamics``."""
    return {
        "analysed": lambda: analysed(folder / "run", out=folder / "out"),
        "stored": lambda: opened(folder / "run"),
        "capture": lambda: opened(folder / "run" / "dynamics" / "capture.zarr"),
    }


def _probed(folder: Path) -> dict[str, Callable[[], Result]]:
    return {"run": lambda: analysed(folder / "run", probe=load)}


def _recorded(folder: Path) -> dict[str, Callable[[], Result]]:
    """Train anew by the code in question, and analyse what it recorded."""
    make_two_tasks(folder / "tasks")
    make_capture(folder / "dense")
    make_capture_checkpoints(folder / "plain")
    return {
        "tasks": lambda: analysed(folder / "tasks" / "run"),
        "dense": lambda: analysed(folder / "dense" / "run"),
        "plain": lambda: analysed(folder / "plain" / "run"),
    }


#: Name of an input to its analyses: the function gets a folder that holds a copy of the input.
CASES: Mapping[str, Callable[[Path], dict[str, Callable[[], Result]]]] = {
    "pydoc_lora": _pydoc_lora,
    "multi_adapter": _one,
    "kohya": _one,
    "dense_base": _with_base,
    "distributed": _with_base,
    "capture": _one,
    "capture_checkpoints": _one,
    "two_tasks": _one,
    "six_runs": _six_runs,
    "first_format": _first_format,
    "probed": _probed,
    "recorded": _recorded,
}


def results(name: str, inputs: Path, variants: Collection[str] = ()) -> Iterator[tuple[str, Dump]]:
    """Analyse a copy of one input: each analysis, or some, as it was returned and as it is opened afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        if (inputs / name).is_dir():
            shutil.copytree(inputs / name, folder)
        for variant, analyse in CASES[name](folder).items():
            if variants and variant not in variants:
                continue
            result = analyse()
            files = [*result.written.rglob("summary.json"), *result.written.rglob("rank_pattern*.json")]
            yield variant, dump(result.tree, folder, files)
            yield f"{variant}.opened", dump(result.opened, folder)


# The command line


def freeze(folder: Path, names: Sequence[str]) -> None:
    """Make the inputs that are not there, and the results of all.

    Raises:
        FileExistsError: If there are results of one already: they are of the code that was believed.
    """
    for name in names:
        if (folder / "results" / name).exists():
            raise FileExistsError(f"There are results of {name} in '{folder}'. Remove them to freeze this code's.")
        if name in MAKERS and not (folder / "inputs" / name).exists():
            MAKERS[name](folder / "inputs" / name)
        start = time.perf_counter()
        for variant, result in results(name, folder / "inputs"):
            result.write(folder / "results" / name / variant)
        print(f"{name}: frozen in {time.perf_counter() - start:.1f} s")


def keep() -> None:
    """Pack the results of the inputs that a test compares: of what ``freeze`` writes all but descriptions."""
    with tempfile.TemporaryDirectory() as temporary:
        for name, variants in KEPT.items():
            MAKERS[name](Path(temporary) / "inputs" / name)
            for variant, result in results(name, Path(temporary) / "inputs", variants):
                replace(result, texts={}).write(Path(temporary) / "results" / name / variant)
        with tarfile.open(DATA / "results.tar.xz", "w:xz", preset=9) as archive:
            for path in sorted(Path(temporary).glob("results/*/*")):
                archive.add(path, path.relative_to(temporary / Path("results")), filter=_anonymous)


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    return member


def compare(folder: Path, names: Sequence[str]) -> bool:
    """Print how today's results differ from the frozen ones; return whether anything differs that is not intended."""
    used: set[Intended] = set()
    failed = False
    for name in names:
        start, count, texts, lines = time.perf_counter(), 0, 0, []
        stems = {path.name.removesuffix(".npz") for path in (folder / "results" / name).glob("*.npz")}
        for variant, new in results(name, folder / "inputs"):
            stems.discard(variant)
            old = renamed(f"{name}/{variant}", Dump.read(folder / "results" / name / variant), INTENDED, used)
            count += len(new.arrays)
            bad = judged(f"{name}/{variant}", differences(old, new), INTENDED, used)
            lines += [f"   {variant} {each.path}: {each.kind} {each.what}" for each in bad]
            texts += sum(old.texts[path] != new.texts.get(path) for path in old.texts)
        lines += [f"   {variant}: frozen, and not analysed" for variant in sorted(stems)]
        failed |= bool(lines)
        head = f"{name}: {'differs' if lines else 'equal'} ({count} variables, {time.perf_counter() - start:.1f} s)"
        print(head + (f"; {texts} descriptions are others" if texts else ""), *lines, sep="\n", flush=True)
    if set(names) == set(CASES):
        for entry in INTENDED:
            if entry not in used:
                print(f"An intended difference is in no input: {entry}")
    return failed


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("freeze", "compare", "keep"))
    parser.add_argument("folder", type=Path, nargs="?", help="where inputs and results lie")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all by default")
    arguments = parser.parse_args()
    names = arguments.names or list(CASES)
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"expected inputs among {', '.join(CASES)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    if arguments.action == "keep":
        keep()
        return 0
    if arguments.folder is None:
        parser.error(f"expected a folder to {arguments.action}")
    if arguments.action == "freeze":
        freeze(arguments.folder, names)
        return 0
    return int(compare(arguments.folder, names))


if __name__ == "__main__":
    sys.exit(main())
