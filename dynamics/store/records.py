"""What a training recorded of itself: its records as raw datasets, and what must be known about them.

What records hold of probe samples: the Fisher's K and b, and scores, checked and joined over steps.

Whether a record is what a recorder writes: strangers' files are not believed, and a bad one costs only itself.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.findings import CATALOGUE, Finding
from dynamics.schema import DECOMPOSITIONS, KINDS, UPDATE_COORDINATES, WRAPPERS, Variable
from dynamics.spectra import raw
from dynamics.store import FOLDER, Capture, capture_path, read_capture
from dynamics.store.capture import CAPTURE, capture_attributes, record_name, record_names
from dynamics.text import encodable, some

_REMEDY = "The other records are used; restore it from a copy, or remove it."


@dataclass(frozen=True)
class Captured:
    """The records of a training.

    Args:
        path: The capture store.
        update: Raw update of all captured steps, ``None`` if no record is left to use.
        gradient: Raw gradient of the steps that have one, ``None`` if none has.
        fisher: K and b of the steps that have them, ``None`` if none has.
        score: Scores of the steps that have some, ``None`` if none has.
        live_names: Name on disk → name in the live model, where they differ.
        findings: What was found during the training, and while reading.
        stamp: Tells whether the store has changed since: run, steps, records that cannot be used, attributes.
        bytes: Size of the numbers.
    """

    path: Path
    update: xr.Dataset | None
    gradient: xr.Dataset | None
    fisher: xr.Dataset | None
    score: xr.Dataset | None
    live_names: Mapping[str, str]
    findings: tuple[Finding, ...]
    stamp: Mapping[str, Any]
    attributes: Mapping[str, Any]
    bytes: int

    @property
    def input(self) -> dict[str, Any]:
        """Its entry among the inputs of a result."""
        steps = self.stamp["steps"]
        return {
            "path": _shown(self.path),
            "bytes": self.bytes,
            "header_sha256": self.stamp["attributes"],
            "step": steps[-1] if steps else None,
            "captured_steps": len(steps),
        }


def find_captured(run: Path, matrices: str | None = None) -> tuple[Captured | None, list[Finding]]:
    """The records of a run, ``None`` where there are none; and what stands in their place, if something does.

    Args:
        run: A run folder, its ``dynamics`` folder, or the store.
        matrices: Regular expression; only matrices whose name it finds are kept.

    Raises:
        ValueError: If it is not a regular expression.
    """
    path = capture_path(run)
    if path is None:
        return None, [_foreign(place) for place in (run / FOLDER / CAPTURE, run / CAPTURE) if _is_occupied(place)]
    try:
        return captured(read_capture(path), matrices), []
    except ValueError as error:
        if matrices is not None:
            _pattern(matrices)
        return None, [Finding("OD309", str(error), file=_shown(path))]


def captured(capture: Capture, matrices: str | None = None) -> Captured:
    """The content of a capture store, checked and joined.

    Raises:
        ValueError: If ``matrices`` is not a regular expression.
    """
    keep = _pattern(matrices or "")
    broken = dict(capture.broken)
    updates, gradients = [], []
    probed: dict[str, list[xr.Dataset]] = {name: [] for name in GROUPS}
    unusable: list[Finding] = []
    for step, record in capture.records.items():
        if problem := next(record_problems(record), None):
            broken[record_name(step)] = problem
            continue
        updates.append(record["update"])
        if "gradient" in record:
            gradients.append(record["gradient"])
        problems = dict(probe_problems(record))
        unusable += [_broken(capture.path, record_name(step), problem) for problem in problems.values()]
        for name, found in probed.items():
            if name in record and name not in problems:
                found.append(record[name])
    fisher, news = joined_fisher(probed["fisher"], keep)
    steps = [int(update["step"].values[0]) for update in updates]
    bad = sorted(broken)
    return Captured(
        path=capture.path,
        update=_joined(updates, keep),
        gradient=_joined(gradients, keep),
        fisher=fisher,
        score=joined_scores(probed["score"]),
        live_names=_live_names(capture.attributes.get("disk_names"), updates),
        findings=(
            *_findings_of(capture.attributes),
            *(_broken(capture.path, name, broken[name]) for name in bad),
            *unusable,
            *news,
        ),
        stamp={
            "run_id": str(capture.attributes.get("run_id", "")),
            "steps": steps,
            "broken": bad,
            "attributes": _digest(capture.attributes),
        },
        attributes=capture.attributes,
        bytes=sum(part.nbytes for part in (*updates, *gradients, *probed["fisher"], *probed["score"])),
    )


def is_current(stamp: Any, path: Path) -> bool:
    """Whether a capture store holds what it held when it was stamped.

    Args:
        stamp: As in :class:`Captured`; anything else is not current.
        path: The store.
    """
    try:
        then = sorted([*map(record_name, stamp["steps"]), *stamp["broken"]])
        return then == record_names(path) and stamp["attributes"] == _digest(capture_attributes(path))
    except (KeyError, TypeError, ValueError):
        return False


def finding_of(content: Any) -> Finding | None:
    """A finding from its dictionary; ``None`` for what is none of this version's."""
    if not isinstance(content, dict) or not isinstance(content.get("message"), str):
        return None
    code, step, evidence = (content.get(key) for key in ("code", "step", "evidence"))
    if not isinstance(code, str) or code not in CATALOGUE:
        return None
    texts = {key: value for key in ("remedy", "file", "matrix") if isinstance(value := content.get(key), str)}
    return Finding(
        code,
        content["message"],
        **texts,
        step=step if type(step) is int else None,
        evidence=evidence if isinstance(evidence, dict) else {},
    )


