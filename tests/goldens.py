"""Freeze the results of analyses, and compare later results with them bit for bit.

    python -m tests.goldens freeze DIR              # with trusted code: writes inputs and results
    python -m tests.goldens compare DIR [NAME ...]  # with the code in question: exit status 1 if a number differs
    python -m tests.goldens keep                    # with trusted code: writes what test_goldens.py compares with

Each input is made once, with fixed seeds; analyses work on copies. The comparison covers names, dimensions, dtypes,
coordinates and values of all variables; code, severity, place and evidence of all findings; and the numbers in
``summary.json`` and ``rank_pattern.json``. It ignores prose and provenance. The inputs ``recorded`` and ``probed``
train or run a model with the code in question, so they also cover the recorder and the probes. Equal bits are expected
on one machine with one thread.

Only the public interface is used, so the comparison survives changes of the rooms behind it.
"""

from __future__ import annotations

import argparse
import inspect
import os
import re
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
from tests.golden_differences import Difference, Dump, Intended, differences, dump, renamed, unintended
from tests.golden_inputs import (
    DATA,
    GROUPS,
    MAKERS,
    load,
    make_capture,
    make_capture_checkpoints,
    make_two_tasks,
)

#: Every intended difference from the frozen results, with its reason.
INTENDED: tuple[Intended, ...] = (
    Intended("*", "/*/statement", "values", "Sentences are prose: they say the same numbers in plainer English."),
    *(
        Intended("six_runs/*", path, kind, "A share of permutations is counted: 1 − 0.95 was above the level of 0.05.")
        for path, kind in (
            ("/association/p_familywise", "values"),
            ("/association/smallest_p_adjusted", "values"),
            ("/comparison/p_familywise", "values"),
            ("/comparison/smallest_p_adjusted", "values"),
            ("OD507", "evidence"),
        )
    ),
    *(
        Intended(
            "six_runs/given_loss*", path, "values", "One pair has a smallest p of 0.05 exactly: it can be decided."
        )
        for path in ("/association/decidable", "/association/low", "/association/high")
    ),
    Intended(
        "*",
        "/association/mixed_*",
        "missing",
        "Mixed models are dropped: under the null their interval excludes 0 in a third of cases.",
    ),
    Intended(
        "*",
        "*/path/segment",
        "renamed",
        "a dimension has this name now, so its number at a step has another",
        "step_segment",
    ),
    Intended("recorded/*", "*/share_outside_space", "values", "1 − inside/all is rounding where all is inside."),
    Intended("recorded/*", "*/condition_number*_low", "values", "Of a null whose smallest singular value is rounding."),
    Intended("*", "*/decomposition", "values", "Triangular factors come from Grams where those hold all digits."),
    Intended("*", "summary.json:intervention", "added", "What parts of updates do; nothing where none was run."),
    Intended("*", "summary.json:sharpness", "added", "How far a step can go; nothing where it was not measured."),
    Intended("*", "summary.json:routing", "added", "Who was trained of a mixture; nothing without one."),
    *(
        Intended("*", path, "added", "Updates stand beside steps of their optimizer, too; NaN where that is unknown.")
        for path in ("*/concentration/*optimizer*", "summary.json:fisher.concentration.*optimizer*")
    ),
    Intended("*", "OD206", "missing", "The answer to “Is the rank right?” says it."),
    Intended("*", "summary.json:answers*", "added", "A result answers the questions that it is asked first."),
    *(
        Intended("*", path, "added", "What merging keeps of an update, and whether weights equal their base.")
        for path in ("*/base/changed_share", "*/base/lost_in_merge", "OD211", "OD212")
    ),
    *(
        Intended("*", f"*/gradient/{name}", "added", "How noisy the training's gradients are, from micro-batches.")
        for name in ("micro_norm", "micro_batches", "batch_size", "signal", "noise", "noise_to_signal", "noise_scale")
    ),
    Intended("*", "OD513", "missing", "One run has no correlations, and no headline measure unless one is named."),
    Intended("*", "*/loss/*", "added", "Losses of probe samples since the training began."),
    Intended("*", "summary.json:*losses*", "added", "Losses of probe samples since the training began."),
    Intended("*", "OD502", "missing", "A score before training, at step 0, needs no measures at that step."),
    *(
        Intended("*", path, "added", "Groups are compared in scores; checkpoints are listed with theirs.")
        for path in (
            "*/score_comparison/*",
            "*/score/*",
            "summary.json:*score_comparison*",
            "summary.json:*scores.*",
            "summary.json:*scores",
            "summary.json:*checkpoints.*",
            "summary.json:*checkpoint_choice*",
        )
    ),
    *(
        Intended("*", path, "values", "An interval is cut at what is possible: 1 and d.")
        for name in ("low", "high")
        for path in (f"/fisher/*participation_ratio*_{name}", f"summary.json:fisher.*participation_ratio*.{name}")
    ),
    *(
        Intended("*", path, "added", "The path stands beside a random walk with steps of the same lengths.")
        for path in ("*/path/*_null", "summary.json:*path.*_null")
    ),
    Intended("*", "summary.json:*fisher.pairs.*", "added", "A pair of tasks has overlap, transfer and a sentence."),
    Intended("*", "*/path/training", "renamed", "one word for a training's number, as everywhere else", "segment"),
)
#: Of inputs whose training or model runs anew: what follows from K, whose gradients are in float32, and null models of
#: increments, whose factors' smallest singular values cancel at the first steps.
_ANEW = re.compile(r"/(fisher|concentration|tasks|association|comparison|null)/|_null|summary\.json:fisher|^OD4")
#: χ of tasks made equally large: their squared norms are summed for all permutations at a time.
_PERMUTED = re.compile(r"/tasks/divergence_n|summary\.json:fisher\.mixture\.n")
ROUNDED = {
    **dict.fromkeys(("recorded", "probed"), (_ANEW, 1e-4)),
    **dict.fromkeys(("two_tasks", "first_format"), (_PERMUTED, 1e-12)),
}
#: Largest number of differences printed for one input.
SHOWN = 60
#: Input to the analyses that a test compares, too.
KEPT = {"pydoc_lora": ("some_matrices",), "kohya": ("run",), "first_format": ("analysed", "capture", "stored")}


