"""Findings about spectra: one for each fact, not one for each matrix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr

from dynamics.findings import Finding
from dynamics.spectra.rounding import NOISE_LIMIT
from dynamics.text import listed, percent, some

#: At most so many matrices are named in one finding's evidence.
NAMED = 8
#: An update lies below its null if its entropy is under this percentile of the null's draws.
PERCENTILE = 5.0
#: Root mean square of an update's entries beyond which it is no training's: weights are about 0.01 to 1.
ABSURD = 1e3
#: Share of an update's energy that rounding takes, from which on merging is said to lose it.
LOST = 0.5


def findings_of(update: xr.Dataset) -> list[Finding]:
    """Return the findings that follow from the numbers of ``/update`` alone."""
    return [
        *_zero_updates(update),
        *_absurd(update),
        *_quantisation(update),
        *_missing_increments(update),
        *_against_null(update),
        *_without_null(update),
        *_leading_alone(update),
    ]


def base_findings(base: xr.Dataset) -> list[Finding]:
    """Return the findings that follow from the numbers of ``/base``; results of earlier versions lack those numbers."""
    return [*_lost_in_merge(base), *_equal_to_base(base)] if "changed_share" in base else []


def _lost_in_merge(base: xr.Dataset) -> Iterator[Finding]:
    lost = base["lost_in_merge"].values
    names = base["matrix"].values[np.nan_to_num(lost) > LOST].tolist()
    if names:
        yield Finding(
            "OD211",
            f"Merged into the base's weights, the update of {_count(names, int(np.isfinite(lost).sum()))} is mostly "
            f"rounded away: the base's format loses {percent(float(np.nanmax(lost)), 0)} of its energy at worst.",
            "Keep the adapter beside the base, or merge into float32 weights.",
            matrix=names[0] if len(names) == 1 else "",
            evidence={"threshold": LOST, "largest_share": float(np.nanmax(lost)), **_named(names)},
        )


def _equal_to_base(base: xr.Dataset) -> Iterator[Finding]:
    dense = np.isfinite(base["changed_share"].values) & np.isnan(base["lost_in_merge"].values)
    last = base["relative_size"].isel(step=-1).values
    if dense.any() and not (base["changed_share"].values[dense] > 0).any():
        rounded = " but for rounding to another format" if np.nan_to_num(last[dense]).any() else ""
        yield Finding(
            "OD212",
            f"All {int(dense.sum()):,} weight matrices that could be compared equal those of the base{rounded}: "
            "nothing was trained, or a merge lost the adapter.",
            "Check that the adapter was loaded when it was merged, and that these are the trained weights.",
            evidence={"matrices": int(dense.sum())},
        )


def _named(names: Sequence[str]) -> dict[str, object]:
    return {"matrices": len(names), "names": list(names[:NAMED])}


def _count(names: Sequence[str], total: int) -> str:
    return "every matrix" if len(names) == total else f"{len(names)} of {total} matrices"


def _zero_updates(update: xr.Dataset) -> Iterator[Finding]:
    zero = update["is_zero"].sel(kind="total")
    for step in update["step"].values.tolist():
        names = zero["matrix"].values[zero.sel(step=step).values].tolist()
        if names:
            yield Finding(
                "OD202",
                f"At step {step} the update of {_count(names, zero.sizes['matrix'])} is exactly zero, as every "
                "update is at the start of training, so its measures are NaN.",
                matrix=names[0] if len(names) == 1 else "",
                step=step,
                evidence=_named(names),
            )


def _absurd(update: xr.Dataset) -> Iterator[Finding]:
    size = np.sqrt(update["out"].values.astype(np.float64) * update["in"].values)
    entries = update["frobenius_norm"].sel(kind="total").values / np.maximum(size, 1.0)
    for row, step in enumerate(update["step"].values.tolist()):
        names = update["matrix"].values[entries[row] > ABSURD].tolist()
        if names:
            largest = float(np.nanmax(entries[row]))
            yield Finding(
                "OD141",
                f"At step {step} the update of {_count(names, len(size))} has entries of {largest:.1e} in the root "
                "mean square; weights are about 0.01 to 1.",
                remedy="Check that the file is not damaged, and that training had not diverged.",
                matrix=names[0] if len(names) == 1 else "",
                step=step,
                evidence={"threshold": ABSURD, "largest": largest, **_named(names)},
            )


def _quantisation(update: xr.Dataset) -> Iterator[Finding]:
    for kind in update["kind"].values.tolist():
        limited = update["quantisation_limited"].sel(kind=kind)
        cells = int(limited.sum())
        if not cells:
            continue
        worst = float(update["quantisation_noise_share"].sel(kind=kind).max())
        formats = ", ".join(np.unique(update["storage"].values).tolist())
        yield Finding(
            "OD203",
            f"In {cells} of {limited.size} {kind}s (step × matrix) rounding of the storage format ({formats}) is "
            f"predicted to make up more than {percent(NOISE_LIMIT, 0)} of the energy, at worst {percent(worst, 0)}: "
            "their rank is partly noise.",
            remedy="Save checkpoints in float32, or further apart.",
            evidence={"kind": kind, "cells": cells, "threshold": NOISE_LIMIT, "largest_share": worst},
        )


def _missing_increments(update: xr.Dataset) -> Iterator[Finding]:
    first = update["step"].values[update["from_step"].values < 0].tolist()
    if first:
        steps = f"step{'s' * (len(first) > 1)} {listed(map(str, first))}"
        yield Finding(
            "OD204",
            f"The first checkpoint of a training has no increment: {steps}.",
            evidence={"steps": first},
        )
    count = update["count"]
    for step, origin in zip(update["step"].values.tolist(), update["from_step"].values.tolist(), strict=True):
        total, increment = (count.sel(step=step, kind=kind).values > 0 for kind in ("total", "increment"))
        names = update["matrix"].values[total & ~increment].tolist()
        if origin >= 0 and names:
            yield Finding(
                "OD204",
                f"At step {step} the increment of {_count(names, len(total))} is unknown, and so is that of all "
                f"matrices together: the weights before it, of step {origin}, do not include "
                f"{'it' if len(names) == 1 else 'them'}.",
                matrix=names[0] if len(names) == 1 else "",
                step=step,
                evidence=_named(names),
            )


def _against_null(update: xr.Dataset) -> Iterator[Finding]:
    last = update.isel(step=-1).sel(kind="total")
    percentile = last["null_percentile"].values
    known = ~np.isnan(percentile)
    below = last["matrix"].values[known & (percentile < PERCENTILE)].tolist()
    if below:
        deficit = float(np.nanmedian(last["entropy_deficit"].values))
        yield Finding(
            "OD205",
            f"At step {int(last['step'])} the update of {_count(below, int(known.sum()))} uses fewer directions than a "
            f"random one of its shape: the median entropy deficit is {deficit:.2f} nat. This is normal after training, "
            "since gradients are not random. Compare runs by the size of the deficit.",
            step=int(last["step"]),
            evidence={"threshold_percentile": PERCENTILE, "median_deficit_nat": deficit, **_named(below)},
        )


def _without_null(update: xr.Dataset) -> Iterator[Finding]:
    increment = update.sel(kind="increment")
    unknown = update["left_factor_change"].isnull().values | update["right_factor_change"].isnull().values
    moved = (increment["frobenius_norm"].values > 0) & (update["adapter_rank"].values > 0)
    cells = unknown & moved
    if cells.any():
        steps = update["step"].values[cells.any(1)].tolist()
        yield Finding(
            "OD208",
            f"{int(cells.sum()):,} of {int(moved.sum()):,} LoRA increments have no null model, so their "
            f"entropy_deficit is NaN (steps {some(map(str, steps), 5)}): the factors at the previous step are unknown, "
            "since the rank changed, or since an earlier version recorded or analysed them.",
            "Analyse the run again where it has checkpoints; records of an earlier version keep their other numbers.",
            evidence={"increments": int(cells.sum()), "of": int(moved.sum()), "steps": steps},
        )


def _leading_alone(update: xr.Dataset) -> Iterator[Finding]:
    alone = np.isfinite(update["entropy_energy_low"].values) if "entropy_energy_low" in update else np.array(False)
    if alone.any():
        counts = np.unique(update["count"].values[alone]).tolist()
        width = (update["entropy_energy_high"] - update["entropy_energy_low"]).values[alone]
        yield Finding(
            "OD210",
            f"Only the {' or '.join(map(str, counts))} leading singular values of {int(alone.sum())} of "
            f"{int((update['count'] > 0).sum())} totals and increments (step × matrix) were computed. Their norms, "
            "participation ratio and stable rank are exact; their spectral entropy (energy) lies between "
            f"entropy_energy_low and entropy_energy_high, which are up to {width.max():.2g} nat apart. What needs all "
            "singular values is NaN, and no median counts it: the entropies and effective ranks, nuclear norm and "
            "rank, condition number, Gini and Hoyer coefficients, outliers; and the rank at a share of energy, or "
            "above a tolerance, where it exceeds what was computed.",
            "Analyse without --top (top=None) for all singular values.",
            evidence={"top": counts, "cells": int(alone.sum()), "widest_bound_nat": float(width.max())},
        )
