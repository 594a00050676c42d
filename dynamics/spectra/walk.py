"""One step of a batch of matrices: the spectra of their totals, and of what changed since the step before.

Matrices of equal shape are solved together, those of checkpoints and those of a live model by the same functions.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.trajectory import Matrix, MatrixShape
from dynamics.spectra import increments, rounding
from dynamics.spectra.dense import dense_spectrum
from dynamics.spectra.increments import Cores, FactorSpectra, Workspace
from dynamics.spectra.leading import Remainder
from dynamics.spectra.singular_values import core_singular_values
from probes.low_rank import LowRankMatrix

#: Bytes of float64 stack that one batch works on: what stays in a CPU's last-level cache, what fills an accelerator.
BATCH_BYTES = {"cpu": 2**23}
BATCH_BYTES_ELSEWHERE = 2**26
#: Rows of a dense matrix that are looked at together.
_ROWS = 1024


@dataclass(frozen=True)
class MatrixSpectra:
    """Spectra of one matrix at one step.

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
        remainders: What is known of the whole spectrum of each where only leading values are.
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
    remainders: tuple[Remainder | None, Remainder | None] = (None, None)

    def without_total(self) -> MatrixSpectra:
        """Return the same where the start of training is not known: only the increment is an update."""
        nothing = torch.empty(0, dtype=torch.float64)
        return replace(self, total=nothing, ranks=(0, self.ranks[1]), found_by=("none", self.found_by[1]))


@dataclass(frozen=True)
class BatchResult:
    """Result for one matrix of a batch, and what the next step needs of it.

    Args:
        spectra: Its spectra.
        cores: Its triangular factors, for the inner product with the next increment; ``None`` for dense matrices and
            across a change of rank.
        is_finite: Whether the matrix is.
        noise: Predicted rounding energy of the matrix as it is stored, without that of its start.
    """

    spectra: MatrixSpectra
    cores: Cores | None
    is_finite: bool
    noise: float


@dataclass(frozen=True)
class Previous:
    """A batch at the previous step.

    Args:
        matrices: Of one shape and rank.
        noise: Predicted rounding energy of each as it is stored; of dense matrices it is not needed.
        cores: Triangular factors of each from that step, for the inner product of the two increments.
        earlier: The matrices at the step before that, which go with ``cores``.
    """

    matrices: Sequence[Matrix]
    noise: Sequence[float] = ()
    cores: Sequence[Cores] | None = None
    earlier: Sequence[LowRankMatrix] | None = None

    @classmethod
    def of_factors(
        cls,
        matrices: Sequence[LowRankMatrix],
        results: Sequence[BatchResult | None],
        earlier: Callable[[], Sequence[LowRankMatrix]] | None,
    ) -> Previous:
        """Return the previous step of low-rank matrices with as much as is known of it.

        Args:
            matrices: The matrices then.
            results: Their results then, ``None`` where there is none.
            earlier: Reads the matrices at the step before that; called only if all triangular factors are there.
                ``None`` where no inner products are wanted.
        """
        noise = [
            rounding.product_noise_energy(matrix) if result is None else result.noise
            for matrix, result in zip(matrices, results, strict=True)
        ]
        cores = [result.cores for result in results if result is not None and result.cores is not None]
        if earlier is None or len(cores) < len(matrices):
            return cls(matrices, noise)
        return cls(matrices, noise, cores, earlier())


