"""``/base``: the newest update of each matrix beside the weight that it changed, with chance beside each number."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from dynamics.checkpoints.trajectory import Matrix, OpenCheckpoint, Trajectory, UnreadableMatrix
from dynamics.spectra.against_base import (
    INTRUDER_COSINE,
    TOP_K,
    Decomposition,
    decompose,
    intruders,
    overlap,
)
from dynamics.spectra.cache import content_key, read_tensors, write_tensors

#: Part of the key under which a decomposition is kept: another algorithm, another number.
_VERSION = 1

_PER_MATRIX = {
    "base_norm": ("weight", "Frobenius norm of the base", "‖W⁰‖_F"),
    "overlap_left": ("1", "overlap of left subspaces", "‖U_kᵀU⁰_k‖_F²/k of update and base; 1: the same subspace"),
    "overlap_right": ("1", "overlap of right subspaces", "‖V_kᵀV⁰_k‖_F²/k of update and base"),
    "overlap_left_null": ("1", "overlap of left subspaces by chance", "k/out"),
    "overlap_right_null": ("1", "overlap of right subspaces by chance", "k/in"),
    "energy_left": ("1", "energy of the update in the base's leading left directions", "‖U⁰_kᵀΔW‖_F²/‖ΔW‖_F²"),
    "energy_right": ("1", "energy of the update in the base's leading right directions", "‖ΔW V⁰_k‖_F²/‖ΔW‖_F²"),
    "intruders": ("1", "intruder dimensions", "of the k leading left directions of W⁰ + ΔW: max_i |⟨u, u⁰_i⟩| < ε"),
    "intruders_null": ("1", "intruder dimensions by chance", "mean over updates of the same σ, turned at random"),
    "intruder_energy": ("1", "energy in intruder dimensions", "their share of the k leading σ²"),
    "intruder_energy_null": ("1", "energy in intruder dimensions by chance", "as for intruders_null"),
}
_REFERENCE = "Shuttleworth et al. 2024"


def beside_base(
    trajectory: Trajectory,
    raw_update: xr.Dataset,
    *,
    k: int = TOP_K,
    directions: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> xr.Dataset | None:
    """Relative sizes at every step, and where directions are asked for, overlaps and intruders at the last one.

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
    nothing: dict[str, float] = {}
    columns = {key: np.array([rows.get(name, nothing).get(key, np.nan) for name in names]) for key in _PER_MATRIX}
    if not directions:
        columns = {"base_norm": columns["base_norm"]}
    values = raw_update["singular_value"].sel(kind="total").values
    norm = np.where(np.isfinite(values).any(-1), np.sqrt(np.nansum(values**2, -1)), np.nan)
    size = np.divide(norm, columns["base_norm"], out=np.full_like(norm, np.nan), where=columns["base_norm"] > 0)
    relative = {"units": "1", "long_name": "relative size of the update", "definition": "‖ΔW‖_F/‖W⁰‖_F"}
    return xr.Dataset(
        {
            "relative_size": (("step", "matrix"), size, relative),
            **{key: ("matrix", column, _attributes(key)) for key, column in columns.items()},
        },
        coords={"step": raw_update["step"].variable, "matrix": raw_update["matrix"].variable},
        attrs={"k": k, "cosine": INTRUDER_COSINE, "at_step": last.step, "directions": int(directions)},
    )


def _of_matrix(name: str, before: OpenCheckpoint, after: OpenCheckpoint, k: int) -> dict[str, float]:
    """What is known of one matrix; ``k`` = 0: its norm alone."""
    try:
        weight = before[name]
        if not isinstance(weight, Tensor):
            return {}
        found = {"base_norm": float(torch.linalg.vector_norm(weight, dtype=torch.float64))}
        if not k or name not in after.shapes or after.shapes[name].holds == "state":
            return found
        update = _update(after[name], weight, after.shapes[name].holds)
    except UnreadableMatrix:
        return {}
    if not _is_finite(weight) or not _is_finite(update):
        return found
    base = _decomposition(weight, k)
    shared = overlap(update, base, k)
    found |= {f"overlap_{side}": getattr(shared, side) for side in ("left", "right", "left_null", "right_null")}
    found |= {"energy_left": shared.energy_left, "energy_right": shared.energy_right}
    strange = intruders(update, weight, base, k=k)
    return found | {
        "intruders": float(strange.count),
        "intruders_null": strange.null_count,
        "intruder_energy": strange.energy_share,
        "intruder_energy_null": strange.null_energy_share,
    }


def _update(now: Matrix, weight: Tensor, holds: str) -> Matrix:
    if isinstance(now, Tensor) and holds == "weight":
        return now.to(torch.float64) - weight.to(torch.float64)
    return now


def _is_finite(matrix: Matrix) -> bool:
    parts = [matrix] if isinstance(matrix, Tensor) else [matrix.left_factor, matrix.right_factor]
    return all(bool(part.isfinite().all()) for part in parts)


def _decomposition(weight: Tensor, k: int) -> Decomposition:
    """All left singular vectors and the k leading right ones, in single precision; from the cache if they are there."""
    key = content_key(weight, "decomposition", _VERSION, k)
    count = min(weight.shape)
    k = min(k, count)
    shapes = {"left": (weight.shape[0], count), "values": (count,), "right": (weight.shape[1], k)}
    kept = read_tensors(key, shapes)
    if kept is None:
        whole = decompose(weight)
        kept = {"left": whole.left.float(), "values": whole.values, "right": whole.right[:, :k].float()}
        write_tensors(key, kept)
    return Decomposition(kept["left"].double(), kept["values"].double(), kept["right"].double())


def _attributes(name: str) -> dict[str, str]:
    units, long_name, definition = _PER_MATRIX[name]
    found = {"units": units, "long_name": long_name, "definition": definition}
    return found | ({"reference": _REFERENCE} if "intruder" in name else {})
