"""One step of a batch of matrices: the spectra of their totals and of what changed since the step before.

The same arithmetic serves matrices from checkpoints and those of a model in training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.spectra import increments, rounding
from dynamics.spectra.dense import dense_spectrum
from dynamics.spectra.increments import Cores, Workspace
from dynamics.spectra.singular_values import core_singular_values
from probes.low_rank import LowRankMatrix


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
    """

    total: Float[Tensor, " k"]
    increment: Float[Tensor, " l"] | None
    total_noise: float
    increment_noise: float
    inner_product: float
    ranks: tuple[int, int]
    found_by: tuple[str, str] = ("qr_core", "qr_core")

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
    total_noise = [a + b for a, b in zip(noise, noise_at_start, strict=True)]
    if before is None:
        spectra = [
            MatrixSpectra(totals[i], None, total_noise[i], 0.0, math.nan, (total_rank, 0)) for i in range(len(now))
        ]
    else:
        columns = rank + before.matrices[0].rank
        changes = core_singular_values(reduced.increment())[:, :columns]
        inner = _inner_products(before, stacked, reduced, workspace)
        spectra = [
            MatrixSpectra(
                totals[i], changes[i], total_noise[i], noise[i] + before.noise[i], inner[i], (total_rank, columns)
            )
            for i in range(len(now))
        ]
    # The next increment's cosine wants this one's triangles; across a change of rank there is none.
    keep = before is not None and before.matrices[0].rank == rank
    return [
        Solved(each, reduced.member(i) if keep else None, bool(finite[i]), noise[i]) for i, each in enumerate(spectra)
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
    noise = rounding.dense_noise_energy(now)
    total, total_noise, how = torch.empty(0, dtype=torch.float64), math.nan, "none"
    if start is not None:
        found = dense_spectrum(_difference(now, start))
        total, how, total_noise = found.values, found.method, noise + rounding.dense_noise_energy(start)
    if before is None:
        increment, change_noise, how_changed = None, 0.0, "none"
    elif before is start:  # what changed since the start is what changed at all
        increment, change_noise, how_changed = total.clone(), total_noise, how
    else:
        found = dense_spectrum(_difference(now, before))
        increment, how_changed = found.values, found.method
        change_noise = noise + rounding.dense_noise_energy(before)
    ranks = (0 if start is None else count, 0 if increment is None else count)
    spectra = MatrixSpectra(total, increment, total_noise, change_noise, math.nan, ranks, (how, how_changed))
    return Solved(spectra, None, bool(now.isfinite().all()), noise)


def _difference(now: Tensor, before: Tensor) -> Float[Tensor, "out in"]:
    return now.detach().to(torch.float64) - before.detach().to(device=now.device, dtype=torch.float64)
