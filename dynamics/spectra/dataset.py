"""From raw spectra to the labelled groups of the result: every measure, its null model, and the summaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool

from dynamics import schema
from dynamics.schema import Variable, label_arrays
from dynamics.spectra import leading, measures, null_models
from dynamics.spectra.measures import known_quantiles
from dynamics.spectra.null_models import NullModel
from dynamics.spectra.rounding import NOISE_LIMIT, above_rounding
from dynamics.spectra.workers import single_threaded_workers

_EPSILON = {
    "F64": torch.finfo(torch.float64).eps,
    "F32": torch.finfo(torch.float32).eps,
    "BF16": torch.finfo(torch.bfloat16).eps,
    "F16": torch.finfo(torch.float16).eps,
}

#: Number of the decomposition that gives leading singular values alone.
_LEADING = schema.DECOMPOSITIONS.index("lanczos")

#: Two spectra of one matrix whose relative ℓ2 distance exceeds this do not belong to the same weights. By Mirsky's
#: inequality ‖σ(X) − σ(Y)‖₂ ≤ ‖X − Y‖_F, so storing factors in another format moves a spectrum by no more than the
#: rounding of both: 2·2⁻⁸ = 0.0078 in bfloat16 and 2·2⁻¹¹ = 0.001 in float16 if every entry is off by half a unit in
#: its last place and all in the same direction; in trainings up to 0.0014 and 0.0002 were measured. Trainings that
#: differ in nothing but their seed are 0.03 to 0.5 apart in each matrix, from the first step on.
SAME_SPECTRA = 1e-2


@dataclass(frozen=True)
class Agreement:
    """How far two measurements of one step's total updates are apart.

    Args:
        difference: Largest relative distance of two spectra, ‖σ − σ′‖₂/max(‖σ‖₂, ‖σ′‖₂), over the matrices that both
            measurements know; NaN if there is none.
        matrix: The matrix with this distance, ``""`` if there is none.
    """

    difference: float
    matrix: str

    @property
    def is_same(self) -> bool:
        """Whether both measured the same weights."""
        return self.difference <= SAME_SPECTRA

    @property
    def is_other(self) -> bool:
        """Whether they measured different weights; false, as is ``is_same``, where nothing can be compared."""
        return self.difference > SAME_SPECTRA


def same_spectra(a: xr.Dataset, b: xr.Dataset) -> Agreement:
    """Compare the singular values of the total updates in two raw updates of one step.

    A spectrum that is missing or NaN in either is not compared. Zero and zero agree.

    Args:
        a, b: Raw updates (see ``raw``) of one step each.

    >>> from dynamics.spectra.raw import raw_update
    >>> same_spectra(raw_update({1: (0, -1)}, {}, {}), raw_update({1: (0, -1)}, {}, {}))
    Agreement(difference=nan, matrix='')
    """
    names, *rows = np.intersect1d(a["matrix"].values, b["matrix"].values, return_indices=True)
    totals = [
        update["singular_value"].sel(kind="total").values.reshape(update.sizes["matrix"], update.sizes["index"])[row]
        for update, row in zip((a, b), rows, strict=True)
    ]
    comparable = np.isfinite(totals[0]).any(-1) & np.isfinite(totals[1]).any(-1)
    if not comparable.any():
        return Agreement(float("nan"), "")
    longest = max(values.shape[-1] for values in totals)
    first, second = (
        np.pad(values, ((0, 0), (0, longest - values.shape[-1])), constant_values=np.nan) for values in totals
    )
    # Of leading values alone, those that both have; else what is not there is zero.
    found_by = [
        update["decomposition"].sel(kind="total").values.reshape(-1)[row]
        for update, row in zip((a, b), rows, strict=True)
    ]
    alone = (found_by[0] == _LEADING) | (found_by[1] == _LEADING)
    both = (np.isfinite(first) & np.isfinite(second)) | ~alone[:, None]
    first, second = (np.where(both, np.nan_to_num(values), 0.0) for values in (first, second))
    largest = np.maximum(first.max(-1), second.max(-1))[:, None]
    first, second = (
        np.divide(values, largest, out=np.zeros_like(values), where=largest > 0) for values in (first, second)
    )
    size = np.maximum(np.linalg.norm(first, axis=-1), np.linalg.norm(second, axis=-1))
    distance = np.linalg.norm(first - second, axis=-1)
    relative = np.where(comparable, np.divide(distance, size, out=np.zeros_like(size), where=size > 0), -1.0)
    worst = int(relative.argmax())
    return Agreement(float(relative[worst]), str(names[worst]))


def measure_update(raw_update: xr.Dataset, raw_gradient: xr.Dataset | None = None) -> dict[str, xr.Dataset]:
    """Return the groups of the result that follow from spectra.

    Args:
        raw_update, raw_gradient: As ``raw`` makes them; without a gradient there are no groups for it.

    Returns:
        ``update``, ``null``, ``summary``, and of gradients ``gradient``, ``null_gradient``, ``summary_gradient``.
    """
    noise, inner_product = raw_update["noise_energy"].values, raw_update["inner_product"].values
    remainder = raw_update[[name for name in schema.RAW_REMAINDER if name in raw_update]]
    update = raw_update.drop_vars(["noise_energy", "inner_product", *remainder])
    flags = {"flag_values": list(range(len(schema.DECOMPOSITIONS))), "flag_meanings": " ".join(schema.DECOMPOSITIONS)}
    update["decomposition"].attrs |= flags
    update = update.assign(label_arrays(schema.UPDATE, _norms(update["singular_value"].values)))
    update = update.assign(measures_of(update, noise))
    if remainder:
        update = update.assign(_of_leading(update, remainder, noise))
    null, against_null = null_models_of(update)
    update = update.assign(against_null)
    update = update.assign(_rounding(update, noise)).assign(_geometry(update, inner_product))
    update = update.assign(direct_sums(update)).assign(suggested_rank(update))
    groups = {"update": update, "null": null, "summary": quantiles_over_matrices(update, null)}
    return groups if raw_gradient is None else groups | _gradient_groups(raw_gradient)


def _gradient_groups(raw_gradient: xr.Dataset) -> dict[str, xr.Dataset]:
    """Measure gradients by the functions of an update, as one of a single kind."""
    like_update = raw_gradient.expand_dims(kind=["gradient"], axis=1)
    norm = _norms(like_update["singular_value"].values)["frobenius_norm"]
    like_update = like_update.assign(label_arrays(schema.UPDATE, {"frobenius_norm": norm}))
    like_update = like_update.assign(measures_of(like_update)).assign(_gradient_noise(like_update))
    null, against_null = null_models_of(like_update)
    gradient = like_update.assign(against_null).isel(kind=0, drop=True)[[*schema.GRADIENT, *raw_gradient.coords]]
    gradient["frobenius_norm"].attrs = schema.GRADIENT["frobenius_norm"].attributes
    gradient.attrs["space"] = "factor"
    null = null.isel(kind=0, drop=True)
    finite = gradient.where(np.isfinite(gradient))
    summary = quantiles_over_matrices(finite, null, schema.SUMMARY_GRADIENT)
    return {"gradient": gradient, "null_gradient": null, "summary_gradient": summary}


#: Captured steps over which noise and signal of gradients are averaged.
_AVERAGED = 10


def _gradient_noise(gradient: xr.Dataset) -> dict[str, xr.Variable]:
    """Return signal and noise of gradients from two batch sizes; NaN where one micro-batch is all there is.

    Args:
        gradient: With ``micro_norm``, ``micro_batches`` and ``batch_size``, of one kind.
    """
    n = gradient["micro_batches"].values[..., None]
    of_whole, of_parts = (gradient[name].values ** 2 for name in ("norm_before_clip", "micro_norm"))
    n = np.where(n > 1, n, np.nan)
    signal, noise = (n * of_whole - of_parts) / (n - 1), (of_parts - of_whole) / (n - 1)
    alone = ~np.asarray(parts_of_sums(gradient["matrix"].values.tolist()), dtype=bool)
    sums = [np.nansum(part[..., alone], -1) for part in (noise, signal)]
    noises, signals = (
        np.stack([values[max(0, row - _AVERAGED + 1) : row + 1].sum(0) for row in range(len(values))])
        for values in sums
    )
    missing = ~np.isfinite(signal[..., alone]).any(-1) | ~(signals > 0)
    ratio = np.where(missing, np.nan, noises / np.where(missing, 1.0, signals))
    arrays = {
        "signal": signal,
        "noise": noise,
        "noise_to_signal": ratio,
        "noise_scale": ratio * gradient["batch_size"].values,
    }
    dims = {name: ("step", "kind", *schema.GRADIENT[name].dims[1:]) for name in arrays}
    return {name: xr.Variable(dims[name], values, schema.GRADIENT[name].attributes) for name, values in arrays.items()}


def measures_of(update: xr.Dataset, noise: np.ndarray | None = None) -> dict[str, xr.Variable]:
    """Return every measure that is a function of the spectrum and its storage alone.

    Args:
        update: Singular values with their coordinates.
        noise: Predicted energy of the storage's rounding, ``(step, kind, matrix)``, where it is known.
    """
    values = torch.from_numpy(update["singular_value"].values)
    tolerance = torch.from_numpy(_rank_tolerance(update, noise))
    arrays = {name: measure(values).numpy() for name, measure in measures.MEASURES.items()}
    arrays["numerical_rank"] = measures.numerical_rank(values, tolerance).numpy()
    return label_arrays(schema.UPDATE, arrays)


def _leading_alone(update: xr.Dataset) -> Bool[np.ndarray, "step kind matrix"]:
    """Return where only leading singular values are known; nowhere in a gradient."""
    found_by = update["decomposition"].values if "decomposition" in update else np.zeros(update["count"].shape)
    return found_by == _LEADING


def _of_leading(update: xr.Dataset, remainder: xr.Dataset, noise: np.ndarray) -> dict[str, xr.Variable]:
    """Return the bounds, and norms and measures with what leading values leave open as NaN, the rest exact."""
    alone = _leading_alone(update)
    values = update["singular_value"].values[alone]
    norm, ratio = (remainder[name].values[alone] for name in ("frobenius_norm", "participation_ratio"))
    known = leading.measures_of_leading(values, norm, ratio, _rank_tolerance(update, noise)[alone])
    arrays = {}
    for name in ("frobenius_norm", "nuclear_norm", "numerical_rank", *measures.MEASURES):
        arrays[name] = update[name].values.copy()
        arrays[name][alone] = norm if name == "frobenius_norm" else known.get(name, np.nan)
    bounds = {name: remainder[name].values for name in schema.BOUNDS}
    return label_arrays({**schema.UPDATE, **schema.BOUNDS}, arrays | bounds)


def _rank_tolerance(update: xr.Dataset, noise: np.ndarray | None) -> np.ndarray:
    """Return σ/σ₁ down to which singular values count, ``(step, kind, matrix)``.

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
    """Return the null model beside every number, and the measures that are relative to it.

    The null of a product of factors is a random LoRA, of a LoRA's increment white noise in its factors, of a dense
    matrix a Gaussian one.

    Returns:
        ``/null``: mean, 5 % and 95 % point of each measure, ``(step, kind, matrix)``; and for ``/update``
        ``entropy_deficit``, ``null_percentile`` and ``marchenko_pastur_outliers``. NaN for the increment of a LoRA
        whose factors at the previous step are not known (finding OD208).
    """
    values, entropy = update["singular_value"].values, update["entropy_energy"].values
    norm = update["frobenius_norm"].values
    statistics = [f"{name}{bound}" for name in schema.NULL_MEASURES for bound in ("", "_low", "_high")]
    null = {name: np.full(entropy.shape, np.nan) for name in statistics}
    null |= {f"singular_value{bound}": np.full(values.shape, np.nan) for bound in ("_low", "_high")}
    outliers, percentile = np.full(entropy.shape, np.nan), np.full(entropy.shape, np.nan)
    with single_threaded_workers() as executor:
        for cells, model in chain(_shape_models(update), _increment_models(update, executor)):
            for bound, numbers in (("", model.mean), ("_low", model.low), ("_high", model.high)):
                for name in schema.NULL_MEASURES:
                    null[f"{name}{bound}"][cells] = numbers[name]
            # A matrix has its newest shape; where it was smaller before, it had fewer values than that allows.
            count = min(model.spectrum_low.shape[-1], values.shape[-1])
            for bound, spectrum in (("_low", model.spectrum_low), ("_high", model.spectrum_high)):
                relative = spectrum[..., :count].numpy()
                null[f"singular_value{bound}"][(*cells, slice(count))] = norm[cells][:, None] * relative
            outliers[cells] = null_models.outliers(torch.from_numpy(values[cells]), model.edge).numpy()
            percentile[cells] = model.percentile(torch.from_numpy(entropy[cells])).numpy()
    outliers[_leading_alone(update)] = np.nan  # the median is not known
    shapes = zip(update["out"].values.tolist(), update["in"].values.tolist(), strict=True)
    null["entropy_energy_gaussian"] = np.array([null_models.page_entropy(*shape) for shape in shapes], dtype=np.float64)
    against_null = {
        "entropy_deficit": null["entropy_energy"] - entropy,
        "null_percentile": percentile,
        "marchenko_pastur_outliers": outliers,
    }
    coords = {dim: update[dim].variable for dim in schema.UPDATE["singular_value"].dims}
    return xr.Dataset(label_arrays(schema.NULL, null), coords), label_arrays(schema.UPDATE, against_null)