def _pattern(matrices: str) -> re.Pattern[str]:
    try:
        return re.compile(matrices)
    except re.error as error:
        raise ValueError(
            f"matrices={matrices!r} is not a regular expression ({error}). Escape it, or leave it out."
        ) from error


def _joined(parts: list[xr.Dataset], keep: re.Pattern[str]) -> xr.Dataset | None:
    if not parts:
        return None
    joined = raw.concatenate(parts)
    joined = joined.isel(matrix=[keep.search(name) is not None for name in joined["matrix"].values.tolist()])
    return joined if joined.sizes["matrix"] else None


def _live_names(disk_names: Any, updates: list[xr.Dataset]) -> dict[str, str]:
    """The inverse of live → disk; a name on disk that several share, or that is a live one as well, stays as it is."""
    pairs = disk_names.items() if isinstance(disk_names, dict) else ()
    texts = [(disk, live) for live, disk in pairs if isinstance(disk, str) and not live.startswith(WRAPPERS)]
    sharing = Counter(disk for disk, _ in texts)
    taken = {name for update in updates for name in update["matrix"].values.tolist()}
    return {disk: live for disk, live in texts if sharing[disk] == 1 and disk not in taken}


def _findings_of(attributes: Mapping[str, Any]) -> Iterator[Finding]:
    known = [finding for each in _list(attributes.get("findings")) if (finding := finding_of(each))]
    yield from known
    gaps = [gap for gap in _list(attributes.get("gaps")) if isinstance(gap, dict) and type(gap.get("step")) is int]
    if gaps and all(finding.code != "OD305" for finding in known):
        steps = [gap["step"] for gap in gaps]
        reasons = list(dict.fromkeys(str(gap.get("reason", "unknown")) for gap in gaps))
        yield Finding(
            "OD305",
            f"Steps that were due could not be captured, or not whole: {some(map(str, steps), 5)} "
            f"({'; '.join(reasons[:2])}).",
            "An increment after such a gap is since the last step that was captured.",
            evidence={"steps": steps, "reasons": reasons},
        )


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _broken(path: Path, name: str, problem: str) -> Finding:
    return Finding("OD309", f"The captured step cannot be used: {problem}.", _REMEDY, file=f"{_shown(path)}/{name}")


def _foreign(place: Path) -> Finding:
    return Finding(
        "OD309",
        "It has the name of a capture store, and is none; it is left out.",
        "Restore its .zattrs if it is one, or move it away.",
        file=_shown(place),
    )


def _shown(path: Path) -> str:
    """A capture store as it lies in its run."""
    return f"{FOLDER}/{path.name}" if path.absolute().parent.name == FOLDER else path.name


def _is_occupied(place: Path) -> bool:
    """Whether there is something that is not the beginning of a capture."""
    if place.is_symlink() or place.is_file():
        return True
    try:
        return place.is_dir() and any(not entry.name.startswith(".") for entry in place.iterdir())
    except OSError:
        return True


def _digest(attributes: Mapping[str, Any]) -> str:
    return sha256(json.dumps(attributes, sort_keys=True).encode()).hexdigest()


