"""Raw datasets: the spectra of each step, and the few numbers beside them from which every measure follows.

A raw dataset is what a recorder writes for one step, what steps are joined into, and what ``dataset.measure_update``
turns into the groups of a result; whether it comes from checkpoints or from a training makes no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from dynamics import schema
from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.schema import RAW_GRADIENT as GRADIENT
from dynamics.schema import RAW_REMAINDER as REMAINDER
from dynamics.schema import RAW_UPDATE as UPDATE
from dynamics.schema import Variable
from dynamics.spectra.walk import MatrixSpectra

#: Variables of a raw update that records and results of earlier versions lack: NaN there.
ADDED = (
    "rounding_edge",
    "left_factor_value",
    "right_factor_value",
    "left_factor_change",
    "right_factor_change",
)
#: The same of a raw gradient.
ADDED_TO_GRADIENT = ("micro_norm", "micro_batches", "batch_size")
#: Whole numbers; where there is nothing they are 0, all others NaN.
_COUNTS = ("count", "factor_rank", "decomposition")


@dataclass(frozen=True)
class GradientSpectrum:
    """A matrix's gradient at one step.

    Args:
        norm_before_clip, norm_after_clip: Over its trainable parameters; NaN where it was not measured.
        values: Singular values, ``None`` where they were not measured.
        rank: Columns of the factors of the gradient.
        micro_norm: Root mean square of the norms of micro-batches' gradients; NaN where it was not measured.
    """

    norm_before_clip: float
    norm_after_clip: float
    values: Float[Tensor, " k"] | None = None
    rank: int = 0
    micro_norm: float = math.nan


def raw_update(
    steps: Mapping[int, tuple[int, int]],
    shapes: Mapping[str, MatrixShape],
    spectra: Mapping[tuple[int, str], MatrixSpectra],
) -> xr.Dataset:
    """Return spectra of updates, labelled.

    Args:
        steps: Step → (segment, from_step), ascending.
        shapes: Matrix → its shape, in the model's order.
        spectra: ``(step, matrix)`` to spectra; what is not in it is missing.
    """
    variables = {**UPDATE, **(REMAINDER if any(any(matrix.remainders) for matrix in spectra.values()) else {})}
    arrays = _empty(variables, len(steps), len(shapes), max(map(len, _spectra_in(spectra.values())), default=0))
    rows, columns = ({label: position for position, label in enumerate(labels)} for labels in (steps, shapes))
    for (step, name), matrix in spectra.items():
        row, column = rows[step], columns[name]
        arrays["inner_product"][row, column] = _finite(matrix.inner_product)
        parts = ((matrix.total, matrix.total_noise), (matrix.increment, matrix.increment_noise))
        for kind, (values, noise) in enumerate(parts):
            if values is not None:
                cell = (row, kind, column)
                arrays["singular_value"][(*cell, slice(len(values)))] = values.numpy()
                arrays["count"][cell] = len(values)
                arrays["factor_rank"][cell] = matrix.ranks[kind]
                arrays["decomposition"][cell] = schema.DECOMPOSITIONS.index(matrix.found_by[kind])
                arrays["noise_energy"][cell] = _finite(noise)
                arrays["rounding_edge"][cell] = _finite(matrix.edges[kind])
            if (remainder := matrix.remainders[kind]) is not None:
                for variable in REMAINDER:
                    arrays[variable][row, kind, column] = getattr(remainder, variable)
        if (factors := matrix.factors) is not None:
            for side, values, change in (
                ("left", factors.left, factors.left_change),
                ("right", factors.right, factors.right_change),
            ):
                arrays[f"{side}_factor_value"][row, column, : len(values)] = values.numpy()
                arrays[f"{side}_factor_change"][row, column] = _finite(change)
    return _dataset(variables, arrays, steps, shapes)


def _spectra_in(spectra: Iterable[MatrixSpectra]) -> Iterator[Tensor]:
    for matrix in spectra:
        yield matrix.total
        if matrix.increment is not None:
            yield matrix.increment
        if matrix.factors is not None:
            yield from (matrix.factors.left, matrix.factors.right)


def raw_gradient(
    step: int,
    shapes: Mapping[str, MatrixShape],
    gradients: Mapping[str, GradientSpectrum],
    *,
    micro_batches: float = math.nan,
    batch_size: float = math.nan,
) -> xr.Dataset:
    """Return gradients of one step, labelled; matrices without one have NaN.

    Args:
        step: The step.
        shapes: Matrix → its shape.
        gradients: Matrix → its gradient.
        micro_batches, batch_size: Micro-batches and samples behind them; NaN if unknown.
    """
    spectra = [gradient.values for gradient in gradients.values() if gradient.values is not None]
    arrays = _empty(GRADIENT, 1, len(shapes), max(map(len, spectra), default=0))
    for column, name in enumerate(shapes):
        if (gradient := gradients.get(name)) is None:
            continue
        arrays["norm_before_clip"][0, column] = gradient.norm_before_clip
        arrays["norm_after_clip"][0, column] = gradient.norm_after_clip
        arrays["micro_norm"][0, column] = gradient.micro_norm
        if gradient.values is not None:
            arrays["singular_value"][0, column, : len(gradient.values)] = gradient.values.numpy()
            arrays["count"][0, column] = len(gradient.values)
            arrays["factor_rank"][0, column] = gradient.rank
    arrays["micro_batches"][0], arrays["batch_size"][0] = micro_batches, batch_size
    return _dataset(GRADIENT, arrays, {step: None}, shapes)


def _finite(number: float) -> float:
    """Return a number, or NaN where weights that are not finite left none."""
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
    shapes: Mapping[str, MatrixShape],
) -> xr.Dataset:
    coordinates: dict[str, tuple[Sequence[object], type]] = {
        "step": (list(steps), np.int64),
        "matrix": (list(shapes), str),
        "index": (range(arrays["singular_value"].shape[-1]), np.int64),
        **_matrix_coordinates(shapes),
    }
    if "kind" in variables["count"].dims:
        segments, origins = ([origin[part] for origin in steps.values() if origin] for part in (0, 1))
        coordinates |= {"kind": (schema.KINDS, str), "segment": (segments, np.int64), "from_step": (origins, np.int64)}
    labels = {name: np.asarray(values, dtype) for name, (values, dtype) in coordinates.items()}
    return xr.Dataset(
        schema.label_arrays(variables, {name: arrays[name] for name in variables}),
        coords=schema.label_arrays(schema.COORDINATES, labels),
    )


def _matrix_coordinates(shapes: Mapping[str, MatrixShape]) -> dict[str, tuple[Sequence[object], type]]:
    layers, roles, stacks = zip(*map(schema.layer_and_role, shapes), strict=True) if shapes else ((), (), ())
    return {
        "layer": (layers, np.int64),
        "role": (roles, str),
        "stack": (stacks, str),
        "out": ([shape.out for shape in shapes.values()], np.int64),
        "in": ([shape.in_ for shape in shapes.values()], np.int64),
        "adapter_rank": ([shape.rank for shape in shapes.values()], np.int64),
        "storage": ([shape.dtype for shape in shapes.values()], str),
    }


def concatenate(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    """Join raw datasets of different steps, in ascending order of step.

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
    variables = UPDATE if "kind" in parts[0].dims else GRADIENT
    added = {name: variable for name, variable in REMAINDER.items() if any(name in part for part in parts)}
    variables = {**variables, **added}
    ordered = dict(sorted(origin for part in parts for origin in _origins(part).items()))
    shapes = _newest_shapes(parts)
    arrays = _empty(variables, len(steps), len(shapes), max(part.sizes["index"] for part in parts))
    rows, columns = ({label: position for position, label in enumerate(labels)} for labels in (ordered, shapes))
    for part in parts:
        positions = {
            "step": np.array([rows[step] for step in part["step"].values.tolist()], dtype=np.int64),  # also of none
            "kind": np.arange(len(schema.KINDS)),
            "matrix": np.array([columns[name] for name in part["matrix"].values.tolist()], dtype=np.int64),
            "index": np.arange(part.sizes["index"]),
        }
        for name, variable in variables.items():
            if name in part.variables or name not in (*ADDED, *ADDED_TO_GRADIENT, *REMAINDER):
                arrays[name][np.ix_(*(positions[dim] for dim in variable.dims))] = part.variables[name].values
    return _dataset(variables, arrays, ordered, shapes)


