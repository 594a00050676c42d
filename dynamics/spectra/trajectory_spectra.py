"""Spectra of a whole trajectory, labelled: one checkpoint at a time, batches of matrices over the cores.

At most three checkpoints of one training are open at once (an increment needs the previous one, its inner product with
the last increment the one before), so memory does not grow with the number of checkpoints.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache

import torch
import xarray as xr
from torch import Tensor

from dynamics.checkpoints.trajectory import (
    Checkpoint,
    Matrix,
    MatrixShape,
    OpenCheckpoint,
    Trajectory,
    UnreadableMatrix,
)
from dynamics.findings import Finding
from dynamics.spectra import raw, zero_blocks
from dynamics.spectra.increments import Workspace
from dynamics.spectra.walk import BatchResult, MatrixSpectra, Previous, batches, factored, solve_batch
from dynamics.spectra.zero_blocks import ZeroBlock, zero_block_findings

#: Buffers of each thread.
_THREAD = threading.local()


def trajectory_spectra(
    trajectory: Trajectory,
    *,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[xr.Dataset, list[Finding]]:
    """Return the raw update (see ``raw``) of every matrix at every checkpoint, and what went wrong by file and matrix.

    A matrix that cannot be read is missing; one that is not finite has NaN.

    Args:
        trajectory: The run.
        device: Where the QR decompositions run; the small cores are solved on the host.
        workers: Threads; by default one for each core this process may use.
        progress: Called with the number of matrices just finished.
    """
    spectra: dict[tuple[int, str], MatrixSpectra] = {}
    findings: list[Finding] = []
    blocks: list[tuple[int, str, ZeroBlock]] = []
    with single_threaded_workers(workers or available_cores()) as executor:
        for segment in sorted({checkpoint.segment for checkpoint in trajectory.checkpoints}):
            checkpoints = [checkpoint for checkpoint in trajectory.checkpoints if checkpoint.segment == segment]
            starts = {checkpoint.step: trajectory.start_of(checkpoint) for checkpoint in checkpoints}
            for checkpoint, outcomes in _solve_segment(checkpoints, starts, executor, torch.device(device), progress):
                for outcome in sorted(outcomes, key=lambda outcome: outcome.name):
                    if outcome.result is not None:
                        spectra[checkpoint.step, outcome.name] = outcome.result.spectra
                    if outcome.code:
                        findings.append(_finding(outcome, checkpoint))
                    if outcome.zero_block is not None:
                        blocks.append((checkpoint.step, outcome.name, outcome.zero_block))
    findings += zero_block_findings(blocks, len(trajectory.matrices))
    return raw.raw_update(_steps(trajectory), _shapes(trajectory), spectra), findings


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


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def single_threaded_workers(workers: int) -> Iterator[Executor]:
    """Start threads that use one core each: many small decompositions gain nothing from threads of their own."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=_prepare_worker) as executor:
            try:
                yield executor
            except BaseException:
                executor.shutdown(cancel_futures=True)  # ^C must not wait for what has not begun
                raise
    finally:
        torch.set_num_threads(threads)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    _THREAD.workspace = Workspace()


@dataclass(frozen=True)
class _Window:
    """Consecutive open checkpoints of one training, newest first.

    Args:
        now, before, earlier: The checkpoints.
        start: What dense weights are counted from.
        results: What the previous step gave.
    """

    now: OpenCheckpoint
    before: OpenCheckpoint | None = None
    earlier: OpenCheckpoint | None = None
    start: OpenCheckpoint | None = None
    results: Mapping[str, BatchResult] = field(default_factory=dict)

    def alone(self) -> _Window:
        """Return the same without predecessors."""
        return _Window(self.now, start=self.start)


@dataclass(frozen=True)
class _Outcome:
    """One matrix of one checkpoint; ``result`` is ``None`` if it could not be read, ``code`` that of a finding."""

    name: str
    result: BatchResult | None = None
    code: str = ""
    message: str = ""
    zero_block: ZeroBlock | None = None


