"""The pure functions of this room, given dimensions and names: datasets in, variables out.

From raw spectra to the labelled groups of the result: every measure, its null model, and the summaries.

Spectra of a whole trajectory, labelled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import numpy as np
import torch
import xarray as xr

from dynamics import schema
from dynamics.checkpoints.trajectory import Checkpoint, Trajectory
from dynamics.findings import Finding
from dynamics.spectra import findings as notes
from dynamics.spectra import measures, null_models, raw
from dynamics.spectra.measures import known_quantiles
from dynamics.spectra.null_models import NullModel
from dynamics.spectra.raw import Place
from dynamics.spectra.rounding import DEFINITIONS as FLOOR_DEFINITIONS
from dynamics.spectra.rounding import NOISE_LIMIT, above_rounding
from dynamics.spectra.walk import trajectory_spectra

_DIMS = ("step", "kind", "matrix")
_EPSILON = {
    "F64": torch.finfo(torch.float64).eps,
    "F32": torch.finfo(torch.float32).eps,
    "BF16": torch.finfo(torch.bfloat16).eps,
    "F16": torch.finfo(torch.float16).eps,
}
#: Measures of which the null model has a mean and a band.
_NULL_MEASURES = (*measures.MEASURES, "marchenko_pastur_outliers")
_BOUNDS = {"": "mean", "_low": "5 % point", "_high": "95 % point"}


def variable(name: str, array: np.ndarray, definition: str = "", reference: str = "", **more: object) -> xr.Variable:
    """A variable of ``/update`` with its dimensions and attributes by the schema."""
    known = schema.UPDATE[name]
    return xr.Variable(known.dims, array, {**schema.attributes(known, definition, reference), **more})


def measures_of(update: xr.Dataset, noise: np.ndarray | None = None) -> dict[str, xr.Variable]:
    """Return every measure that is a function of the spectrum and its storage alone.

    Args:
        update: Singular values with their coordinates.
        noise: Predicted energy of the storage's rounding, ``(step, kind, matrix)``, where it is known.
    """
    values = torch.from_numpy(update["singular_value"].values)
    tolerance = torch.from_numpy(_rank_tolerance(update, noise))
    rank = measures.numerical_rank(values, tolerance)
    return {
        name: variable(name, measure.function(values).numpy(), measure.definition, measure.reference)
        for name, measure in measures.MEASURES.items()
    } | {
        "numerical_rank": variable(
            "numerical_rank",
            rank.numpy(),
            "number of σ > tol·σ₁; of products tol = ‖E‖_F/σ₁ with E the predicted rounding of the product, at least "
            "max(out, in)·2⁻⁵²; of dense matrices and gradients tol = max(out, in)·ε of the storage format, √ε where "
            "that exceeds 0.1",
            "Golub & Van Loan; of products Weyl's inequality, of dense matrices LAPACK's default tolerance",
        )
    }


def _rank_tolerance(update: xr.Dataset, noise: np.ndarray | None) -> np.ndarray:
    """σ/σ₁ down to which singular values count, ``(step, kind, matrix)``.

    By Weyl's inequality no σ moves by more than ‖E‖₂ ≤ ‖E‖_F. The factors of a product are rounded, not the product, so
    its E is far smaller than max(out, in)·ε says.
    """
    out, in_ = update["out"].values, update["in"].values
    stored = [
        measures.rank_tolerance(int(rows), int(columns), _EPSILON[str(storage)])
        for rows, columns, storage in zip(out, in_, update["storage"].values, strict=True)
    ]
    largest = np.nan_to_num(update["singular_value"].values).max(-1, initial=0.0)
    tolerance = np.broadcast_to(np.array(stored, dtype=np.float64), largest.shape)
    if noise is None:
        return tolerance.copy()
    relative = np.divide(np.sqrt(noise), largest, out=np.full(largest.shape, np.nan), where=largest > 0)
    computed = np.maximum(relative, np.maximum(out, in_) * _EPSILON["F64"])
    return np.where((update["adapter_rank"].values > 0) & np.isfinite(relative), computed, tolerance)


def null_models_of(update: xr.Dataset) -> tuple[xr.Dataset, dict[str, xr.Variable]]:
    """The null model beside every number, and the measures that are relative to it.

    Of a product of factors that is a random LoRA, of a LoRA's increment white noise in its factors, of a dense matrix a
    Gaussian one.

    Returns:
        ``/null``: mean, 5 % and 95 % point of each measure, ``(step, kind, matrix)``; and for ``/update``
        ``entropy_deficit``, ``null_percentile`` and ``marchenko_pastur_outliers``. NaN for the increment of a LoRA
        whose factors at the previous step are not known (finding OD208).
    """
    shape = update["count"].shape
    null = {f"{name}{bound}": np.full(shape, np.nan) for name in _NULL_MEASURES for bound in _BOUNDS}
    values, entropy = update["singular_value"].values, update["entropy_energy"].values
    outliers, percentile = np.full(shape, np.nan), np.full(shape, np.nan)
    band = {"singular_value_low": np.full(values.shape, np.nan), "singular_value_high": np.full(values.shape, np.nan)}
    norm = update["frobenius_norm"].values
    for places, model in chain(_models(update), _increment_models(update)):
        for bound, numbers in (("", model.mean), ("_low", model.low), ("_high", model.high)):
            for name in _NULL_MEASURES:
                null[f"{name}{bound}"][places] = numbers[name]
        # A matrix has its newest shape; where it was smaller before, it had fewer values than that allows.
        count = min(model.spectrum_low.shape[-1], values.shape[-1])
        for bound, shape in (("low", model.spectrum_low), ("high", model.spectrum_high)):
            relative = shape[..., :count].numpy()
            band[f"singular_value_{bound}"][(*places, slice(count))] = norm[places][:, None] * relative
        outliers[places] = null_models.outliers(torch.from_numpy(values[places]), model.edge).numpy()
        percentile[places] = model.percentile(torch.from_numpy(entropy[places])).numpy()
    return _null_dataset(update, null, band), {
        "entropy_deficit": variable(
            "entropy_deficit",
            null["entropy_energy"] - entropy,
            "mean energy entropy of the null, minus entropy_energy; null of a total: a random LoRA of the same shape "
            "and rank; of a LoRA's increment: white noise of the same size in the factors, from where they were; of a "
            "dense matrix: a Gaussian one. Gradients are not white: any update made of them has a deficit",
            "independent Gaussian factors, drawn as Bartlett triangles (Bartlett 1933); dense: Dumitriu & Edelman 2002",
        ),
        "null_percentile": variable(
            "null_percentile",
            percentile,
            f"share of the null's draws ({null_models.DRAWS}; fewer of increments and of large dense matrices) whose "
            "energy entropy is smaller, in %; near 0 for any update made of gradients, so compare runs by "
            "entropy_deficit",
            "Monte-Carlo percentile",
        ),
        "marchenko_pastur_outliers": variable(
            "marchenko_pastur_outliers",
            outliers,
            "number of σ above the update's own median σ times the 99 % point of σ₁/median σ under the null; NaN for "
            "fewer than three σ or a zero median",
            "noise scale by the median: Gavish & Donoho 2014",
        ),
    }


def _models(update: xr.Dataset) -> Iterator[tuple[tuple[np.ndarray, ...], NullModel]]:
    """Places (step, kind, matrix) that share a shape and a rank of the factors, with their null model.

    Dense matrices are no products of factors: their null is a Gaussian matrix.
    """
    rank, out, in_ = update["factor_rank"].values, update["out"].values, update["in"].values
    factored = np.where(update["adapter_rank"].values > 0, rank, 0)
    present = np.nonzero((rank > 0) & ~_is_factored_increment(update))
    keys = np.stack([out[present[2]], in_[present[2]], factored[present]], axis=1)
    for key in np.unique(keys, axis=0):
        chosen, (rows, columns, columns_of_factors) = (keys == key).all(1), key.tolist()
        model = (
            null_models.random_lora_null(rows, columns, columns_of_factors)
            if columns_of_factors
            else null_models.gaussian_null(rows, columns)
        )
        yield tuple(axis[chosen] for axis in present), model


def _is_factored_increment(update: xr.Dataset) -> np.ndarray:
    """Which cells (step, kind, matrix) are increments of a product of factors."""
    increments = update["kind"].values == "increment"
    return (update["factor_rank"].values > 0) & increments[:, None] & (update["adapter_rank"].values > 0)


def _increment_models(update: xr.Dataset) -> Iterator[tuple[tuple[np.ndarray, ...], NullModel]]:
    """Places of LoRA increments whose factors are known, with a null for each.

    The noise depends on the shape and the order of the cells alone, so that checkpoints and records of the same steps
    have the same null.
    """
    increments = _is_factored_increment(update)
    if not increments.any():
        return
    kind = update["kind"].values.tolist().index("increment")
    factors = [update[f"{side}_factor_value"].values for side in ("left", "right")]
    changes = [update[f"{side}_factor_change"].values for side in ("left", "right")]
    counts = [np.isfinite(values).sum(-1) for values in factors]
    known = increments[:, kind] & np.isfinite(changes).all(0) & (sum(changes) > 0)
    step, matrix = np.nonzero(known)
    columns = (update["out"].values[matrix], update["in"].values[matrix], *(number[known] for number in counts))
    keys = np.stack([*columns, update["count"].values[step, kind, matrix]], axis=1)
    for key in np.unique(keys, axis=0):
        out, in_, p, q, count = key.tolist()
        chosen = (keys == key).all(1)
        values, sizes = ([torch.from_numpy(array[known][chosen]) for array in arrays] for arrays in (factors, changes))
        for cells, model in null_models.increment_null(
            values[0][:, :p], values[1][:, :q], sizes[0], sizes[1], out, in_, count=count, seed=null_models.SEED
        ):
            rows, places = step[chosen][cells], matrix[chosen][cells]
            yield (rows, np.full(len(rows), kind), places), model


def _null_dataset(update: xr.Dataset, arrays: dict[str, np.ndarray], band: dict[str, np.ndarray]) -> xr.Dataset:
    variables = {
        f"{name}{bound}": xr.Variable(
            _DIMS,
            arrays[f"{name}{bound}"],
            {
                "units": schema.MEASURES[name].units,
                "long_name": f"{schema.MEASURES[name].long_name} of the null, {words}",
                "definition": f"{words} over {null_models.DRAWS} products of Gaussian factors of the same shape; of a "
                "LoRA's increment over white noise in its factors, of a dense matrix over Gaussian ones, fewer where "
                "they are large",
            },
        )
        for name in _NULL_MEASURES
        for bound, words in _BOUNDS.items()
    }
    for (name, array), words in zip(band.items(), ("5 % point", "95 % point"), strict=True):
        attributes = {
            "units": "weight",
            "long_name": f"singular value of the null of the same norm, {words}",
            "definition": f"{words} of σ/‖σ‖_F over the draws, times this update's frobenius_norm",
        }
        variables[name] = xr.Variable((*_DIMS, "index"), array, attributes)
    shapes = zip(update["out"].values.tolist(), update["in"].values.tolist(), strict=True)
    variables["entropy_energy_gaussian"] = xr.Variable(
        "matrix",
        np.array([null_models.page_entropy(out, in_) for out, in_ in shapes], dtype=np.float64),
        {
            "units": "nat",
            "long_name": "mean spectral entropy of a dense Gaussian matrix of the same shape",
            "definition": "ψ(mn+1) − ψ(max+1) − (min−1)/(2 max)",
            "reference": "Page 1993",
        },
    )
    return xr.Dataset(variables, coords={dim: update[dim].variable for dim in (*_DIMS, "index")})


def direct_sums(update: xr.Dataset) -> dict[str, xr.Variable]:
    """The update of all matrices, and of all matrices of one role, as one, by the exact chain rule."""
    # A matrix that is not there adds nothing; one that failed, or whose increment is not known, makes the sum unknown.
    count, linked = update["count"].values, update["from_step"].values >= 0
    unknown = np.zeros(count.shape, dtype=bool)
    unknown[:, 1] = (count[:, 0] > 0) & (count[:, 1] == 0) & linked[:, None]
    energy = np.where((count > 0) | unknown, update["frobenius_norm"].values ** 2, 0.0)
    energy[..., parts_of_sums(update["matrix"].values.tolist())] = 0.0
    entropy, ratio = update["entropy_energy"].values, update["participation_ratio"].values
    whole = np.asarray(measures.entropy_of_direct_sum(energy, entropy))
    roles = np.unique(update["role"].values)
    member = [update["role"].values == role for role in roles]
    by_role = np.stack([energy[..., chosen].sum(-1) for chosen in member], -1)
    total = energy.sum(-1, keepdims=True)
    share = np.divide(by_role, total, out=np.full_like(by_role, np.nan), where=total > 0)
    sums = np.stack([measures.entropy_of_direct_sum(energy[..., c], entropy[..., c]) for c in member], -1)
    chain = "entropy of the direct sum of all updates, by the chain rule H(w) + Σ w SE, w ∝ ‖ΔW‖_F²"
    # No step has a predecessor: there is no increment, rather than one of norm 0.
    nothing = (update["count"].values == 0).all(-1)
    role_name = xr.Variable("role_name", roles, {"units": "1", "long_name": "role within the layer"})
    return {
        "role_name": role_name,
        "frobenius_norm_all": variable("frobenius_norm_all", np.where(nothing, np.nan, np.sqrt(total[..., 0]))),
        "entropy_energy_block_diagonal": variable("entropy_energy_block_diagonal", whole, chain),
        "effective_rank_block_diagonal": variable(
            "effective_rank_block_diagonal", np.exp(whole), f"exp of the {chain}"
        ),
        "participation_ratio_block_diagonal": variable(
            "participation_ratio_block_diagonal",
            np.asarray(measures.participation_ratio_of_direct_sum(energy, ratio)),
            "1/Σ(w²/PR), w ∝ ‖ΔW‖_F²",
        ),
        "frobenius_norm_by_role": variable(
            "frobenius_norm_by_role", np.where(np.expand_dims(nothing, -1), np.nan, np.sqrt(by_role))
        ),
        "energy_share_by_role": variable("energy_share_by_role", share),
        "entropy_energy_by_role": variable("entropy_energy_by_role", sums, chain.replace("all updates", "its updates")),
    }


def parts_of_sums(names: list[str]) -> list[bool]:
    """Which matrices are one adapter's part (``name@adapter``) of a sum that is there too."""
    known = set(names)
    return ["@" in name and name.rpartition("@")[0] in known for name in names]


