"""A run in memory: checkpoints in order of step, whose matrices are loaded when asked for."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from dynamics.findings import Finding
from probes.low_rank import LowRankMatrix

#: A low-rank update as its factors; a dense weight or a dense update as a tensor.
Matrix: TypeAlias = LowRankMatrix | Tensor


class UnreadableMatrix(ValueError):
    """A matrix of an :class:`OpenCheckpoint` could not be read although its file's header names it; one line."""


@dataclass(frozen=True)
class MatrixShape:
    """Everything the headers of a checkpoint say about one watched matrix.

    Args:
        out: Output dimension (rows).
        in_: Input dimension (columns).
        rank: Adapter rank, 0 for a dense matrix.
        dtype: Storage dtype of the factors or of the weight, as safetensors writes it (``F32``, ``BF16``, ...).
        holds: ``"update"``: the change since the start. ``"weight"``: the weight itself, from which the start must be
            subtracted. ``"state"``: factors with an unknown start (PiSSA without its initial adapter), so that only
            differences between checkpoints are updates.
    """

    out: int
    in_: int
    rank: int
    dtype: str
    holds: Literal["update", "weight", "state"] = "update"


class OpenCheckpoint(Mapping[str, Matrix]):
    """The matrices of one checkpoint, loaded when asked for; valid until it is closed.

    Low-rank updates are :class:`LowRankMatrix`; dense matrices are tensors ``(out, in)``, views of the file where it
    stores them so.

    Args:
        shapes: Name → shape, in the model's order.
        load: Reads one matrix by name.

    Raises:
        UnreadableMatrix: On access, if the file does not hold what its header says.
    """

    def __init__(self, shapes: Mapping[str, MatrixShape], load: Callable[[str], Matrix]) -> None:
        self.shapes = shapes
        self._load = load

    def __getitem__(self, name: str) -> Matrix:
        if name not in self.shapes:
            raise KeyError(name)
        return self._load(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint of a run, not yet opened.

    Args:
        step: Optimizer step.
        folder: The folder of its files.
        segment: Number of the training it belongs to, from 0.
        shapes: Name → shape, in the model's order.
        open: Opens the weight files; ``with checkpoint.open() as matrices: matrices[name]``.
        findings: Findings about its headers and configuration.
        inputs: Fingerprints of its weight files: ``{"path", "bytes", "header_sha256"}``.
    """

    step: int
    folder: Path
    segment: int
    shapes: Mapping[str, MatrixShape]
    open: Callable[[], AbstractContextManager[OpenCheckpoint]]
    findings: tuple[Finding, ...] = ()
    inputs: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class LogEntry:
    """One scalar from a training log.

    Args:
        segment: The training it belongs to.
        step: Optimizer step.
        name: The Trainer's name for it, e.g. ``loss``, ``grad_norm``, ``eval_accuracy``.
        value: The number; NaN where the log has NaN.
    """

    segment: int
    step: int
    name: str
    value: float


@dataclass(frozen=True)
class Trajectory:
    """A run: its checkpoints in order of step, its training log, and the findings of reading it.

    Args:
        folder: The run folder.
        checkpoints: In ascending order of step; steps are unique.
        log: Scalars of the training log (loss, learning rate, ``eval_*``), by segment and step.
        findings: All findings, those of the checkpoints included.
        base: The weights before training, if they were given, under the names of the run; step 0.

    Example: the largest singular value of each matrix in the last checkpoint::

        trajectory = dynamics.open_trajectory("runs/imax")
        with trajectory.checkpoints[-1].open() as matrices:
            for name, matrix in matrices.items():
                print(name, dynamics.singular_values(matrix)[0])
    """

    folder: Path
    checkpoints: Sequence[Checkpoint]
    log: Sequence[LogEntry] = field(default=())
    findings: Sequence[Finding] = field(default=())
    base: Checkpoint | None = None

    def start_of(self, checkpoint: Checkpoint) -> Checkpoint | None:
        """Return what totals of dense weights are counted from: the base, else the first checkpoint of the training.

        Args:
            checkpoint: One of the run's checkpoints. Without a base the first checkpoint of a training has no total:
                for it the start is ``None``.
        """
        if self.base is not None:
            return self.base
        first = next(earlier for earlier in self.checkpoints if earlier.segment == checkpoint.segment)
        return None if first is checkpoint else first

    @property
    def trainings(self) -> list[list[Checkpoint]]:
        """The checkpoints of each training, in order of segment and step."""
        return by_training(self.checkpoints)

    @property
    def name(self) -> str:
        """The folder's name; of a link, the link's name."""
        return Path(os.path.abspath(self.folder)).name

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer steps, ascending."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Every matrix that occurs in some checkpoint, in the model's order."""
        return tuple(dict.fromkeys(name for checkpoint in self.checkpoints for name in checkpoint.shapes))


def by_training(checkpoints: Iterable[Checkpoint]) -> list[list[Checkpoint]]:
    """Return the checkpoints of each training in their order, the trainings by segment.

    >>> from contextlib import nullcontext
    >>> a, b, c = (
    ...     Checkpoint(step, Path("run"), segment, {}, nullcontext) for step, segment in ((5, 0), (6, 1), (10, 0))
    ... )
    >>> [[checkpoint.step for checkpoint in training] for training in by_training([a, b, c])]
    [[5, 10], [6]]
    """
    trainings: dict[int, list[Checkpoint]] = defaultdict(list)
    for checkpoint in checkpoints:
        trainings[checkpoint.segment].append(checkpoint)
    return [trainings[segment] for segment in sorted(trainings)]
