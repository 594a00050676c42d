"""What is kept of each step: spectra and the few numbers beside them from which every measure follows.

A raw dataset is what a capture writes for one step, what steps are joined into, and what ``measured`` turns into the
groups of a result; whether it comes from checkpoints or from a training makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from dynamics import schema
from dynamics.schema import Variable
from dynamics.spectra.walk import Results

#: Variables of a raw update that records and results of earlier versions lack: NaN there.
ADDED = (
    "rounding_edge",
    "left_factor_value",
    "right_factor_value",
    "left_factor_change",
    "right_factor_change",
)
#: Variables of a raw update.
UPDATE: Mapping[str, Variable] = {
    **{name: schema.UPDATE[name] for name in ("singular_value", "count", "factor_rank", "decomposition", *ADDED)},
    "noise_energy": Variable(("step", "kind", "matrix"), "weight²", "predicted energy of the storage's rounding"),
    "inner_product": Variable(("step", "matrix"), "weight²", "inner product with the previous increment"),
}
#: Variables of a raw gradient.
GRADIENT: Mapping[str, Variable] = {
    name: schema.GRADIENT[name]
    for name in ("singular_value", "count", "factor_rank", "norm_before_clip", "norm_after_clip")
}
_MATRIX_WORDS = {
    "layer": "layer number, −1 if none",
    "role": "role within the layer",
    "stack": "stack of layers",
    "out": "output dimension",
    "in": "input dimension",
    "adapter_rank": "adapter rank, 0 for a dense matrix",
    "storage": "format in which the factors are stored",
}
#: Whole numbers; where there is nothing they are 0, all others NaN.
_COUNTS = ("count", "factor_rank", "decomposition")


@dataclass(frozen=True)
class Place:
    """One matrix as the coordinates describe it.

    Args:
        out, in_: Its dimensions.
        rank: Adapter rank, 0 for a dense matrix.
        storage: Dtype of its factors as safetensors writes it.
    """

    out: int
    in_: int
    rank: int
    storage: str


@dataclass(frozen=True)
class GradientSpectrum:
    """A matrix's gradient at one step.

    Args:
        norm_before_clip, norm_after_clip: Over its trainable parameters; NaN where it was not measured.
        values: Singular values, ``None`` where they were not wanted.
        rank: Columns of the factors of the gradient.
    """

    norm_before_clip: float
    norm_after_clip: float
    values: Float[Tensor, " k"] | None = None
    rank: int = 0


def raw_update(steps: Mapping[int, tuple[int, int]], places: Mapping[str, Place], results: Results) -> xr.Dataset:
    """Spectra of updates, labelled.

    Args:
        steps: Step → (segment, from_step), ascending.
        places: Matrix → its place, in the model's order.
        results: ``(step, matrix)`` to spectra; what is not in it is missing.
    """
    values_of = [part for each in results.values() for part in (each.total, each.increment) if part is not None]
    values_of += [part for each in results.values() if each.factors for part in (each.factors.left, each.factors.right)]
    arrays = _empty(UPDATE, len(steps), len(places), max(map(len, values_of), default=0))
    row = {step: position for position, step in enumerate(steps)}
    column = {name: position for position, name in enumerate(places)}
    for (step, name), spectra in results.items():
        here = row[step], column[name]
        arrays["inner_product"][here] = _known(spectra.inner_product)
        parts = ((spectra.total, spectra.total_noise), (spectra.increment, spectra.increment_noise))
        for kind, (values, noise) in enumerate(parts):
            if values is not None:
                place = (here[0], kind, here[1])
                arrays["singular_value"][(*place, slice(len(values)))] = values
                arrays["count"][place] = len(values)
                arrays["factor_rank"][place] = spectra.ranks[kind]
                arrays["decomposition"][place] = schema.DECOMPOSITIONS.index(spectra.found_by[kind])
                arrays["noise_energy"][place] = _known(noise)
                arrays["rounding_edge"][place] = _known(spectra.edges[kind])
        if (factors := spectra.factors) is not None:
            for side, values, change in (
                ("left", factors.left, factors.left_change),
                ("right", factors.right, factors.right_change),
            ):
                arrays[f"{side}_factor_value"][(*here, slice(len(values)))] = values
                arrays[f"{side}_factor_change"][here] = _known(change)
    return _dataset(UPDATE, arrays, steps, places)


def raw_gradient(step: int, places: Mapping[str, Place], gradients: Mapping[str, GradientSpectrum]) -> xr.Dataset:
    """Gradients of one step, labelled; matrices without one have NaN."""
    longest = max((len(each.values) for each in gradients.values() if each.values is not None), default=0)
    arrays = _empty(GRADIENT, 1, len(places), longest)
    for column, name in enumerate(places):
        if (gradient := gradients.get(name)) is None:
            continue
        arrays["norm_before_clip"][0, column] = gradient.norm_before_clip
        arrays["norm_after_clip"][0, column] = gradient.norm_after_clip
        if gradient.values is not None:
            arrays["singular_value"][0, column, : len(gradient.values)] = gradient.values
            arrays["count"][0, column] = len(gradient.values)
            arrays["factor_rank"][0, column] = gradient.rank
    return _dataset(GRADIENT, arrays, {step: None}, places)


def _known(number: float) -> float:
    """A number, or NaN where weights that are not finite left none."""
    return number if math.isfinite(number) else math.nan


def _empty(variables: Mapping[str, Variable], steps: int, matrices: int, longest: int) -> dict[str, np.ndarray]:
    sizes = {"step": steps, "kind": len(schema.KINDS), "matrix": matrices, "index": longest}
    shapes = {name: [sizes[dim] for dim in variable.dims] for name, variable in variables.items()}
    return {
        name: np.zeros(shape, dtype=np.int64) if name in _COUNTS else np.full(shape, np.nan)
        for name, shape in shapes.items()
    }


def _dataset(
    variables: Mapping[str, Variable],
    arrays: Mapping[str, np.ndarray],
    steps: Mapping[int, tuple[int, int] | None],
    places: Mapping[str, Place],
) -> xr.Dataset:
    dataset = xr.Dataset(
        {name: (known.dims, arrays[name], schema.attributes(known)) for name, known in variables.items()},
        coords={
            **_coordinate("step", "step", list(steps), np.int64, "optimizer step"),
            **_coordinate("matrix", "matrix", list(places), str, "weight matrix"),
            **_coordinate(
                "index", "index", range(arrays["singular_value"].shape[-1]), np.int64, "position in descending order"
            ),
            **_matrix_coordinates(places),
        },
    )
    if "kind" not in variables["count"].dims:
        return dataset
    segments, origins = ([origin[part] for origin in steps.values() if origin] for part in (0, 1))
    return dataset.assign_coords(
        {
            **_coordinate("kind", "kind", list(schema.KINDS), str, "since the start, or since the last step"),
            **_coordinate("segment", "step", segments, np.int64, "number of the training"),
            **_coordinate(
                "from_step", "step", origins, np.int64, "previous step of the same training, −1 if none, 0 the start"
            ),
        }
    )


def _coordinate(name: str, dim: str, values: Sequence[object], dtype: type, words: str) -> dict[str, tuple]:
    return {name: (dim, np.asarray(values, dtype=dtype), {"units": "1", "long_name": words})}


def _matrix_coordinates(places: Mapping[str, Place]) -> dict[str, tuple]:
    where = [schema.layer_and_role(name) for name in places]
    columns: dict[str, tuple[list, type]] = {
        "layer": ([layer for layer, _, _ in where], np.int64),
        "role": ([role for _, role, _ in where], str),
        "stack": ([stack for _, _, stack in where], str),
        "out": ([place.out for place in places.values()], np.int64),
        "in": ([place.in_ for place in places.values()], np.int64),
        "adapter_rank": ([place.rank for place in places.values()], np.int64),
        "storage": ([place.storage for place in places.values()], str),
    }
    return {
        name: coordinate
        for name, (values, dtype) in columns.items()
        for name, coordinate in _coordinate(name, "matrix", values, dtype, _MATRIX_WORDS[name]).items()
    }


def concatenate(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Raw datasets of different steps as one, in ascending order of step.

    Matrices are those that occur in any part, in the order of the newest; a matrix has its newest shape and the
    largest rank it ever had.

    Raises:
        ValueError: If there is no part, or two parts have the same step.
    """
    if not parts:
        raise ValueError("Expected at least one raw dataset, got none.")
    parts = sorted(parts, key=lambda part: int(part["step"].values.min(initial=np.iinfo(np.int64).max)))
    steps = [int(step) for part in parts for step in part["step"].values]
    if len(set(steps)) != len(steps):
        raise ValueError(f"Expected each step once, got {sorted(steps)}.")
    known = UPDATE if "kind" in parts[0].dims else GRADIENT
    ordered = dict(sorted(origin for part in parts for origin in _origins(part).items()))
    places = _all_places(parts)
    arrays = _empty(known, len(steps), len(places), max(part.sizes["index"] for part in parts))
    row = {step: position for position, step in enumerate(ordered)}
    column = {name: position for position, name in enumerate(places)}
    for part in parts:
        rows = np.array([row[step] for step in part["step"].values.tolist()], dtype=np.int64)  # also of none
        columns = np.array([column[name] for name in part["matrix"].values.tolist()], dtype=np.int64)
        at = {"step": rows, "kind": np.arange(2), "matrix": columns, "index": np.arange(part.sizes["index"])}
        for name, variable in known.items():
            if name in part.variables or name not in ADDED:
                arrays[name][np.ix_(*(at[dim] for dim in variable.dims))] = part.variables[name].values
    return _dataset(known, arrays, ordered, places)


