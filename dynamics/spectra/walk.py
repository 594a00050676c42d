"""Spectra of a whole trajectory: one checkpoint at a time, matrices of equal shape in batches, over the cores.

At most three checkpoints of one training are open at once (the increment needs the previous one, its cosine
with the last increment the one before), so memory does not grow with the number of checkpoints.

One step of a batch of matrices: the spectra of their totals and of what changed since the step before.

The same arithmetic serves matrices from checkpoints and those of a model in training.
"""

from __future__ import annotations

import math
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.trajectory import Checkpoint, Matrix, OpenCheckpoint, Trajectory, UnreadableMatrix
from dynamics.findings import Finding
from dynamics.spectra import increments, rounding, zero_blocks
from dynamics.spectra.dense import dense_spectrum
from dynamics.spectra.increments import Cores, FactorSpectra, Workspace
from dynamics.spectra.singular_values import core_singular_values
from dynamics.spectra.zero_blocks import ZeroBlock, zero_block_findings
from probes.low_rank import LowRankMatrix

#: Bytes of float64 stack that one task works on: a few matrices of a 7B model, which stay in the last-level cache.
BATCH_BYTES = 2**23

#: Buffers of each worker.
_OWN = threading.local()


def trajectory_spectra(
    trajectory: Trajectory,
    *,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[Results, list[Finding]]:
    """Total and increment spectra of every matrix at every step.

    Args:
        trajectory: The run.
        device: Where the QR decompositions run; the small cores are solved on the host.
        workers: Threads, by default one for each core this process may use.
        progress: Called with the number of matrices just finished.

    Returns:
        ``(step, matrix)`` to spectra, and what went wrong by file and matrix. A matrix that cannot be read is absent;
        one that is not finite has NaN.
    """
    results: Results = {}
    findings: list[Finding] = []
    blocks: list[tuple[int, str, ZeroBlock]] = []
    with _single_threaded_workers(workers or _available_cores()) as executor:
        for segment in sorted({checkpoint.segment for checkpoint in trajectory.checkpoints}):
            checkpoints = [checkpoint for checkpoint in trajectory.checkpoints if checkpoint.segment == segment]
            starts = {checkpoint.step: trajectory.start_of(checkpoint) for checkpoint in checkpoints}
            for checkpoint, outcomes in _segment_spectra(checkpoints, starts, executor, torch.device(device), progress):
                for outcome in sorted(outcomes, key=lambda outcome: outcome.name):
                    if outcome.spectra is not None:
                        results[checkpoint.step, outcome.name] = outcome.spectra
                    if outcome.code:
                        findings.append(_finding(outcome, checkpoint))
                    if outcome.zero_block is not None:
                        blocks.append((checkpoint.step, outcome.name, outcome.zero_block))
    return results, [*findings, *zero_block_findings(blocks, len(trajectory.matrices))]


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def _single_threaded_workers(workers: int) -> Iterator[Executor]:
    """Threads that use one core each: many small decompositions gain nothing from threads of their own."""
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
    _OWN.workspace = increments.Workspace()


@dataclass(frozen=True)
class _Window:
    """Consecutive open checkpoints of one training, newest first, and what the previous step brought out.

    ``start`` is what dense weights are counted from.
    """

    now: OpenCheckpoint
    before: OpenCheckpoint | None = None
    earlier: OpenCheckpoint | None = None
    start: OpenCheckpoint | None = None
    solved: Mapping[str, MatrixSpectra] = field(default_factory=dict)
    reduced: Mapping[str, Cores] = field(default_factory=dict)

    def alone(self) -> _Window:
        """The same without predecessors."""
        return _Window(self.now, start=self.start)


def _segment_spectra(
    checkpoints: Sequence[Checkpoint],
    starts: Mapping[int, Checkpoint | None],
    executor: Executor,
    device: torch.device,
    progress: Callable[[int], None],
) -> Iterator[tuple[Checkpoint, list[_Outcome]]]:
    opened: list[tuple[ExitStack, OpenCheckpoint]] = []
    solved: dict[str, MatrixSpectra] = {}
    reduced: dict[str, Cores] = {}
    try:
        for checkpoint in checkpoints:
            stack = ExitStack()
            matrices = stack.enter_context(checkpoint.open())
            # A matrix is wanted three times: as itself, as a predecessor, and by the next increment's cosine.
            opened.insert(0, (stack, OpenCheckpoint(matrices.shapes, _kept_factors(matrices))))
            now, before, earlier = [each for _, each in opened] + [None] * (3 - len(opened))
            assert now is not None
            start = starts[checkpoint.step]
            beginning = None if start is None else stack.enter_context(start.open())
            if before is None and start is not None and start.step < checkpoint.step:
                before = beginning  # the first increment is what changed since the base
            window = _Window(now, before, earlier, beginning, solved, reduced)
            outcomes: list[_Outcome] = []
            tasks = [executor.submit(_solve_batch, names, window, device) for names in _batches(window)]
            for task in as_completed(tasks):
                outcomes += task.result()
                progress(len(task.result()))
            yield checkpoint, outcomes
            solved = {outcome.name: outcome.spectra for outcome in outcomes if outcome.spectra is not None}
            reduced = {outcome.name: outcome.cores for outcome in outcomes if outcome.cores is not None}
            if len(opened) == 3:
                opened.pop()[0].close()
    finally:
        for stack, _ in opened:
            stack.close()


def _kept_factors(matrices: OpenCheckpoint) -> Callable[[str], Matrix]:
    """Reads a matrix, factors once; dense matrices are too large to be kept."""
    kept = cache(matrices.__getitem__)
    return lambda name: kept(name) if matrices.shapes[name].rank else matrices[name]


def _batches(window: _Window) -> list[list[str]]:
    """Names grouped by what one batch can hold: one shape and rank, and predecessors of the same kind."""
    groups: dict[tuple, list[str]] = defaultdict(list)
    for name, shape in window.now.shapes.items():
        size = (shape.out, shape.in_, shape.rank, shape.holds)
        linked = tuple(
            (other.out, other.in_, other.rank) if (other := checkpoint.shapes.get(name)) else None
            for checkpoint in (window.before, window.earlier)
            if checkpoint is not None
        )
        groups[(size, linked, name in window.reduced)].append(name)
    chunks = []
    for ((out, in_, rank, _), *_), names in groups.items():
        length = max(1, BATCH_BYTES // (16 * rank * (out + in_))) if rank else 1
        chunks += [names[start : start + length] for start in range(0, len(names), length)]
    return chunks


@dataclass(frozen=True)
class _Outcome:
    name: str
    spectra: MatrixSpectra | None = None
    cores: Cores | None = None
    code: str = ""
    message: str = ""
    zero_block: ZeroBlock | None = None


def _solve_batch(names: Sequence[str], window: _Window, device: torch.device) -> list[_Outcome]:
    """One batch; a matrix that cannot be read costs only itself, a predecessor only the increment."""
    try:
        return _solve(names, window, device)
    except UnreadableMatrix as error:
        if len(names) > 1:
            return [outcome for name in names for outcome in _solve_batch([name], window, device)]
        if window.before is not None:
            return _solve_batch(names, window.alone(), device)
        return [_Outcome(names[0], code="OD101", message=str(error))]


def _solve(names: Sequence[str], window: _Window, device: torch.device) -> list[_Outcome]:
    shape = window.now.shapes[names[0]]
    if not shape.rank:
        return [_solve_dense(name, window, device) for name in names]
    now = _matrices(names, window.now)
    assert now is not None
    before = _before(names, window)
    if before is not None and before.matrices[0].shape != (shape.out, shape.in_):
        before = None  # the finding is the reader's: the matrix is another one
    solved = solve(now, before, device=device, workspace=_OWN.workspace)
    failures = [_failure(one.is_finite, bool(one.spectra.total.isnan().any())) for one in solved]
    if shape.holds == "state":
        solved = [replace(one, spectra=one.spectra.without_total()) for one in solved]
    return [
        _Outcome(name, one.spectra, one.cores, *failure, zero_blocks.of_factors(matrix))
        for name, matrix, one, failure in zip(names, now, solved, failures, strict=True)
    ]


def _solve_dense(name: str, window: _Window, device: torch.device) -> _Outcome:
    """One dense matrix: a weight, of which the start is subtracted, or an update as it is."""
    now = _dense(name, window.now, window, device)
    assert now is not None
    is_update = window.now.shapes[name].holds == "update"
    start = torch.zeros_like(now) if is_update else _dense(name, window.start, window, device)
    of_base = window.before is window.start and not is_update
    solved = solve_dense(now, start if of_base else _dense(name, window.before, window, device), start)
    values = [each for each in (solved.spectra.total, solved.spectra.increment) if each is not None]
    bad = any(bool(each.isnan().any()) for each in values)
    block = zero_blocks.of_dense(now, start, is_update=is_update)
    return _Outcome(name, solved.spectra, None, *_failure(solved.is_finite, bad), block)


def _dense(name: str, checkpoint: OpenCheckpoint | None, window: _Window, device: torch.device) -> Tensor | None:
    """The matrix in another checkpoint, if it is the same kind of matrix there."""
    shape = window.now.shapes[name]
    other = None if checkpoint is None else checkpoint.shapes.get(name)
    if checkpoint is None or other is None:
        return None
    if (other.out, other.in_, other.rank, other.holds) != (shape.out, shape.in_, 0, shape.holds):
        return None
    matrix = checkpoint[name]
    return matrix.to(device) if isinstance(matrix, Tensor) else None


def _failure(core_is_finite: bool, values_are_bad: bool) -> tuple[str, str]:
    if not core_is_finite:
        return (
            "OD201",
            "Its factors or their product are not finite, so its spectrum and the increment after it are NaN.",
        )
    if values_are_bad:
        return "OD207", "The singular value decomposition of its core did not converge, so its spectrum is NaN."
    return "", ""


def _before(names: Sequence[str], window: _Window) -> Before | None:
    matrices = _matrices(names, window.before)
    if matrices is None:
        return None
    noise = [window.solved[name].total_noise if name in window.solved else math.nan for name in names]
    if names[0] not in window.reduced:
        return Before(matrices, noise)
    earlier = _matrices(names, window.earlier)
    assert earlier is not None, "a step whose triangular factors hold a change has a predecessor"
    return Before(matrices, noise, [window.reduced[name] for name in names], earlier)


def _matrices(names: Sequence[str], checkpoint: OpenCheckpoint | None) -> list[LowRankMatrix] | None:
    if checkpoint is None or names[0] not in checkpoint.shapes:
        return None
    matrices = [checkpoint[name] for name in names]
    factored = [matrix for matrix in matrices if isinstance(matrix, LowRankMatrix)]
    return factored if len(factored) == len(names) else None


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


@dataclass(frozen=True)
class MatrixSpectra:
    """What is found out about one matrix at one step.

    Args:
        total: Singular values of the update since the start of training, descending.
        increment: Those of the change since the previous step of the same training, ``None`` if there is none.
        total_noise, increment_noise: Predicted energy of the storage format's rounding, see ``rounding``.
        inner_product: ⟨this increment, the previous increment⟩, NaN if there are not two.
        ranks: Columns of the factors of the total and of the increment, which is a sum of two; of a dense matrix the
            smaller dimension.
        found_by: How the values of both were found, one of ``schema.DECOMPOSITIONS`` each.
        edges: Largest singular value of the rounding noise alone in each; NaN for products of factors.
        factors: What the increment's null is conditioned on; ``None`` for dense matrices and across a change of rank.
    """

    total: Float[Tensor, " k"]
    increment: Float[Tensor, " l"] | None
    total_noise: float
    increment_noise: float
    inner_product: float
    ranks: tuple[int, int]
    found_by: tuple[str, str] = ("qr_core", "qr_core")
    edges: tuple[float, float] = (math.nan, math.nan)
    factors: FactorSpectra | None = None

    def without_total(self) -> MatrixSpectra:
        """The same where the start of training is not known: only the increment is an update."""
        nothing = torch.empty(0, dtype=torch.float64)
        return replace(self, total=nothing, ranks=(0, self.ranks[1]), found_by=("none", self.found_by[1]))


#: (step, matrix) to spectra.
Results: TypeAlias = dict[tuple[int, str], MatrixSpectra]


@dataclass(frozen=True)
class Before:
    """The previous step of a batch.

    Args:
        matrices: As they were; of one shape and rank.
        noise: Predicted rounding energy of each total then.
        reduced: Triangular factors of each pair of that step, for the cosine of the two increments.
        earlier: The matrices at the step before that, which goes with ``reduced``.
    """

    matrices: Sequence[LowRankMatrix]
    noise: Sequence[float]
    reduced: Sequence[Cores] | None = None
    earlier: Sequence[LowRankMatrix] | None = None


@dataclass(frozen=True)
class Solved:
    """Result for one matrix of a batch.

    Args:
        spectra: Its spectra.
        cores: Its triangular factors, which the next increment's cosine wants; ``None`` across a change of rank.
        is_finite: Whether its factors' product is.
        noise: Predicted rounding energy of the matrix as it is stored, without that of its start.
    """

    spectra: MatrixSpectra
    cores: Cores | None
    is_finite: bool
    noise: float


def solve(
    now: Sequence[LowRankMatrix],
    before: Before | None = None,
    start: Sequence[LowRankMatrix] | None = None,
    *,
    device: torch.device | str = "cpu",
    workspace: Workspace | None = None,
) -> list[Solved]:
    """Spectra of a batch of low-rank matrices of one shape and rank.

    Args:
        now: The matrices.
        before: The same at the previous step, if there is one.
        start: The same at the start of training, where their product was not zero: the total is the difference.
        device: Where the tall factors are worked on; the small cores are solved on the host.
        workspace: Buffers to use again, of this thread.
    """
    workspace = workspace or Workspace()
    rank = now[0].rank
    noise_at_start, values_from_start = [0.0] * len(now), None
    if start is not None:
        values_from_start, noise_at_start = _since(now, start, device, workspace)
    stacked = increments.stack(now, None if before is None else before.matrices, device, workspace)
    reduced = increments.cores(stacked)
    total_cores = reduced.total()
    energies = [side[:, :rank] for side in reduced.energies()]
    noise = [rounding.noise_energy(*row) for row in zip(now, *energies, strict=True)]
    totals = core_singular_values(total_cores)[:, :rank] if values_from_start is None else values_from_start
    total_rank = rank if start is None else rank + start[0].rank
    finite = total_cores.isfinite().all(-1).all(-1)
    same_rank = before is not None and before.matrices[0].rank == rank
    total_noise = [a + b for a, b in zip(noise, noise_at_start, strict=True)]
    if before is None:
        spectra = [
            MatrixSpectra(totals[i], None, total_noise[i], 0.0, math.nan, (total_rank, 0)) for i in range(len(now))
        ]
    else:
        columns = rank + before.matrices[0].rank
        changes = core_singular_values(reduced.increment())[:, :columns]
        inner = _inner_products(before, stacked, reduced, workspace)
        factors = reduced.factors() if same_rank else [None] * len(now)
        spectra = [
            MatrixSpectra(
                totals[i],
                changes[i],
                total_noise[i],
                noise[i] + before.noise[i],
                inner[i],
                (total_rank, columns),
                factors=factors[i],
            )
            for i in range(len(now))
        ]
    # The next increment's cosine wants this one's triangles; across a change of rank there is none.
    return [
        Solved(one, reduced.member(i) if same_rank else None, bool(finite[i]), noise[i])
        for i, one in enumerate(spectra)
    ]


def _since(
    now: Sequence[LowRankMatrix], start: Sequence[LowRankMatrix], device: torch.device | str, workspace: Workspace
) -> tuple[Float[Tensor, "batch k"], list[float]]:
    """Singular values of the change since the start, and the rounding energy of the start."""
    reduced = increments.cores(increments.stack(now, start, device, workspace))
    values = core_singular_values(reduced.increment())[:, : now[0].rank + start[0].rank]
    return values, [rounding.product_noise_energy(matrix) for matrix in start]


def _inner_products(before: Before, stacked: increments.Stack, reduced: Cores, workspace: Workspace) -> list[float]:
    ranks = {stacked.rank, before.matrices[0].rank}
    if before.reduced is None or before.earlier is None or ranks != {before.reduced[0].rank}:
        return [math.nan] * len(before.matrices)
    changes = increments.changes_between(before.matrices, before.earlier, stacked.left.device, workspace)
    left, right = increments.cross_grams(stacked, *changes)
    return increments.inner_products(reduced, increments.join(before.reduced), left, right).tolist()


def solve_dense(
    now: Float[Tensor, "out in"], before: Float[Tensor, "out in"] | None, start: Float[Tensor, "out in"] | None
) -> Solved:
    """Spectra of one dense weight's change, exactly, in float64 (:func:`dense_spectrum`).

    Args:
        now: The weight, in its own dtype and on its own device, where the SVD runs.
        before: At the previous step; ``None`` if there is none.
        start: At the start of training; where it is not known there is no total.
    """
    count = min(now.shape)
    profile = rounding.noise_profile(now)
    total, how, of_total = torch.empty(0, dtype=torch.float64), "none", None
    if start is not None:
        spectrum = dense_spectrum(_difference(now, start))
        total, how, of_total = spectrum.values, spectrum.method, profile + rounding.noise_profile(start)
    if before is None:
        increment, how_changed, of_change = None, "none", None
    elif before is start:  # what changed since the start is what changed at all
        increment, how_changed, of_change = total.clone(), how, of_total
    else:
        spectrum = dense_spectrum(_difference(now, before))
        increment, how_changed, of_change = spectrum.values, spectrum.method, profile + rounding.noise_profile(before)
    spectra = MatrixSpectra(
        total,
        increment,
        math.nan if of_total is None else of_total.energy,
        0.0 if of_change is None else of_change.energy,
        math.nan,
        (0 if start is None else count, 0 if increment is None else count),
        (how, how_changed),
        (math.nan if of_total is None else of_total.edge, math.nan if of_change is None else of_change.edge),
    )
    return Solved(spectra, None, bool(now.isfinite().all()), profile.energy)


def _difference(now: Tensor, before: Tensor) -> Float[Tensor, "out in"]:
    return now.detach().to(torch.float64) - before.detach().to(device=now.device, dtype=torch.float64)
