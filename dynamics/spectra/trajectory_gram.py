r"""Spectra of one low-rank matrix at many checkpoints, from one Gram matrix a side.

With the columns X = [B₁, ΔB₂, …, ΔB_T], ΔB_t = B_t − B_{t−1}, everything that spectra ask of a side are r×r blocks of
G = XᵀX and sums of them, since B_t is the sum of the first t blocks:

.. math:: B_s^\top B_t = \sum_{i \le s} \sum_{j \le t} G_{ij}, \qquad
          B_t^\top \Delta B_t = \sum_{i \le t} G_{it}, \qquad \Delta B_s^\top \Delta B_t = G_{st}

The triangular factor of [B_t, ΔB_t] is then a Cholesky factor of its 2r×2r Gram, the same for Aᵀ, and from there on
all is as in ``increments``. Products of the two sides' B_sᵀB_t are the inner products of the whole path. One product of
BLAS takes the place of T decompositions, for half the arithmetic and several times the speed.

A Gram has half the digits of its matrix. They suffice where the columns of [B_t, ΔB_t], brought to norm 1, are far from
dependent, and where B_t is not much smaller than what it is the sum of: with d the smallest pivot of the scaled
Cholesky factor and c² = min_i ‖B_t,i‖²/Σ‖terms‖², a direction is off by about ε/(d²c²) of itself. Where that is
possible (d²c² below ``TRUSTED``) the triangle comes from a QR decomposition, for this matrix, side and step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from dynamics.spectra import increments, rounding
from dynamics.spectra.increments import Cores, Workspace
from dynamics.spectra.path import path_gram
from dynamics.spectra.singular_values import FAINT, TRUSTED, core_singular_values, gram_triangles, padded_triangle
from dynamics.spectra.walk import BatchResult, MatrixSpectra
from probes.low_rank import LowRankMatrix


@dataclass(frozen=True)
class TrajectoryResult:
    """One matrix at all its steps.

    Args:
        steps: What :func:`~dynamics.spectra.walk.solve_batch` gives at each step.
        path: ⟨D_s, D_t⟩ of the totals, ``(step, step)``.
    """

    steps: list[BatchResult]
    path: Float[np.ndarray, "step step"]


@dataclass(frozen=True)
class _Side:
    """One side of a batch of matrices.

    Args:
        triangles: Triangular factors of [B_t, ΔB_t], ``(batch, step, 2r, 2r)``.
        by_gram: Where they come from the Gram.
        products: B_sᵀB_t.
        changes: ΔB_tᵀΔB_{t−1}, from the second step on.
        is_summable: Whether no B_t is much smaller than what it is the sum of, so that ``products`` hold.
        ulps: Σ ulp² over each column of B_t as it is stored.
    """

    triangles: Float[Tensor, "batch step columns columns"]
    by_gram: Bool[Tensor, "batch step"]
    products: Float[Tensor, "batch step r step r"]
    changes: Float[Tensor, "batch later r r"]
    is_summable: Bool[Tensor, " batch"]
    ulps: Float[Tensor, "batch step r"]


def solve_trajectories(
    matrices: Sequence[Sequence[LowRankMatrix]],
    *,
    device: torch.device | str = "cpu",
    workspace: Workspace | None = None,
) -> list[TrajectoryResult | None]:
    """Return the spectra of a batch of matrices at all steps of a training; the twin of ``walk.solve_batch`` a step.

    Args:
        matrices: Each at every step, ascending; all of one shape, and of the same rank at each step. Ranks may change
            from step to step.
        device: Where the Grams are formed; all that is small is solved on the host.
        workspace: Buffers to use again, of this thread.

    Returns:
        One result a matrix; ``None`` where a Gram cannot hold it: it is not finite, its squares overflow or vanish, or
        it has fewer rows than columns.

    >>> def step(t):
    ...     return LowRankMatrix(torch.tensor([[3.0 * t], [4.0 * t]]), torch.tensor([[0.0, 2.0]]), scale=0.5)
    >>> (result,) = solve_trajectories([[step(1), step(3)]])
    >>> [step.spectra.total.tolist() for step in result.steps], result.path.tolist()
    ([[5.0], [15.0]], [[25.0, 75.0], [75.0, 225.0]])
    """
    workspace = workspace or Workspace()
    ranks = [matrix.rank for matrix in matrices[0]]
    rank = max(ranks)
    if 2 * rank > min(matrices[0][0].shape):
        return [None] * len(matrices)
    scales = torch.stack([increments.scales(steps, rank) for steps in matrices])
    left, is_left_held = _side(matrices, "left", rank, device, workspace)
    right, is_right_held = _side(matrices, "right", rank, device, workspace)
    products = left.products.mul_(right.products).mul_(scales[:, :, :, None, None]).mul_(scales[:, None, None])
    paths = products.sum((2, 4)).numpy()
    results: list[TrajectoryResult | None] = [None] * len(matrices)
    held = is_left_held & is_right_held
    is_summable = left.is_summable & right.is_summable
    for index in torch.nonzero(held)[:, 0].tolist():
        path = paths[index] if is_summable[index] else path_gram(matrices[index])
        cores = Cores(left.triangles[index], right.triangles[index], rank, scales[index], _shifted(scales[index]))
        by_gram = (left.by_gram[index] & right.by_gram[index]).tolist()
        noise = rounding.noise_of_ulps(scales[index], left.ulps[index], right.ulps[index], *cores.energies())
        steps = _results(matrices[index], cores, by_gram, noise.tolist(), left.changes[index], right.changes[index])
        results[index] = TrajectoryResult(steps, path)
    return results


def _shifted(scales: Float[Tensor, "step r"]) -> Float[Tensor, "step r"]:
    """Return the scales of the step before, at the first step those of itself."""
    return torch.cat([scales[:1], scales[:-1]])


def _side(
    matrices: Sequence[Sequence[LowRankMatrix]], name: str, rank: int, device: torch.device | str, workspace: Workspace
) -> tuple[_Side, Bool[Tensor, " batch"]]:
    """Return one side, and of which matrices it holds."""
    steps = len(matrices[0])
    rows, ulps = _rows(matrices, name, rank, device, workspace)
    for step in range(steps - 1, 0, -1):
        rows[:, step] -= rows[:, step - 1]
    gram = _row_products(rows.flatten(1, 2), name, workspace)
    energies = gram.diagonal(dim1=1, dim2=2).unflatten(1, (steps, rank))
    is_held = energies.isfinite().flatten(1).all(1)  # no entry is larger than those of the diagonal
    for index, step, column in torch.nonzero(energies < FAINT).tolist():
        is_held[index] &= not bool(rows[index, step, column].any())
    gram[~is_held] = 0.0
    blocks = gram.unflatten(1, (steps, rank)).unflatten(3, (steps, rank))
    return _reduced(matrices, name, blocks, energies, ulps, workspace), is_held


def _rows(
    matrices: Sequence[Sequence[LowRankMatrix]], name: str, rank: int, device: torch.device | str, workspace: Workspace
) -> tuple[Float[Tensor, "batch step r n"], Float[Tensor, "batch step r"]]:
    """Return the columns of B_t, or the rows of A_t, in float64, and Σ ulp² of each; zeros up to the largest rank."""
    size = matrices[0][0].shape[0 if name == "left" else 1]
    rows = workspace.take(name, (len(matrices), len(matrices[0]), rank, size), device)
    ulps = torch.zeros(rows.shape[:-1], dtype=torch.float64)
    for index, trajectory in enumerate(matrices):
        for step, matrix in enumerate(trajectory):
            factor, present = _factor(matrix, name), rows[index, step, : matrix.rank]
            present[:] = factor
            rows[index, step, matrix.rank :] = 0
            ulps[index, step, : matrix.rank] = rounding.stacked_ulp_energy(present, factor.dtype)
    return rows, ulps


def _row_products(
    rows: Float[Tensor, "batch columns n"], name: str, workspace: Workspace
) -> Float[Tensor, "batch columns columns"]:
    """Return XXᵀ of each member, on the host."""
    if rows.device.type != "cpu":
        return (rows @ rows.mT).cpu()
    grams = workspace.take(f"{name} gram", (*rows.shape[:2], rows.shape[1]), "cpu")
    for member, gram in zip(rows.numpy(), grams.numpy(), strict=True):
        with np.errstate(over="ignore", invalid="ignore"):  # what is not finite stays so
            np.matmul(member, member.T, out=gram)  # which NumPy hands to syrk
    return grams


def _reduced(
    matrices: Sequence[Sequence[LowRankMatrix]],
    name: str,
    gram: Float[Tensor, "batch step r step r"],
    energies: Float[Tensor, "batch step r"],
    ulps: Float[Tensor, "batch step r"],
    workspace: Workspace,
) -> _Side:
    rank = gram.shape[2]
    # Into buffers: arrays of this size that come and go leave holes in the memory of each thread.
    beside, products = (workspace.take(f"{name} {part}", tuple(gram.shape), "cpu") for part in ("beside", "products"))
    torch.cumsum(gram, 1, out=beside)  # B_sᵀΔB_t
    torch.cumsum(beside, 3, out=products)
    total, mixed, change = (_of_steps(array) for array in (products, beside, gram))
    mixed[:, 0], change[:, 0] = 0.0, 0.0  # B₁ stands in the place of a change
    triangles, pivots = gram_triangles(torch.cat([torch.cat([total, mixed], 3), torch.cat([mixed.mT, change], 3)], 2))
    terms, remaining = energies.cumsum(1), total.diagonal(dim1=-2, dim2=-1).clamp_min(0)
    shares = torch.where(terms > 0, remaining / terms, 1.0).amin(-1)
    by_gram = pivots.square() * shares >= TRUSTED
    for index, step in torch.nonzero(~by_gram).tolist():
        triangles[index, step] = _exact_triangle(matrices[index], name, step, rank)
    return _Side(triangles, by_gram, products, _of_steps(gram, later=1), (shares >= TRUSTED).all(1), ulps)


def _of_steps(blocks: Float[Tensor, "batch step r step r"], later: int = 0) -> Float[Tensor, "batch steps r r"]:
    """Return the blocks of each step with itself, or with that ``later`` steps before."""
    return blocks.diagonal(offset=-later, dim1=1, dim2=3).movedim(-1, 1).clone()


def _exact_triangle(
    trajectory: Sequence[LowRankMatrix], name: str, step: int, rank: int
) -> Float[Tensor, "columns columns"]:
    """Return the triangular factor of [B_t, ΔB_t] by a QR decomposition."""
    now, before = (_factor(trajectory[position], name).to(torch.float64) for position in (step, max(step - 1, 0)))
    tall = torch.zeros(2 * rank, now.shape[1], dtype=torch.float64, device=now.device)
    tall[: len(now)] = now
    tall[rank : rank + len(now)] += now
    tall[rank : rank + len(before)] -= before
    return padded_triangle(tall.mT).cpu()


def _factor(matrix: LowRankMatrix, name: str) -> Float[Tensor, "r n"]:
    return matrix.left_factor.detach().mT if name == "left" else matrix.right_factor.detach()


def _results(
    trajectory: Sequence[LowRankMatrix],
    cores: Cores,
    by_gram: Sequence[bool],
    noise: Sequence[float],
    left_changes: Float[Tensor, "later r r"],
    right_changes: Float[Tensor, "later r r"],
) -> list[BatchResult]:
    """Return the spectra of one matrix at all steps from its triangular factors."""
    total_cores = cores.total()
    totals, changes = core_singular_values(total_cores), core_singular_values(cores.increment())
    finite = total_cores.isfinite().all(-1).all(-1).tolist()
    factors = cores.factors()
    inner = increments.increment_products(
        cores.members(slice(2, None)), cores.members(slice(1, -1)), left_changes[1:], right_changes[1:]
    ).tolist()
    routes = ["gram_core" if is_gram else "qr_core" for is_gram in by_gram]
    results = []
    for step, matrix in enumerate(trajectory):
        before = trajectory[step - 1] if step else None
        # As in ``walk``: where a rank grew at this step or changed at the one before, there is none.
        is_linked = before is not None and step > 1 and trajectory[step - 2].rank == before.rank >= matrix.rank
        columns = 0 if before is None else matrix.rank + before.rank
        spectra = MatrixSpectra(
            totals[step, : matrix.rank],
            changes[step, :columns] if step else None,
            noise[step],
            noise[step] + noise[step - 1] if step else 0.0,
            inner[step - 2] if is_linked else float("nan"),
            (matrix.rank, columns),
            found_by=(routes[step], routes[step]),
            factors=factors[step] if before is not None and before.rank == matrix.rank else None,
        )
        results.append(BatchResult(spectra, None, finite[step], noise[step]))
    return results
