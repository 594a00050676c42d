"""A run folder → a ``Trajectory``: the whole path of reading, on one screen."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from dynamics.checkpoints.base import base_checkpoint, every_shape, has_updates, open_base, start_findings
from dynamics.checkpoints.candidates import DEFAULT, STATE, Candidate
from dynamics.checkpoints.checkpoint import Content, Reader
from dynamics.checkpoints.common_names import with_common_names
from dynamics.checkpoints.duplicates import duplicates, same_tensors
from dynamics.checkpoints.errors import NotARun, UnreadableFile
from dynamics.checkpoints.folders import RunFolder, find_checkpoints, is_unfinished
from dynamics.checkpoints.initial_adapters import initial_adapters, without_auxiliary
from dynamics.checkpoints.names import natural_order, shown_path
from dynamics.checkpoints.trainings import Clues, TrainingState, find_segments, merged_log, read_training_state
from dynamics.checkpoints.trajectory import Checkpoint, Trajectory
from dynamics.findings import Finding, worst_severity
from dynamics.text import some

_NAMES = (
    "Matrices are named as in the files: no map from the live model's names is in the run. Names can differ "
    "where a library renames weights when it saves them."
)


def open_trajectory(
    run: str | PathLike[str], matrices: str | None = None, base: str | PathLike[str] | None = None
) -> Trajectory:
    """Opens a run of LoRA adapters or of whole models: headers and configurations only, no weights.

    What cannot be read, or is neither a dense weight nor a plain product of factors, becomes a finding of the
    trajectory; the rest is read. The matrices themselves come from ``with checkpoint.open() as matrices``.

    Args:
        run: A Trainer output folder with ``checkpoint-N/``, or one checkpoint or adapter folder.
        matrices: Watch only matrices in whose names this regular expression is found (``re.search``).
        base: Folder with the weights before training. Totals of dense weights are counted from it, without it from the
            run's first checkpoint; modules saved with an adapter, and DoRA, are analysed only with it.

    Raises:
        NotARun: If nothing at all can be read, or not the base; its ``findings`` say why, file by file.
        ValueError: If ``matrices`` is not a regular expression.

    Example::

        trajectory = open_trajectory("runs/imax", matrices=r"layers\\.0\\.")
        for checkpoint in trajectory.checkpoints:
            with checkpoint.open() as opened:
                print(checkpoint.step, {name: matrix.shape for name, matrix in opened.items()})
    """
    folder = Path(run)
    watch = _watch(matrices)
    found = _without_auxiliary(find_checkpoints(folder))
    numbered = found.numbered or [root for root in (found.root,) if root is not None]
    names = _adapter_names(numbered)
    start = None if base is None else open_base(base)
    reader = Reader(folder, names, watch, start, initial_adapters(folder))
    contents = [reader.read(one, latest=is_unfinished(one, found.numbered)) for one in numbered]
    states, findings = _states(folder, numbered)
    candidates, contents, states, notes = _with_root(found, reader, list(numbered), contents, states)
    contents, settled = with_common_names(contents, [one.step for one in candidates], names, start)
    findings = [*found.findings, *findings, *notes, *(f for content in contents for f in content.findings), *settled]
    used = [i for i, content in enumerate(contents) if content.products]
    if not used:
        raise _nothing_left(folder, matrices, contents, findings)
    clues = [_clues(candidates[i], states[i], contents[i]) for i in used]
    segments = find_segments(clues)
    checkpoints = [
        _checkpoint(folder, candidates[i], contents[i], segment)
        for i, segment in zip(used, segments.numbers, strict=True)
    ]
    findings += [
        *segments.findings,
        *_duplicate_findings([contents[i] for i in used], checkpoints),
        *_missing_findings(checkpoints),
        *_rank_findings(checkpoints),
        *_size_findings(checkpoints),
        Finding("OD117", _NAMES),
    ]
    at_start = None
    if start is not None:
        sources = {name: source for i in used for name, source in contents[i].sources.items()}
        transposed = _transposed([contents[i] for i in used])
        at_start, lacking = base_checkpoint(start, every_shape(checkpoints), transposed, sources)
        findings += lacking
    moved = {name: method for i in used for name, method in contents[i].moved.items()}
    findings += start_findings(checkpoints, at_start, moved)
    if not has_updates(checkpoints, at_start):
        raise _nothing_left(folder, matrices, contents, findings)
    log = merged_log(segments.numbers, clues)
    return Trajectory(folder, tuple(checkpoints), log, tuple(_merged(findings)), at_start)


def _without_auxiliary(found: RunFolder) -> RunFolder:
    """Without folders that hold the start or a conversion of an adapter beside it."""
    root = None if found.root is None else without_auxiliary(found.root)
    return replace(found, numbered=[without_auxiliary(one) for one in found.numbered], root=root)


def _watch(matrices: str | None) -> Callable[[str], bool]:
    if matrices is None:
        return lambda name: True
    try:
        pattern = re.compile(matrices)
    except re.error as error:
        raise ValueError(
            f"matrices={matrices!r} is not a regular expression ({error}). Escape it, or leave it out."
        ) from error
    return lambda name: pattern.search(name) is not None


def _adapter_names(candidates: Iterable[Candidate]) -> list[str]:
    names = {adapter.name for candidate in candidates for adapter in candidate.adapters if adapter.weights is not None}
    return sorted(names, key=lambda name: (name != DEFAULT, natural_order(name))) or [DEFAULT]


def _states(run: Path, candidates: Sequence[Candidate]) -> tuple[list[TrainingState | None], list[Finding]]:
    states: list[TrainingState | None] = []
    findings: list[Finding] = []
    for candidate in candidates:
        state = None
        if candidate.state is not None:
            file = shown_path(candidate.state, run)
            try:
                state = read_training_state(candidate.state)
            except UnreadableFile as error:
                findings.append(error.to_finding(file, candidate.step))
            if state is not None and state.step is not None and state.step != candidate.step:
                message = f"Its global_step is {state.step}, its folder says {candidate.step}; the folder was believed."
                findings.append(Finding("OD119", message, "Rename the folder.", file=file, step=candidate.step))
        states.append(state)
    return states, findings


def _with_root(
    found: RunFolder,
    reader: Reader,
    candidates: list[Candidate],
    contents: list[Content],
    states: list[TrainingState | None],
) -> tuple[list[Candidate], list[Content], list[TrainingState | None], list[Finding]]:
    """Adds the adapter saved beside numbered checkpoints, if it is a checkpoint of its own."""
    root = found.root
    if root is None or not found.numbered:
        return candidates, contents, states, []
    what = "adapter" if root.adapters else "model"
    message, remedy = f"{'An' if root.adapters else 'A'} {what} is saved beside the checkpoints; it is left out: ", ""
    content = reader.read(root)
    if {adapter.name for adapter in root.adapters} - set(reader.adapters):
        content = replace(content, products={})
    last = next((one for one in reversed(contents) if one.products), None)
    problems = tuple(finding for finding in content.findings if finding.code in ("OD126", "OD128"))
    (state,), _ = _states(reader.run, [root])
    if last is None and content.products:
        step = root.step if state is None or state.step is None else state.step
        note = Finding("OD110", f"The {what} saved beside the checkpoints is all that can be analysed.", step=step)
        return [replace(root, step=step)], [content], [state], [note, *(f for one in contents for f in one.findings)]
    if not content.products:
        message += "nothing of it could be analysed."
        problems = tuple(finding for finding in content.findings if finding.severity != "note")
    elif last is not None and _holds(last) != _holds(content):
        kinds = ("a whole model", "adapters") if _holds(last) == {"update"} else ("an adapter", "whole models")
        message += f"it is {kinds[0]}, the checkpoints are {kinds[1]}."
    elif last is not None and same_tensors(last.files, content.files):
        message += "it holds the same weights as the last checkpoint."
    else:
        taken = {candidate.step for candidate in candidates}
        if state is not None and state.step is not None and state.step not in taken:
            both = [*zip(candidates, contents, states, strict=True), (replace(root, step=state.step), content, state)]
            both.sort(key=lambda entry: entry[0].step)
            text = f"The {what} saved beside the checkpoints is step {state.step}, by its {STATE}."
            note = Finding("OD110", text, step=state.step)
            return [b[0] for b in both], [b[1] for b in both], [b[2] for b in both], [note]
        why = "its step is unknown" if state is None or state.step is None else f"step {state.step} has a checkpoint"
        message += f"{why}, and its weights differ from the last checkpoint's."
        remedy = "Analyse it on its own, or put it into a folder checkpoint-N."
    note = Finding("OD110", message, remedy, file=_root_file(root, reader.run))
    return candidates, contents, states, [note, *problems]


def _holds(content: Content) -> set[str]:
    """What the matrices are that an adapter or a model gives, those aside that were trained beside it."""
    holds = {product.shape.holds for product in content.products.values()}
    return {"update"} if "update" in holds else holds


def _root_file(root: Candidate, run: Path) -> str:
    adapter = root.adapters[0] if root.adapters else None
    weights = root.whole if adapter is None else adapter.weights or adapter.config
    return shown_path(weights, run) if weights is not None else ""


def _clues(candidate: Candidate, state: TrainingState | None, content: Content) -> Clues:
    sizes = {name: (product.shape.out, product.shape.in_) for name, product in content.products.items()}
    return Clues(candidate.step, state, content.ranks, sizes, content.settings)


def _checkpoint(run: Path, candidate: Candidate, content: Content, segment: int) -> Checkpoint:
    inputs = tuple(
        {"path": shown_path(part.path, run), "bytes": part.bytes, "header_sha256": part.header_sha256}
        for file in content.files.values()
        for part in file.parts
    )
    shapes = {name: product.shape for name, product in content.products.items()}
    return Checkpoint(candidate.step, candidate.folder, segment, shapes, content.open, content.findings, inputs)


def _transposed(contents: Sequence[Content]) -> set[str]:
    """Matrices of adapters that say that their base stores (in, out)."""
    turned = [one for one in contents if any(each.get("fan_in_fan_out") for each in one.settings.values())]
    return {name for content in turned for name in content.products}


def _nothing_left(run: Path, matrices: str | None, contents: Sequence[Content], findings: Sequence[Finding]) -> NotARun:
    known = sorted({name for content in contents for name in content.ranks}, key=natural_order)
    if matrices is not None and known and worst_severity(findings) != "error":
        return NotARun(f"matrices={matrices!r} is found in none of the {len(known)} matrices ({some(known)}).")
    problems = [finding for finding in findings if finding.severity != "note"]
    count = f"{len(problems)} problems were found" if len(problems) != 1 else "one problem was found"
    first = f"; the first: {problems[0]}" if problems else "."
    return NotARun(f"Nothing in {str(run)!r} could be analysed: {count}{first}", _merged(findings))


def _duplicate_findings(contents: Sequence[Content], checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    return [
        Finding(
            "OD114",
            f"Steps {checkpoints[earlier].step} and {checkpoints[later].step} hold the same weights, bit by bit.",
            "Check whether training really went on between them.",
            step=checkpoints[later].step,
            evidence={"steps": [checkpoints[earlier].step, checkpoints[later].step]},
        )
        for earlier, later in duplicates([content.files for content in contents])
    ]


def _missing_findings(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Matrices that only some checkpoints of their training have, grouped by the steps they are missing from."""
    findings = []
    for segment in sorted({checkpoint.segment for checkpoint in checkpoints}):
        own = [checkpoint for checkpoint in checkpoints if checkpoint.segment == segment]
        counts = Counter(name for checkpoint in own for name in checkpoint.shapes)
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in (name for name, count in counts.items() if count < len(own)):
            groups[tuple(one.step for one in own if name not in one.shapes)].append(name)
        for steps, names in groups.items():
            message = (
                f"{some(names)}: not in every checkpoint, missing at {_steps(steps)}. An increment is formed only "
                "where the previous checkpoint of the same training has the matrix too."
            )
            remedy = "Check that these checkpoints are of one training, with one choice of matrices."
            evidence = {"matrices": names, "missing_at": list(steps)}
            matrix = names[0] if len(names) == 1 else ""
            findings.append(Finding("OD115", message, remedy, matrix=matrix, evidence=evidence))
    return findings


