"""Adapters that did not start at zero: their updates are counted from the initial adapter.

PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA move a part of the base weight into the adapter before training. The update is
then s (B A − B₀ A₀). The initial adapter lies beside the checkpoints if the training kept it (``pissa_init/``), or is
``checkpoint-0``. Without it, the difference of two checkpoints is still exact.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynamics.checkpoints.candidates import DEFAULT, CheckpointFolder
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import WeightFile, read_json, read_weight_file
from dynamics.checkpoints.formats.peft import WEIGHTS, read_peft
from dynamics.checkpoints.formats.peft_config import CONFIG, AdapterFile
from dynamics.checkpoints.matrices import FileContent, StoredMatrix, since

_METHODS = "pissa|olora|corda|loftq|lora[_-]?ga"
#: Folders of the initial adapter, and folders that trainers keep beside it for conversion.
_OF_METHOD = re.compile(rf"({_METHODS})[_-]init(ial)?([_-].*)?", re.IGNORECASE)
_INITIAL = re.compile(r"(.*[_-])?init(ial)?([_-].*)?|checkpoint-0+", re.IGNORECASE)
_AUXILIARY = re.compile(rf"({_METHODS})[_-](init(ial)?|backup|converted)([_-].*)?", re.IGNORECASE)


@dataclass(frozen=True)
class InitialAdapter:
    """The adapter at the start of training: the name of its folder, its file and its matrices."""

    name: str
    file: WeightFile
    matrices: Mapping[str, StoredMatrix]

    @property
    def is_of_method(self) -> bool:
        """Whether its name alone says that the training started from it, whatever its configuration says."""
        return _OF_METHOD.fullmatch(self.name) is not None

    @property
    def file_name(self) -> str:
        """Key of its file beside the files of the adapters; no adapter has such a name, since folders have none."""
        return f"/{self.name}"


def without_auxiliary(candidate: CheckpointFolder) -> CheckpointFolder:
    """Return the folder without subfolders that are the start, a backup or a conversion of its adapter."""
    kept = tuple(
        adapter for adapter in candidate.adapters if adapter.name == DEFAULT or not _AUXILIARY.fullmatch(adapter.name)
    )
    return replace(candidate, adapters=kept) if kept else candidate


def initial_adapters(run: Path) -> list[InitialAdapter]:
    """Return the adapters in a run's folders that are named like the start of a training, named after a method first.

    An adapter that cannot be read is left out, as if it were absent.

    Args:
        run: The run's folder.
    """
    try:
        names = sorted(name for name in os.listdir(run) if _INITIAL.fullmatch(name))
    except OSError:
        return []
    adapters = []
    for name in sorted(names, key=lambda name: _OF_METHOD.fullmatch(name) is None):
        folder = run / name
        path = next((folder / file for file in WEIGHTS if (folder / file).is_file()), None)
        if path is None or folder.is_symlink():
            continue
        try:
            file = read_weight_file(path)
            adapter = read_peft(AdapterFile(file, read_json(folder / CONFIG, "OD102")))
        except UnreadableFile:
            continue
        matrices = {key: matrix for key, matrix in adapter.readable.items() if matrix.shape.rank}
        if matrices:
            adapters.append(InitialAdapter(name, file, matrices))
    return adapters


def counted_from_start(
    adapter: FileContent, initial: Sequence[InitialAdapter]
) -> tuple[FileContent, InitialAdapter | None, tuple[str, ...]]:
    """Return an adapter with its matrices as updates, the initial adapter used, and the matrices without a start.

    Args:
        adapter: The adapter as read.
        initial: The initial adapters of its run.
    """
    usable = [candidate for candidate in initial if adapter.moved_start or candidate.is_of_method]
    start = next((candidate for candidate in usable if _belongs(candidate, adapter.readable)), None)
    if start is None and not adapter.moved_start:
        return adapter, None, ()
    matrices: dict[str, StoredMatrix] = {}
    for name, matrix in adapter.readable.items():
        before = None if start is None else start.matrices.get(name)
        if not matrix.shape.rank:
            matrices[name] = matrix
        elif start is None or before is None:
            matrices[name] = replace(matrix, shape=replace(matrix.shape, holds="state"))
        else:
            matrices[name] = since(matrix, before)
    unknown = tuple(name for name, matrix in matrices.items() if matrix.shape.holds == "state")
    return replace(adapter, matrices={**matrices, **adapter.refused}), start, unknown


def _belongs(initial: InitialAdapter, matrices: Mapping[str, StoredMatrix]) -> bool:
    """Return whether an initial adapter shares matrices with these, all of equal size."""
    shared = [(initial.matrices[name].shape, matrices[name].shape) for name in initial.matrices if name in matrices]
    return bool(shared) and all((start.out, start.in_) == (now.out, now.in_) for start, now in shared)
