"""Builds results by the schema, quickly, from made-up spectra: for what reads a result and draws or tells it."""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np
import torch
import xarray as xr

from dynamics import schema
from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.findings import Finding
from dynamics.spectra import raw
from dynamics.spectra.dataset import (
    direct_sums,
    measure_update,
    measures_of,
    null_models_of,
    quantiles_over_matrices,
    suggested_rank,
)
from dynamics.spectra.raw import GradientSpectrum

ROLES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
HOSTILE = "<script>alert('x')</script> & $a$ \"b\""


#: Groups of a result by the arguments that they were made with.
_MEASURED: dict[str, dict[str, xr.Dataset]] = {}


def matrix_names(count: int) -> list[str]:
    """Names of a Llama-style model, seven a layer, in model order."""
    return [f"model.layers.{index // len(ROLES)}.{ROLES[index % len(ROLES)]}" for index in range(count)]


def example_tree(
    steps: int | Sequence[int] = 6,
    matrices: int | Sequence[str] = 14,
    seed: int = 0,
    *,
    rank: int = 8,
    segment: Sequence[int] | None = None,
    zero: Sequence[str] | None = None,
    missing: Sequence[str] = (),
    findings: Sequence[Finding] = (),
    run: str = "example",
    gradients: Sequence[int] | None = None,
    gradient_spectra: bool = True,
) -> xr.DataTree:
    """A plausible result of one run: updates that grow over the steps and concentrate.

    Measured once for each set of arguments; what is returned is a copy.

    Args:
        steps: The steps, or how many (100, 200, …).
        matrices: Their names, or how many.
        seed: Of the made-up spectra.
        rank: Adapter rank of each matrix.
        segment: Number of the training of each step; all 0 by default.
        zero: Matrices whose update is zero at every step.
        missing: Matrices that are not in the last checkpoint.
        findings: Stored with the result.
        run: The run's name.
        gradients: Steps at which gradients were captured; with them the result is one of a captured training.
        gradient_spectra: Whether their singular values were, beside their norms.
    """
    numbers = [100 * (1 + index) for index in range(steps)] if isinstance(steps, int) else list(steps)
    names = matrix_names(matrices) if isinstance(matrices, int) else list(matrices)
    segments = [0] * len(numbers) if segment is None else list(segment)
    of_update = numbers, names, segments, rank, seed, zero or (), missing
    key = repr((*of_update, gradients, gradient_spectra))
    if key not in _MEASURED:
        _MEASURED[key] = _updates(*of_update) | {"/training": _training(numbers, segments)}
        if gradients is not None:
            _MEASURED[key] |= _gradients(gradients, names, rank, seed, gradient_spectra)
    tree = xr.DataTree.from_dict({name: group.copy(deep=True) for name, group in _MEASURED[key].items()})
    inputs = [
        {"path": f"checkpoint-{step}/adapter_model.safetensors", "bytes": 4096, "header_sha256": "a" * 64, "step": step}
        for step in numbers
    ]
    tree.attrs = {
        "run": run,
        "toolkit_version": "1.2.3",
        "library_versions": json.dumps({"torch": "2.13.0", "xarray": "2026.9.0"}),
        "git_commit": "",
        "configuration": json.dumps({"matrices": None, "device": "cpu"}),
        "inputs": json.dumps(inputs),
        "seed": seed,
        "created": "2026-01-02T03:04:05+00:00",
        "findings": json.dumps([finding.to_dict() for finding in findings]),
    }
    if gradients is not None:
        tree.attrs["captured"] = json.dumps({"steps": numbers, "checkpoints": []})
    return tree


def _updates(
    steps: list[int], names: list[str], segments: list[int], rank: int, seed: int, *of_matrices: Sequence[str]
) -> dict[str, xr.Dataset]:
    """Updates with their null models and their quantiles over matrices; the arguments are those of ``_spectra``."""
    update = _spectra(steps, names, segments, rank, seed, *of_matrices)
    update = update.assign(measures_of(update))
    null, against_null = null_models_of(update)
    update = update.assign(against_null).assign(_flags(update)).assign(_geometry(update, seed))
    update = update.assign(direct_sums(update)).assign(suggested_rank(update))
    return {"/update": update, "/null": null, "/summary": quantiles_over_matrices(update, null)}


def example_runs(**runs: xr.DataTree) -> xr.DataTree:
    """Several results as one: each under ``/runs/<name>``."""
    tree = xr.DataTree.from_dict({f"/runs/{name}": run for name, run in runs.items()})
    tree.attrs["findings"] = json.dumps([Finding("OD100", "No checkpoints in 'runs/c'.", file="runs/c").to_dict()])
    return tree


