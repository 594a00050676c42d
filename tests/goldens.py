"""Freeze what analyses give, and compare later results with it bit for bit: for changes that must change no number.

    python -m tests.goldens freeze DIR              # by the code that is believed: inputs, and their results
    python -m tests.goldens compare DIR [NAME ...]  # by the code in question: exit status 1 if a number differs

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
import json
import math
import os
import shutil
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: sums are the same only in the same order

import numpy as np
import torch
import xarray as xr

import dynamics
from tests.golden_inputs import (
    GROUPS,
    MAKERS,
    load,
    make_capture,
    make_capture_checkpoints,
    make_two_tasks,
)

_TEXTS = ("units", "long_name", "definition", "reference")
_KINDS = {"b": "bool", "U": "str", "T": "str", "O": "str"}


class Intended(NamedTuple):
    """A difference that is meant.

    Args:
        inputs: Pattern of ``input/variant``.
        path: Pattern of the variable, finding or number, as the comparison names it: ``/path/segment``, ``OD123``.
        kind: Pattern of the kind of difference (``missing``, ``added``, ``dims``, ``dtype``, ``shape``, ``values``),
            or ``renamed``, whereupon a variable or dimension that was ``path`` is expected under the name ``now``.
        reason: Why.
        now: The new name.
    """

    inputs: str
    path: str
    kind: str
    reason: str
    now: str = ""


#: Every difference from the frozen results that is meant.
INTENDED: tuple[Intended, ...] = ()


class Difference(NamedTuple):
    """One difference between two results: where, of what kind, and what the two say."""

    path: str
    kind: str
    what: str


@dataclass
class Dump:
    """What is compared of one result.

    Args:
        arrays: ``/group/variable`` to values; texts as ``str`` arrays.
        dims: ``/group/variable`` to names of dimensions.
        findings: Code, severity, place, evidence, in the order of the result.
        numbers: Numbers of the JSON files, by path.
        texts: Attributes that describe variables and groups: told, not compared.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)

    def write(self, stem: Path) -> None:
        """Write ``stem.npz``, ``stem.json`` and ``stem.texts.json``."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(f"{stem}.npz", **{name[1:]: values for name, values in self.arrays.items()})
        kept = {"dims": self.dims, "findings": self.findings, "numbers": self.numbers}
        Path(f"{stem}.json").write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        Path(f"{stem}.texts.json").write_text(json.dumps(self.texts, indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, stem: Path) -> Dump:
        """Read what was written; texts may be missing."""
        kept = json.loads(Path(f"{stem}.json").read_text())
        texts = Path(f"{stem}.texts.json")
        with np.load(f"{stem}.npz") as arrays:
            values = {f"/{name}": arrays[name] for name in arrays.files}
        return cls(values, **kept, texts=json.loads(texts.read_text()) if texts.exists() else {})


def dump(tree: xr.DataTree, folder: Path, files: Sequence[Path] = ()) -> Dump:
    """Take from a result what is compared.

    Args:
        tree: The result.
        folder: The temporary folder of this analysis, which is no part of any evidence.
        files: JSON files written beside it.
    """
    result = Dump()
    for node in tree.subtree:
        dataset = node.to_dataset(inherit=False).load()
        for name, variable in dataset.variables.items():
            path = f"{node.path.rstrip('/')}/{name}"
            values = np.asarray(variable.values)
            result.arrays[path] = values.astype(str) if _kind(values.dtype) == "str" else values
            result.dims[path] = [str(dimension) for dimension in variable.dims]
            result.texts[path] = {key: str(variable.attrs[key]) for key in _TEXTS if key in variable.attrs}
        label = f"{node.path.rstrip('/')}/"
        for finding in json.loads(dataset.attrs.get("findings", "[]")):
            kept = {key: finding[key] for key in ("code", "severity", "file", "matrix", "step", "evidence")}
            result.findings.append(_portable({"of": label, **kept}, folder))
        for key, value in dataset.attrs.items():
            if node is tree or "toolkit_version" in dataset.attrs:
                continue  # provenance
            is_number = isinstance(value, int | float | list | np.ndarray | np.number) and key != "statements"
            where = result.numbers if is_number else result.texts
            where[f"{label}@{key}"] = _portable(json.loads(json.dumps(value, default=_plain)), folder)
    for path in files:
        result.numbers |= {
            f"{path.name}:{key}": "text" if isinstance(value, str) else value
            for key, value in _leaves(json.loads(path.read_text()))
            if not {"findings", "statements"} & set(key.split("."))
        }
    return result


def _plain(value: Any) -> Any:
    return value.tolist()


def _kind(dtype: np.dtype) -> str:
    return _KINDS.get(dtype.kind, dtype.name)


def _portable(value: Any, folder: Path) -> Any:
    """Return the same without the temporary folder in it."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    for name in sorted({str(folder), str(folder.resolve())}, key=len, reverse=True):
        text = text.replace(json.dumps(name, ensure_ascii=False)[1:-1], "…")
    return json.loads(text)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for number, inner in enumerate(value):
            yield from _leaves(inner, f"{path}.{number}")
    else:
        yield path, value