def completed(update: xr.Dataset) -> xr.Dataset:
    """Return a raw update with every variable; NaN for what earlier versions did not keep."""
    lacking = {name: UPDATE[name].dims for name in ADDED if name not in update}
    arrays = {name: np.full([update.sizes[dim] for dim in dims], np.nan) for name, dims in lacking.items()}
    return update.assign(schema.label_arrays(UPDATE, arrays))


def _origins(part: xr.Dataset) -> dict[int, tuple[int, int] | None]:
    """Return step → (segment, from_step); of a gradient ``None``."""
    if "from_step" not in part.coords:
        return dict.fromkeys(part["step"].values.tolist())
    columns = (part[name].values.tolist() for name in ("step", "segment", "from_step"))
    return {step: (segment, origin) for step, segment, origin in zip(*columns, strict=True)}


def _newest_shapes(parts: Sequence[xr.Dataset]) -> dict[str, MatrixShape]:
    shapes: dict[str, MatrixShape] = {}
    for part in reversed(parts):
        columns = (part[name].values.tolist() for name in ("matrix", "out", "in", "adapter_rank", "storage"))
        for name, out, in_, rank, storage in zip(*columns, strict=True):
            newest = shapes.get(name, MatrixShape(out, in_, rank, storage))
            shapes[name] = replace(newest, rank=max(newest.rank, rank))
    return shapes
