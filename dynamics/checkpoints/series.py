"""Adapter files in one folder as checkpoints of one training, told by the numbers in their names.

``name-000010.safetensors`` and ``name-step00000100.safetensors`` (kohya, which counts epochs in the first),
``name_000000100.safetensors`` (ai-toolkit), ``0000100_adapters.safetensors`` (MLX-LM), ``adapter_0.pt`` (torchtune,
which counts epochs), ``step-100.safetensors``, ``epoch=1-step=200.safetensors``, each with the final
``name.safetensors`` beside them. Where kohya's metadata give the steps of all files, these count.
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
from dynamics.checkpoints.formats.foreign import describe, is_adapter
from dynamics.checkpoints.formats.mlx import ADAPTERS
from dynamics.checkpoints.names import natural_order, shown
from dynamics.checkpoints.steps import is_plain_name, named_step
from dynamics.findings import Finding
from dynamics.text import some

_NUMBERED = (
    re.compile(r"(?P<stem>.+?)[-_](?:step|epoch)?(?P<number>[0-9]{6,18})", re.DOTALL),
    re.compile(r"(?P<number>[0-9]{7,18})_(?P<stem>.+)", re.DOTALL),
    re.compile(r"(?P<stem>adapter)_(?P<number>[0-9]{1,5})"),
)
_STEPS = "ss_steps"
_LARGEST_STEP = 2**63 - 1
#: The end of a name that tells a step: what stands before it is the name of the training.
_STEP = re.compile(r"[-_=.]?((global|model)[-_]?)?(step|epoch|iter|checkpoint|ckpt)[-_=]?N$", re.IGNORECASE)


@dataclass(frozen=True)
class Series:
    """Files of one training.

    Args:
        numbered: Step to file, ascending.
        final: The file without a number, if its step is not known.
        findings: How the steps were found.
    """

    numbered: Mapping[int, Path] = field(default_factory=dict)
    final: Path | None = None
    findings: tuple[Finding, ...] = ()


def find_series(folder: Path, names: Sequence[str]) -> Series:
    """Adapter files in a folder that are not PEFT's.

    Args:
        folder: The folder.
        names: Names of what may be such files: neither PEFT's nor those of a whole model.

    Raises:
        NotARun: If the files are of several trainings, by their names.
    """
    groups: dict[str, dict[str, int | None]] = defaultdict(dict)
    for name in weight_names(names):
        stem, number = _taken_apart(name.rpartition(".")[0])
        groups[stem][name] = number
    steps: dict[str, dict[str, int | None]] = {}
    for stem, files in groups.items():
        told = {name: _steps(folder / name, is_step=number is not None) for name, number in files.items()}
        if any(step is not None for step in told.values()):
            steps[stem] = {name: step for name, step in told.items() if step is not None}
    _join_final(groups, steps)
    if len(steps) > 1:
        stems = some([shown(stem) for stem in sorted(steps, key=natural_order)])
        raise NotARun(
            f"{str(folder)!r} holds adapters of {len(steps)} trainings, by their names: {stems}. "
            "Put the files of one training into a folder of its own."
        )
    if not steps:
        return Series()
    ((stem, read),) = steps.items()
    series = _series(folder, groups[stem], read)
    left = [shown(name) for name in weight_names(names) if name not in groups[stem]]
    if left:
        message = f"Further weights in the same folder are left out: {some(left)}."
        remedy = "To analyse them, put them into a folder of their own."
        series = replace(series, findings=(*series.findings, Finding("OD126", message, remedy, file=left[0])))
    return series


def _join_final(groups: Mapping[str, dict[str, int | None]], steps: dict[str, dict[str, int | None]]) -> None:
    """A file that is called ``final`` or the like belongs to the only numbered ones beside it."""
    numbered = [stem for stem in steps if any(number is not None for number in groups[stem].values())]
    for stem in set(steps) - set(numbered):
        if len(numbered) == 1 and is_plain_name(stem):
            groups[numbered[0]].update(groups[stem])
            steps[numbered[0]].update(steps.pop(stem))


def _taken_apart(name: str) -> tuple[str, int | None]:
    match = next((match for pattern in _NUMBERED if (match := pattern.fullmatch(name))), None)
    if match is not None:
        return match["stem"], int(match["number"])
    step = named_step(name)
    if step is None or step.number > _LARGEST_STEP:
        return name, None
    return _STEP.sub("", step.template), step.number


def _steps(path: Path, *, is_step: bool) -> int | None:
    """Steps by the file's metadata, −1 if it does not say; ``None`` if it is no adapter that is read here.

    Args:
        path: The file.
        is_step: Whether its name tells a step; weights of a whole model are then read as well.
    """
    try:
        file = read_weight_file(path)
    except UnreadableFile:
        # One that cannot be read is reported where its matrices are; its name alone makes no series.
        return -1 if path.name.endswith(f"_{ADAPTERS}") else None
    if not is_adapter(file.tensors) and (not is_step or describe(file.tensors)):
        return None
    text = file.metadata.get(_STEPS, "")
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else -1


def _series(folder: Path, files: Mapping[str, int | None], read: Mapping[str, int | None]) -> Series:
    numbers = {name: number for name, number in files.items() if number is not None}
    finals = [name for name in files if name not in numbers]
    final = folder / finals[0] if finals else None
    told = {name: step for name, step in read.items() if step is not None and step >= 0}
    if set(told) >= set(files) and len(set(told.values())) == len(told):
        return Series({step: folder / name for name, step in sorted(told.items(), key=lambda pair: pair[1])})
    if not numbers:
        return Series({}, final)
    steps: dict[int, Path] = {}
    findings = []
    for name, number in sorted(numbers.items(), key=lambda pair: (pair[1], pair[0])):
        if number in steps:
            message = f"It is left out: {shown(steps[number].name)} has the same number."
            findings.append(Finding("OD111", message, "Remove one of the two.", file=shown(name), step=number))
        else:
            steps[number] = folder / name
    text = "Steps are the numbers in the names of the files (kohya counts epochs there)."
    return Series(steps, final, (*findings, Finding("OD121", text)))
