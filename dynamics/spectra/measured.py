"""From raw spectra to the labelled groups of the result: every measure, its null model, and the summaries."""

from __future__ import annotations

import numpy as np
import xarray as xr

from dynamics import schema
from dynamics.spectra.dataset import direct_sums, measures_of, null_models_of, quantiles_over_matrices, suggested_rank, variable
from dynamics.spectra.floor import DEFINITIONS as FLOOR_DEFINITIONS, above_rounding
from dynamics.spectra.rounding import NOISE_LIMIT

_OF_THE_GRADIENT = (
    "of a dense weight ∇W; of a LoRA pair s(∇_B·A + B·∇_A), what a small step along the factors' gradients does to the "
    "matrix"
)
#: Definitions of the gradient's own variables; each number is of the factors or weights as they are trained.
_GRADIENT_DEFINITIONS = {
    "norm_before_clip": "√Σ‖∂L/∂p‖² over the matrix's trainable parameters p at the end of the step's last backward "
    "pass, reduced over processes, summed over accumulation, without the loss scale",
    "norm_after_clip": "the same as the optimizer takes it, after clipping",
    "singular_value": f"after clipping, {_OF_THE_GRADIENT}",
    "frobenius_norm": f"√Σσ² after clipping, {_OF_THE_GRADIENT}",
}


def measured(raw_update: xr.Dataset, raw_gradient: xr.Dataset | None = None) -> dict[str, xr.Dataset]:
    """Groups of the result: ``update``, ``null``, ``summary``, and of gradients ``gradient``, ``null_gradient``.

    Args:
        raw_update, raw_gradient: As ``raw`` makes them; without a gradient there are no groups for it.
    """
    noise, inner_product = raw_update["noise_energy"].values, raw_update["inner_product"].values
    update = raw_update.drop_vars(["noise_energy", "inner_product"])
    how = {"flag_values": list(range(len(schema.DECOMPOSITIONS))), "flag_meanings": " ".join(schema.DECOMPOSITIONS)}
    update["decomposition"].attrs |= how
    norms = _norms(update["singular_value"].values)
    update = update.assign({name: variable(name, norm) for name, norm in norms.items()})
    update = update.assign(measures_of(update, noise))
    null, against_null = null_models_of(update)
    update = update.assign(against_null)
    update = update.assign(_rounding(update, noise)).assign(_geometry(update, inner_product))
    update = update.assign(direct_sums(update)).assign(suggested_rank(update))
    groups = {"update": update, "null": null, "summary": quantiles_over_matrices(update, null)}
    return groups if raw_gradient is None else groups | _gradient_groups(raw_gradient)


def _gradient_groups(raw: xr.Dataset) -> dict[str, xr.Dataset]:
    """As an update of one kind, so that both are measured by the same functions."""
    like_update = raw.expand_dims(kind=["gradient"], axis=1)
    norm = _norms(like_update["singular_value"].values)["frobenius_norm"]
    like_update = like_update.assign(frobenius_norm=variable("frobenius_norm", norm))
    like_update = like_update.assign(measures_of(like_update))
    null, against_null = null_models_of(like_update)
    measured_ = like_update.assign(against_null).isel(kind=0, drop=True)
    gradient = measured_[[*schema.GRADIENT, *raw.coords]]
    for name, definition in _GRADIENT_DEFINITIONS.items():
        gradient[name].attrs = schema.attributes(schema.GRADIENT[name], definition)
    gradient.attrs["space"] = "factor"
    return {"gradient": gradient, "null_gradient": null.isel(kind=0, drop=True)}


def _norms(values: np.ndarray) -> dict[str, np.ndarray]:
    """Of spectra padded with NaN. A failed spectrum is NaN throughout, an absent one has none: neither has a norm."""
    known = np.isfinite(values).any(-1)
    largest = np.nan_to_num(values).max(-1, initial=0.0)
    relative = np.divide(values, largest[..., None], out=np.zeros_like(values), where=largest[..., None] > 0)
    norms = {
        "frobenius_norm": largest * np.sqrt(np.nansum(relative**2, -1)),
        "spectral_norm": largest,
        "nuclear_norm": np.nansum(values, -1),
    }
    return {name: np.where(known, norm, np.nan) for name, norm in norms.items()}


def _rounding(update: xr.Dataset, noise: np.ndarray) -> dict[str, xr.Variable]:
    """Which updates are zero, which are spoiled by the rounding of their storage, and what is left without it."""
    norm = update["frobenius_norm"].values
    share = np.divide(np.sqrt(noise), norm, out=np.full_like(noise, np.nan), where=norm > 0) ** 2
    above = above_rounding(
        update["singular_value"].values,
        update["rounding_edge"].values,
        noise,
        np.minimum(update["out"].values, update["in"].values).astype(np.float64),
    )
    return {
        "is_zero": variable("is_zero", norm == 0),
        "quantisation_noise_share": variable(
            "quantisation_noise_share", share, "Σ ulp²/12 of the stored factors, carried to the product, over ‖·‖_F²"
        ),
        "quantisation_limited": variable(
            "quantisation_limited", np.nan_to_num(share) > NOISE_LIMIT, f"quantisation_noise_share > {NOISE_LIMIT}"
        ),
        **{name: variable(name, array, FLOOR_DEFINITIONS[name]) for name, array in above.items()},
    }


def _geometry(update: xr.Dataset, inner_product: np.ndarray) -> dict[str, xr.Variable]:
    """Length of each matrix's path, and whether it keeps its direction."""
    steps = update["step"].values.tolist()
    length = update["frobenius_norm"].sel(kind="increment").values
    origin = update["from_step"].values.tolist()
    path, cosine = np.full(length.shape, np.nan), np.full(length.shape, np.nan)
    for row in range(len(steps)):
        if origin[row] not in steps:
            # From a known start the first increment counts; where the start is unknown the path begins here.
            first = length[row] if origin[row] == 0 else 0.0
            path[row] = np.where(update["count"].values[row, 0] > 0, first, np.nan)
            continue
        before = steps.index(origin[row])
        path[row] = path[before] + length[row]
        sizes = length[row] * length[before]
        with np.errstate(invalid="ignore"):
            moved = sizes > 0  # a zero increment has no direction, and rounding must not lend it one
        np.divide(inner_product[row], sizes, out=cosine[row], where=moved)
        np.clip(cosine[row], -1, 1, out=cosine[row])
    return {
        "path_length": variable(
            "path_length",
            path,
            "Σ ‖increment‖_F since the start of the training, or since its first step here where that is unknown",
        ),
        "increment_cosine": variable(
            "increment_cosine", cosine, "⟨Δ_t, Δ_{t−1}⟩/(‖Δ_t‖_F ‖Δ_{t−1}‖_F), from r×r cross-Grams"
        ),
    }
