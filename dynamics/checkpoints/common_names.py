"""One name for one matrix in all checkpoints of a run.

A library updated during a training spells names differently afterwards, some ways of saving write tied weights twice
and others once, and a reference adapter belongs to no sum. Such differences between checkpoints are removed here,
before the checkpoints are compared.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace

from dynamics.checkpoints.alignment import Size, aligned, expert_forms
from dynamics.checkpoints.base import Base
from dynamics.checkpoints.checkpoint import CheckpointContent
from dynamics.checkpoints.duplicates import same_tensors
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.matrices import StoredMatrix
from dynamics.checkpoints.names import natural_order, shown
from dynamics.checkpoints.ties import Tied, embedding_of, equal_keys, tied_everywhere
from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.findings import Finding
from dynamics.text import some

#: Names of adapters that are only compared with, or belong to another model.
_APART = re.compile(
    r"(.*[_-])?(ref|reference|frozen|teacher|critic|value|reward)([_-](policy|model|adapter|head))?", re.IGNORECASE
)


def with_common_names(
    contents: Sequence[CheckpointContent], steps: Sequence[int], adapters: Sequence[str], base: Base | None
) -> tuple[list[CheckpointContent], list[Finding]]:
    """Return the contents of a run's checkpoints under common names, each matrix once, and the findings.

    Args:
        contents: The contents, in ascending order of step.
        steps: The step of each.
        adapters: Names of all adapters of the run.
        base: The weights before training, if given.
    """
    findings: list[Finding] = []
    spelled = []
    last = next((content for content in reversed(contents) if content.matrices), None)
    for content, step in zip(contents, steps, strict=True):
        renamed = content if last is None or content is last else _spelled_like(content, last)
        spelled.append(renamed)
        new = [name for name in renamed.matrices if name not in content.matrices]
        if new:
            old = [name for name in content.matrices if name not in renamed.matrices]
            message = (
                f"The last checkpoint calls {some(old)} differently: {some(new)}. By name and shape, these are the "
                "same matrices."
            )
            findings.append(Finding("OD136", message, step=step, evidence={"matrices": new, "called": old}))
    untied, ties = _each_once(spelled, base)
    parted, sums = _without_false_sums(untied, steps, adapters)
    return parted, [*findings, *ties, *sums]


# --- spelling ------------------------------------------------------------------------------------


def _spelled_like(content: CheckpointContent, last: CheckpointContent) -> CheckpointContent:
    """Return a checkpoint with the names of the last checkpoint, where the match is unambiguous."""
    matrices = dict(content.matrices)
    names: dict[str, str] = {}
    used: set[str] = set()
    for suffix in dict.fromkeys(_suffix(name) for name in last.ranks.keys() | last.matrices.keys()):
        wanted, held = _sizes(last, suffix), _sizes(content, suffix)
        missing = {name: size for name, size in wanted.items() if name not in held}
        spare = {name: size for name, size in held.items() if name not in wanted}
        if not missing or not spare:
            continue
        shaped = {name: size for name, size in missing.items() if size is not None}
        forms = expert_forms(
            {name: matrices[f"{name}{suffix}"] for name in spare if f"{name}{suffix}" in matrices}, shaped
        )
        sizes = {name: size or (0, 0) for name, size in spare.items()}
        sizes |= {name: (form.matrix.shape.out, form.matrix.shape.in_) for name, form in forms.items()}
        for new, old in aligned(missing, sizes).items():
            if missing[new] not in (None, sizes[old]):
                continue
            if old in forms:
                matrices[f"{new}{suffix}"] = forms[old].matrix
                used |= {f"{part}{suffix}" for part in forms[old].parts}
            else:
                names[f"{old}{suffix}"] = f"{new}{suffix}"
    # The parts of a stack, or the stack of single experts, would count a second time.
    matrices = {name: matrix for name, matrix in matrices.items() if name not in used}
    if not names and matrices.keys() == content.matrices.keys():
        return content
    renamed = {names.get(name, name): matrix for name, matrix in matrices.items()}
    ranks = {names.get(name, name): rank for name, rank in content.ranks.items()}
    ranks = {name: rank for name, rank in ranks.items() if name in renamed or name not in content.matrices}
    ranks |= {name: 0 for name in renamed if name not in ranks}
    return replace(
        content,
        matrices={name: renamed[name] for name in sorted(renamed, key=natural_order)},
        ranks=ranks,
        tied={names.get(name, name): names.get(first, first) for name, first in content.tied.items()},
        sources={names.get(name, name): source for name, source in content.sources.items()},
    )


def _suffix(name: str) -> str:
    stem, at, adapter = name.rpartition("@")
    return f"@{adapter}" if at and stem else ""


def _sizes(content: CheckpointContent, suffix: str) -> dict[str, Size | None]:
    """Return the sizes of one adapter's matrices, by names without the adapter; refused matrices have none."""
    names = [name for name in (*content.matrices, *content.ranks) if _suffix(name) == suffix]
    shapes = {name: content.matrices[name].shape if name in content.matrices else None for name in names}
    return {
        name.removesuffix(suffix): None if shape is None else (shape.out, shape.in_) for name, shape in shapes.items()
    }


# --- ties ----------------------------------------------------------------------------------------