def completed(update: xr.Dataset) -> xr.Dataset:
    """A raw update with every variable; NaN for what earlier versions did not keep."""
    lacking = {name: UPDATE[name] for name in ADDED if name not in update}
    return update.assign(
        {
            name: (known.dims, np.full([update.sizes[dim] for dim in known.dims], np.nan), schema.attributes(known))
            for name, known in lacking.items()
        }
    )


def _origins(part: xr.Dataset) -> dict[int, tuple[int, int] | None]:
    """Step → (segment, from_step); of a gradient, to nothing."""
    if "from_step" not in part.coords:
        return dict.fromkeys(part["step"].values.tolist())
    columns = (part[name].values.tolist() for name in ("step", "segment", "from_step"))
    return {step: (segment, origin) for step, segment, origin in zip(*columns, strict=True)}


def _all_places(parts: Sequence[xr.Dataset]) -> dict[str, Place]:
    places: dict[str, Place] = {}
    for part in reversed(parts):
        columns = (part[name].values.tolist() for name in ("matrix", "out", "in", "adapter_rank", "storage"))
        for name, out, in_, rank, storage in zip(*columns, strict=True):
            newest = places.get(name, Place(out, in_, rank, storage))
            places[name] = Place(newest.out, newest.in_, max(newest.rank, rank), newest.storage)
    return places
