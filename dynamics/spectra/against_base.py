r"""Updates beside the weights they change: relative size, shared subspaces, and intruder dimensions.

Every number has its chance level: what an update of the same singular values, turned at random, would give. Without it
an overlap or a count of "intruders" says little: in 4096 dimensions a random direction has no base vector near it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from dynamics import schema
from dynamics.checkpoints.trajectory import Matrix, OpenCheckpoint, Trajectory, UnreadableMatrix
from dynamics.spectra.base_directions import (
    BaseDecomposition,
    LeadingDecomposition,
    decompose_base,
    decompose_leading,
    leading_left,
)
from dynamics.spectra.cache import cached_tensors, content_key, write_tensors
from dynamics.spectra.dense import gram_matrix
from dynamics.spectra.singular_values import triangle
from probes.low_rank import LowRankMatrix

#: Entries of a matrix that are rounded to see what merging would keep of an update.
_ROUNDED = 2**18
#: Variables that need no decomposition.
_WITHOUT_DIRECTIONS = ("base_norm", "changed_share", "lost_in_merge")
#: Directions that are compared by default.
TOP_K = 10
#: A direction with no larger cosine with any singular vector of the base is an intruder (Shuttleworth et al. 2024).
INTRUDER_COSINE = 0.5


@dataclass(frozen=True)
class Overlap:
    """What an update shares with the base's leading directions, beside chance.

    Args:
        left, right: ‖U_kᵀU⁰_k‖_F²/k, the mean squared cosine of principal angles; 1: the same subspace.
        left_null, right_null: k/out and k/in.
        energy_left, energy_right: share of ‖ΔW‖_F² in the span of U⁰_k, and of V⁰_k.
    """

    left: float
    right: float
    left_null: float
    right_null: float
    energy_left: float
    energy_right: float


@dataclass(frozen=True)
class Intruders:
    """Leading left singular directions of the tuned weight that no singular vector of the base resembles.

    Args:
        count: How many of the k leading ones.
        energy_share: Their share of the k leading σ².
        null_count, null_energy_share: Means of the same over updates turned at random.
    """

    count: int
    energy_share: float
    null_count: float
    null_energy_share: float


def leading_vectors(update: Matrix, k: int) -> tuple[Float[Tensor, "out k"], Float[Tensor, "in k"]]:
    """Return the k leading left and right singular vectors; of a product of factors from its r×r core alone.

    >>> left, right = leading_vectors(LowRankMatrix(torch.tensor([[0.0], [2.0]]), torch.tensor([[1.0, 0.0]])), 1)
    >>> left.abs().flatten().tolist(), right.abs().flatten().tolist()
    ([0.0, 1.0], [1.0, 0.0])
    """
    if isinstance(update, LowRankMatrix):
        left, right = torch.linalg.qr(update.left.detach().cpu()), torch.linalg.qr(update.right.detach().cpu().mT)
        inner_left, _, inner_right = torch.linalg.svd(left.R @ right.R.mT)
        return left.Q @ inner_left[:, :k], right.Q @ inner_right.mT[:, :k]
    leading = decompose_leading(update, k)
    return leading.left[:, :k], leading.right[:, :k]


def base_overlap(update: Matrix, base: BaseDecomposition | LeadingDecomposition, k: int = TOP_K) -> Overlap:
    """Return what the update shares with the k leading directions of the base.

    Args:
        update: ``(out, in)``.
        base: Of the weight that it changes.
        k: Directions; at most as many as there are.

    >>> base = decompose_base(torch.diag(torch.tensor([3.0, 2.0, 1.0])))
    >>> base_overlap(torch.diag(torch.tensor([0.0, 0.0, 1.0])), base, k=1).energy_left
    0.0
    """
    k = min(k, len(base.values), *update.shape)
    left, right = leading_vectors(update, k)
    base_left, base_right = base.left[:, :k], base.right[:, :k]
    energy = _norm(update) ** 2
    if isinstance(update, LowRankMatrix):
        inside_left = (triangle(update.right.detach().cpu().mT) @ (base_left.mT @ update.left.detach().cpu()).mT).norm()
        inside_right = (triangle(update.left.detach().cpu()) @ (update.right.detach().cpu() @ base_right)).norm()
    else:
        dense = update.detach().to(device="cpu", dtype=torch.float64)
        inside_left, inside_right = (base_left.mT @ dense).norm(), (dense @ base_right).norm()
    return Overlap(
        left=float((left.mT @ base_left).square().sum()) / k,
        right=float((right.mT @ base_right).square().sum()) / k,
        left_null=k / update.shape[0],
        right_null=k / update.shape[1],
        energy_left=float(inside_left) ** 2 / energy if energy > 0 else float("nan"),
        energy_right=float(inside_right) ** 2 / energy if energy > 0 else float("nan"),
    )


def intruders(
    update: Matrix,
    weight: Float[Tensor, "out in"],
    base: BaseDecomposition | LeadingDecomposition,
    *,
    k: int = TOP_K,
    cosine: float = INTRUDER_COSINE,
    draws: int = 4,
    seed: int = 0,
) -> Intruders:
    r"""Count the directions that the update brought among the k leading ones of W⁰ + ΔW (Shuttleworth et al. 2024).

    Direction j is an intruder if max_i |⟨u_j, u⁰_i⟩| < ``cosine`` over *all* singular vectors of the base. The count
    saturates, and a large update turned at random makes intruders too: read the share of energy, beside its null.

    Args:
        update: ``(out, in)``.
        weight: W⁰.
        base: Its decomposition.
        k: Leading directions that are looked at.
        cosine: ε.
        draws: Of the null: updates with the same singular values, turned at random (Haar).
        seed: Of the draws.
    """
    start = weight.detach().to(device="cpu", dtype=torch.float64)
    product = base.product if isinstance(base, LeadingDecomposition) else gram_matrix(start)

    def intruding(change: Matrix) -> tuple[int, float]:
        squares, left = leading_left(start, product, change, min(k, *start.shape))
        strange = base.strange(left, cosine)
        total = float(squares.sum())
        return int(strange.sum()), float(squares[strange].sum()) / total if total > 0 else float("nan")

    count, share = intruding(update)
    generator = torch.Generator().manual_seed(seed)
    null = [intruding(_turned(update, generator)) for _ in range(draws)]
    counts, shares = zip(*null, strict=True) if null else ((float("nan"),), (float("nan"),))
    return Intruders(count, share, float(np.mean(counts)), float(np.mean(shares)))


def _turned(update: Matrix, generator: torch.Generator) -> LowRankMatrix | Tensor:
    """Return a matrix of the same singular values between random orthonormal vectors."""
    if isinstance(update, LowRankMatrix):
        core = triangle(update.left.detach().cpu()) @ triangle(update.right.detach().cpu().mT).mT
        values = torch.linalg.svdvals(core)
    else:
        values = torch.linalg.svdvals(_dense(update))
    sides = (
        torch.linalg.qr(torch.randn(length, len(values), generator=generator, dtype=torch.float64)).Q
        for length in update.shape
    )
    left, right = sides
    return LowRankMatrix(left * values, right.mT) if isinstance(update, LowRankMatrix) else (left * values) @ right.mT


def _dense(update: Matrix) -> Float[Tensor, "out in"]:
    if isinstance(update, LowRankMatrix):
        return update.to_dense().detach().cpu()
    return update.detach().to(device="cpu", dtype=torch.float64)


def _norm(update: Matrix) -> float:
    if isinstance(update, LowRankMatrix):
        return float((triangle(update.left.detach()) @ triangle(update.right.detach().mT).mT).norm())
    return float(update.detach().to(torch.float64).norm())


#: Part of the key under which a decomposition is kept: another algorithm, another number.
_VERSION = 1


def compare_with_base(
    trajectory: Trajectory,
    raw_update: xr.Dataset,
    *,
    k: int = TOP_K,
    directions: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> xr.Dataset | None:
    """Return relative sizes at every step, and at the last one what merging keeps.

    Overlaps and intruders at the last step are added if directions are asked for.

    Args:
        trajectory: The run, with its base; without one there is no result.
        raw_update: Its raw update.
        k: Leading directions that are compared.
        directions: Whether base and update are decomposed: seconds a matrix of a few thousand rows. The base's
            decomposition is kept (:mod:`dynamics.spectra.cache`).
        progress: Called with the number of matrices just finished.

    Returns:
        ``relative_size(step, matrix)`` and the rest ``(matrix)``; NaN for matrices that the base does not have.
    """
    base = trajectory.base
    if base is None:
        return None
    names = raw_update["matrix"].values.tolist()
    last = trajectory.checkpoints[-1]
    rows: dict[str, dict[str, float]] = {}
    with base.open() as before, last.open() as after:
        for name in names:
            if name in before.shapes:
                rows[name] = _of_matrix(name, before, after, k if directions else 0)
            progress(1)
    per_matrix = [name for name in schema.BASE if name != "relative_size"] if directions else _WITHOUT_DIRECTIONS
    arrays = {name: np.array([rows.get(matrix, {}).get(name, np.nan) for matrix in names]) for name in per_matrix}
    values = raw_update["singular_value"].sel(kind="total").values
    norm = np.where(np.isfinite(values).any(-1), np.sqrt(np.nansum(values**2, -1)), np.nan)
    if "frobenius_norm" in raw_update:  # of spectra of which only leading values are known
        norm = raw_update["frobenius_norm"].sel(kind="total").fillna(norm).values
    base_norm = arrays["base_norm"]
    arrays["relative_size"] = np.divide(norm, base_norm, out=np.full_like(norm, np.nan), where=base_norm > 0)
    return xr.Dataset(
        schema.label_arrays(schema.BASE, arrays),
        coords={"step": raw_update["step"].variable, "matrix": raw_update["matrix"].variable},
        attrs={"k": k, "cosine": INTRUDER_COSINE, "at_step": last.step, "directions": int(directions)},
    )


def _of_matrix(name: str, before: OpenCheckpoint, after: OpenCheckpoint, k: int) -> dict[str, float]:
    """Return what is known of one matrix; with ``k`` = 0 no directions."""
    try:
        weight = before[name]
        if not isinstance(weight, Tensor):
            return {}
        numbers = {"base_norm": float(torch.linalg.vector_norm(weight, dtype=torch.float64))}
        if name not in after.shapes or after.shapes[name].holds == "state":
            return numbers
        now, holds = after[name], after.shapes[name].holds
        numbers |= kept_by_rounding(now, weight, is_weight=holds == "weight")
        if not k:
            return numbers
        update = _update(now, weight, holds)
    except UnreadableMatrix:
        return {}
    if not _is_finite(weight) or not _is_finite(update):
        return numbers
    base = decompose_leading(weight, k, lambda: _decomposition(weight, k))
    shared = base_overlap(update, base, k)
    numbers |= {f"overlap_{side}": getattr(shared, side) for side in ("left", "right", "left_null", "right_null")}
    numbers |= {"energy_left": shared.energy_left, "energy_right": shared.energy_right}
    strange = intruders(update, weight, base, k=k)
    return numbers | {
        "intruders": float(strange.count),
        "intruders_null": strange.null_count,
        "intruder_energy": strange.energy_share,
        "intruder_energy_null": strange.null_energy_share,
    }


def kept_by_rounding(now: Matrix, weight: Float[Tensor, "out in"], *, is_weight: bool) -> dict[str, float]:
    """Return ``changed_share`` and, of updates, ``lost_in_merge`` (see ``schema.BASE``); nothing if not all is finite.

    Args:
        now: The trained weight, or its update.
        weight: W⁰ as it is stored.
        is_weight: Which of the two ``now`` is.

    >>> weight = torch.ones(1, 2, dtype=torch.bfloat16)
    >>> kept_by_rounding(torch.tensor([[2**-7, 2**-10]]), weight, is_weight=False)
    {'changed_share': 0.5, 'lost_in_merge': 0.015384615384615385}
    >>> kept_by_rounding(torch.full((1, 2), 1 + 2**-10), weight, is_weight=True)
    {'changed_share': 0.0}
    """
    stride = max(1, math.ceil(weight.numel() / _ROUNDED))
    rows = slice(min(stride // 2, max(len(weight) - 1, 0)), None, stride)
    start = weight[rows].detach().cpu()
    if isinstance(now, Tensor):
        part = now[rows].detach().cpu()
    else:
        part = (now.left_factor[rows].detach().cpu().double() * now.scales()) @ now.right.detach().cpu()
    if not start.numel() or not bool(part.isfinite().all()) or not bool(start.isfinite().all()):
        return {}
    if is_weight:
        coarser = max(part.dtype, start.dtype, key=lambda dtype: torch.finfo(dtype).eps)
        return {"changed_share": float((part.to(coarser) != start.to(coarser)).double().mean())}
    change, before = part.double(), start.double()
    merged = (before + change).to(start.dtype).double()
    energy = float(change.square().sum())
    lost = float((merged - before - change).square().sum()) / energy if energy > 0 else math.nan
    return {"changed_share": float((merged != before).double().mean()), "lost_in_merge": lost}


def _update(now: Matrix, weight: Tensor, holds: str) -> Matrix:
    if isinstance(now, Tensor) and holds == "weight":
        return now.to(torch.float64) - weight.to(torch.float64)
    return now


def _is_finite(matrix: Matrix) -> bool:
    parts = [matrix] if isinstance(matrix, Tensor) else [matrix.left_factor, matrix.right_factor]
    return all(bool(part.isfinite().all()) for part in parts)


def _decomposition(weight: Tensor, k: int) -> BaseDecomposition:
    """Return all left singular vectors and the k leading right ones, in float32, from the cache if possible."""
    key = content_key(weight, "decomposition", _VERSION, k)
    count = min(weight.shape)
    k = min(k, count)
    shapes = {"left": (weight.shape[0], count), "values": (count,), "right": (weight.shape[1], k)}
    kept = cached_tensors(key, shapes)
    if kept is None:
        whole = decompose_base(weight)
        kept = {"left": whole.left.float(), "values": whole.values, "right": whole.right[:, :k].float()}
        write_tensors(key, kept)
    return BaseDecomposition(kept["left"].double(), kept["values"].double(), kept["right"].double())
