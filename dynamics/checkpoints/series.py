"""Adapter files in one folder as the checkpoints of one training, by the numbers in their names.

``name-000010.safetensors`` and ``name-step00000100.safetensors`` (kohya, which counts epochs in the first),
``name_000000100.safetensors`` (ai-toolkit), ``0000100_adapters.safetensors`` (MLX-LM), ``adapter_0.pt`` (torchtune,
which counts epochs), ``step-100.safetensors``, ``epoch=1-step=200.safetensors``, each with the final
``name.safetensors`` beside them. If kohya's metadata give the steps of all files, the metadata win.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from dynamics.checkpoints.candidates import weight_names
from dynamics.checkpoints.errors import NotARun, UnreadableFile
from dynamics.checkpoints.files import read_weight_file
from dynamics.checkpoints.formats import describe, is_adapter
from dynamics.checkpoints.formats.mlx import ADAPTERS
from dynamics.checkpoints.names import natural_order, shown
from dynamics.checkpoints.steps import LARGEST_STEP, is_plain_name, named_step
from dynamics.findings import Finding
from dynamics.text import some

_NUMBERED = (
    re.compile(r"(?P<stem>.+?)[-_](?:step|epoch)?(?P<number>[0-9]{6,})", re.DOTALL),
    re.compile(r"(?P<number>[0-9]{7,})_(?P<stem>.+)", re.DOTALL),
    re.compile(r"(?P<stem>adapter)_(?P<number>[0-9]{1,5})"),
)
_STEPS = "ss_steps"
#: The end of a name that holds a step; the name of the training stands before it.
_STEP = re.compile(r"[-_=.]?((global|model)[-_]?)?(step|epoch|iter|checkpoint|ckpt)[-_=]?N$", re.IGNORECASE)


@dataclass(frozen=True)
class Series:
    """Adapter files of one training.

    Args:
        numbered: Step → file, ascending.
        final: The file without a number, if its step is unknown.
        findings: How the steps were found, and the files left out.
    """

    numbered: Mapping[int, Path] = field(default_factory=dict)
    final: Path | None = None
    findings: tuple[Finding, ...] = ()


def find_series(folder: Path, names: Sequence[str]) -> Series:
    """Return the adapter files in a folder that PEFT did not write.

    Args:
        folder: The folder.
        names: Names of the candidates: neither PEFT's files nor those of a whole model.

    Raises:
        NotARun: If the names of the files name several trainings.
    """
    groups: dict[str, dict[str, int | None]] = defaultdict(dict)
    for name in weight_names(names):
        stem, number = _stem_and_number(name.rpartition(".")[0])
        groups[stem][name] = number
    steps: dict[str, dict[str, int | None]] = {}
    for stem, files in groups.items():
        recorded = {name: _recorded_step(folder / name, is_step=number is not None) for name, number in files.items()}
        if any(step is not None for step in recorded.values()):
            steps[stem] = {name: step for name, step in recorded.items() if step is not None}
    _join_final(groups, steps)
    if len(steps) > 1:
        stems = some([shown(stem) for stem in sorted(steps, key=natural_order)])
        raise NotARun(
            f"{str(folder)!r} holds adapters of {len(steps)} trainings, going by their names: {stems}. "
            "Put the files of each training into a folder of their own."
        )
    if not steps:
        return Series()
    ((stem, recorded),) = steps.items()
    series = _series(folder, groups[stem], recorded)
    left_out = [shown(name) for name in weight_names(names) if name not in groups[stem]]
    if left_out:
        message = f"Other weights in the folder are left out: {some(left_out)}."
        remedy = "To analyse them, put them into a folder of their own."
        series = replace(series, findings=(*series.findings, Finding("OD126", message, remedy, file=left_out[0])))
    return series


def _join_final(groups: Mapping[str, dict[str, int | None]], steps: dict[str, dict[str, int | None]]) -> None:
    """Add a file called ``final`` or the like to the only numbered files beside it, in place."""
    numbered = [stem for stem in steps if any(number is not None for number in groups[stem].values())]
    for stem in set(steps) - set(numbered):
        if len(numbered) == 1 and is_plain_name(stem):
            groups[numbered[0]].update(groups[stem])
            steps[numbered[0]].update(steps.pop(stem))


def _stem_and_number(name: str) -> tuple[str, int | None]:
    """Return the name of the training in a file's name, and the number of the checkpoint if there is one."""
    match = next((match for pattern in _NUMBERED if (match := pattern.fullmatch(name))), None)
    if match is not None and int(match["number"]) <= LARGEST_STEP:
        return match["stem"], int(match["number"])
    step = named_step(name)
    if step is None or step.number > LARGEST_STEP:
        return name, None
    return _STEP.sub("", step.template), step.number


def _recorded_step(path: Path, *, is_step: bool) -> int | None:
    """Return the step in a file's metadata: −1 if there is none, ``None`` if the file is no adapter.

    Args:
        path: The file.
        is_step: Whether its name holds a step; the weights of a whole model then count, too.
    """
    try:
        file = read_weight_file(path)
    except UnreadableFile:
        # Reported where its matrices are read; its name alone makes no series.
        return -1 if path.name.endswith(f"_{ADAPTERS}") else None
    if not is_adapter(file.tensors) and (not is_step or describe(file.tensors)):
        return None
    text = file.metadata.get(_STEPS, "")
    return int(text) if re.fullmatch("[0-9]{1,19}", text) and int(text) <= LARGEST_STEP else -1


def _series(folder: Path, files: Mapping[str, int | None], recorded: Mapping[str, int | None]) -> Series:
    """Return the files of one training by step: by their metadata if all have a step of their own, else by name."""
    numbers = {name: number for name, number in files.items() if number is not None}
    finals = [name for name in files if name not in numbers]
    final = folder / finals[0] if finals else None
    known_steps = {name: step for name, step in recorded.items() if step is not None and step >= 0}
    if set(known_steps) >= set(files) and len(set(known_steps.values())) == len(known_steps):
        return Series({step: folder / name for name, step in sorted(known_steps.items(), key=lambda pair: pair[1])})
    if not numbers:
        return Series({}, final)
    steps: dict[int, Path] = {}
    findings = []
    for name, number in sorted(numbers.items(), key=lambda pair: (pair[1], pair[0])):
        if number in steps:
            message = f"{shown(steps[number].name)} has the same number; this file is left out."
            findings.append(Finding("OD111", message, "Remove one of the two.", file=shown(name), step=number))
        else:
            steps[number] = folder / name
    text = "Steps are the numbers in the file names (kohya counts epochs there)."
    return Series(steps, final, (*findings, Finding("OD121", text)))
