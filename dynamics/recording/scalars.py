"""One record as a handful of numbers for a training log."""

from __future__ import annotations

import math

import numpy as np
import torch
import xarray as xr

from dynamics.spectra.dataset import parts_of_sums
from dynamics.spectra.measures import dominant_ratio, effective_rank


def update_numbers(update: xr.Dataset, gradient: xr.Dataset | None = None) -> dict[str, float]:
    """Norms over all matrices as one, and medians over matrices of two measures; what is not known is left out.

    Args:
        update, gradient: Raw datasets of one step.

    Returns:
        ``{total,increment}/{frobenius_norm,effective_rank_energy,dominant_ratio}`` and
        ``gradient/{norm_before_clip,norm_after_clip,effective_rank_energy}``.
    """
    numbers: dict[str, float] = {}
    alone = ~np.asarray(parts_of_sums(update["matrix"].values.tolist()), dtype=bool)
    for kind in update["kind"].values.tolist():
        values = update["singular_value"].sel(kind=kind).values[0]
        present = alone & (update["count"].sel(kind=kind).values[0] > 0)
        norms = np.where(np.isnan(values).all(-1), np.nan, np.sqrt(np.nansum(values**2, -1)))
        numbers[f"{kind}/frobenius_norm"] = _together(norms[present])
        numbers[f"{kind}/effective_rank_energy"] = _median(effective_rank(torch.from_numpy(values)).numpy())
        numbers[f"{kind}/dominant_ratio"] = _median(dominant_ratio(torch.from_numpy(values)).numpy())
    if gradient is not None:  # of what is trained now, which may be less than what has moved
        alone = ~np.asarray(parts_of_sums(gradient["matrix"].values.tolist()), dtype=bool)
        for name in ("norm_before_clip", "norm_after_clip"):
            numbers[f"gradient/{name}"] = _together(gradient[name].values[0][alone])
        values = torch.from_numpy(gradient["singular_value"].values[0])
        numbers["gradient/effective_rank_energy"] = _median(effective_rank(values).numpy())
    return {name: number for name, number in numbers.items() if math.isfinite(number)}


def _together(norms: np.ndarray) -> float:
    """Norm over all; not known if there is none, or one is not."""
    return math.sqrt(float((norms**2).sum())) if len(norms) else math.nan


def _median(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(np.median(known)) if len(known) else math.nan