def differences(old: Dump, new: Dump, rtol: float = 0.0) -> list[Difference]:
    """Return how two results differ.

    Args:
        old, new: The two.
        rtol: Relative tolerance of real numbers, in units of the largest number of a variable's last axis; 0 compares
            bits, except that NaN is NaN.
    """
    results = []
    for path in sorted(old.arrays.keys() | new.arrays.keys()):
        if path not in new.arrays or path not in old.arrays:
            results.append(Difference(path, "missing" if path in old.arrays else "added", ""))
            continue
        before, after = old.arrays[path], new.arrays[path]
        if old.dims[path] != new.dims[path]:
            results.append(Difference(path, "dims", f"{old.dims[path]} → {new.dims[path]}"))
        if _kind(before.dtype) != _kind(after.dtype):
            results.append(Difference(path, "dtype", f"{before.dtype} → {after.dtype}"))
        if before.shape != after.shape:
            results.append(Difference(path, "shape", f"{before.shape} → {after.shape}"))
        elif what := _unequal(before, after, rtol):
            results.append(Difference(path, "values", what))
    ours, theirs = ([json.dumps(_rounded(f, rtol), sort_keys=True) for f in each.findings] for each in (old, new))
    for kind, counted in (("missing", Counter(ours) - Counter(theirs)), ("added", Counter(theirs) - Counter(ours))):
        results += [Difference(json.loads(text)["code"], kind, text) for text in counted.elements()]
    for path in sorted(old.numbers.keys() | new.numbers.keys()):
        if path not in new.numbers or path not in old.numbers:
            results.append(Difference(path, "missing" if path in old.numbers else "added", ""))
        elif _rounded(old.numbers[path], rtol) != _rounded(new.numbers[path], rtol):
            results.append(Difference(path, "values", f"{old.numbers[path]!r} → {new.numbers[path]!r}"))
    return results


def _unequal(before: np.ndarray, after: np.ndarray, rtol: float) -> str:
    """Return how many values differ, and by how much; nothing if none does."""
    if before.dtype.kind not in "fc" or after.dtype.kind not in "fc":
        different = before != after
        return f"{different.sum()} of {before.size}" if different.any() else ""
    if before.tobytes() == after.tobytes():
        return ""
    with np.errstate(invalid="ignore"):
        distance = np.abs(after - before)
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    if not rtol:
        same &= np.isnan(before) | (np.signbit(before) == np.signbit(after))
    size = np.where(np.isfinite(before), np.abs(before), 0.0)
    if size.ndim:
        size = size.max(axis=-1, keepdims=True, initial=0.0)
    different = ~same & ~(distance <= rtol * size)
    if not different.any():
        return ""
    finite = np.isfinite(distance) & different
    worst = f", by at most {distance[finite].max():.3g}" if finite.any() else ""
    return f"{different.sum()} of {before.size}{worst}"


