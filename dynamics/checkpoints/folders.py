"""Find the checkpoints in a run folder, whatever the trainer calls them, and order them by step."""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynamics.checkpoints.candidates import (
    STATE,
    CheckpointFolder,
    candidate,
    entries,
    holds_adapter,
    holds_weights,
    is_state_folder,
    of_file,
)
from dynamics.checkpoints.errors import NotARun, UnreadableFile
from dynamics.checkpoints.formats import diffusers
from dynamics.checkpoints.formats.mlx import ADAPTERS
from dynamics.checkpoints.formats.peft import WEIGHTS
from dynamics.checkpoints.formats.peft_config import CONFIG
from dynamics.checkpoints.formats.transformers import lone_shards, whole_model
from dynamics.checkpoints.formats.unread import remedy_for, unread_format
from dynamics.checkpoints.names import natural_order, shown, shown_path
from dynamics.checkpoints.series import Series, find_series
from dynamics.checkpoints.steps import LARGEST_STEP, NamedStep, is_plain_step, named_step
from dynamics.checkpoints.trainings import read_training_state
from dynamics.findings import Finding
from dynamics.text import counted, first_line, some

#: The Trainer's names; they win over other names in the same folder.
_TRAINER = "checkpoint-N"
_UNFINISHED = re.compile(r"tmp-checkpoint-[0-9]+|tmp\.checkpoint_[0-9]+")
_LOOKED_FOR = f"checkpoint-*/ or {CONFIG} with {WEIGHTS[0]} or {WEIGHTS[1]}, or model.safetensors[.index.json]"
_REMEDY = "Pass a Trainer output folder, or one checkpoint."
#: Seconds that writing a checkpoint may take.
_LATELY = 3600
#: How deep below the run the folders of its steps may lie: ``model/version/checkpoint-10``.
_DEEPEST = 2
#: Names of folders of checkpoints that may stand beside the last weights, and names of the folder of the last weights.
_OF_CHECKPOINTS = re.compile(r"checkpoints?|ckpts?|saves?|steps?|epochs?|weights", re.IGNORECASE)
_OF_THE_END = re.compile(r"(.*[-_])?(final|last|latest|best|merged|export(ed)?|hf)([-_].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class RunFolder:
    """The checkpoints in a run folder.

    Args:
        numbered: Folders or files with a step in their names, one for each step, ascending.
        root: The folder itself, if it holds an adapter, or a whole model while no checkpoint holds an adapter.
        findings: Findings about the folders, those left out included.
    """

    numbered: Sequence[CheckpointFolder]
    root: CheckpointFolder | None
    findings: Sequence[Finding]


def find_checkpoints(run: Path) -> RunFolder:
    """Return the checkpoints in a run folder.

    Only names are read, the step of a single adapter, and headers of adapter files that PEFT did not write.

    Args:
        run: The folder.

    Raises:
        NotARun: If the folder does not exist, is empty, or holds neither checkpoints nor weights.
    """
    top, names, findings = _folder_of_steps(run, _entries_of_run(run))
    numbered, problems = _numbered(run, top, names)
    findings += problems
    for name in names:
        if _UNFINISHED.fullmatch(name):
            message = "This checkpoint is still being written, or was never finished; it is left out."
            file = shown_path(top / name, run)
            findings.append(Finding("OD118", message, "Analyse the run again when it is saved.", file=file))
    step = _step_of_run(top)
    if step is not None and holds_weights(top, names):
        # DeepSpeed's checkpoint-10/global_step10
        numbered = [checkpoint for checkpoint in numbered if checkpoint.holds_weights]
    has_weights = any(checkpoint.holds_weights for checkpoint in numbered)
    series = Series() if has_weights or is_plain_step(top.name) else _files(top, names)
    numbered += [_of_series(top, number, path, names) for number, path in series.numbered.items()]
    findings += series.findings
    root = None
    final_step = _state_step(top) if step is None else step
    if series.final is not None:
        root = _of_series(top, final_step, series.final, names)
    elif series.numbered:
        pass  # the folder's own configuration belongs to its files
    elif holds_weights(top, names) or (CONFIG in names and not has_weights):
        root = candidate(top, final_step, names, is_run=has_weights or step is None)
    elif not numbered and step is not None:
        checkpoint = candidate(top, step, names)  # perhaps with named adapters, or without weights
        root = checkpoint if checkpoint.holds_weights or checkpoint.adapters or checkpoint.state else None
    if not numbered and root is None:
        raise NotARun(*_nothing(run, names, findings))
    if has_weights:
        findings += _at_the_end(run, top, names)
    return RunFolder(_with_config(numbered, top, names), root, findings)


def _folder_of_steps(run: Path, names: list[str]) -> tuple[Path, list[str], list[Finding]]:
    """Return the folder whose subfolders are the steps: the run, or the one folder below it that holds all steps."""
    if any(_steps_in(run, names)):
        return run, names, []
    has_weights = holds_weights(run, names)
    folders = [path for path in _below(run, _DEEPEST) if not has_weights or _OF_CHECKPOINTS.fullmatch(path.name)]
    beside = [name for name in names if not _OF_THE_END.fullmatch(name) and _holds_below(run / name)]
    if len(folders) != 1 or (not has_weights and beside):
        return run, names, []
    top = folders[0]
    message = f"The checkpoints are read from {shown_path(top, run)}/."
    findings = [Finding("OD125", message), *_at_the_end(run, run, names)]
    if has_weights:
        message = f"Other weights in the run's folder are left out: {shown(_name_of_weights(run, names))}."
        remedy = "To analyse them, put them into a folder of their own."
        findings.append(Finding("OD126", message, remedy))
    return top, entries(top), findings


def _name_of_weights(run: Path, names: Sequence[str]) -> str:
    content = candidate(run, 0, names, is_run=True)
    path = content.whole or next(adapter.weights for adapter in content.adapters if adapter.weights is not None)
    return path.relative_to(run).as_posix()


def _holds_below(folder: Path) -> bool:
    return folder.is_dir() and holds_adapter(entries(folder))


def _below(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the folders below one that hold folders of steps, without following links."""
    for name in entries(folder):
        inner = folder / name
        if is_state_folder(name) or inner.is_symlink() or not inner.is_dir():
            continue
        names = entries(inner)
        if any(_steps_in(inner, names)):
            yield inner
        elif depth > 1:
            yield from _below(inner, depth - 1)


def _steps_in(folder: Path, names: Sequence[str]) -> Iterator[tuple[NamedStep, str]]:
    """Yield the folders of steps, and anything else with the Trainer's name of a checkpoint."""
    for name in names:
        step = named_step(name, folder.name)
        if step is None or _UNFINISHED.fullmatch(name) or is_state_folder(name):
            continue
        if (folder / name).is_dir() or (step.template == _TRAINER and "." not in name):
            yield step, name


def _step_of_run(run: Path) -> int | None:
    """Return the step in the folder's name, or in the name of a folder just above it; a link's own name wins."""
    absolute = Path(os.path.abspath(run))
    paths = [absolute, run.resolve(), *absolute.parents[:_DEEPEST]]
    steps = (named_step(path.name, path.parent.name) for path in paths)
    return next((step.number for step in steps if step is not None and step.is_plain), None)


def _entries_of_run(run: Path) -> list[str]:
    if not run.exists():
        dangling = f" It is a link to {os.readlink(run)!r}, which does not exist." if run.is_symlink() else ""
        raise NotARun(f"No such folder: {str(run)!r}.{dangling} {_REMEDY}")
    if not run.is_dir():
        raise NotARun(f"{str(run)!r} is a file, not a run folder. Pass its folder.")
    try:
        names = sorted(os.listdir(run), key=natural_order)
    except OSError as error:
        raise NotARun(f"{str(run)!r} cannot be read: {first_line(error)}. Make it readable (chmod u+rx).") from error
    if not names:
        raise NotARun(f"{str(run)!r} is empty (looked for {_LOOKED_FOR}). {_REMEDY}")
    return names


def _numbered(run: Path, top: Path, names: Sequence[str]) -> tuple[list[CheckpointFolder], list[Finding]]:
    """Return the checkpoints in a folder of steps, all of one training, and the findings."""
    trainings: dict[str, list[tuple[NamedStep, str]]] = defaultdict(list)
    for step, name in _steps_in(top, names):
        trainings[step.template].append((step, name))
    content = {template: _candidates(run, top, steps) for template, steps in trainings.items()}
    filled = [
        template
        for template, (checkpoints, _) in content.items()
        if any(checkpoint.holds_weights for checkpoint in checkpoints)
    ]
    plain = [template for template in filled or content if trainings[template][0][0].is_plain]
    if not plain and len(filled) > 1:
        stems = some([shown(template) for template in sorted(filled, key=natural_order)])
        raise NotARun(
            f"{str(top)!r} holds checkpoints of {len(filled)} trainings, going by their names: {stems}. "
            "Put the folders of each training into a folder of their own."
        )
    choice = plain or filled
    if not choice:
        return [], []
    template = min(
        choice,
        key=lambda template: (
            template != _TRAINER,
            trainings[template][0][0].is_epoch,
            -len(trainings[template]),
            template,
        ),
    )
    checkpoints, findings = content[template]
    if trainings[template][0][0].is_epoch:
        text = f"Steps are the epochs in the folder names ({shown(template)}, where N is the epoch)."
        findings.append(Finding("OD121", text))
    left_out = [shown(name) for other in filled if other != template for _, name in trainings[other]]
    if left_out:
        message = f"The checkpoints of this run are named {shown(template)}. Left out: {some(left_out)}."
        remedy = "To analyse them, put them into a folder of their own."
        findings.append(Finding("OD126", message, remedy, file=left_out[0], evidence={"folders": left_out}))
    return checkpoints, findings


def _candidates(
    run: Path, top: Path, steps: Sequence[tuple[NamedStep, str]]
) -> tuple[list[CheckpointFolder], list[Finding]]:
    """Return the checkpoints in the folders of one training, one for each step, ascending."""
    findings: list[Finding] = []
    folders: dict[int, str] = {}
    # Of several names for one step the shortest, canonical one comes first.
    for named, name in sorted(steps, key=lambda pair: len(pair[1])):
        step, file = named.number, shown_path(top / name, run)
        if step > LARGEST_STEP:
            message = "Its step does not fit into 64 bits; it is left out."
            findings.append(Finding("OD106", message, "Rename the folder.", file=file))
        elif step in folders:
            message = f"{shown(folders[step])} is the same step; this folder is left out."
            findings.append(Finding("OD111", message, "Remove one of the two.", file=file, step=step))
        else:
            folders[step] = name
    candidates: list[CheckpointFolder] = []
    for step, name in sorted(folders.items()):
        folder = top / name
        problem = _not_a_folder(folder)
        if problem is None:
            try:
                candidates.append(candidate(folder, step, sorted(os.listdir(folder), key=natural_order)))
                continue
            except OSError as error:
                problem = f"The folder cannot be read: {first_line(error)}."
        file = shown_path(folder, run)
        findings.append(Finding("OD106", problem, "Restore the checkpoint, or remove it.", file=file, step=step))
    return candidates, findings


def _with_config(numbered: Sequence[CheckpointFolder], top: Path, names: Sequence[str]) -> list[CheckpointFolder]:
    """Return checkpoints with the configuration beside them if they have none: some trainers save it once."""
    if CONFIG not in names or any(
        checkpoint.config or any(adapter.config for adapter in checkpoint.adapters) for checkpoint in numbered
    ):
        return list(numbered)
    config = top / CONFIG
    return [
        replace(
            checkpoint,
            config=config,
            adapters=tuple(replace(adapter, config=config) for adapter in checkpoint.adapters),
        )
        for checkpoint in numbered
    ]


def _at_the_end(run: Path, top: Path, names: Sequence[str]) -> Iterator[Finding]:
    """Yield a finding about folders of weights beside the checkpoints, such as ``final/``."""
    folders = [
        shown_path(top / name, run) for name in names if not named_step(name, top.name) and _weights_below(top / name)
    ]
    if folders:
        message = f"Other weights beside the checkpoints are left out: {some(folders)}."
        remedy = "To analyse them, pass their folder, or rename it to checkpoint-N."
        yield Finding("OD126", message, remedy, file=folders[0], evidence={"folders": folders})


def _weights_below(folder: Path) -> bool:
    if is_state_folder(folder.name) or folder.is_symlink() or not folder.is_dir():
        return False
    inside = entries(folder)
    return STATE not in inside and not any(map(is_plain_step, inside)) and holds_weights(folder, inside)


def _not_a_folder(folder: Path) -> str | None:
    if folder.is_symlink() and not folder.exists():
        return f"It is a link to {os.readlink(folder)!r}, which does not exist."
    return None if folder.is_dir() else "It is a file, not a folder."


def is_unfinished(checkpoint: CheckpointFolder, numbered: Sequence[CheckpointFolder]) -> bool:
    """Return whether a checkpoint may still be being written.

    Only the last one may: if it changed lately and lacks the training state, which trainers write last, although other
    checkpoints have one.

    Args:
        checkpoint: A checkpoint.
        numbered: All checkpoints of the run.
    """
    if not numbered or checkpoint is not numbered[-1] or checkpoint.state is not None:
        return False
    if len(numbered) > 1 and not any(earlier.state for earlier in numbered):
        return False
    try:
        return time.time() - checkpoint.folder.stat().st_mtime < _LATELY
    except OSError:
        return False


def _files(run: Path, names: Sequence[str]) -> Series:
    """Return the adapter files that PEFT did not write, none if there are files of PEFT or of a whole model."""
    if not {*WEIGHTS}.isdisjoint(names) or whole_model(run, names):
        return Series()
    return find_series(run, [name for name in names if name not in lone_shards(names)])


def _of_series(folder: Path, step: int, path: Path, names: Sequence[str]) -> CheckpointFolder:
    return of_file(folder, step, path, names, has_state=path.name in (ADAPTERS, diffusers.FILE))


def _state_step(folder: Path) -> int:
    try:
        return read_training_state(folder / STATE).step or 0
    except UnreadableFile:  # absent, or reported where the log is read
        return 0


def other_weights(folder: Path, run: Path, step: int | None = None) -> list[Finding]:
    """Return findings about weights in a folder that are not read: their format, and how to make them readable.

    Args:
        folder: A checkpoint, or a run without checkpoints.
        run: The run's folder.
        step: The step, if the folder is a checkpoint.
    """
    findings = []
    if shards := lone_shards(entries(folder)):
        message = f"The index of this shard is missing ({counted(len(shards), 'shard')} in the folder)."
        remedy = "Copy the index (….index.json) into the folder of its shards."
        findings.append(Finding("OD106", message, remedy, file=shown_path(folder / shards[0], run), step=step))
    if (unread := unread_format(folder)) is not None:
        path, form = unread
        remedy = remedy_for(form.remedy, path, run, step)
        message = f"It is {form.title}; this format is not read."
        findings.append(Finding("OD127", message, remedy, file=shown_path(path, run), step=step))
    return findings


def _nothing(run: Path, names: Sequence[str], findings: Sequence[Finding]) -> tuple[str, list[Finding]]:
    """Return the message and the findings for a folder in which nothing can be analysed."""
    problems = [*findings, *other_weights(run, run)]
    subfolders = {name: entries(run / name) for name in names if (run / name).is_dir()}
    runs = [shown_path(path, run) for path in _below(run, _DEEPEST + 1)]
    adapters = [shown(name) for name, inside in subfolders.items() if holds_adapter(inside)]
    models = [
        shown(name)
        for name, inside in subfolders.items()
        if not holds_adapter(inside) and holds_weights(run / name, inside)
    ]
    remedy = _REMEDY
    if runs:
        remedy = f"Pass one of the runs inside it: {some(sorted({*runs, *adapters}, key=natural_order))}."
    elif len(adapters) == 1:
        remedy = f"An adapter is in its subfolder {adapters[0]}. Pass that subfolder."
    elif adapters:
        remedy = f"Adapters are in its subfolders {some(adapters)}. Pass one of them."
    elif models:
        remedy = f"Weights are in its subfolders {some(models)}. Pass one of them."
    elif problems:
        remedy = str(problems[0])
    return f"No checkpoints in {str(run)!r} (looked for {_LOOKED_FOR}). {remedy}", problems