def _shape_models(update: xr.Dataset) -> Iterator[tuple[tuple[np.ndarray, ...], NullModel]]:
    """Yield cells (step, kind, matrix) that share a shape and a rank of the factors, with their null model.

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
    """Return which cells (step, kind, matrix) are increments of a product of factors."""
    increments = update["kind"].values == "increment"
    return (update["factor_rank"].values > 0) & increments[:, None] & (update["adapter_rank"].values > 0)


def _increment_models(update: xr.Dataset, executor: Executor) -> Iterator[tuple[tuple[np.ndarray, ...], NullModel]]:
    """Yield cells of LoRA increments whose factors are known, with a null for each.

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
    moved = increments[:, kind] & np.isfinite(changes).all(0) & (sum(changes) > 0)
    step, matrix = np.nonzero(moved)
    columns = (update["out"].values[matrix], update["in"].values[matrix], *(number[moved] for number in counts))
    keys = np.stack([*columns, update["count"].values[step, kind, matrix]], axis=1)
    for key in np.unique(keys, axis=0):
        out, in_, p, q, count = key.tolist()
        chosen = (keys == key).all(1)
        values, sizes = ([torch.from_numpy(array[moved][chosen]) for array in arrays] for arrays in (factors, changes))
        for part, model in null_models.increment_null(
            values[0][:, :p],
            values[1][:, :q],
            sizes[0],
            sizes[1],
            out,
            in_,
            executor,
            count=count,
            seed=null_models.SEED,
        ):
            rows = step[chosen][part]
            yield (rows, np.full(len(rows), kind), matrix[chosen][part]), model