def _rounded(value: Any, rtol: float) -> Any:
    """Return numbers to as many digits as a tolerance leaves, all of them without one."""
    if isinstance(value, dict):
        return {key: _rounded(inner, rtol) for key, inner in value.items()}
    if isinstance(value, list):
        return [_rounded(inner, rtol) for inner in value]
    if rtol and isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{max(1, round(-math.log10(rtol)) - 3)}g}")
    return value


def judged(name: str, found: Sequence[Difference], used: set[Intended]) -> list[Difference]:
    """Return the differences that nobody intended; those that match an entry are added to ``used``."""
    kept = []
    for difference in found:
        entries = [
            entry
            for entry in INTENDED
            if fnmatchcase(name, entry.inputs)
            and fnmatchcase(difference.path, entry.path)
            and fnmatchcase(difference.kind, entry.kind)
        ]
        used.update(entries)
        kept += [] if entries else [difference]
    return kept


def renamed(name: str, old: Dump, used: set[Intended]) -> Dump:
    """Return a frozen result with the names of today."""
    for entry in INTENDED:
        if entry.kind != "renamed" or not fnmatchcase(name, entry.inputs):
            continue
        arrays = {_renamed(path, entry): values for path, values in old.arrays.items()}
        dims = {
            _renamed(path, entry): [
                _renamed(f"{path.rpartition('/')[0]}/{dimension}", entry).rpartition("/")[2] for dimension in names
            ]
            for path, names in old.dims.items()
        }
        if dims != old.dims:
            used.add(entry)
        old = replace(old, arrays=arrays, dims=dims)
    return old


def _renamed(path: str, entry: Intended) -> str:
    return f"{path.rpartition('/')[0]}/{entry.now}" if fnmatchcase(path, entry.path) else path


# Analyses


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
    "probed": _probed,
    "recorded": _recorded,
}


def results(name: str, inputs: Path) -> Iterator[tuple[str, Dump]]:
    """Analyse a copy of one input: each analysis as it was returned, and as it is opened afterwards."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / name
        if (inputs / name).is_dir():
            shutil.copytree(inputs / name, folder)
        for variant, analyse in CASES[name](folder).items():
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


def compare(folder: Path, names: Sequence[str]) -> bool:
    """Print how today's results differ from the frozen ones; return whether anything differs that is not intended."""
    used: set[Intended] = set()
    failed = False
    for name in names:
        start, count, texts, lines = time.perf_counter(), 0, 0, []
        stems = {path.name.removesuffix(".npz") for path in (folder / "results" / name).glob("*.npz")}
        for variant, new in results(name, folder / "inputs"):
            stems.discard(variant)
            old = renamed(f"{name}/{variant}", Dump.read(folder / "results" / name / variant), used)
            count += len(new.arrays)
            bad = judged(f"{name}/{variant}", differences(old, new), used)
            lines += [f"   {variant} {each.path}: {each.kind} {each.what}" for each in bad]
            texts += sum(old.texts[path] != new.texts.get(path) for path in old.texts)
        lines += [f"   {variant}: frozen, and not analysed" for variant in sorted(stems)]
        failed |= bool(lines)
        took = time.perf_counter() - start
        print(
            f"{name}: {'differs' if lines else 'equal'} ({count} variables, {took:.1f} s)", *lines, sep="\n", flush=True
        )
    if set(names) == set(CASES):
        for entry in INTENDED:
            if entry not in used:
                print(f"An intended difference is in no input: {entry}")
    return failed


def main() -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("freeze", "compare"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CASES)}; all by default")
    arguments = parser.parse_args()
    names = arguments.names or list(CASES)
    if unknown := sorted(set(names) - set(CASES)):
        parser.error(f"expected inputs among {', '.join(CASES)}, got {', '.join(unknown)}")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    if arguments.action == "freeze":
        freeze(arguments.folder, names)
        return 0
    return int(compare(arguments.folder, names))


if __name__ == "__main__":
    sys.exit(main())
