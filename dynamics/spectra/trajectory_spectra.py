"""Spectra of a whole trajectory, labelled: tiles of checkpoints, batches of matrices over the cores.

The steps of one matrix are solved together (``trajectory_gram``). So that memory does not grow with the number of
checkpoints, a training is cut into tiles of as many as may be open and fit; a tile begins with the last two checkpoints
of the one before, of which one is needed for its first increment, the other for that increment's inner product with the
previous one. Within a tile some matrices at a time are read from all of its checkpoints, which are closed after that:
mapped files that were read count as memory until then.
"""

from __future__ import annotations

import math
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.trajectory import (
    Checkpoint,
    MatrixShape,
    OpenCheckpoint,
    Trajectory,
    UnreadableMatrix,
)
from dynamics.findings import Finding
from dynamics.spectra import raw, walk, zero_blocks
from dynamics.spectra.increments import Workspace
from dynamics.spectra.path import checkpoints_open_at_once
from dynamics.spectra.trajectory_gram import TrajectoryResult, solve_trajectories
from dynamics.spectra.walk import BATCH_BYTES_ELSEWHERE, BatchResult, MatrixSpectra, Previous, factored, solve_batch
from dynamics.spectra.workers import available_cores, single_threaded_workers
from dynamics.spectra.zero_blocks import ZeroBlock, zero_block_findings
from probes.low_rank import LowRankMatrix

#: Bytes that all workers' factors of one matrix at all steps of a tile may take in float64, with their Grams.
TILE_BYTES = 2**30
#: Bytes of stored matrices that are read from the files of a tile between opening and closing them.
READ_BYTES = 2**28
#: Bytes for each core that the Grams of dense matrices may take, and how many such arrays are in memory for one.
CORE_BYTES, _DENSE_COPIES = 2**29, 3
#: Copies of a Gram that are in memory while one matrix is solved.
_GRAM_COPIES = 8
#: Checkpoints at the beginning of a tile that belong to the tile before.
_OVERLAP = 2

#: Buffers of each thread.
_THREAD = threading.local()


