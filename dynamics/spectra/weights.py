"""``/weights``: spectra of the weights themselves at the last checkpoint, not of what training changed in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
import xarray as xr
from torch import Tensor

from dynamics import schema
from dynamics.checkpoints.trajectory import OpenCheckpoint, Trajectory, UnreadableMatrix
from dynamics.spectra import raw
from dynamics.spectra.dataset import measured
from dynamics.spectra.dense import dense_spectrum
from dynamics.spectra.raw import Place
from dynamics.spectra.rounding import noise_profile
from dynamics.spectra.walk import MatrixSpectra
from probes.low_rank import LowRankMatrix

_KEPT = (
    "singular_value",
    "count",
    "decomposition",
    "frobenius_norm",
    "spectral_norm",
    "nuclear_norm",
    *schema.MEASURES,
)


def weights_of(trajectory: Trajectory, progress: Callable[[int], None] = lambda done: None) -> xr.Dataset | None:
    """Spectra and measures of every weight that is known whole: a dense one, or an adapter's beside its base.

    Args:
        trajectory: The run.
        progress: Called with the number of matrices just finished.

    Returns:
        Measures as in ``/update``, ``(matrix)``; ``None`` if no weight is known. Chance is a Gaussian matrix.
    """
    last = trajectory.checkpoints[-1]
    results: dict[tuple[int, str], MatrixSpectra] = {}
    places: dict[str, Place] = {}
    with ExitStack() as stack:
        after = stack.enter_context(last.open())
        before = None if trajectory.base is None else stack.enter_context(trajectory.base.open())
        for name, shape in last.shapes.items():
            weight = _weight(name, after, before)
            if weight is not None:
                found = dense_spectrum(weight)
                noise, size = noise_profile(weight), min(weight.shape)
                results[last.step, name] = MatrixSpectra(
                    found.values,
                    None,
                    noise.energy,
                    0.0,
                    math.nan,
                    (size, 0),
                    (found.method, "none"),
                    (noise.edge, math.nan),
                )
                places[name] = Place(shape.out, shape.in_, 0, shape.dtype)
            progress(1)
    if not places:
        return None
    groups = measured(raw.raw_update({last.step: (last.segment, -1)}, places, results))
    found = groups["update"].sel(kind="total").isel(step=0).reset_coords(drop=True)
    dataset = found[list(_KEPT)]
    for variable in dataset.data_vars.values():
        variable.attrs["long_name"] = variable.attrs["long_name"].replace("of the update", "of the weight")
    return dataset.assign_coords(index=groups["update"]["index"].variable).assign_attrs(at_step=last.step)


def _weight(name: str, after: OpenCheckpoint, before: OpenCheckpoint | None) -> Tensor | None:
    """W itself, or W⁰ + ΔW; ``None`` where that is not known."""
    try:
        matrix = after[name]
        if after.shapes[name].holds == "weight":
            return matrix if isinstance(matrix, Tensor) else None
        if after.shapes[name].holds == "state":
            return None
        start = before[name] if before is not None and name in before.shapes else None
    except UnreadableMatrix:
        return None
    if not isinstance(start, Tensor):
        return None
    change = matrix.to_dense() if isinstance(matrix, LowRankMatrix) else matrix
    return start.to(torch.float64) + change.detach().to(device=start.device, dtype=torch.float64)