GROUPS: Mapping[str, Mapping[str, Variable]] = {"fisher": schema.FISHER_RECORD, "score": schema.SCORE}
_COORDINATES = ("step", "block", "evaluated_at_step", *schema.SAMPLE_LABELS)
_SPACES = ("tangent", "factor", "weight")
#: Beyond, sums of squares are no numbers any more.
_LARGEST_NUMBER = 1e100


def probe_problems(record: Mapping[str, xr.Dataset]) -> Iterator[tuple[str, str]]:
    """Groups of a record that cannot be used, each with what is wrong with it, in words that go on from its name."""
    for name, known in GROUPS.items():
        if name in record and (problem := next(_problems(record[name], known), None)):
            yield name, f"'{name}' {problem}"


def _problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    fisher = "gram" in known
    labels = dict.fromkeys(schema.SAMPLE_LABELS, ("sample",)) if fisher else {}
    texts = {"block": ("block",), **labels} if fisher else {"task": ("task",)}
    whole = {"step": ("step",), **({"evaluated_at_step": ("step",)} if fisher else {})}
    optional = {"momentum": schema.FISHER_MOMENTUM} if fisher else {"direction": schema.SCORE_DIRECTION}
    stated = {name: variable for name, variable in optional.items() if name in dataset.variables}
    numbers = {name: variable.dims for name, variable in {**known, **stated}.items()}
    for expected, kinds in ((texts, "U"), (whole, "iu"), (numbers, "fiu")):
        for name, dims in expected.items():
            if name not in dataset.variables or dataset[name].dims != dims or dataset[name].dtype.kind not in kinds:
                yield f"lacks {name!r} with the dimensions {dims}"
                return
    if dataset.sizes["step"] != 1:
        yield "is not of one step"
    axis = "block" if fisher else "task"
    names = dataset[axis].values.tolist()
    if len(set(names)) < len(names) or names != encodable(names):
        yield f"has a {axis} whose name is no text, or another's too"
    if any((np.abs(dataset[name].values) > _LARGEST_NUMBER).any() for name in known):
        yield f"has a number beyond {_LARGEST_NUMBER:g}"
    if fisher:
        yield from _gram_problems(dataset)


def _gram_problems(dataset: xr.Dataset) -> Iterator[str]:
    if dataset.sizes["sample"] != dataset.sizes["sample_"] or not dataset.sizes["sample"]:
        yield "has no square K"
        return
    if dataset.attrs.get("space") not in _SPACES or not isinstance(dataset.attrs.get("batch_size"), int):
        yield "does not say its space and its batch size"
    if not isinstance(dataset.attrs.get("fisher"), str) or not isinstance(dataset.attrs.get("reduction"), str):
        yield "does not say its kind and its reduction"
    k = np.nan_to_num(dataset["gram"].values)
    size = np.abs(k).max((2, 3), initial=0.0)
    apart = np.abs(k - k.swapaxes(2, 3)).max((2, 3), initial=0.0)
    if (apart > 1e-4 * size).any() or (np.diagonal(k, axis1=2, axis2=3) < 0).any():
        yield "has a K that is no Gram matrix"
    elif (np.linalg.eigvalsh(k) < -1e-4 * size[..., None] * k.shape[-1]).any():
        yield "has a K with a negative eigenvalue"
    if int(dataset["evaluated_at_step"].values[0]) > int(dataset["step"].values[0]):
        yield "was evaluated at a later step"


def joined_fisher(parts: Sequence[xr.Dataset], keep: re.Pattern[str]) -> tuple[xr.Dataset | None, list[Finding]]:
    """K and b of all steps; of those that probed the same samples in the same way as the last one.

    Args:
        parts: One step each, ascending.
        keep: Blocks whose name it finds are kept, and ``global``.
    """
    if not parts:
        return None, []
    same = [part for part in parts if _is_alike(part, parts[-1])]
    found = []
    if len(same) < len(parts):
        steps = [int(part["step"].values[0]) for part in parts if not _is_alike(part, parts[-1])]
        found.append(_other_samples(f"{len(steps)} steps", "the last one", steps))
    whole = xr.concat(same, "step", data_vars="all", coords="minimal", compat="override", join="outer")
    blocks = whole["block"].values.tolist()
    whole = whole.isel(block=[name == schema.GLOBAL or keep.search(name) is not None for name in blocks])
    return whole.assign_attrs(parts[-1].attrs), found


