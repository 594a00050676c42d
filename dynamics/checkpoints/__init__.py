"""Reading runs: a folder of checkpoints → a trajectory of matrices. The only code that opens weight files."""

from __future__ import annotations

from dynamics.checkpoints.errors import NotARun
from dynamics.checkpoints.open import open_trajectory
from dynamics.checkpoints.trajectory import (
    Checkpoint,
    LogEntry,
    Matrix,
    MatrixShape,
    OpenCheckpoint,
    Trajectory,
    UnreadableMatrix,
)

__all__ = [
    "Checkpoint",
    "LogEntry",
    "Matrix",
    "MatrixShape",
    "NotARun",
    "OpenCheckpoint",
    "Trajectory",
    "UnreadableMatrix",
    "open_trajectory",
]