def direct_sums(update: xr.Dataset) -> dict[str, xr.Variable]:
    """Return the measures of all matrices as one update, and of all matrices of one role, by the exact chain rule."""
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
    # No step has a predecessor: there is no increment, rather than one of norm 0.
    nothing = (update["count"].values == 0).all(-1)
    arrays = {
        "frobenius_norm_all": np.where(nothing, np.nan, np.sqrt(total[..., 0])),
        "entropy_energy_block_diagonal": whole,
        "effective_rank_block_diagonal": np.exp(whole),
        "participation_ratio_block_diagonal": np.asarray(measures.participation_ratio_of_direct_sum(energy, ratio)),
        "frobenius_norm_by_role": np.where(np.expand_dims(nothing, -1), np.nan, np.sqrt(by_role)),
        "energy_share_by_role": share,
        "entropy_energy_by_role": sums,
    }
    return label_arrays(schema.COORDINATES, {"role_name": roles}) | label_arrays(schema.UPDATE, arrays)


def parts_of_sums(names: list[str]) -> list[bool]:
    """Return which matrices are one adapter's part (``name@adapter``) of a sum that is there too."""
    present = set(names)
    return ["@" in name and name.rpartition("@")[0] in present for name in names]


def suggested_rank(update: xr.Dataset) -> dict[str, xr.Variable]:
    """Return ``suggested_rank``, from each matrix's total at the last step where it has one."""
    values = update["singular_value"].sel(kind="total").values
    ranks = measures.rank_at_energy(torch.from_numpy(values), measures.ENERGY).numpy()
    alone = _leading_alone(update)[:, update["kind"].values.tolist().index("total")]
    norm = update["frobenius_norm"].sel(kind="total").values
    ranks[alone] = leading.rank_at_energy_of_leading(values[alone], norm[alone], measures.ENERGY)
    last = np.full(ranks.shape[1], np.nan)
    for row, unknown in zip(ranks, alone, strict=True):
        last = np.where(np.isnan(row) & ~unknown, last, row)
    variables = label_arrays(schema.UPDATE, {"suggested_rank": last})
    variables["suggested_rank"].attrs["energy"] = measures.ENERGY
    return variables


