"""Adapter files in one folder as checkpoints of one training, told by the numbers in their names.

``name-000010.safetensors`` and ``name-step00000100.safetensors`` (kohya, which counts epochs in the first),
``name_000000100.safetensors`` (ai-toolkit), ``0000100_adapters.safetensors`` (MLX-LM), each with the final
``name.safetensors`` beside them. Where kohya's metadata give the steps of all files, these count.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dynamics.checkpoints.errors import NotARun, UnreadableFile
from dynamics.checkpoints.foreign import is_readable
from dynamics.checkpoints.mlx import ADAPTERS
from dynamics.checkpoints.names import natural_order, shown, some
from dynamics.checkpoints.weight_files import read_weight_file
from dynamics.findings import Finding

_NUMBERED = (
    re.compile(r"(?P<stem>.+?)[-_](?:step|epoch)?(?P<number>[0-9]{6,18})", re.DOTALL),
    re.compile(r"(?P<number>[0-9]{7,18})_(?P<stem>.+)", re.DOTALL),
)
_SUFFIX = ".safetensors"
_STEPS = "ss_steps"


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
    for name in names:
        if name.endswith(_SUFFIX):
            stem, number = _taken_apart(name.removesuffix(_SUFFIX))
            groups[stem][name] = number
    steps: dict[str, dict[str, int | None]] = {}
    for stem, files in groups.items():
        known = {name: _steps(folder / name) for name in files}
        if any(step is not None for step in known.values()):
            steps[stem] = {name: step for name, step in known.items() if step is not None}
    if len(steps) > 1:
        stems = some([shown(stem) for stem in sorted(steps, key=natural_order)])
        raise NotARun(
            f"{str(folder)!r} holds adapters of {len(steps)} trainings, by their names: {stems}. "
            "Put the files of one training into a folder of its own."
        )
    if not steps:
        return Series()
    ((stem, read),) = steps.items()
    return _series(folder, groups[stem], read)


def _taken_apart(name: str) -> tuple[str, int | None]:
    match = next((match for pattern in _NUMBERED if (match := pattern.fullmatch(name))), None)
    return (name, None) if match is None else (match["stem"], int(match["number"]))


def _steps(path: Path) -> int | None:
    """Steps by the file's metadata, −1 if it does not say; ``None`` if it is no adapter that is read here."""
    try:
        file = read_weight_file(path)
    except UnreadableFile:
        # One that cannot be read is reported where its matrices are; its name alone makes no series.
        return -1 if path.name.endswith(f"_{ADAPTERS}") else None
    if not is_readable(file.tensors) and not any(key.endswith(".lora_a") for key in file.tensors):
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
