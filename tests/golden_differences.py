"""What ``tests.goldens`` compares of two results, and how."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

_TEXTS = ("units", "long_name", "definition", "reference")
_KINDS = {"b": "bool", "U": "str", "T": "str", "O": "str"}


class Intended(NamedTuple):
    """An intended difference.

    Args:
        inputs: Pattern of ``input/variant``.
        path: Pattern of the variable, finding or number, as the comparison names it: ``/path/segment``, ``OD123``.
        kind: Pattern of the kind of difference (``missing``, ``added``, ``dims``, ``dtype``, ``shape``, ``values``,
            ``evidence``), or ``renamed``: a variable or dimension that was ``path`` is compared under the name ``now``.
        reason: Why.
        now: The new name.
    """

    inputs: str
    path: str
    kind: str
    reason: str
    now: str = ""


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
        texts: Attributes that describe variables and groups: reported, never a failure.
    """

    arrays: dict[str, np.ndarray] = field(default_factory=dict)
    dims: dict[str, list[str]] = field(default_factory=dict)
    findings: list[dict[str, Any]] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    texts: dict[str, Any] = field(default_factory=dict)

    def write(self, stem: Path) -> None:
        """Write ``stem.npz``, ``stem.json`` and ``stem.texts.json``."""
        stem.parent.mkdir(parents=True, exist_ok=True)
        np.savez(f"{stem}.npz", **{name[1:]: values for name, values in self.arrays.items()})
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
    """Return what is compared of a result.

    Args:
        tree: The result.
        folder: The temporary folder of this analysis, which evidence may name.
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
    """Return a JSON value with "…" in place of the temporary folder."""
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
        rtol: Relative tolerance of real numbers, relative to the largest number along the last axis; 0 compares bits,
            except that all NaN are equal.
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
    results += _findings(old.findings, new.findings, rtol)
    for path in sorted(old.numbers.keys() | new.numbers.keys()):
        if path not in new.numbers or path not in old.numbers:
            results.append(Difference(path, "missing" if path in old.numbers else "added", ""))
        elif not _alike(old.numbers[path], new.numbers[path], rtol):
            results.append(Difference(path, "values", f"{old.numbers[path]!r} → {new.numbers[path]!r}"))
    return results


def _unequal(before: np.ndarray, after: np.ndarray, rtol: float) -> str:
    """Return how many values differ and by how much, or an empty text."""
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


def _findings(old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], rtol: float) -> Iterator[Difference]:
    before, after = _by_place(old), _by_place(new)
    for key in sorted(before.keys() | after.keys()):
        ours, theirs = before.get(key, []), after.get(key, [])
        code = json.loads(key)["code"]
        if len(ours) != len(theirs):
            kind = "missing" if len(ours) > len(theirs) else "added"
            yield Difference(code, kind, f"{len(ours)} → {len(theirs)} of {key}")
        elif not _alike(ours, theirs, rtol):
            yield Difference(code, "evidence", f"{ours} → {theirs} of {key}")


def _by_place(findings: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return evidence by all other fields; the order of findings does not count."""
    evidence: dict[str, list[Any]] = {}
    for finding in sorted(findings, key=lambda finding: json.dumps(finding, sort_keys=True)):
        key = json.dumps({name: value for name, value in finding.items() if name != "evidence"}, sort_keys=True)
        evidence.setdefault(key, []).append(finding["evidence"])
    return evidence


def _alike(before: Any, after: Any, rtol: float) -> bool:
    if isinstance(before, dict) and isinstance(after, dict):
        return before.keys() == after.keys() and all(_alike(before[key], after[key], rtol) for key in before)
    if isinstance(before, list) and isinstance(after, list):
        pairs = zip(before, after, strict=False)
        return len(before) == len(after) and all(_alike(*pair, rtol) for pair in pairs)
    if isinstance(before, float) and isinstance(after, float):
        return math.isclose(before, after, rel_tol=rtol, abs_tol=rtol) or (before != before and after != after)
    return type(before) is type(after) and before == after


def unintended(
    name: str, changes: Sequence[Difference], intended: Sequence[Intended], used: set[Intended]
) -> list[Difference]:
    """Return the unintended differences, and add the entries that match others to ``used``."""
    kept = []
    for difference in changes:
        entries = [
            entry
            for entry in intended
            if fnmatchcase(name, entry.inputs)
            and fnmatchcase(difference.path, entry.path)
            and fnmatchcase(difference.kind, entry.kind)
        ]
        used.update(entries)
        kept += [] if entries else [difference]
    return kept


def renamed(name: str, old: Dump, intended: Sequence[Intended], used: set[Intended]) -> Dump:
    """Return a frozen result under its new names, and add the entries that apply to ``used``."""
    for entry in intended:
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