def suggested_rank(update: xr.Dataset) -> dict[str, xr.Variable]:
    """``suggested_rank`` from each matrix's total at the last step where it has one."""
    values = update["singular_value"].sel(kind="total").values
    ranks = measures.rank_at_energy(torch.from_numpy(values), measures.ENERGY).numpy()
    last = np.full(ranks.shape[1], np.nan)
    for row in ranks:
        last = np.where(np.isnan(row), last, row)
    words = f"fewest directions that hold {measures.ENERGY:.0%} of Σσ² of the newest total"
    return {"suggested_rank": variable("suggested_rank", last, words, energy=measures.ENERGY)}


def quantiles_over_matrices(update: xr.Dataset, null: xr.Dataset) -> xr.Dataset:
    """``/summary``: quartiles over matrices of the norm and of each measure, and medians of the null band.

    Quartiles describe how matrices differ; the update of all matrices together is ``*_block_diagonal``.
    """
    names = ("frobenius_norm", "path_length", "increment_cosine", *schema.MEASURES)
    quartiles = {
        f"{name}_quantile": _over_matrices(update[name], list(schema.QUANTILES), f"{name}, quartiles over matrices")
        for name in names
    }
    bands = {
        f"{name}_null{bound}": _over_matrices(
            null[f"{name}{bound}"], [0.5], f"null of {name}, {words}, median over matrices"
        ).isel(quantile=0, drop=True)
        for name in _NULL_MEASURES
        for bound, words in _BOUNDS.items()
    }
    return xr.Dataset({**quartiles, **bands})


