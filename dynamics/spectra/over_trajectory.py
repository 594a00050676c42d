"""From a trajectory to the labelled groups ``/update``, ``/null`` and ``/summary`` of the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import xarray as xr
from torch import Tensor

from dynamics import schema
from dynamics.checkpoints.trajectory import MatrixShape, Trajectory
from dynamics.findings import Finding
from dynamics.spectra import labelled, notes
from dynamics.spectra.engine import MatrixSpectra, Results, trajectory_spectra
from dynamics.spectra.rounding import NOISE_LIMIT


def analyse_spectra(
    trajectory: Trajectory,
    *,
    device: str = "cpu",
    workers: int | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[str, xr.Dataset], list[Finding]]:
    """Spectra, measures, null models and their summaries over a whole trajectory.

    Args:
        trajectory: The run.
        device: Where the QR decompositions run.
        workers: Threads; by default one for each core.
        progress: Called with the number of matrices just finished.

    Returns:
        Group name (``"update"``, ``"null"``, ``"summary"``) to dataset, and the findings.
    """
    results, findings = trajectory_spectra(trajectory, device=device, workers=workers, progress=progress)
    update = _spectra(trajectory, results)
    update = update.assign(labelled.measures_of(update))
    null, against_null = labelled.null_models_of(update)
    update = update.assign(against_null)
    update = update.assign(_rounding(update, results)).assign(_geometry(update, results))
    update = update.assign(labelled.direct_sums(update)).assign(labelled.suggested_rank(update))
    groups = {"update": update, "null": null, "summary": labelled.quantiles_over_matrices(update, null)}
    return groups, [*findings, *notes.notes(update)]


def _spectra(trajectory: Trajectory, results: Results) -> xr.Dataset:
    """``singular_value``, ``count``, the norms, and all coordinates."""
    steps, names = trajectory.steps, trajectory.matrices
    longest = max((len(part) for each in results.values() for part in _parts(each)), default=0)
    values = np.full((len(steps), len(schema.KINDS), len(names), longest), np.nan)
    count = np.zeros(values.shape[:-1], dtype=np.int64)
    rank = np.zeros_like(count)
    column = {name: position for position, name in enumerate(names)}
    row = {step: position for position, step in enumerate(steps)}
    for (step, name), spectra in results.items():
        for kind, part in enumerate(_parts(spectra)):
            values[row[step], kind, column[name], : len(part)] = part
            count[row[step], kind, column[name]] = len(part)
            rank[row[step], kind, column[name]] = spectra.ranks[kind]
    # A failed spectrum is NaN throughout, an absent one has count 0: neither has a norm.
    known = np.isfinite(values).any(-1)
    largest = np.nan_to_num(values).max(-1, initial=0.0)
    relative = np.divide(values, largest[..., None], out=np.zeros_like(values), where=largest[..., None] > 0)
    norms = {
        "frobenius_norm": largest * np.sqrt(np.nansum(relative**2, -1)),
        "spectral_norm": largest,
        "nuclear_norm": np.nansum(values, -1),
    }
    return xr.Dataset(
        {
            "singular_value": labelled.variable("singular_value", values),
            "count": labelled.variable("count", count),
            "factor_rank": labelled.variable("factor_rank", rank),
            **{name: labelled.variable(name, np.where(known, norm, np.nan)) for name, norm in norms.items()},
        },
        coords={
            "step": ("step", np.asarray(steps, dtype=np.int64), {"units": "1", "long_name": "optimizer step"}),
            "kind": (
                "kind",
                list(schema.KINDS),
                {"units": "1", "long_name": "since the start, or since the last step"},
            ),
            "matrix": ("matrix", np.asarray(names, dtype=str), {"units": "1", "long_name": "weight matrix"}),
            "index": ("index", np.arange(longest), {"units": "1", "long_name": "position in descending order"}),
            **_step_coordinates(trajectory),
            **_matrix_coordinates(trajectory),
        },
    )


def _parts(spectra: MatrixSpectra) -> list[Tensor]:
    return [spectra.total] if spectra.increment is None else [spectra.total, spectra.increment]


def _step_coordinates(trajectory: Trajectory) -> Mapping[str, tuple]:
    segments = [checkpoint.segment for checkpoint in trajectory.checkpoints]
    last: dict[int, int] = {}
    origins = []
    for step, segment in zip(trajectory.steps, segments, strict=True):
        origins.append(last.get(segment, -1))
        last[segment] = step
    words = {"segment": "number of the training", "from_step": "previous step of the same training, −1 if none"}
    return {
        name: ("step", np.asarray(numbers, dtype=np.int64), {"units": "1", "long_name": words[name]})
        for name, numbers in (("segment", segments), ("from_step", origins))
    }


def _matrix_coordinates(trajectory: Trajectory) -> Mapping[str, tuple]:
    shapes = _shapes(trajectory)
    names = trajectory.matrices
    places = [schema.layer_and_role(name) for name in names]
    numbers = {
        "layer": ([layer for layer, _, _ in places], "layer number, −1 if none"),
        "out": ([shapes[name].out for name in names], "output dimension"),
        "in": ([shapes[name].in_ for name in names], "input dimension"),
        "adapter_rank": ([shapes[name].rank for name in names], "adapter rank, 0 for a dense matrix"),
    }
    words = {
        "role": ([role for _, role, _ in places], "role within the layer"),
        "stack": ([stack for _, _, stack in places], "stack of layers"),
        "storage": ([shapes[name].dtype for name in names], "format in which the factors are stored"),
    }
    return {
        name: ("matrix", np.asarray(values, dtype=dtype), {"units": "1", "long_name": long_name})
        for columns, dtype in ((numbers, np.int64), (words, str))
        for name, (values, long_name) in columns.items()
    }


def _shapes(trajectory: Trajectory) -> dict[str, MatrixShape]:
    """One shape for each matrix: its newest, with the largest rank it ever had."""
    shapes: dict[str, MatrixShape] = {}
    for checkpoint in trajectory.checkpoints:
        for name, shape in checkpoint.shapes.items():
            rank = max(shape.rank, shapes[name].rank if name in shapes else 0)
            shapes[name] = MatrixShape(shape.out, shape.in_, rank, shape.dtype)
    return shapes


def _rounding(update: xr.Dataset, results: Results) -> dict[str, xr.Variable]:
    """Which updates are zero, and which are spoiled by the rounding of their storage."""
    noise = np.full(update["count"].shape, np.nan)
    for row, step in enumerate(update["step"].values.tolist()):
        for column, name in enumerate(update["matrix"].values.tolist()):
            if (spectra := results.get((step, name))) is not None:
                noise[row, 0, column] = spectra.total_noise
                noise[row, 1, column] = spectra.increment_noise if spectra.increment is not None else np.nan
    norm = update["frobenius_norm"].values
    share = np.divide(np.sqrt(noise), norm, out=np.full_like(noise, np.nan), where=norm > 0) ** 2
    return {
        "is_zero": labelled.variable("is_zero", norm == 0),
        "quantisation_noise_share": labelled.variable(
            "quantisation_noise_share", share, "Σ ulp²/12 of the stored factors, carried to the product, over ‖·‖_F²"
        ),
        "quantisation_limited": labelled.variable(
            "quantisation_limited", np.nan_to_num(share) > NOISE_LIMIT, f"quantisation_noise_share > {NOISE_LIMIT}"
        ),
    }


def _geometry(update: xr.Dataset, results: Results) -> dict[str, xr.Variable]:
    """Length of each matrix's path, and whether it keeps its direction."""
    steps, names = update["step"].values.tolist(), update["matrix"].values.tolist()
    length = update["frobenius_norm"].sel(kind="increment").values
    origin = update["from_step"].values.tolist()
    path, cosine = np.full(length.shape, np.nan), np.full(length.shape, np.nan)
    for row, step in enumerate(steps):
        if origin[row] not in steps:
            path[row] = np.where(update["count"].values[row, 0] > 0, 0.0, np.nan)
            continue
        before = steps.index(origin[row])
        path[row] = path[before] + length[row]
        inner = np.array([results[step, name].inner_product if (step, name) in results else np.nan for name in names])
        sizes = length[row] * length[before]
        with np.errstate(invalid="ignore"):
            moved = sizes > 0  # a zero increment has no direction, and rounding must not lend it one
        np.divide(inner, sizes, out=cosine[row], where=moved)
        np.clip(cosine[row], -1, 1, out=cosine[row])
    return {
        "path_length": labelled.variable(
            "path_length", path, "Σ ‖increment‖_F since the first captured step of the training"
        ),
        "increment_cosine": labelled.variable(
            "increment_cosine", cosine, "⟨Δ_t, Δ_{t−1}⟩/(‖Δ_t‖_F ‖Δ_{t−1}‖_F), from r×r cross-Grams"
        ),
    }