def _solve_segment(
    checkpoints: Sequence[Checkpoint],
    starts: Mapping[int, Checkpoint | None],
    executor: Executor,
    device: torch.device,
    progress: Callable[[int], None],
) -> Iterator[tuple[Checkpoint, list[_Outcome]]]:
    opened: list[tuple[ExitStack, OpenCheckpoint]] = []
    results: dict[str, BatchResult] = {}
    try:
        for checkpoint in checkpoints:
            stack = ExitStack()
            matrices = stack.enter_context(checkpoint.open())
            # A matrix is needed three times: as itself, as a predecessor, and for the next inner product.
            opened.insert(0, (stack, OpenCheckpoint(matrices.shapes, _kept_factors(matrices))))
            now, before, earlier = [matrices for _, matrices in opened] + [None] * (3 - len(opened))
            assert now is not None
            start = starts[checkpoint.step]
            beginning = None if start is None else stack.enter_context(start.open())
            if before is None and start is not None and start.step < checkpoint.step:
                before = beginning  # the first increment is what changed since the base
            window = _Window(now, before, earlier, beginning, results)
            outcomes: list[_Outcome] = []
            tasks = [executor.submit(_solve_names, names, window, device) for names in _window_batches(window, device)]
            for task in as_completed(tasks):
                outcomes += task.result()
                progress(len(task.result()))
            yield checkpoint, outcomes
            results = {outcome.name: outcome.result for outcome in outcomes if outcome.result is not None}
            if len(opened) == 3:
                opened.pop()[0].close()
    finally:
        for stack, _ in opened:
            stack.close()


def _kept_factors(matrices: OpenCheckpoint) -> Callable[[str], Matrix]:
    """Return a reader that reads factors once; dense matrices are too large to be kept."""
    kept = cache(matrices.__getitem__)
    return lambda name: kept(name) if matrices.shapes[name].rank else matrices[name]


def _window_batches(window: _Window, device: torch.device) -> list[list[str]]:
    def kind(name: str) -> Hashable:
        result = window.results.get(name)
        shapes = [past.shapes.get(name) for past in (window.before, window.earlier) if past is not None]
        sizes = tuple(None if shape is None else (shape.out, shape.in_, shape.rank) for shape in shapes)
        return sizes, result is not None and result.cores is not None

    return batches(window.now.shapes, lambda name: device, kind)


def _solve_names(names: Sequence[str], window: _Window, device: torch.device) -> list[_Outcome]:
    """Solve one batch; a matrix that cannot be read costs only itself, a predecessor only the increment."""
    try:
        return _solve(names, window, device)
    except UnreadableMatrix as error:
        if len(names) > 1:
            return [outcome for name in names for outcome in _solve_names([name], window, device)]
        if window.before is not None:
            return _solve_names(names, window.alone(), device)
        return [_Outcome(names[0], code="OD101", message=str(error))]


def _solve(names: Sequence[str], window: _Window, device: torch.device) -> list[_Outcome]:
    shape = window.now.shapes[names[0]]
    if not shape.rank:
        return [_solve_weight(name, window, device) for name in names]
    now = factored([window.now[name] for name in names])
    results = solve_batch(now, _previous(names, window), device=device, workspace=_THREAD.workspace)
    failures = [_failure(result, [result.spectra.total]) for result in results]
    if shape.holds == "state":
        results = [replace(result, spectra=result.spectra.without_total()) for result in results]
    return [
        _Outcome(name, result, *failure, zero_blocks.of_factors(matrix))
        for name, matrix, result, failure in zip(names, now, results, failures, strict=True)
    ]


def _previous(names: Sequence[str], window: _Window) -> Previous | None:
    shape = window.now.shapes[names[0]]
    before, earlier = window.before, window.earlier
    past = None if before is None else before.shapes.get(names[0])
    if before is None or past is None or not past.rank or (past.out, past.in_) != (shape.out, shape.in_):
        return None  # where it is another matrix the reader's finding says so
    matrices = factored([before[name] for name in names])
    return Previous.of_factors(
        matrices,
        [window.results.get(name) for name in names],
        None if earlier is None else lambda: factored([earlier[name] for name in names]),
    )


def _solve_weight(name: str, window: _Window, device: torch.device) -> _Outcome:
    """Solve one dense matrix: a weight, of which the start is subtracted, or an update as it is."""
    now = _dense(name, window.now, window, device)
    assert now is not None
    is_update = window.now.shapes[name].holds == "update"
    start = torch.zeros_like(now) if is_update else _dense(name, window.start, window, device)
    since_base = window.before is window.start and not is_update
    before = start if since_base else _dense(name, window.before, window, device)
    previous = None if before is None else Previous([before])
    (result,) = solve_batch([now], previous, None if start is None else [start])
    values = [values for values in (result.spectra.total, result.spectra.increment) if values is not None]
    block = zero_blocks.of_dense(now, start, is_update=is_update)
    return _Outcome(name, result, *_failure(result, values), block)


def _dense(name: str, checkpoint: OpenCheckpoint | None, window: _Window, device: torch.device) -> Tensor | None:
    """Read the matrix from another checkpoint, if it is the same kind of matrix there."""
    shape = window.now.shapes[name]
    other = None if checkpoint is None else checkpoint.shapes.get(name)
    if checkpoint is None or other is None:
        return None
    if (other.out, other.in_, other.rank, other.holds) != (shape.out, shape.in_, 0, shape.holds):
        return None
    matrix = checkpoint[name]
    return matrix.to(device) if isinstance(matrix, Tensor) else None


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
