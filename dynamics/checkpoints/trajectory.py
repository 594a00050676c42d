"""What a run folder becomes: matrices over steps, opened one checkpoint at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from torch import Tensor

from dynamics.findings import Finding
from probes.low_rank import LowRankMatrix

#: A low-rank update as its factors; a dense weight, or a dense update, as it is.
Matrix: TypeAlias = LowRankMatrix | Tensor


class UnreadableMatrix(ValueError):
    """A matrix that the header promised could not be read (raised by an :class:`OpenCheckpoint`); one line."""


@dataclass(frozen=True)
class MatrixShape:
    """Shape of one watched matrix in one checkpoint, known from the file's header alone.

    Args:
        out: Output dimension (rows).
        in_: Input dimension (columns).
        rank: Adapter rank, 0 for a dense matrix.
        dtype: Storage dtype of the factors or of the weight, as safetensors writes it (``F32``, ``BF16``, ...).
        holds: ``"update"`` where the matrix is the change since the start, ``"weight"`` where it is the weight
            itself, of which the start must be subtracted, ``"state"`` where it is factors whose start is not known, so
            that only differences between checkpoints are updates (PiSSA without its initial adapter).
    """

    out: int
    in_: int
    rank: int
    dtype: str
    holds: Literal["update", "weight", "state"] = "update"


class OpenCheckpoint(Mapping[str, Matrix]):
    """The matrices of one checkpoint, loaded when asked for; valid until it is closed.

    Low-rank updates come as :class:`LowRankMatrix`; everything dense as a tensor ``(out, in)``, a view of the file
    where it is stored as such.

    Args:
        shapes: Name to shape, in the model's order.
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
        folder: Where its files are.
        segment: Number of the training it belongs to, from 0.
        shapes: Name to shape, in the model's order.
        open: Opens the weight files; ``with checkpoint.open() as matrices: matrices[name]``.
        findings: What reading its headers and configuration brought up.
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
        name: As the Trainer wrote it, e.g. ``loss``, ``grad_norm``, ``eval_accuracy``.
        value: The number; NaN where the log says NaN.
    """

    segment: int
    step: int
    name: str
    value: float


@dataclass(frozen=True)
class Trajectory:
    """A run: its checkpoints in step order, its training log, and what was found while reading it.

    Args:
        folder: The run folder.
        checkpoints: In ascending order of step; steps are unique.
        log: Scalars of the training log (loss, learning rate, ``eval_*``), by segment and step.
        findings: Everything found while reading, those of the checkpoints included.
        base: The weights before training under the names of the run, if they were given; step 0.

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
        """What totals of dense weights are counted from: the base, or the first checkpoint of the same training.

        ``None`` for that first checkpoint itself: without a base it has no total.
        """
        if self.base is not None:
            return self.base
        first = next(one for one in self.checkpoints if one.segment == checkpoint.segment)
        return None if first is checkpoint else first

    @property
    def name(self) -> str:
        """The folder's own name; that of the link, where it is one."""
        return Path(os.path.abspath(self.folder)).name

    @property
    def steps(self) -> tuple[int, ...]:
        """Optimizer steps, ascending."""
        return tuple(checkpoint.step for checkpoint in self.checkpoints)

    @property
    def matrices(self) -> tuple[str, ...]:
        """Every matrix that occurs in some checkpoint, in the model's order."""
        return tuple(dict.fromkeys(name for checkpoint in self.checkpoints for name in checkpoint.shapes))