def _over_matrices(array: xr.DataArray, quantiles: list[float], words: str) -> xr.DataArray:
    """Quantiles of the numbers that are there; NaN where there are none."""
    found = known_quantiles(array.transpose(..., "matrix").values, quantiles)
    dims = [dim for dim in array.dims if dim != "matrix"]
    coords = {**{dim: array[dim].variable for dim in dims}, "quantile": quantiles}
    attrs = {"units": array.attrs["units"], "long_name": words}
    return xr.DataArray(found, coords, [*dims, "quantile"], attrs=attrs)


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


def raw_spectra(
    trajectory: Trajectory,
    *,
    device: str = "cpu",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[xr.Dataset, list[Finding]]:
    """The raw update (see ``raw``) of a whole trajectory, and what went wrong.

    Args:
        trajectory: The run.
        device: Where the QR decompositions run.
        workers: Threads; by default one for each core.
        progress: Called with the number of matrices just finished.
    """
    results, findings = trajectory_spectra(trajectory, device=device, workers=workers, progress=progress)
    return raw.raw_update(_steps(trajectory), _places(trajectory), results), findings


def analyse_spectra(
    trajectory: Trajectory, *, device: str = "cpu", workers: int | None = None
) -> tuple[dict[str, xr.Dataset], list[Finding]]:
    """Spectra, measures, null models and their summaries over a whole trajectory, and the findings."""
    update, findings = raw_spectra(trajectory, device=device, workers=workers)
    groups = measured(update)
    return groups, [*findings, *notes.notes(groups["update"])]


def _steps(trajectory: Trajectory) -> dict[int, tuple[int, int]]:
    """Step → (segment, previous step of the same training)."""
    last: dict[int, int] = {}
    steps = {}
    for checkpoint in trajectory.checkpoints:
        unknown = 0 if _starts_at_base(trajectory, checkpoint) else -1
        steps[checkpoint.step] = (checkpoint.segment, last.get(checkpoint.segment, unknown))
        last[checkpoint.segment] = checkpoint.step
    return steps


def _starts_at_base(trajectory: Trajectory, checkpoint: Checkpoint) -> bool:
    """Whether what dense weights were before training is known."""
    base = trajectory.base
    if base is None or checkpoint.step <= base.step:
        return False
    return any(shape.holds == "weight" and name in base.shapes for name, shape in checkpoint.shapes.items())


def _places(trajectory: Trajectory) -> dict[str, Place]:
    """One place for each matrix: its newest, with the largest rank it ever had."""
    places: dict[str, Place] = dict.fromkeys(trajectory.matrices, Place(0, 0, 0, ""))
    for checkpoint in trajectory.checkpoints:
        for name, shape in checkpoint.shapes.items():
            places[name] = Place(shape.out, shape.in_, max(shape.rank, places[name].rank), shape.dtype)
    return places