def quantiles_over_matrices(
    group: xr.Dataset, null: xr.Dataset, summary: Mapping[str, Variable] = schema.SUMMARY
) -> xr.Dataset:
    """Return quartiles over matrices of the norms and of each measure, and medians of the null model.

    Quartiles describe how matrices differ; the update of all matrices together is ``*_block_diagonal``.

    Args:
        group: ``/update``, or ``/gradient`` with NaN for what is not finite.
        null: The null model beside it.
        summary: ``schema.SUMMARY``, or ``schema.SUMMARY_GRADIENT`` of a gradient.
    """
    arrays = {}
    for name in summary:
        if name.endswith("_quantile"):
            arrays[name] = _over_matrices(group[name.removesuffix("_quantile")], schema.QUANTILES)
        else:
            measure, _, bound = name.rpartition("_null")
            arrays[name] = _over_matrices(null[f"{measure}{bound}"], (0.5,))[..., 0]
    coords = {dim: group[dim].variable for dim in ("step", "kind") if dim in group.dims}
    return xr.Dataset(label_arrays(summary, arrays), {**coords, "quantile": list(schema.QUANTILES)})


def _over_matrices(array: xr.DataArray, quantiles: Sequence[float]) -> np.ndarray:
    return known_quantiles(array.transpose(..., "matrix").values, quantiles)


