"""What there is of a run to analyse: its checkpoints, its records, its log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynamics.checkpoints import LogEntry, NotARun, Trajectory, open_trajectory
from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.steps import named_step
from dynamics.checkpoints.training_state import read_training_state
from dynamics.findings import Finding
from dynamics.store import FOLDER, capture_path
from dynamics.store.capture import CAPTURE
from dynamics.store.records import Captured, find_captured

_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Source:
    """One run as it lies on the disk.

    Args:
        trajectory: Its checkpoints and its log; without checkpoints where it has records only.
        captured: Its records, ``None`` if there are none.
    """

    trajectory: Trajectory
    captured: Captured | None = None


def open_source(run: Path, matrices: str | None = None, base: str | None = None) -> Source:
    """Opens what there is of a run; reads records, but no weights.

    Args:
        run: A run folder, one checkpoint, or a capture store.
        matrices: Regular expression; only matrices whose name it finds are watched.
        base: Folder of the weights before training.

    Raises:
        NotARun: If there are neither checkpoints nor captured steps that can be analysed.
        ValueError: If ``matrices`` is not a regular expression.
    """
    captured, problems = find_captured(run, matrices)
    usable = captured is not None and captured.update is not None
    if captured is not None and captured.path == run:
        if not usable:
            raise NotARun(_nothing_captured(captured, matrices), captured.findings)
        return Source(without_checkpoints(run), captured)
    try:
        trajectory = open_trajectory(run, matrices, base)
    except NotARun as error:
        if not usable:
            beside = "" if captured is None else f" {_nothing_captured(captured, matrices)}"
            found = () if captured is None else captured.findings
            raise NotARun(f"{error}{beside}", [*error.findings, *problems, *found]) from error
        trajectory = without_checkpoints(run, error.findings)
    return Source(replace(trajectory, findings=(*trajectory.findings, *problems)), captured)


def run_folder(run: Path) -> Path:
    """The run that a capture store, or the folder it lies in, is of; any other folder is itself."""
    folder = run.absolute().parent if run.name == CAPTURE else run
    return folder.absolute().parent if folder.name == FOLDER and _holds_results(folder) else folder


def results_folder(run: Path) -> Path:
    """Where results of a run go: beside its capture store where that, or the folder it lies in, is given as the run."""
    if capture_path(run) == run:
        return run.parent
    return run if run.name == FOLDER and _holds_results(run) else run / FOLDER


def without_checkpoints(run: Path, findings: Sequence[Finding] = ()) -> Trajectory:
    """A run of which only records can be analysed, with the log that its training left, if it left one."""
    folder = run_folder(run)
    log: tuple[LogEntry, ...] = ()
    problems = []
    for path in _states(folder):
        try:
            log = tuple(LogEntry(0, step, name, value) for step, name, value in read_training_state(path).log)
            break
        except UnreadableFile as error:
            problems.append(error.to_finding(path.relative_to(folder).as_posix()))
    return Trajectory(folder, (), log, (*findings, *problems))


def _states(folder: Path) -> list[Path]:
    """Training states, that of the run first, then those of checkpoints, the newest first."""
    try:
        steps = [(named_step(entry.name), entry) for entry in folder.iterdir()]
    except OSError:
        return []
    numbered = {step.number: entry for step, entry in steps if step is not None and step.is_plain}
    places = [folder, *(numbered[step] for step in sorted(numbered, reverse=True))]
    return [place / _STATE for place in places if (place / _STATE).is_file()]


def _holds_results(folder: Path) -> bool:
    return capture_path(folder) == folder / CAPTURE


def _nothing_captured(captured: Captured, matrices: str | None) -> str:
    steps = len(captured.stamp["steps"])
    if steps and matrices is not None:
        return f"matrices={matrices!r} is found in none of the matrices captured in '{captured.path}'."
    return f"The capture store '{captured.path}' holds no step that can be used; wait for the first, or train on."