@dataclass(frozen=True)
class Result:
    """An analysis: the tree it returned, the tree that opens afterwards, and the folder it wrote."""

    tree: xr.DataTree
    opened: xr.DataTree
    written: Path


def analyse(
    run: Path | Mapping[str, Path],
    *,
    out: Path | None = None,
    labels: Mapping[str, str] | None = None,
    probe: Any = None,
    **options: Any,
) -> Result:
    """Call ``analyze_run`` with keywords, or with ``options`` and ``labels`` where it takes those."""
    parameters = inspect.signature(dynamics.analyze_run).parameters
    chosen: dict[str, Any] = {"device": "cpu", "report": False, **options}
    keywords: dict[str, Any] = {"out": out} if out is not None else {}
    keywords |= {"probe": probe} if probe is not None else {}
    if "base" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
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
    """Open a stored result without an analysis."""
    tree = dynamics.open_run(path)
    return Result(tree, tree, path)


def _pydoc_lora(folder: Path) -> dict[str, Callable[[], Result]]:
    return {
        "run": lambda: analyse(folder / "run"),
        "one_checkpoint": lambda: analyse(folder / "run" / "checkpoint-200", out=folder / "one"),
        "some_matrices": lambda: analyse(folder / "run", out=folder / "some", matrices=r"layers\.1.*q_proj"),
    }


def _one(folder: Path) -> dict[str, Callable[[], Result]]:
    return {"run": lambda: analyse(folder / "run")}


def _with_base(folder: Path) -> dict[str, Callable[[], Result]]:
    base = str(folder / "base")
    return {
        "base": lambda: analyse(folder / "run", base=base, intruders=True, weights=True),
        "no_base": lambda: analyse(folder / "run", out=folder / "alone"),
    }


def _six_runs(folder: Path) -> dict[str, Callable[[], Result]]:
    runs = {name: folder / name for name in GROUPS}
    scores = (str(folder / "scores.csv"),)
    several = {"labels": GROUPS, "scores": scores}
    return {
        "groups": lambda: analyse(runs, out=folder / "groups", **several),
        "given_loss": lambda: analyse(runs, out=folder / "loss", given="loss", matrices=r"layers\.1", **several),
        "given_trend": lambda: analyse(
            runs,
            out=folder / "trend",
            given="trend",
            lower=("vqa/accuracy",),
            headline="total/stable_rank",
            matrices="q_proj",
            **several,
        ),
        "one_run": lambda: analyse(folder / "imax_s1", out=folder / "single", scores=scores),
    }


def _first_format(folder: Path) -> dict[str, Callable[[], Result]]:
    """Analyse and open what the first edition left in ``RUN/dynamics``."""
    return {
        "analysed": lambda: analyse(folder / "run", out=folder / "out"),
        "stored": lambda: opened(folder / "run"),
        "capture": lambda: opened(folder / "run" / "dynamics" / "capture.zarr"),
    }


def _probed(folder: Path) -> dict[str, Callable[[], Result]]:
    return {"run": lambda: analyse(folder / "run", probe=load)}