def with_probed(captured: xr.Dataset | None, probed: xr.Dataset | None) -> tuple[xr.Dataset | None, list[Finding]]:
    """K and b of the training's own records and of its probed checkpoints; where both have a step, that of the records.

    Probed checkpoints are left out, with a finding, if they were probed in another way than the records.
    """
    if captured is None or probed is None:
        return (probed if captured is None else captured), []
    if not _is_alike(captured, probed):
        steps = probed["step"].values.tolist()
        return captured, [_other_samples(f"{len(steps)} probed checkpoints", "the records of the training", steps)]
    new = probed.sel(step=~probed["step"].isin(captured["step"].values))
    if not new.sizes["step"]:
        return captured, []
    whole = xr.concat([captured, new], "step", data_vars="all", coords="minimal", compat="override", join="outer")
    # The order of blocks stays that of the records, which the union of names does not keep.
    names = dict.fromkeys([*captured["block"].values.tolist(), *probed["block"].values.tolist()])
    return whole.sel(block=list(names)).sortby("step").assign_attrs(captured.attrs), []


def raw_fisher(tree: xr.DataTree) -> xr.Dataset | None:
    """What a stored result keeps of its probed checkpoints: as :data:`dynamics.schema.FISHER_RECORD` has it."""
    if "probed" in tree.children:
        return tree["probed"].to_dataset().load()
    if "captured" in tree.attrs or "fisher" not in tree.children:
        return None
    fisher, shares = tree["fisher"].to_dataset(), tree["concentration"].to_dataset()
    own = [name for name in schema.FISHER_RECORD if name in fisher]
    found = fisher[own].assign(share_outside_space=shares["share_outside_space"])
    return found.drop_vars([name for name in found.coords if name not in _COORDINATES]).load()


def joined_scores(parts: Sequence[xr.Dataset]) -> xr.Dataset | None:
    """Scores of all steps."""
    return xr.concat(parts, "step", data_vars="all", join="outer") if parts else None


def _other_samples(what: str, reference: str, steps: Sequence[int]) -> Finding:
    return Finding(
        "OD312",
        f"{what} probed other samples, or another space, than {reference}; their Fisher is left out.",
        "Probe the same samples throughout a training.",
        evidence={"steps": list(steps)},
    )


def _is_alike(one: xr.Dataset, other: xr.Dataset) -> bool:
    labels = all(np.array_equal(one[name].values, other[name].values) for name in schema.SAMPLE_LABELS)
    return labels and all(one.attrs.get(name) == other.attrs.get(name) for name in ("space", "fisher", "reduction"))


_FORMATS = ("F64", "F32", "BF16", "F16")
_TEXTS = ("matrix", "role", "stack", "storage")
_COUNTS = ("count", "factor_rank", "decomposition")
_STEP_COORDINATES = ("segment", "from_step")
_IS_OF: Mapping[str, Callable[[np.dtype], bool]] = {
    "text": lambda dtype: dtype.kind == "U",
    "whole numbers of 64 bits": lambda dtype: dtype == np.int64,
    "numbers": lambda dtype: dtype.kind == "f",
}
#: No training has as many steps, no matrix as many rows.
_LARGEST = 10**12
#: Chance is drawn from factors of that many columns, at the cost of its square; no adapter comes near.
_LARGEST_RANK = 4096
#: Beyond, the energy of a spectrum is no number any more.


def record_problems(record: Mapping[str, xr.Dataset]) -> Iterator[str]:
    """What is wrong with a record, in words that go on from its name; nothing if it can be used.

    Args:
        record: Name of the group → its numbers, as ``read_capture`` gives them.
    """
    if "update" not in record:
        yield "it has no update"
    for group, known in (("update", raw.UPDATE), ("gradient", raw.GRADIENT)):
        if group in record:
            yield from (f"'{group}' {problem}" for problem in _dataset_problems(record[group], known))


def _dataset_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    """Each check relies on those before it, so only the first problem is told."""
    # Records of earlier versions lack some variables.
    known = {name: variable for name, variable in known.items() if name in dataset.variables or name not in raw.ADDED}
    for check in (_layout_problems, _coordinate_problems, _spectrum_problems):
        if problem := next(check(dataset, known), None):
            yield problem
            return


def _layout_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    dims = _dimensions(known)
    for name, expected in dims.items():
        if name not in dataset.variables or dataset.variables[name].dims != expected:
            yield f"lacks {name!r} with the dimensions {expected}"
            return
    types = {name: "whole numbers of 64 bits" if name in _COUNTS or name not in known else "numbers" for name in dims}
    types |= dict.fromkeys(("kind", *_TEXTS), "text")
    yield from (
        f"holds no {types[name]} in {name!r}" for name in dims if not _IS_OF[types[name]](dataset.variables[name].dtype)
    )


