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
from dynamics.spectra.increments import Cores, FactorSpectra, Workspace
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
