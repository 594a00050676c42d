"""Which folders of a run are checkpoints, in which order, and what each of them holds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dynamics.checkpoints.errors import NotARun, UnreadableFile, one_line
from dynamics.checkpoints.foreign import describe
from dynamics.checkpoints.mlx import ADAPTERS
from dynamics.checkpoints.names import natural_order, shown, shown_path, some
from dynamics.checkpoints.series import Series, find_series
from dynamics.checkpoints.training_state import read_training_state
from dynamics.checkpoints.weight_files import read_weight_file
from dynamics.checkpoints.whole_models import lone_shards, whole_model
from dynamics.findings import Finding

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # in PEFT's own order of preference
#: Where diffusers' training scripts save an adapter.
DIFFUSERS = "pytorch_lora_weights.safetensors"
CONFIG = "adapter_config.json"
STATE = "trainer_state.json"
#: The name PEFT gives an adapter that was given none; it is saved in the folder itself.
DEFAULT = "default"
_LARGEST_STEP = 2**63 - 1
_CHECKPOINT = re.compile(r"checkpoint-([0-9]+)")
_UNFINISHED = re.compile(r"tmp-checkpoint-[0-9]+")
_LOOKED_FOR = f"checkpoint-*/ or {CONFIG} with {WEIGHTS[0]} or {WEIGHTS[1]}, or model.safetensors[.index.json]"
_REMEDY = "Pass a Trainer output folder, or one checkpoint."


@dataclass(frozen=True)
class AdapterFolder:
    """One adapter: its name, its folder, and its two files where they are there."""

    name: str
    folder: Path
    weights: Path | None
    config: Path | None


@dataclass(frozen=True)
class Candidate:
    """A folder that may be a checkpoint.

    Args:
        step: Optimizer step.
        folder: The folder.
        adapters: The adapters in it.
        state: Its ``trainer_state.json``, if there.
        entries: Names of everything in it.
        whole: The file that holds, or names, the weights of a whole model; ``None`` if there is none, or adapters are.
    """

    step: int
    folder: Path
    adapters: tuple[AdapterFolder, ...]
    state: Path | None
    entries: tuple[str, ...]
    whole: Path | None = None

    @property
    def holds_weights(self) -> bool:
        """Whether there is an adapter or a whole model in it."""
        return bool(self.adapters) or self.whole is not None


@dataclass(frozen=True)
class RunFolder:
    """What lies in a run folder.

    Args:
        numbered: Folders ``checkpoint-N``, or files with numbers in their names, one a step, ascending.
        root: The folder itself, if it holds an adapter, or a whole model and no checkpoint holds an adapter.
        findings: Folders that were left out.
    """

    numbered: Sequence[Candidate]
    root: Candidate | None
    findings: Sequence[Finding]


def find_checkpoints(run: Path) -> RunFolder:
    """Looks for checkpoints in a run folder; reads nothing but names, the step of a lone adapter, and headers of files
    that are no PEFT adapter.

    Raises:
        NotARun: If the folder is not there, is empty, or holds neither checkpoints nor an adapter.
    """
    names = _entries_of_run(run)
    numbered, findings = _numbered(run, names)
    for name in names:
        if _UNFINISHED.fullmatch(name):
            message = "It is a checkpoint that is still being written, or was never finished; it is left out."
            findings.append(Finding("OD118", message, "Analyse the run again when it is saved.", file=name))
    root = None
    own = _own_step(run)
    series = Series() if numbered else _files(run, names)
    numbered += [_of_file(run, step, path, names) for step, path in series.numbered.items()]
    findings += series.findings
    if series.final is not None:
        root = _of_file(run, _state_step(run) if own is None else own, series.final, names)
    elif series.numbered:
        pass  # the folder's own configuration belongs to its files
    elif _holds_adapter(names) or (whole_model(run, names) and not any(one.adapters for one in numbered)):
        root = _candidate(run, _state_step(run) if own is None else own, names)
    elif not numbered and own is not None:
        lone = _candidate(run, own, names)  # one checkpoint, perhaps with named adapters or without weights
        root = lone if lone.adapters or lone.state else None
    if not numbered and root is None:
        raise NotARun(*_nothing(run, names, findings))
    return RunFolder(numbered, root, findings)


def _own_step(run: Path) -> int | None:
    """The step in the folder's name; of a link, its own name goes first."""
    names = (Path(os.path.abspath(run)).name, run.resolve().name)
    return next((int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))), None)


def _entries_of_run(run: Path) -> list[str]:
    if not run.exists():
        dangling = f" It is a link to {os.readlink(run)!r}, which is not there." if run.is_symlink() else ""
        raise NotARun(f"No such folder: {str(run)!r}.{dangling} {_REMEDY}")
    if not run.is_dir():
        raise NotARun(f"{str(run)!r} is a file, not a run folder. Pass the folder that holds it.")
    try:
        names = sorted(os.listdir(run), key=natural_order)
    except OSError as error:
        raise NotARun(f"{str(run)!r} cannot be read: {one_line(error)}. Give yourself read permission.") from error
    if not names:
        raise NotARun(f"{str(run)!r} is empty (looked for {_LOOKED_FOR}). {_REMEDY}")
    return names