def _rank_findings(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Matrices whose rank changes between checkpoints, grouped by how it changes."""
    groups: dict[tuple[tuple[int, int], ...], list[str]] = defaultdict(list)
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.shapes)
    for name in names:
        ranks = [(one.step, one.shapes[name].rank) for one in checkpoints if name in one.shapes]
        changes = [pair for i, pair in enumerate(ranks) if i == 0 or pair[1] != ranks[i - 1][1]]
        if len(changes) > 1:
            groups[tuple(changes)].append(name)
    return [
        Finding(
            "OD116",
            f"{some(members)}: the rank changes, {', '.join(f'{rank} from step {step}' for step, rank in changes)}.",
            "Check that these checkpoints are of one training.",
            matrix=members[0] if len(members) == 1 else "",
            step=changes[1][0],
            evidence={"matrices": members, "ranks": {str(step): rank for step, rank in changes}},
        )
        for changes, members in groups.items()
    ]


def _size_findings(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Matrices whose size changes within one training: no difference of them can be formed."""
    findings = []
    last: dict[tuple[int, str], tuple[int, tuple[int, int]]] = {}
    for checkpoint in checkpoints:
        for name, shape in checkpoint.shapes.items():
            size = (shape.out, shape.in_)
            step, before = last.get((checkpoint.segment, name), (checkpoint.step, size))
            if size != before:
                message = f"Its size is {before} at step {step} and {size} at step {checkpoint.step}."
                remedy = "Check that these checkpoints are of one training."
                findings.append(Finding("OD104", message, remedy, matrix=name, step=checkpoint.step))
            last[checkpoint.segment, name] = (checkpoint.step, size)
    return findings


def _steps(steps: Sequence[int]) -> str:
    return f"step{'s' if len(steps) > 1 else ''} {some(map(str, steps), 5)}"


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """Findings, each note that is the same for several checkpoints once, with its steps as evidence.

    So is the warning of weights beside the adapter, which every checkpoint of a training has.
    """
    kept: dict[object, Finding] = {}
    for finding in findings:
        is_shared = finding.severity == "note" or finding.code == "OD128"
        key: object = (finding.code, finding.message, finding.matrix) if is_shared else len(kept)
        first = kept.get(key)
        if first is None:
            kept[key] = finding
        else:
            steps = [*first.evidence.get("steps", [first.step]), finding.step]
            kept[key] = replace(first, evidence={**first.evidence, "steps": steps})
    return list(kept.values())
