"""Open a run folder as a ``Trajectory``: find its checkpoints, read their headers, assign them to trainings."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from dynamics.checkpoints.base import base_checkpoint, every_shape, has_updates, open_base, start_findings
from dynamics.checkpoints.candidates import DEFAULT, STATE, CheckpointFolder
from dynamics.checkpoints.checkpoint import CheckpointContent, CheckpointReader
from dynamics.checkpoints.common_names import with_common_names
from dynamics.checkpoints.duplicates import duplicates, same_tensors
from dynamics.checkpoints.errors import NotARun, UnreadableFile
from dynamics.checkpoints.folders import RunFolder, find_checkpoints, is_unfinished
from dynamics.checkpoints.initial_adapters import initial_adapters, without_auxiliary
from dynamics.checkpoints.names import natural_order, shown_path
from dynamics.checkpoints.trainings import Clues, TrainingState, find_segments, merged_log, read_training_state
from dynamics.checkpoints.trajectory import Checkpoint, Trajectory, by_training
from dynamics.findings import Finding, worst_severity
from dynamics.text import counted, some

_ONE_TRAINING = "Check that these checkpoints belong to one training."
_NAMES = "Names come from the checkpoint files and may differ from those in your code."


def open_trajectory(
    run: str | PathLike[str], matrices: str | None = None, base: str | PathLike[str] | None = None
) -> Trajectory:
    """Open a run of LoRA adapters or of whole models; read headers and configurations, but no weights.

    A file that cannot be read, or a matrix that is neither a dense weight nor a product of factors, becomes a finding
    of the trajectory; the rest is read. ``with checkpoint.open() as matrices`` gives the matrices themselves.

    Args:
        run: A Trainer output folder with ``checkpoint-N/``, or one checkpoint or adapter folder.
        matrices: Only matrices whose name matches this regular expression (``re.search``).
        base: Folder with the weights before training. Totals of dense weights are counted from it, without it from the
            run's first checkpoint; modules saved with an adapter, and DoRA, are analysed only with it.

    Raises:
        NotARun: If nothing can be analysed, or the base cannot be read; its ``findings`` give the reason for each file.
        ValueError: If ``matrices`` is not a regular expression.

    Example::

        trajectory = open_trajectory("runs/imax", matrices=r"layers\\.0\\.")
        for checkpoint in trajectory.checkpoints:
            with checkpoint.open() as opened:
                print(checkpoint.step, {name: matrix.shape for name, matrix in opened.items()})
    """
    folder = Path(run)
    watch = _watch(matrices)
    run_folder = _without_auxiliary(find_checkpoints(folder))
    numbered = run_folder.numbered or [root for root in (run_folder.root,) if root is not None]
    names = _adapter_names(numbered)
    start = None if base is None else open_base(base)
    reader = CheckpointReader(folder, names, watch, start, initial_adapters(folder))
    contents = [
        reader.read(checkpoint, latest=is_unfinished(checkpoint, run_folder.numbered)) for checkpoint in numbered
    ]
    states, findings = _states(folder, numbered)
    candidates, contents, states, notes = _with_root(run_folder, reader, list(numbered), contents, states)
    contents, naming = with_common_names(contents, [candidate.step for candidate in candidates], names, start)
    findings = [
        *run_folder.findings,
        *findings,
        *notes,
        *(finding for content in contents for finding in content.findings),
        *naming,
    ]
    used = [i for i, content in enumerate(contents) if content.matrices]
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


def _without_auxiliary(run_folder: RunFolder) -> RunFolder:
    """Return the run folder without folders that hold the start or a conversion of an adapter."""
    root = None if run_folder.root is None else without_auxiliary(run_folder.root)
    return replace(run_folder, numbered=[without_auxiliary(folder) for folder in run_folder.numbered], root=root)


def _watch(matrices: str | None) -> Callable[[str], bool]:
    """Return whether a matrix is wanted, as a function of its name."""
    if matrices is None:
        return lambda name: True
    try:
        pattern = re.compile(matrices)
    except re.error as error:
        raise ValueError(
            f"matrices={matrices!r} is not a regular expression ({error}). Escape it, or leave it out."
        ) from error
    return lambda name: pattern.search(name) is not None


def _adapter_names(candidates: Iterable[CheckpointFolder]) -> list[str]:
    """Return the names of all adapters of a run, the default one first."""
    names = {adapter.name for candidate in candidates for adapter in candidate.adapters if adapter.weights is not None}
    return sorted(names, key=lambda name: (name != DEFAULT, natural_order(name))) or [DEFAULT]


def _states(run: Path, candidates: Sequence[CheckpointFolder]) -> tuple[list[TrainingState | None], list[Finding]]:
    """Read the training state of each checkpoint that has one."""
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
                message = f"Its global_step is {state.step}, its folder says {candidate.step}; using the folder's step."
                findings.append(Finding("OD119", message, "Rename the folder.", file=file, step=candidate.step))
        states.append(state)
    return states, findings


def _with_root(
    run_folder: RunFolder,
    reader: CheckpointReader,
    candidates: list[CheckpointFolder],
    contents: list[CheckpointContent],
    states: list[TrainingState | None],
) -> tuple[list[CheckpointFolder], list[CheckpointContent], list[TrainingState | None], list[Finding]]:
    """Return the checkpoints with the adapter or model saved beside them, if it is a further checkpoint."""
    root = run_folder.root
    if root is None or not run_folder.numbered:
        return candidates, contents, states, []
    kind = "adapter" if root.adapters else "model"
    message, remedy = f"The {kind} saved beside the checkpoints is left out: ", ""
    content = reader.read(root)
    if {adapter.name for adapter in root.adapters} - set(reader.adapters):
        content = replace(content, matrices={})
    last = next((earlier for earlier in reversed(contents) if earlier.matrices), None)
    problems = tuple(finding for finding in content.findings if finding.code in ("OD126", "OD128"))
    (state,), _ = _states(reader.run, [root])
    if last is None and content.matrices:
        step = root.step if state is None or state.step is None else state.step
        note = Finding("OD110", f"Only the {kind} saved beside the checkpoints can be analysed.", step=step)
        problems = [finding for earlier in contents for finding in earlier.findings]
        return [replace(root, step=step)], [content], [state], [note, *problems]
    if not content.matrices:
        message += "none of its matrices can be analysed."
        problems = tuple(finding for finding in content.findings if finding.severity != "note")
    elif last is not None and _holds(last) != _holds(content):
        kinds = ("a whole model", "adapters") if _holds(last) == {"update"} else ("an adapter", "whole models")
        message += f"it is {kinds[0]}, the checkpoints are {kinds[1]}."
    elif last is not None and same_tensors(last.files, content.files):
        message += "it holds the same weights as the last checkpoint."
    else:
        taken = {candidate.step for candidate in candidates}
        if state is not None and state.step is not None and state.step not in taken:
            position = sum(step < state.step for step in taken)
            candidates.insert(position, replace(root, step=state.step))
            contents.insert(position, content)
            states.insert(position, state)
            text = f"The {kind} saved beside the checkpoints is step {state.step}, by its {STATE}."
            return candidates, contents, states, [Finding("OD110", text, step=state.step)]
        why = "its step is unknown" if state is None or state.step is None else f"step {state.step} has a checkpoint"
        message += f"{why}, and its weights differ from those of the last checkpoint."
        remedy = "Analyse it alone, or put it into a folder checkpoint-N."
    note = Finding("OD110", message, remedy, file=_root_file(root, reader.run))
    return candidates, contents, states, [note, *problems]


def _holds(content: CheckpointContent) -> set[str]:
    """Return what the matrices of a checkpoint are, without the modules trained beside an adapter."""
    holds = {matrix.shape.holds for matrix in content.matrices.values()}
    return {"update"} if "update" in holds else holds


def _root_file(root: CheckpointFolder, run: Path) -> str:
    adapter = root.adapters[0] if root.adapters else None
    weights = root.whole if adapter is None else adapter.weights or adapter.config
    return shown_path(weights, run) if weights is not None else ""


def _clues(candidate: CheckpointFolder, state: TrainingState | None, content: CheckpointContent) -> Clues:
    sizes = {name: (matrix.shape.out, matrix.shape.in_) for name, matrix in content.matrices.items()}
    return Clues(candidate.step, state, content.ranks, sizes, content.settings)


def _checkpoint(run: Path, candidate: CheckpointFolder, content: CheckpointContent, segment: int) -> Checkpoint:
    inputs = tuple(
        {"path": shown_path(part.path, run), "bytes": part.bytes, "header_sha256": part.header_sha256}
        for file in content.files.values()
        for part in file.parts
    )
    shapes = {name: matrix.shape for name, matrix in content.matrices.items()}
    return Checkpoint(candidate.step, candidate.folder, segment, shapes, content.open, content.findings, inputs)


def _transposed(contents: Sequence[CheckpointContent]) -> set[str]:
    """Return the matrices of adapters whose configuration says that the base stores (in, out)."""
    return {
        name
        for content in contents
        if any(settings.get("fan_in_fan_out") for settings in content.settings.values())
        for name in content.matrices
    }


def _nothing_left(
    run: Path, matrices: str | None, contents: Sequence[CheckpointContent], findings: Sequence[Finding]
) -> NotARun:
    names = sorted({name for content in contents for name in content.ranks}, key=natural_order)
    if matrices is not None and names and worst_severity(findings) != "error":
        listing = f"{counted(len(names), 'matrix', 'matrices')} ({some(names)})"
        return NotARun(f"matrices={matrices!r} matches none of {listing}. Correct it, or leave it out.")
    problems = [finding for finding in findings if finding.severity != "note"]
    first = f"; the first: {problems[0]}" if problems else "."
    return NotARun(
        f"Nothing in {str(run)!r} can be analysed: {counted(len(problems), 'problem')}{first}", _merged(findings)
    )


def _duplicate_findings(contents: Sequence[CheckpointContent], checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    findings = []
    for earlier, later in duplicates([content.files for content in contents]):
        steps = [checkpoints[earlier].step, checkpoints[later].step]
        message = f"Steps {steps[0]} and {steps[1]} hold the same weights, bit by bit."
        remedy = "Check whether training went on between them."
        findings.append(Finding("OD114", message, remedy, step=steps[1], evidence={"steps": steps}))
    return findings


def _missing_findings(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Return findings about matrices that some checkpoints of their training lack, one for each set of steps."""
    findings = []
    for training in by_training(checkpoints):
        counts = Counter(name for checkpoint in training for name in checkpoint.shapes)
        groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
        for name in (name for name, count in counts.items() if count < len(training)):
            groups[tuple(checkpoint.step for checkpoint in training if name not in checkpoint.shapes)].append(name)
        for steps, names in groups.items():
            message = (
                f"Missing at step{'s' if len(steps) > 1 else ''} {some(map(str, steps), 5)}: {some(names)}. Increments "
                "need the matrix in two consecutive checkpoints of one training."
            )
            remedy = "Check that these checkpoints belong to one training with one choice of matrices."
            evidence = {"matrices": names, "missing_at": list(steps)}
            matrix = names[0] if len(names) == 1 else ""
            findings.append(Finding("OD115", message, remedy, matrix=matrix, evidence=evidence))
    return findings


