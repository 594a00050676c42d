"""Spectra of a whole trajectory, labelled."""

from __future__ import annotations

from collections.abc import Callable

import xarray as xr

from dynamics.checkpoints.trajectory import Checkpoint, Trajectory
from dynamics.findings import Finding
from dynamics.spectra import findings as notes
from dynamics.spectra import raw
from dynamics.spectra.measured import measured
from dynamics.spectra.raw import Place
from dynamics.spectra.walk import trajectory_spectra


def raw_spectra(
    trajectory: Trajectory,
    *,
    device: str = "cpu",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[xr.Dataset, list[Finding]]:
    """The raw update (see ``raw``) of a whole trajectory, and what went wrong.

    Args:
        trajectory: The run.
        device: Where the QR decompositions run.
        workers: Threads; by default one for each core.
        progress: Called with the number of matrices just finished.
    """
    results, findings = trajectory_spectra(trajectory, device=device, workers=workers, progress=progress)
    return raw.raw_update(_steps(trajectory), _places(trajectory), results), findings


def analyse_spectra(
    trajectory: Trajectory, *, device: str = "cpu", workers: int | None = None
) -> tuple[dict[str, xr.Dataset], list[Finding]]:
    """Spectra, measures, null models and their summaries over a whole trajectory, and the findings."""
    update, findings = raw_spectra(trajectory, device=device, workers=workers)
    groups = measured(update)
    return groups, [*findings, *notes.notes(groups["update"])]


def _steps(trajectory: Trajectory) -> dict[int, tuple[int, int]]:
    """Step → (segment, previous step of the same training)."""
    last: dict[int, int] = {}
    steps = {}
    for checkpoint in trajectory.checkpoints:
        unknown = 0 if _starts_at_base(trajectory, checkpoint) else -1
        steps[checkpoint.step] = (checkpoint.segment, last.get(checkpoint.segment, unknown))
        last[checkpoint.segment] = checkpoint.step
    return steps


def _starts_at_base(trajectory: Trajectory, checkpoint: Checkpoint) -> bool:
    """Whether what dense weights were before training is known."""
    base = trajectory.base
    if base is None or checkpoint.step <= base.step:
        return False
    return any(shape.holds == "weight" and name in base.shapes for name, shape in checkpoint.shapes.items())


def _places(trajectory: Trajectory) -> dict[str, Place]:
    """One place for each matrix: its newest, with the largest rank it ever had."""
    places: dict[str, Place] = dict.fromkeys(trajectory.matrices, Place(0, 0, 0, ""))
    for checkpoint in trajectory.checkpoints:
        for name, shape in checkpoint.shapes.items():
            places[name] = Place(shape.out, shape.in_, max(shape.rank, places[name].rank), shape.dtype)
    return places