def _recorded(folder: Path) -> dict[str, Callable[[], Result]]:
    """Train with the code in question, and analyse its records."""
    make_two_tasks(folder / "tasks")
    make_capture(folder / "dense")
    make_capture_checkpoints(folder / "plain")
    return {
        "tasks": lambda: analyse(folder / "tasks" / "run"),
        "dense": lambda: analyse(folder / "dense" / "run"),
        "plain": lambda: analyse(folder / "plain" / "run"),
    }


#: Input to its analyses; the function gets a folder with a copy of the input.
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
    """Yield each analysis of one input, or those named, as returned and as opened afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        if (inputs / name).is_dir():
            shutil.copytree(inputs / name, folder)
        for variant, analysis in CASES[name](folder).items():
            if variants and variant not in variants:
                continue
            result = analysis()
            files = [*result.written.rglob("summary.json"), *result.written.rglob("rank_pattern*.json")]
            yield variant, dump(result.tree, folder, files)
            yield f"{variant}.opened", dump(result.opened, folder)


# The command line


def _beyond_rounding(name: str, old: Dump, new: Dump, rtol: float) -> list[Difference]:
    """Return differences beyond a tolerance, but those that the rounding of K explains."""
    results = differences(old, new, rtol)
    if name not in ROUNDED:
        return results
    pattern, tolerance = ROUNDED[name]
    kept = {(entry.path, entry.kind) for entry in differences(old, new, tolerance)}
    return [entry for entry in results if not pattern.search(entry.path) or (entry.path, entry.kind) in kept]


def freeze(folder: Path, names: Sequence[str]) -> None:
    """Make missing inputs, and write the results of all.

    Raises:
        FileExistsError: If an input has frozen results already.
    """
    for name in names:
        if (folder / "results" / name).exists():
            raise FileExistsError(f"'{folder}' holds results of {name} already. Remove them to freeze new ones.")
        if name in MAKERS and not (folder / "inputs" / name).exists():
            MAKERS[name](folder / "inputs" / name)
        start = time.perf_counter()
        for variant, result in results(name, folder / "inputs"):
            result.write(folder / "results" / name / variant)
        print(f"{name}: frozen in {time.perf_counter() - start:.1f} s")


def keep() -> None:
    """Pack the results that a test compares; descriptions are left out."""
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


def compare(folder: Path, names: Sequence[str], *, descriptions: bool = False, rtol: float = 0.0) -> bool:
    """Print differences from the frozen results, on request of descriptions too; return whether any is unintended.

    Args:
        folder: Where inputs and results lie.
        names: The inputs.
        descriptions: Whether to print descriptions that changed.
        rtol: Relative tolerance, for a change of an algorithm that only rounds otherwise; 0 compares bits.
    """
    used: set[Intended] = set()
    failed = False
    for name in names:
        start, count, texts, lines = time.perf_counter(), 0, [], []
        stems = {path.name.removesuffix(".npz") for path in (folder / "results" / name).glob("*.npz")}
        for variant, new in results(name, folder / "inputs"):
            stems.discard(variant)
            old = renamed(f"{name}/{variant}", Dump.read(folder / "results" / name / variant), INTENDED, used)
            count += len(new.arrays)
            bad = unintended(f"{name}/{variant}", _beyond_rounding(name, old, new, rtol), INTENDED, used)
            lines += [f"   {variant} {difference.path}: {difference.kind} {difference.what}" for difference in bad]
            texts += [
                f"   {variant} {path}: {text} → {new.texts.get(path)}"
                for path, text in old.texts.items()
                if text != new.texts.get(path)
            ]
        lines += [f"   {variant}: frozen, and not analysed" for variant in sorted(stems)]
        failed |= bool(lines)
        head = f"{name}: {'differs' if lines else 'equal'} ({count} variables, {time.perf_counter() - start:.1f} s)"
        head += f"; {len(texts)} descriptions changed" if texts else ""
        more = [f"   and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        print(head, *lines[:SHOWN], *more, *(texts if descriptions else ()), sep="\n", flush=True)
    if set(names) == set(CASES):
        for entry in INTENDED:
            if entry not in used:
                print(f"This intended difference occurs in no input; remove it: {entry}")
    return failed


def main() -> int:
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("freeze", "compare", "keep"))
    parser.add_argument("folder", type=Path, nargs="?", help="where inputs and results lie")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--descriptions", action="store_true", help="print changed descriptions, too")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative tolerance; by default bits are compared")
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
    return int(compare(arguments.folder, names, descriptions=arguments.descriptions, rtol=arguments.rtol))


if __name__ == "__main__":
    sys.exit(main())