def _numbered(run: Path, names: Sequence[str]) -> tuple[list[Candidate], list[Finding]]:
    findings: list[Finding] = []
    folders: dict[int, str] = {}
    # The canonical name comes first of those that give one step: it is the shortest.
    for name in sorted((name for name in names if _CHECKPOINT.fullmatch(name)), key=len):
        step = int(name.removeprefix("checkpoint-"))
        if step > _LARGEST_STEP:
            message = "Its step number does not fit into 64 bits; it is left out."
            findings.append(Finding("OD106", message, "Rename the folder.", file=name))
        elif step in folders:
            message = f"It is left out: {folders[step]} is the same step under its canonical name."
            findings.append(Finding("OD111", message, "Remove one of the two.", file=name, step=step))
        else:
            folders[step] = name
    candidates: list[Candidate] = []
    for step, name in sorted(folders.items()):
        folder = run / name
        problem = _not_a_folder(folder)
        if problem is None:
            try:
                candidates.append(_candidate(folder, step, sorted(os.listdir(folder), key=natural_order)))
                continue
            except OSError as error:
                problem = f"The folder cannot be read: {one_line(error)}."
        findings.append(Finding("OD106", problem, "Restore the checkpoint, or remove it.", file=name, step=step))
    return candidates, findings


def _not_a_folder(folder: Path) -> str | None:
    if folder.is_symlink() and not folder.exists():
        return f"It is a link to {os.readlink(folder)!r}, which is not there."
    return None if folder.is_dir() else "It is a file, not a folder."


def _candidate(folder: Path, step: int, names: Sequence[str]) -> Candidate:
    adapters = [_adapter(DEFAULT, folder, names)] if _holds_adapter(names) else []
    for name in names:  # PEFT saves every adapter but the default one in a subfolder of its name
        inner = folder / name
        if _CHECKPOINT.fullmatch(name) or not inner.is_dir():
            continue
        try:
            inside = os.listdir(inner)
        except OSError:
            continue  # no adapter is known to be in it; an adapter's own files are reported when they cannot be read
        # A folder with a training state or checkpoints of its own is another run, such as a copy of the best one.
        if _holds_adapter(inside) and STATE not in inside and not any(map(_CHECKPOINT.fullmatch, inside)):
            adapters.append(_adapter(name, inner, inside))
    if not adapters and DIFFUSERS in names:
        return _of_file(folder, step, folder / DIFFUSERS, names)
    state = folder / STATE if STATE in names else None
    whole = None if adapters else whole_model(folder, names)
    return Candidate(step, folder, tuple(adapters), state, tuple(names), folder / whole if whole else None)


def _files(run: Path, names: Sequence[str]) -> Series:
    """Adapter files that PEFT did not write; none where there are files that it, or a whole model, would have."""
    if not {*WEIGHTS}.isdisjoint(names) or whole_model(run, names):
        return Series()
    return find_series(run, [name for name in names if name not in lone_shards(names)])


def _of_file(folder: Path, step: int, path: Path, names: Sequence[str]) -> Candidate:
    """One adapter file as a checkpoint."""
    state = folder / STATE if STATE in names and path.name in (ADAPTERS, DIFFUSERS) else None
    config = folder / CONFIG if CONFIG in names else None
    return Candidate(step, folder, (AdapterFolder(DEFAULT, folder, path, config),), state, tuple(names))


def _adapter(name: str, folder: Path, names: Iterable[str]) -> AdapterFolder:
    names = set(names)
    weights = next((folder / file for file in WEIGHTS if file in names), None)
    return AdapterFolder(name, folder, weights, folder / CONFIG if CONFIG in names else None)


def _holds_adapter(names: Iterable[str]) -> bool:
    return not {CONFIG, *WEIGHTS}.isdisjoint(names)


def _state_step(folder: Path) -> int:
    try:
        return read_training_state(folder / STATE).step or 0
    except UnreadableFile:  # absent, or reported where the log is read
        return 0


def other_weights(folder: Path, names: Sequence[str], run: Path, step: int | None = None) -> list[Finding]:
    """Findings for weight files in a folder that are not PEFT adapters: what each of them is.

    Args:
        folder: The folder.
        names: Names of what is in it.
        run: The run's folder.
        step: The step, if the folder is a checkpoint.
    """
    findings = []
    if shards := lone_shards(names):
        message = f"It is a part of a whole model's weights ({len(shards)} are here), but their index is not there."
        remedy = "Copy the index (….index.json) beside its shards."
        findings.append(Finding("OD106", message, remedy, file=shown_path(folder / shards[0], run), step=step))
    for name in names:
        path = folder / name
        file = shown_path(path, run)
        remedy = "Pass a run of PEFT LoRA adapters, or of whole models."
        if name.endswith(".safetensors") and name not in (*WEIGHTS, *shards):
            try:
                keys = read_weight_file(path).tensors
            except UnreadableFile as error:
                findings.append(error.to_finding(file, step))
                continue
            what = describe(keys) or "a weight file without LoRA factors of PEFT"
            findings.append(Finding("OD103", f"It is {what}, which is not analysed.", remedy, file=file, step=step))
    return findings


def _nothing(run: Path, names: Sequence[str], findings: Sequence[Finding]) -> tuple[str, list[Finding]]:
    """Message and findings for a folder in which nothing can be analysed."""
    found = [*findings, *other_weights(run, names, run)]
    inside = {name: _entries(run / name) for name in names if (run / name).is_dir()}
    runs = [shown(name) for name, entries in inside.items() if any(map(_CHECKPOINT.fullmatch, entries))]
    adapters = [shown(name) for name, entries in inside.items() if _holds_adapter(entries)]
    remedy = _REMEDY
    if runs:
        both = sorted({*runs, *adapters}, key=natural_order)
        remedy = f"Pass one of the runs inside it: {some(both)}."
    elif len(adapters) == 1:
        remedy = f"It holds an adapter in a subfolder of its name: {adapters[0]}. Pass that subfolder."
    elif adapters:
        remedy = f"It holds adapters in subfolders of their names: {some(adapters)}. Pass one of them."
    return f"No checkpoints in {str(run)!r} (looked for {_LOOKED_FOR}). {remedy}", found


def _entries(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