def _dimensions(known: Mapping[str, Variable]) -> dict[str, tuple[str, ...]]:
    per_kind = "kind" in known["count"].dims
    axes = ("step", "matrix", "index", *(["kind"] if per_kind else []))
    return {
        **{name: (name,) for name in axes},
        **{name: (dim,) for name, dim in UPDATE_COORDINATES.items() if per_kind or name not in _STEP_COORDINATES},
        **{name: variable.dims for name, variable in known.items()},
    }


def _coordinate_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    if "kind" in dataset.dims and tuple(dataset.variables["kind"].values.tolist()) != KINDS:
        yield f"is not of the kinds {KINDS}"
    if dataset.sizes["step"] != 1:
        yield "is not of one step"
    smallest = {"from_step": -1, "layer": -1, "out": 1, "in": 1}
    for name in _dimensions(known):
        values = dataset.variables[name].values
        if values.dtype == np.int64 and values.size:
            least = smallest.get(name, 0)
            if not (least <= int(values.min()) and int(values.max()) < _LARGEST):
                yield f"has a number in {name!r} that is not from {least} to {_LARGEST - 1}"
    if "from_step" in dataset.coords and bool(dataset.variables["from_step"] >= dataset.variables["step"]):
        yield "is an increment since a later step"
    if not dataset.indexes["matrix"].is_unique:
        yield "has two matrices of one name"
    names = dataset.variables["matrix"].values.tolist()
    if any(name.startswith(WRAPPERS) for name in names):
        yield "has a matrix whose name begins with a wrapper's prefix"
    if names != encodable(names):
        yield "has a matrix whose name is no text"
    if not set(dataset.variables["storage"].values.tolist()) <= set(_FORMATS):
        yield f"is stored in a format that is none of {', '.join(_FORMATS)}"


def _spectrum_problems(dataset: xr.Dataset, known: Mapping[str, Variable]) -> Iterator[str]:
    values, count, rank = (dataset.variables[name].values for name in ("singular_value", "count", "factor_rank"))
    shortest = np.minimum(dataset.variables["out"].values, dataset.variables["in"].values)
    factored = dataset.variables["adapter_rank"].values > 0
    # A dense matrix has as many as it is wide, factors as many as they have columns.
    possible = np.where(rank > 0, np.where(factored, np.minimum(rank, shortest), shortest), 0)
    if (count != possible).any() or count.max(initial=0) > values.shape[-1]:
        yield "does not count the singular values that its matrices have"
    if (rank[..., factored] > _LARGEST_RANK).any():
        yield f"has factors of more than {_LARGEST_RANK} columns"
    if "from_step" in dataset.coords and dataset.variables["from_step"].values[0] < 0 and count[:, 1].any():
        yield "has an increment since nothing"
    if "decomposition" in known and (dataset.variables["decomposition"].values >= len(DECOMPOSITIONS)).any():
        yield "has singular values that were found in an unknown way"
    inside = np.arange(values.shape[-1]) < count[..., None]
    if not np.isnan(values[~inside]).all():
        yield "has more singular values than it counts"
    missing = np.isnan(values) & inside
    if (missing.any(-1) & (missing.sum(-1) < count)).any():
        yield "lacks some of its singular values"
    sides = [np.isfinite(dataset.variables[name].values) for name in known if name.endswith("factor_value")]
    if any((~side[..., :-1] & side[..., 1:]).any() for side in sides):
        yield "has a gap in the singular values of its factors"
    if sides and (sum(side.sum(-1) for side in sides) > np.where(factored, rank[:, 1], 0)).any():
        yield "has more singular values of factors than its increments have columns"
    for name in (each for each in known if each not in _COUNTS):
        numbers = dataset.variables[name].values.astype(np.float64)
        least = -_LARGEST_NUMBER if name == "inner_product" else 0.0
        # A gradient that is not finite has a norm that says so.
        allowed = np.isnan(numbers) | (numbers >= least) & (numbers <= _LARGEST_NUMBER)
        if not (allowed | (np.isposinf(numbers) & name.startswith("norm"))).all():
            yield f"has a number in {name!r} that is not from {least:g} to {_LARGEST_NUMBER:g}"
    if (np.diff(np.where(inside, values, 0.0), axis=-1) > 0).any():
        yield "has singular values that are not in descending order"