def trajectory_spectra(
    trajectory: Trajectory,
    *,
    top: int | None = None,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[xr.Dataset, list[Finding], dict[tuple[int, str], Float[np.ndarray, "step step"]]]:
    """Return the raw update (see ``raw``) of every matrix at every checkpoint, and what went wrong by file and matrix.

    A matrix that cannot be read is missing; one that is not finite has NaN.

    Args:
        trajectory: The run.
        top: How many leading singular values of dense matrices are wanted; by default all.
        device: Where the Grams are formed; the small cores are solved on the host.
        workers: Threads; by default one for each core this process may use.
        progress: Called with the number of matrices just finished.

    Returns:
        The raw update, the findings, and ⟨D_s, D_t⟩ of the totals of each matrix (segment, name) where they came with
        the spectra: for ``path.training_path``.
    """
    workers = workers or available_cores()
    spectra: dict[tuple[int, str], MatrixSpectra] = {}
    findings: list[Finding] = []
    blocks: list[tuple[int, str, ZeroBlock]] = []
    paths: dict[tuple[int, str], np.ndarray] = {}
    side_by_side = _workers_that_fit(trajectory, workers)
    with single_threaded_workers(side_by_side, workers // side_by_side) as executor:
        for checkpoints in trajectory.trainings:
            starts = [trajectory.start_of(checkpoint) for checkpoint in checkpoints]
            tiles = _tiles(checkpoints, starts, workers)
            outcomes: list[_Outcome] = []
            for tile in tiles:
                for part, path in _solve_tile(tile, checkpoints, starts, executor, torch.device(device), workers, top):
                    outcomes += part
                    progress(len(part))
                    if len(tiles) == 1:
                        paths |= {(checkpoints[0].segment, name): gram for name, gram in path.items()}
            for outcome in sorted(outcomes, key=lambda outcome: (outcome.position, outcome.name)):
                checkpoint = checkpoints[outcome.position]
                if outcome.spectra is not None:
                    spectra[checkpoint.step, outcome.name] = outcome.spectra
                if outcome.code:
                    findings.append(_finding(outcome, checkpoint))
                if outcome.zero_block is not None:
                    blocks.append((checkpoint.step, outcome.name, outcome.zero_block))
    findings += zero_block_findings(blocks, len(trajectory.matrices))
    return raw.raw_update(_steps(trajectory), _shapes(trajectory), spectra), findings, paths


def _workers_that_fit(trajectory: Trajectory, workers: int) -> int:
    """Return how many dense matrices are solved side by side: on one thread each, fewer where they are large."""
    shapes = {shape for checkpoint in trajectory.checkpoints for shape in checkpoint.shapes.values() if not shape.rank}
    largest = max((8 * _DENSE_COPIES * min(shape.out, shape.in_) ** 2 for shape in shapes), default=0)
    return max(1, min(workers, workers * CORE_BYTES // largest)) if largest else workers


def _steps(trajectory: Trajectory) -> dict[int, tuple[int, int]]:
    """Return step → (segment, previous step of the same training)."""
    last: dict[int, int] = {}
    steps = {}
    for checkpoint in trajectory.checkpoints:
        unknown = 0 if _starts_at_base(trajectory, checkpoint) else -1
        steps[checkpoint.step] = (checkpoint.segment, last.get(checkpoint.segment, unknown))
        last[checkpoint.segment] = checkpoint.step
    return steps


def _starts_at_base(trajectory: Trajectory, checkpoint: Checkpoint) -> bool:
    """Return whether it is known what dense weights were before training."""
    base = trajectory.base
    if base is None or checkpoint.step <= base.step:
        return False
    return any(shape.holds == "weight" and name in base.shapes for name, shape in checkpoint.shapes.items())


def _shapes(trajectory: Trajectory) -> dict[str, MatrixShape]:
    """Return one shape for each matrix: its newest, with the largest rank it ever had."""
    shapes = dict.fromkeys(trajectory.matrices, MatrixShape(0, 0, 0, ""))
    for checkpoint in trajectory.checkpoints:
        for name, shape in checkpoint.shapes.items():
            shapes[name] = replace(shape, rank=max(shape.rank, shapes[name].rank))
    return shapes


# --- tiles ------------------------------------------------------------------------------------------------------------


def _tiles(checkpoints: Sequence[Checkpoint], starts: Sequence[Checkpoint | None], workers: int) -> list[slice]:
    """Return the checkpoints of each tile, the first two of all but the first tile being the last of the one before."""
    room = checkpoints_open_at_once(checkpoints, starts)
    columns: dict[str, tuple[int, int]] = {}
    for checkpoint in checkpoints:
        for name, shape in checkpoint.shapes.items():
            rank, sides = columns.get(name, (0, 0))
            columns[name] = max(rank, shape.rank), max(sides, shape.out + shape.in_)
    for rank, sides in set(columns.values()):
        room = min(room, _steps_that_fit(rank, sides, TILE_BYTES // workers))
    length = max(room, _OVERLAP + 1)
    tiles = [slice(0, min(length, len(checkpoints)))]
    while tiles[-1].stop < len(checkpoints):
        first = tiles[-1].stop - _OVERLAP
        tiles.append(slice(first, min(first + length, len(checkpoints))))
    return tiles


def _steps_that_fit(rank: int, sides: int, room: int) -> int:
    """Return for how many steps the factors and Grams of a matrix fit: 8·r·sides·T + 8·copies·(rT)² bytes.

    >>> _steps_that_fit(16, 4096 + 11008, 2**29)
    131
    """
    if not rank:
        return sys.maxsize  # a dense matrix is solved step by step
    linear, square = 8 * rank * sides, 8 * _GRAM_COPIES * rank**2
    return int((math.sqrt(linear**2 + 4 * square * room) - linear) / (2 * square))


@dataclass(frozen=True)
class _Window:
    """The open checkpoints of one tile.

    Args:
        first: Position of the tile's first checkpoint in its training.
        lead: How many of its checkpoints belong to the tile before.
        opened: The checkpoints, ascending.
        starts: What dense weights are counted from, for each checkpoint.
        follows_start: Whether the first increment is what changed since the start.
        device: Where tall factors and dense matrices are worked on.
        top: How many leading singular values of dense matrices are wanted.
    """

    first: int
    lead: int
    opened: Sequence[OpenCheckpoint]
    starts: Sequence[OpenCheckpoint | None]
    follows_start: bool
    device: torch.device
    top: int | None = None

    def before(self, step: int) -> OpenCheckpoint | None:
        """Return what the increment of a step is counted from."""
        if step > 0:
            return self.opened[step - 1]
        return self.starts[0] if step == 0 and self.follows_start else None

    def alone(self, step: int) -> _Window:
        """Return the same where the checkpoint before a step does not exist."""
        absent = OpenCheckpoint({}, lambda name: torch.empty(0))
        opened = [*self.opened[: max(step - 1, 0)], *[absent][:step], *self.opened[step:]]
        return replace(self, opened=opened, follows_start=False)


@dataclass(frozen=True)
class _Outcome:
    """One matrix of one checkpoint; ``spectra`` is ``None`` if it could not be read, ``code`` that of a finding."""

    position: int
    name: str
    spectra: MatrixSpectra | None = None
    code: str = ""
    message: str = ""
    zero_block: ZeroBlock | None = None


_Solved = tuple[list[_Outcome], dict[str, Float[np.ndarray, "step step"]]]


def _solve_tile(
    tile: slice,
    checkpoints: Sequence[Checkpoint],
    starts: Sequence[Checkpoint | None],
    executor: Executor,
    device: torch.device,
    workers: int,
    top: int | None,
) -> Iterator[_Solved]:
    lead = _OVERLAP if tile.start else 0
    first_start = starts[0]
    follows_start = not tile.start and first_start is not None and first_start.step < checkpoints[0].step
    names = dict.fromkeys(name for checkpoint in checkpoints[tile][lead:] for name in checkpoint.shapes)
    for part in _read_together([*names], checkpoints[tile], workers):
        with ExitStack() as stack:
            opened = [stack.enter_context(checkpoint.open()) for checkpoint in checkpoints[tile]]
            weights = any(
                checkpoint.shapes[name].holds == "weight"
                for checkpoint in opened
                for name in part
                if name in checkpoint.shapes
            )
            distinct = {id(start): start for start in starts[tile] if start is not None and weights}
            beginnings = {key: stack.enter_context(start.open()) for key, start in distinct.items()}
            begins = [beginnings.get(id(start)) for start in starts[tile]]
            window = _Window(tile.start, lead, opened, begins, follows_start, device, top)
            tasks = [executor.submit(_solve, batch, window) for batch in _batches(part, window)]
            for task in as_completed(tasks):
                yield task.result()


def _read_together(names: Sequence[str], checkpoints: Sequence[Checkpoint], workers: int) -> Iterator[list[str]]:
    """Yield as many matrices as are read before the files are closed, at least one for each worker."""
    part: list[str] = []
    held = 0
    for name in names:
        shapes = [checkpoint.shapes[name] for checkpoint in checkpoints if name in checkpoint.shapes]
        size = sum(4 * (shape.rank * (shape.out + shape.in_) or shape.out * shape.in_) for shape in shapes)
        if len(part) >= workers and held + size > READ_BYTES:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    if part:
        yield part


def _batches(names: Sequence[str], window: _Window) -> Iterator[list[str]]:
    """Yield the matrices that are solved together: of one shape at each step, as many as stay in a CPU's cache."""
    groups: dict[Hashable, list[str]] = defaultdict(list)
    for name in names:
        shapes = tuple(matrices.shapes.get(name) for matrices in window.opened)
        groups[shapes if _has_gram(name, window) else name].append(name)
    allowed = walk.BATCH_BYTES.get(window.device.type, BATCH_BYTES_ELSEWHERE)
    for members in groups.values():
        shapes = [matrices.shapes[members[0]] for matrices in window.opened if members[0] in matrices.shapes]
        numbers = len(shapes) * max(shape.rank for shape in shapes) * (shapes[-1].out + shapes[-1].in_)
        length = max(1, allowed // (8 * numbers)) if numbers else 1
        yield from (members[first : first + length] for first in range(0, len(members), length))


def _has_gram(name: str, window: _Window) -> bool:
    """Return whether a matrix is a product of factors of one size at each step."""
    shapes = [matrices.shapes.get(name) for matrices in window.opened]
    sizes = {None if shape is None or not shape.rank else (shape.out, shape.in_) for shape in shapes}
    return len(sizes) == 1 and None not in sizes


# --- one batch --------------------------------------------------------------------------------------------------------


def _solve(names: Sequence[str], window: _Window) -> _Solved:
    """Solve matrices of one shape at all steps of a tile, by one Gram a side where that is possible."""
    outcomes: list[_Outcome] = []
    paths: dict[str, np.ndarray] = {}
    results: Sequence[TrajectoryResult | None] = [None] * len(names)
    trajectories: list[list[LowRankMatrix]] = []
    if _has_gram(names[0], window):
        with suppress(UnreadableMatrix):  # what can be read is solved step by step
            trajectories = [factored([checkpoint[name] for checkpoint in window.opened]) for name in names]
            results = solve_trajectories(trajectories, device=window.device, workspace=_workspace())
    for index, (name, result) in enumerate(zip(names, results, strict=True)):
        if result is None:
            outcomes += _solve_by_steps(name, window)
            continue
        steps = list(enumerate(zip(trajectories[index], result.steps, strict=True)))
        outcomes += [_outcome(name, step, *pair, window) for step, pair in steps[window.lead :]]
        if window.opened[-1].shapes[name].holds != "state":
            paths[name] = result.path
    return outcomes, paths


def _workspace() -> Workspace:
    if not hasattr(_THREAD, "workspace"):
        _THREAD.workspace = Workspace()
    return _THREAD.workspace


def _solve_by_steps(name: str, window: _Window) -> Iterator[_Outcome]:
    """Solve one matrix step by step; where it cannot be read costs only that step and the increment after it."""
    result: BatchResult | None = None
    for step, checkpoint in enumerate(window.opened):
        shape = checkpoint.shapes.get(name)
        if shape is None or step < window.lead - bool(shape.rank):
            result = None  # of products the step before the tile's first new one, for the inner product
            continue
        solve = _solve_factors if shape.rank else _solve_weight
        try:
            outcome, result = solve(name, step, window, result)
        except UnreadableMatrix:
            try:
                outcome, result = solve(name, step, window.alone(step), result)
            except UnreadableMatrix as error:
                outcome, result = _Outcome(window.first + step, name, code="OD101", message=str(error)), None
        if step >= window.lead:
            yield outcome


def _solve_factors(
    name: str, step: int, window: _Window, before: BatchResult | None
) -> tuple[_Outcome, BatchResult | None]:
    now = factored([window.opened[step][name]])
    previous = _previous(name, step, window, before)
    (result,) = solve_batch(now, previous, device=window.device, workspace=_workspace())
    return _outcome(name, step, now[0], result, window), result


def _previous(name: str, step: int, window: _Window, result: BatchResult | None) -> Previous | None:
    shape, before = window.opened[step].shapes[name], window.before(step)
    past = None if before is None else before.shapes.get(name)
    if before is None or past is None or not past.rank or (past.out, past.in_) != (shape.out, shape.in_):
        return None  # where it is another matrix the reader's finding says so
    earlier = window.before(step - 1)
    inner = None if earlier is None else lambda: factored([earlier[name]])
    return Previous.of_factors(factored([before[name]]), [result], inner)


def _outcome(name: str, step: int, matrix: LowRankMatrix, result: BatchResult, window: _Window) -> _Outcome:
    failure = _failure(result, [result.spectra.total])
    is_state = window.opened[step].shapes[name].holds == "state"
    spectra = result.spectra.without_total() if is_state else result.spectra
    return _Outcome(window.first + step, name, spectra, *failure, zero_blocks.of_factors(matrix))


def _solve_weight(name: str, step: int, window: _Window, _: BatchResult | None) -> tuple[_Outcome, None]:
    """Solve one dense matrix: a weight, of which the start is subtracted, or an update as it is."""
    now = _dense(name, step, window.opened[step], window)
    assert now is not None
    is_update = window.opened[step].shapes[name].holds == "update"
    beginning, before_it = window.starts[step], window.before(step)
    start = torch.zeros_like(now) if is_update else _dense(name, step, beginning, window)
    since_base = before_it is beginning and not is_update
    before = start if since_base else _dense(name, step, before_it, window)
    previous = None if before is None else Previous([before])
    (result,) = solve_batch([now], previous, None if start is None else [start], top=window.top)
    values = [values for values in (result.spectra.total, result.spectra.increment) if values is not None]
    block = zero_blocks.of_dense(now, start, is_update=is_update)
    return _Outcome(window.first + step, name, result.spectra, *_failure(result, values), block), None


def _dense(name: str, step: int, checkpoint: OpenCheckpoint | None, window: _Window) -> Tensor | None:
    """Read the matrix from a checkpoint, if it is the same kind of matrix there as at a step."""
    shape = window.opened[step].shapes[name]
    other = None if checkpoint is None else checkpoint.shapes.get(name)
    if checkpoint is None or other is None:
        return None
    if (other.out, other.in_, other.rank, other.holds) != (shape.out, shape.in_, 0, shape.holds):
        return None
    matrix = checkpoint[name]
    return matrix.to(window.device) if isinstance(matrix, Tensor) else None


def _failure(result: BatchResult, spectra: Sequence[Tensor]) -> tuple[str, str]:
    """Return code and message of what went wrong with a matrix, ``""`` if nothing did."""
    if not result.is_finite:
        return (
            "OD201",
            "Its factors or their product are not finite, so its spectrum and the increment after it are NaN.",
        )
    if any(bool(values.isnan().any()) for values in spectra):
        return "OD207", "The singular value decomposition of its core did not converge, so its spectrum is NaN."
    return "", ""


def _finding(outcome: _Outcome, checkpoint: Checkpoint) -> Finding:
    remedy = "Look for a diverged loss before this step; the other matrices are analysed."
    return Finding(
        outcome.code,
        outcome.message,
        remedy="" if outcome.code == "OD101" else remedy,
        file=str(checkpoint.inputs[0]["path"]) if checkpoint.inputs else checkpoint.folder.name,
        matrix=outcome.name,
        step=checkpoint.step,
    )
