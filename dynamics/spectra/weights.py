"""Spectra of the weights themselves at the last checkpoint, not of what training changed in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace

import torch
import xarray as xr
from torch import Tensor

from dynamics import schema
from dynamics.checkpoints.trajectory import MatrixShape, OpenCheckpoint, Trajectory, UnreadableMatrix
from dynamics.spectra import raw
from dynamics.spectra.dataset import measure_update
from dynamics.spectra.dense import dense_spectrum
from dynamics.spectra.rounding import noise_profile
from dynamics.spectra.walk import MatrixSpectra
from probes.low_rank import LowRankMatrix


def weights(
    trajectory: Trajectory, *, top: int | None = None, progress: Callable[[int], None] = lambda done: None
) -> xr.Dataset | None:
    """Return spectra and measures of every weight that is known whole: a dense one, or an adapter's beside its base.

    Args:
        trajectory: The run.
        top: How many leading singular values are wanted; by default all.
        progress: Called with the number of matrices just finished.

    Returns:
        Measures as in ``/update``, ``(matrix)``; ``None`` if no weight is known. Chance is a Gaussian matrix.
    """
    last = trajectory.checkpoints[-1]
    spectra: dict[tuple[int, str], MatrixSpectra] = {}
    shapes: dict[str, MatrixShape] = {}
    with ExitStack() as stack:
        after = stack.enter_context(last.open())
        before = None if trajectory.base is None else stack.enter_context(trajectory.base.open())
        for name, shape in last.shapes.items():
            weight = _weight(name, after, before)
            if weight is not None:
                spectra[last.step, name] = _spectrum(weight, top)
                shapes[name] = replace(shape, rank=0)
            progress(1)
    if not shapes:
        return None
    groups = measure_update(raw.raw_update({last.step: (last.segment, -1)}, shapes, spectra))
    update = groups["update"].sel(kind="total").isel(step=0).reset_coords(drop=True)
    dataset = update[[*schema.WEIGHTS, *(name for name in schema.BOUNDS if name in update)]]
    for name, variable in schema.WEIGHTS.items():
        dataset[name].attrs |= variable.attributes
    return dataset.assign_coords(index=groups["update"]["index"].variable).assign_attrs(at_step=last.step)


def _spectrum(weight: Tensor, top: int | None) -> MatrixSpectra:
    spectrum, noise, size = dense_spectrum(weight, top=top), noise_profile(weight), min(weight.shape)
    return MatrixSpectra(
        spectrum.values,
        None,
        noise.energy,
        0.0,
        math.nan,
        (size, 0),
        (spectrum.method, "none"),
        (noise.edge, math.nan),
        remainders=(spectrum.remainder, None),
    )


def _weight(name: str, after: OpenCheckpoint, before: OpenCheckpoint | None) -> Tensor | None:
    """Return W itself, or W⁰ + ΔW; ``None`` where that is not known."""
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