def _norms(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return norms of spectra padded with NaN. One that failed, or is absent, is NaN throughout and has no norm."""
    present = np.isfinite(values).any(-1)
    largest = np.nan_to_num(values).max(-1, initial=0.0)
    relative = np.divide(values, largest[..., None], out=np.zeros_like(values), where=largest[..., None] > 0)
    norms = {
        "frobenius_norm": largest * np.sqrt(np.nansum(relative**2, -1)),
        "spectral_norm": largest,
        "nuclear_norm": np.nansum(values, -1),
    }
    return {name: np.where(present, norm, np.nan) for name, norm in norms.items()}


def _rounding(update: xr.Dataset, noise: np.ndarray) -> dict[str, xr.Variable]:
    """Return which updates are zero, which ones rounding of their storage spoils, and what stands above it."""
    norm = update["frobenius_norm"].values
    share = np.divide(np.sqrt(noise), norm, out=np.full_like(noise, np.nan), where=norm > 0) ** 2
    above = above_rounding(
        update["singular_value"].values,
        update["rounding_edge"].values,
        noise,
        np.minimum(update["out"].values, update["in"].values).astype(np.float64),
    )
    beyond = leading.count_beyond(update["singular_value"].values, above["rounding_edge"])
    unknown = _leading_alone(update) & np.isnan(beyond)
    for name in set(above) - {"rounding_edge"}:
        above[name] = np.where(unknown, np.nan, above[name])
    arrays = {
        "is_zero": norm == 0,
        "quantisation_noise_share": share,
        "quantisation_limited": np.nan_to_num(share) > NOISE_LIMIT,
    }
    return label_arrays(schema.UPDATE, arrays | above)


def _geometry(update: xr.Dataset, inner_product: np.ndarray) -> dict[str, xr.Variable]:
    """Return the length of each matrix's path, and the cosines of consecutive increments."""
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
    return label_arrays(schema.UPDATE, {"path_length": path, "increment_cosine": cosine})
