"""One Fisher record as a handful of numbers for a training log."""

from __future__ import annotations

import math

import numpy as np
import xarray as xr

from dynamics.fisher.concentration import captured
from dynamics.fisher.entropy import spectral_entropy
from dynamics.fisher.spectrum import fisher_eigenvectors
from dynamics.schema import GLOBAL

#: Leading directions whose share of the update is logged.
LEADING = 16


def fisher_numbers(record: xr.Dataset | None) -> dict[str, float]:
    """Plug-in SE and ρ of all trainable parameters, and the update's share in 16 directions; unknown ones are left out.

    To watch, not to conclude from: intervals and nulls are in the result.

    Args:
        record: The raw record of one step; without one there is nothing to log.

    Returns:
        ``fisher/{spectral_entropy,dominant_ratio,captured_16}``.
    """
    if record is None:
        return {}
    here = record.sel(block=GLOBAL).isel(step=0)
    known = np.isfinite(np.diagonal(here["gram"].values))
    if not known.any():
        return {}
    gram = here["gram"].values[np.ix_(known, known)][None]
    values, vectors = fisher_eigenvectors(gram)
    product = here["update_product"].values[known][None]
    norm = np.sqrt(here["update_norm_squared"].values)[None]
    total = float(values.sum())
    numbers = {
        "fisher/spectral_entropy": float(spectral_entropy(values)[0]),
        "fisher/dominant_ratio": float(values[0, 0]) / total if total > 0 else math.nan,
        f"fisher/captured_{LEADING}": float(captured(values, vectors, product, norm, [LEADING])[0, 0]),
    }
    return {name: number for name, number in numbers.items() if math.isfinite(number)}