def batches(
    shapes: Mapping[str, MatrixShape], device: Callable[[str], torch.device], kind: Callable[[str], Hashable]
) -> list[list[str]]:
    """Group the names of matrices that :func:`solve_batch` takes together, as many as its buffers may hold.

    Args:
        shapes: Name to shape; a batch has one, and dense matrices are alone.
        device: The device a matrix is worked on.
        kind: What else must be the same in a batch.

    >>> pair = dict.fromkeys("ab", MatrixShape(4, 4, 1, "F32"))
    >>> batches({**pair, "c": MatrixShape(4, 4, 0, "F32")}, lambda name: torch.device("cpu"), lambda name: None)
    [['a', 'b'], ['c']]
    """
    groups: dict[tuple[MatrixShape, torch.device, Hashable], list[str]] = defaultdict(list)
    for name, shape in shapes.items():
        groups[shape, device(name), kind(name)].append(name)
    chunks = []
    for (shape, where, _), names in groups.items():
        allowed = BATCH_BYTES.get(where.type, BATCH_BYTES_ELSEWHERE)
        length = max(1, allowed // (16 * shape.rank * (shape.out + shape.in_))) if shape.rank else 1
        chunks += [names[first : first + length] for first in range(0, len(names), length)]
    return chunks


def solve_batch(
    now: Sequence[Matrix],
    previous: Previous | None = None,
    start: Sequence[Matrix] | None = None,
    *,
    top: int | None = None,
    device: torch.device | str = "cpu",
    workspace: Workspace | None = None,
    fast: bool = False,
) -> list[BatchResult]:
    """Return the spectra of a batch of matrices of one shape, all dense or all of one rank.

    Of a dense matrix without ``start`` there is no total: the matrix is a weight. A low-rank matrix without one is
    itself the total.

    Args:
        now: The matrices. Dense ones are decomposed where they are, in float64 (:func:`dense_spectrum`).
        previous: The same at the previous step, if there is one.
        start: The same at the start of training; of low-rank matrices only if their product was not zero then.
        top: How many leading singular values of dense matrices are wanted; by default all.
        device: Where tall factors are worked on; the small cores are solved on the host.
        workspace: Buffers to use again, of this thread.
        fast: Whether triangular factors come from Grams where those hold them, see ``singular_values.tall_triangle``.
    """
    if isinstance(now[0], Tensor):
        before, first = (
            [None] * len(now) if past is None else _dense(past) for past in (previous and previous.matrices, start)
        )
        return [_solve_dense(*ends, top) for ends in zip(_dense(now), before, first, strict=True)]
    begins = None if start is None else factored(start)
    return _solve_factors(factored(now), previous, begins, device, workspace or Workspace(), fast=fast)


def _dense(matrices: Sequence[Matrix]) -> list[Tensor]:
    return [matrix for matrix in matrices if isinstance(matrix, Tensor)]


def factored(matrices: Sequence[Matrix]) -> list[LowRankMatrix]:
    """Return a batch of low-rank matrices as such."""
    products = [matrix for matrix in matrices if isinstance(matrix, LowRankMatrix)]
    assert len(products) == len(matrices), "a batch is all dense or all factored"
    return products


def _solve_factors(
    now: Sequence[LowRankMatrix],
    previous: Previous | None,
    start: Sequence[LowRankMatrix] | None,
    device: torch.device | str,
    workspace: Workspace,
    *,
    fast: bool,
) -> list[BatchResult]:
    rank = now[0].rank
    noise_at_start, values_from_start = [0.0] * len(now), None
    if start is not None:
        from_start, noise_at_start = _since(now, start, device, workspace, fast=fast)
        values_from_start = core_singular_values(from_start.increment())[:, : rank + start[0].rank]
    before = None if previous is None else factored(previous.matrices)
    stacked = increments.stack(now, before, device, workspace)
    reduced = increments.cores(stacked, fast=fast)
    total_cores = reduced.total()
    energies = [side[:, :rank] for side in reduced.energies()]
    noise = _noise(now, stacked, *energies)
    totals = core_singular_values(total_cores)[:, :rank] if values_from_start is None else values_from_start
    total_rank = rank if start is None else rank + start[0].rank
    finite = total_cores.isfinite().all(-1).all(-1)
    same_rank = before is not None and before[0].rank == rank
    routes = _routes(reduced)
    found_by = list(zip(routes if start is None else _routes(from_start), routes, strict=True))
    total_noise = [a + b for a, b in zip(noise, noise_at_start, strict=True)]
    if previous is None or before is None:
        spectra = [
            MatrixSpectra(totals[i], None, total_noise[i], 0.0, math.nan, (total_rank, 0), found_by[i])
            for i in range(len(now))
        ]
    else:
        columns = rank + before[0].rank
        changes = core_singular_values(reduced.increment())[:, :columns]
        inner = _inner_products(previous, before, stacked, reduced, workspace)
        factors = reduced.factors() if same_rank else [None] * len(now)
        values, values_of_changes = totals.unbind(), changes.unbind()
        spectra = [
            MatrixSpectra(
                values[i],
                values_of_changes[i],
                total_noise[i],
                noise[i] + previous.noise[i],
                inner[i],
                (total_rank, columns),
                found_by[i],
                factors=factors[i],
            )
            for i in range(len(now))
        ]
    # The inner product with the next increment needs this one's triangles; across a change of rank there is none.
    members = reduced.one_by_one() if same_rank else [None] * len(now)
    return list(map(BatchResult, spectra, members, finite.tolist(), noise))


def _noise(
    now: Sequence[LowRankMatrix],
    stacked: increments.Stack,
    left_energy: Float[Tensor, "batch rank"],
    right_energy: Float[Tensor, "batch rank"],
) -> list[float]:
    """Return the predicted energy of the rounding noise in each matrix as it is stored."""
    rank, formats = now[0].rank, {(matrix.left_factor.dtype, matrix.right_factor.dtype) for matrix in now}
    if len(formats) > 1:
        return [rounding.noise_energy(*row) for row in zip(now, left_energy, right_energy, strict=True)]
    sides = zip((stacked.left, stacked.right), formats.pop(), strict=True)
    left_ulps, right_ulps = (rounding.stacked_ulp_energy(side[:, :rank], dtype) for side, dtype in sides)
    return rounding.noise_of_ulps(stacked.scale[:, :rank], left_ulps, right_ulps, left_energy, right_energy).tolist()


def _since(
    now: Sequence[LowRankMatrix],
    start: Sequence[LowRankMatrix],
    device: torch.device | str,
    workspace: Workspace,
    *,
    fast: bool,
) -> tuple[Cores, list[float]]:
    """Return the triangular factors of the change since the start, and the rounding energy of the start."""
    reduced = increments.cores(increments.stack(now, start, device, workspace), fast=fast)
    return reduced, [rounding.product_noise_energy(matrix) for matrix in start]


def _routes(reduced: Cores) -> list[str]:
    """Return how each member's triangular factors were found, as ``schema.DECOMPOSITIONS`` has it."""
    assert reduced.by_gram is not None
    return ["gram_core" if by_gram else "qr_core" for by_gram in reduced.by_gram.tolist()]


def _inner_products(
    previous: Previous,
    before: Sequence[LowRankMatrix],
    stacked: increments.Stack,
    reduced: Cores,
    workspace: Workspace,
) -> list[float]:
    ranks = {stacked.rank, before[0].rank}
    if previous.cores is None or previous.earlier is None or ranks != {previous.cores[0].rank}:
        return [math.nan] * len(before)
    changes = increments.changes_between(before, previous.earlier, stacked.left.device, workspace)
    left, right = increments.cross_grams(stacked, *changes)
    return increments.increment_products(reduced, increments.join(previous.cores), left, right).tolist()


def _solve_dense(
    now: Float[Tensor, "out in"],
    before: Float[Tensor, "out in"] | None,
    start: Float[Tensor, "out in"] | None,
    top: int | None,
) -> BatchResult:
    count = min(now.shape)
    profile = rounding.noise_profile(now)
    total = increment = None
    of_total = of_change = None
    if start is not None:
        total, of_total = dense_spectrum(now, minus=start, top=top), profile + rounding.noise_profile(start)
    if before is start:  # what changed since the start is what changed at all
        increment, of_change = total, of_total
    elif before is not None:
        increment, of_change = dense_spectrum(now, minus=before, top=top), profile + rounding.noise_profile(before)
    spectra = MatrixSpectra(
        torch.empty(0, dtype=torch.float64) if total is None else total.values,
        None if increment is None else increment.values.clone(),
        math.nan if of_total is None else of_total.energy,
        0.0 if of_change is None else of_change.energy,
        math.nan,
        (0 if total is None else count, 0 if increment is None else count),
        ("none" if total is None else total.method, "none" if increment is None else increment.method),
        (math.nan if of_total is None else of_total.edge, math.nan if of_change is None else of_change.edge),
        remainders=(total and total.remainder, increment and increment.remainder),
    )
    return BatchResult(spectra, None, all(bool(rows.isfinite().all()) for rows in now.split(_ROWS)), profile.energy)
