"""Writes records of the shape that a recorder writes, quickly, from given factors and without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import xarray as xr

from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.spectra import raw
from dynamics.spectra.raw import GradientSpectrum
from dynamics.spectra.walk import Previous, solve_batch
from dynamics.store import RecordWriter
from probes.low_rank import LowRankMatrix
from tests.runs import Factors, adapter_config, random_factors

#: What a recorder notes about a training, apart from what a test is about.
ATTRIBUTES: Mapping[str, Any] = {
    "run_id": "0123456789abcdef",
    "findings": [],
    "configuration": '{"preset": "standard"}',
    "toolkit_version": "1.2.3",
    "library_versions": "{}",
    "created": "2026-01-02T03:04:05+00:00",
    "disk_names": {},
    "resumptions": [],
    "gaps": [],
    "covered_share": 1.0,
    "seed": 0,
}


def drifting(steps: Sequence[int], seed: int = 0, **shape: Any) -> dict[int, dict[str, tuple]]:
    """Step to factors that drift, as a training's do; for ``write_run`` and ``write_records`` alike."""
    start = random_factors(seed=seed, **shape)
    noises = {step: random_factors(seed=seed + 1 + step, **shape) for step in steps}
    return {
        step: {
            name: (left * 0.01 * step + noises[step][name][0] * 0.02, right + noises[step][name][1] * 0.02)
            for name, (left, right) in start.items()
        }
        for step in steps
    }


def records(
    steps: Mapping[int, Factors],
    *,
    gradients: Sequence[int] | None = None,
    spectra: bool = True,
    from_start: bool = True,
) -> dict[int, dict[str, xr.Dataset]]:
    """Records of consecutive captured steps.

    Args:
        steps: Step to factors, ascending.
        gradients: Steps at which gradients were measured; all by default.
        spectra: Whether singular values of the gradients were.
        from_start: Whether the first increment is since the start (``from_step`` 0), or not known (−1).
    """
    scale = adapter_config()["lora_alpha"] / adapter_config()["r"]
    made, before, previous = {}, None, 0 if from_start else -1
    for number, (step, factors) in enumerate(steps.items()):
        now = [LowRankMatrix(left, right, scale) for left, right in factors.values()]
        if before is None and from_start:
            nothing = [LowRankMatrix(torch.zeros_like(left), right, scale) for left, right in factors.values()]
            before = Previous(nothing, [0.0] * len(nothing))
        solved = solve_batch(now, before)
        places = {
            name: MatrixShape(left.shape[0], right.shape[1], left.shape[1], "F32")
            for name, (left, right) in factors.items()
        }
        results = {(step, name): each.spectra for name, each in zip(factors, solved, strict=True)}
        made[step] = {"update": raw.raw_update({step: (0, previous)}, places, results)}
        if gradients is None or step in gradients:
            made[step]["gradient"] = _gradient(step, places, number, spectra)
        cores = [each.cores for each in solved]
        known = [core for core in cores if core is not None]
        linked = len(known) == len(cores) and before is not None
        before = Previous(
            now,
            [each.spectra.total_noise for each in solved],
            known if linked else None,
            before.matrices if linked else None,
        )
        previous = step
    return made


def _gradient(step: int, places: Mapping[str, MatrixShape], number: int, spectra: bool) -> xr.Dataset:
    generator = torch.Generator().manual_seed(step)
    gradients = {}
    for name, place in places.items():
        values = torch.rand(2 * place.rank, generator=generator, dtype=torch.float64).sort(descending=True).values
        norm = 2.0 / (1 + number) + float(values[0])
        gradients[name] = GradientSpectrum(norm, min(norm, 1.0), *((values, 2 * place.rank) if spectra else ()))
    return raw.raw_gradient(step, places, gradients)


def write_records(
    run: Path,
    steps: Sequence[int] | Mapping[int, Factors] = (5, 10, 15, 20),
    *,
    seed: int = 0,
    attributes: Mapping[str, Any] | None = None,
    **how: Any,
) -> Path:
    """``run/dynamics/records/``, complete and closed; more steps are added to one that is there.

    Args:
        run: The run folder; made if it is not there.
        steps: Steps whose factors drift, or step to factors.
        seed: Of the drifting factors.
        attributes: On top of ``ATTRIBUTES``.
        **how: See ``records``.
    """
    folder = run / "dynamics"
    factors = steps if isinstance(steps, Mapping) else drifting(steps, seed)
    with RecordWriter.resume(folder, 10**9, {**ATTRIBUTES, **(attributes or {})}) as writer:
        there = writer.steps
        for step, record in records(factors, **how).items():
            if step not in there:
                writer.write(step, record)
    return folder / "records"