def _each_once(
    contents: Sequence[CheckpointContent], base: Base | None
) -> tuple[list[CheckpointContent], list[Finding]]:
    """Return the contents with tied weights once, or twice in all checkpoints if training untied them."""
    states: list[tuple[Collection[str], Tied]] = [
        (content.matrices.keys(), content.tied) for content in contents if content.matrices
    ]
    pairs = {name: first for _, tied in states for name, first in tied.items()}
    if base is not None and pairs:
        shapes = {name: content.matrices[name].shape for content in contents for name in content.matrices}
        states.append(_in_base(base, pairs, shapes))
    tied, untied = tied_everywhere(states)
    findings = []
    if tied:
        message = (
            f"{some(tied)} and {some(dict.fromkeys(tied.values()))} hold the same numbers wherever both are saved. "
            "Tied weights are one matrix and count once."
        )
        findings.append(Finding("OD135", message, evidence={"tied": tied}))
    if untied:
        message = (
            f"{some(untied)} and {some(dict.fromkeys(untied.values()))} are equal in one checkpoint and differ in "
            "another: training untied them. They count as two matrices."
        )
        findings.append(Finding("OD135", message, evidence={"untied": untied}))
    return [_with_heads(_merged(content, tied), contents, tied) for content in contents], findings


def _in_base(
    base: Base, pairs: Mapping[str, str], shapes: Mapping[str, MatrixShape]
) -> tuple[set[str], dict[str, str]]:
    """Return the names in the pairs that the base has, and the pairs that are tied in it."""
    matrices = base.find({name: shapes[name] for pair in pairs.items() for name in pair})
    keys = {name: matrix.key for name, (_, matrix) in matrices.items() if matrix.key}
    try:
        equal = equal_keys(base.weights, dict.fromkeys(keys.values()))
    except UnreadableFile:  # reported where its matrices are read
        return set(), {}
    first = {name: equal.get(key, key) for name, key in keys.items()}
    tied = {a: b for a, b in pairs.items() if a in first and b in first and first[a] == first[b]}
    return set(keys), tied


def _merged(content: CheckpointContent, tied: Tied) -> CheckpointContent:
    """Return a checkpoint with each tied matrix once, under the first of its names."""
    if not tied.keys() & content.matrices.keys():
        return content
    matrices: dict[str, StoredMatrix] = {}
    for name in sorted(content.matrices, key=lambda name: name in tied):
        matrices.setdefault(tied.get(name, name), content.matrices[name])
    ordered = {name: matrices[name] for name in sorted(matrices, key=natural_order)}
    ranks = {name: rank for name, rank in content.ranks.items() if name not in tied}
    return replace(content, matrices=ordered, ranks=ranks | dict.fromkeys(ordered.keys() - ranks.keys(), 0))


def _with_heads(content: CheckpointContent, contents: Sequence[CheckpointContent], tied: Tied) -> CheckpointContent:
    """Return a checkpoint with an output layer that others have and that was still its input embedding."""
    if content.ties_head is False or not content.matrices:
        return content
    shapes = {
        name: matrix.shape
        for other in contents
        for name, matrix in other.matrices.items()
        if name not in content.matrices and name not in tied and matrix.shape.holds == "weight"
    }
    heads = {name: embedding_of(name, shape, content.matrices) for name, shape in shapes.items()}
    added = {name: content.matrices[embedding] for name, embedding in heads.items() if embedding is not None}
    if not added:
        return content
    matrices = {**content.matrices, **added}
    ordered = {name: matrices[name] for name in sorted(matrices, key=natural_order)}
    return replace(content, matrices=ordered, ranks={**content.ranks, **dict.fromkeys(added, 0)})


# --- several adapters ----------------------------------------------------------------------------


def _without_false_sums(
    contents: Sequence[CheckpointContent], steps: Sequence[int], adapters: Sequence[str]
) -> tuple[list[CheckpointContent], list[Finding]]:
    """Return the contents without sums of adapters if one is a reference: they are never active together."""
    apart = dict(_apart(contents, steps, adapters)) if len(adapters) > 1 else {}
    if not apart:
        return list(contents), []
    names = ", ".join(map(shown, adapters))
    why = "; ".join(f"{shown(name)} {reason}" for name, reason in apart.items())
    message = f"The adapters {names} are analysed one by one, not as a sum: {why}."
    parted = [
        replace(
            content,
            matrices={name: matrix for name, matrix in content.matrices.items() if _suffix(name)},
            findings=tuple(finding for finding in content.findings if not finding.evidence.get("sum")),
        )
        for content in contents
    ]
    return parted, [Finding("OD121", message, evidence={"adapters": list(adapters), "apart": list(apart)})]


def _apart(
    contents: Sequence[CheckpointContent], steps: Sequence[int], adapters: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Yield each reference adapter, and why it is one."""
    for adapter in adapters:
        if _APART.fullmatch(adapter):
            yield adapter, "is a reference or another model, going by its name"
            continue
        files = [
            (step, content.files[adapter])
            for step, content in zip(steps, contents, strict=True)
            if adapter in content.files
        ]
        if len(files) > 1 and all(same_tensors({"": files[0][1]}, {"": file}) for _, file in files[1:]):
            yield adapter, f"holds the same weights from step {files[0][0]} to {files[-1][0]}"