def _spectra(
    steps: list[int],
    names: list[str],
    segments: list[int],
    rank: int,
    seed: int,
    zero: Sequence[str],
    missing: Sequence[str],
) -> xr.Dataset:
    generator = np.random.default_rng(seed)
    longest = 2 * rank
    size = generator.lognormal(0.0, 0.4, len(names))
    decay = generator.uniform(0.1, 0.8, len(names))
    values = np.full((len(steps), 2, len(names), longest), np.nan)
    count = np.zeros(values.shape[:-1], dtype=np.int64)
    origin = [_previous(steps, segments, row) for row in range(len(steps))]
    for row, step in enumerate(steps):
        progress = np.sqrt(1 + segments[:row].count(segments[row]))
        for column, name in enumerate(names):
            if name in missing and step == steps[-1]:
                continue
            for kind, width in ((0, rank), (1, longest)):
                if kind == 1 and origin[row] < 0:
                    continue
                slope = decay[column] * (progress if kind == 0 else 0.5)
                scale = 0.0 if name in zero else size[column] * (progress if kind == 0 else 0.3)
                noise = generator.uniform(0.9, 1.1, width)
                spectrum = scale * np.exp(-slope * np.arange(width)) * noise
                values[row, kind, column, :width] = np.sort(spectrum)[::-1]
                count[row, kind, column] = width
    known = count > 0
    norm = np.where(known, np.sqrt(np.nansum(values**2, -1)), np.nan)
    places = [schema.layer_and_role(name) for name in names]
    moved = np.where(known[:, 1], 1.0, np.nan)
    factors = np.full((len(steps), len(names), longest), np.nan)
    factors[..., :rank] = moved[..., None]
    same = {"out": 256, "in": 128, "adapter_rank": rank}
    return xr.Dataset(
        schema.label_arrays(
            schema.UPDATE,
            {
                "singular_value": values,
                "count": count,
                "factor_rank": count,
                "frobenius_norm": norm,
                "spectral_norm": values[..., 0],
                "nuclear_norm": np.where(known, np.nansum(values, -1), np.nan),
                **{
                    f"{side}_factor_{part}": array
                    for side in ("left", "right")
                    for part, array in (("value", factors), ("change", 0.1 * moved))
                },
            },
        ),
        coords={
            "step": np.asarray(steps, dtype=np.int64),
            "kind": list(schema.KINDS),
            "matrix": np.asarray(names, dtype=str),
            "index": np.arange(longest),
            "segment": ("step", np.asarray(segments, dtype=np.int64)),
            "from_step": ("step", np.asarray(origin, dtype=np.int64)),
            "layer": ("matrix", np.asarray([layer for layer, _, _ in places], dtype=np.int64)),
            "role": ("matrix", np.asarray([role for _, role, _ in places], dtype=str)),
            "stack": ("matrix", np.asarray([stack for _, _, stack in places], dtype=str)),
            "storage": ("matrix", np.asarray(["F32"] * len(names), dtype=str)),
            **{name: ("matrix", np.full(len(names), value, dtype=np.int64)) for name, value in same.items()},
        },
    )


def _gradients(
    steps: Sequence[int], names: list[str], rank: int, seed: int, with_spectra: bool
) -> dict[str, xr.Dataset]:
    """Gradients that shrink over the steps, clipped at a norm of 1."""
    generator = np.random.default_rng(seed)
    places = {name: MatrixShape(256, 128, rank, "F32") for name in names}
    parts = []
    for number, step in enumerate(steps):
        found = {}
        for name in names:
            values = np.sort(generator.lognormal(0.0, 1.0, 2 * rank))[::-1].copy() / np.sqrt(1 + number)
            norm = float(np.linalg.norm(values))
            spectrum = (torch.from_numpy(values), 2 * rank) if with_spectra else ()
            found[name] = GradientSpectrum(norm, min(norm, 1.0), *spectrum)
        parts.append(raw.raw_gradient(step, places, found))
    update = raw.raw_update(dict.fromkeys(steps, (0, -1)), places, {})
    groups = measure_update(update, raw.concatenate(parts))
    return {f"/{name}": groups[name] for name in ("gradient", "null_gradient", "summary_gradient")}


def _previous(steps: list[int], segments: list[int], row: int) -> int:
    return max((s for s, g in zip(steps[:row], segments[:row], strict=True) if g == segments[row]), default=-1)


def _flags(update: xr.Dataset) -> dict[str, xr.Variable]:
    norm = update["frobenius_norm"].values
    share = np.where(norm > 0, 1e-9, np.nan)
    arrays = {
        "is_zero": norm == 0,
        "quantisation_limited": np.zeros(norm.shape, dtype=bool),
        "quantisation_noise_share": share,
    }
    return schema.label_arrays(schema.UPDATE, arrays)


def _geometry(update: xr.Dataset, seed: int) -> dict[str, xr.Variable]:
    length = update["frobenius_norm"].sel(kind="increment").values
    cosine = np.random.default_rng(seed).uniform(-0.2, 0.8, length.shape)
    arrays = {
        "path_length": np.nan_to_num(length).cumsum(0),
        "increment_cosine": np.where(length > 0, cosine, np.nan),
    }
    return schema.label_arrays(schema.UPDATE, arrays)


def _training(steps: list[int], segments: list[int]) -> xr.Dataset:
    loss = 2.0 * np.exp(-np.arange(len(steps)) / 5)
    return xr.Dataset(
        {"value": (("log", "metric"), loss[:, None], {"units": "as logged", "long_name": "logged number"})},
        coords={"metric": ["loss"], "log_step": ("log", steps), "log_segment": ("log", segments)},
    )