def _rank_findings(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Return findings about matrices whose rank changes between checkpoints, one for each sequence of ranks."""
    groups: dict[tuple[tuple[int, int], ...], list[str]] = defaultdict(list)
    names = dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.shapes)
    for name in names:
        ranks = [
            (checkpoint.step, checkpoint.shapes[name].rank) for checkpoint in checkpoints if name in checkpoint.shapes
        ]
        changes = [pair for i, pair in enumerate(ranks) if i == 0 or pair[1] != ranks[i - 1][1]]
        if len(changes) > 1:
            groups[tuple(changes)].append(name)
    findings = []
    for changes, members in groups.items():
        listing = ", ".join(f"{rank} from step {step}" for step, rank in changes)
        message = f"The rank changes ({listing}): {some(members)}."
        matrix = members[0] if len(members) == 1 else ""
        evidence = {"matrices": members, "ranks": {str(step): rank for step, rank in changes}}
        findings.append(Finding("OD116", message, _ONE_TRAINING, matrix=matrix, step=changes[1][0], evidence=evidence))
    return findings


def _size_findings(checkpoints: Sequence[Checkpoint]) -> list[Finding]:
    """Return findings about matrices whose size changes within one training: they have no difference."""
    findings = []
    last: dict[tuple[int, str], tuple[int, tuple[int, int]]] = {}
    for checkpoint in checkpoints:
        for name, shape in checkpoint.shapes.items():
            size = (shape.out, shape.in_)
            step, before = last.get((checkpoint.segment, name), (checkpoint.step, size))
            if size != before:
                message = f"Its size is {before} at step {step} and {size} at step {checkpoint.step}."
                findings.append(Finding("OD104", message, _ONE_TRAINING, matrix=name, step=checkpoint.step))
            last[checkpoint.segment, name] = (checkpoint.step, size)
    return findings


def _merged(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings with each note that several checkpoints share once, with its steps as evidence.

    The warning about weights beside the adapter is treated alike, since every checkpoint of a training has it.
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
