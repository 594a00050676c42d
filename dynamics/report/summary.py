"""The content of ``summary.json``: what a run's result says at its last step, as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from dynamics.report.fisher_summary import fisher_summary
from dynamics.spectra.dataset import parts_of_sums
from dynamics.text import finite, integer

_TOTALS = (
    "frobenius_norm_all",
    "entropy_energy_block_diagonal",
    "effective_rank_block_diagonal",
    "participation_ratio_block_diagonal",
)
_OVER_MATRICES = ("frobenius_norm", "effective_rank_energy", "stable_rank", "dominant_ratio", "entropy_deficit")
_PER_MATRIX = (
    "frobenius_norm",
    "effective_rank_energy",
    "effective_rank_amplitude",
    "stable_rank",
    "dominant_ratio",
    "entropy_deficit",
    "null_percentile",
)
_OF_GRADIENTS = ("norm_before_clip", "norm_after_clip", "effective_rank_energy", "dominant_ratio")
_BESIDE_BASE = (
    "relative_size",
    "overlap_left",
    "overlap_left_null",
    "energy_left",
    "intruder_energy",
    "intruder_energy_null",
)
_FLAGS = ("is_zero", "quantisation_limited")


def summarise(tree: xr.DataTree) -> dict[str, Any]:
    """What a result says at its last step.

    Args:
        tree: A result of one run, or of several under ``/runs``.

    Returns:
        Strictly valid JSON, missing and infinite numbers as ``None``. For one run:

        - ``toolkit_version``, ``run``, ``label`` (group of runs), ``created``;
        - ``steps``, ``last_step``, ``segments`` (each training and its steps), ``matrices`` (how many);
        - ``captured``: ``None``, or how many ``steps`` were captured during training and how many ``checkpoints`` read;
        - ``gradient``: ``None``, or medians over matrices at the last ``step`` at which gradients were captured;
        - ``fisher``: ``None``, or informative directions, the update in them, and tasks, see ``fisher_summary``;
        - ``path``: ``None``, or the shape of the newest training's path through its checkpoints;
        - ``base``: ``None``, or medians over matrices of updates beside the weights they changed, and how many
          ``matrices`` could be compared;
        - ``association`` with scores and ``comparison`` of groups: ``None``, or the ``headline`` measure named before
          looking and ``statements``, those of the headline first;
        - ``totals`` of the direct sum of all updates, and the number of ``matrices`` in it; ``adapters``: of each one
          by itself, where several are not added up; ``over_matrices``: quartiles, and the medians of the null;
        - ``roles``, most energy first; ``table``, a row for each matrix, largest update first;
        - ``suggested_rank_energy``, the share of energy that the suggested ranks hold; ``findings``.

        All numbers are of the total update, i.e. since the start of training, at the last step. For several runs
        ``{"runs": {name: …}, "association": …, "comparison": …, "findings": […]}``, these findings being about all
        runs, and about runs that could not be opened.

    Example: ``summarise(dynamics.open_run("runs/imax"))["totals"]["frobenius_norm_all"]``
    """
    if "runs" in tree.children:
        runs = {str(name): summarise(run) for name, run in tree["runs"].children.items()}
        return {"runs": runs, **_related(tree), "findings": _findings(tree)}
    update = tree["update"].to_dataset().load()
    last = update.isel(step=-1).sel(kind="total")
    return {
        "toolkit_version": str(tree.attrs["toolkit_version"]),
        "run": str(tree.attrs["run"]),
        "label": str(tree.attrs.get("label", "")),
        "created": str(tree.attrs["created"]),
        "steps": update["step"].values.tolist(),
        "segments": _segments(update),
        "matrices": update.sizes["matrix"],
        "last_step": int(last["step"]),
        "captured": _captured(tree),
        "gradient": _gradient(tree),
        "fisher": fisher_summary(tree),
        "path": _path(tree),
        "base": _base(tree),
        **_related(tree),
        "suggested_rank_energy": float(update["suggested_rank"].attrs["energy"]),
        "totals": _totals(last),
        "adapters": _adapters(last),
        "over_matrices": _over_matrices(tree["summary"].to_dataset().load()),
        "roles": _roles(last),
        "table": _table(last),
        "findings": _findings(tree),
    }


def all_findings(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The findings of a summary, of several runs one after the other."""
    runs: Iterable[Mapping[str, Any]] = summary.get("runs", {}).values()
    return [*summary["findings"], *(finding for run in runs for finding in run["findings"])]


def _findings(tree: xr.DataTree) -> list[dict[str, Any]]:
    return json.loads(tree.attrs.get("findings", "[]"))


def _segments(update: xr.Dataset) -> list[dict[str, Any]]:
    steps: dict[int, list[int]] = {}
    for segment, step in zip(update["segment"].values.tolist(), update["step"].values.tolist(), strict=True):
        steps.setdefault(segment, []).append(step)
    return [{"segment": segment, "steps": own} for segment, own in sorted(steps.items())]


def _captured(tree: xr.DataTree) -> dict[str, int] | None:
    if "captured" not in tree.attrs:
        return None
    captured = json.loads(tree.attrs["captured"])
    return {name: len(captured[name]) for name in ("steps", "checkpoints")}


def _gradient(tree: xr.DataTree) -> dict[str, Any] | None:
    """Medians over matrices, and the median of the null's mean where there is one."""
    if "summary_gradient" not in tree.children:
        return None
    last = tree["summary_gradient"].to_dataset().isel(step=-1).load()
    return {
        "step": int(last["step"]),
        **{
            name: {
                "median": finite(last[f"{name}_quantile"].sel(quantile=0.5)),
                **({"null_mean": finite(last[f"{name}_null"])} if f"{name}_null" in last else {}),
            }
            for name in _OF_GRADIENTS
        },
    }


def _related(tree: xr.DataTree) -> dict[str, Any]:
    """What relates runs to scores and to each other, in sentences."""
    found: dict[str, Any] = {}
    for name in ("association", "comparison"):
        if name not in tree.children:
            found[name] = None
            continue
        attributes = tree[name].attrs
        found[name] = {"headline": str(attributes["headline"]), "statements": [*map(str, attributes["statements"])]}
    return found


def _path(tree: xr.DataTree) -> dict[str, Any] | None:
    if "path" not in tree.children:
        return None
    path = tree["path"].to_dataset().load()
    last = path.isel(training=-1)
    own = path.isel(step=path["segment"].values == int(last["training"]))
    return {
        "checkpoints": own.sizes["step"],
        "straightness": finite(own["straightness"][-1]),
        "participation_ratio": finite(last["participation_ratio"]),
        "component_share": [finite(share) for share in last["component_share"].values[:2]],
        "matrices": integer(last["matrices"]),
    }


def _totals(last: xr.Dataset) -> dict[str, Any]:
    """Of the direct sum of all matrices; nothing where adapters that are not added up make no such sum."""
    separate = bool(_adapters(last))
    names = last["matrix"].values.tolist()
    counted = (last["count"].values > 0) & ~np.array(parts_of_sums(names), dtype=bool)
    return {**{name: None if separate else finite(last[name]) for name in _TOTALS}, "matrices": int(counted.sum())}


def _adapters(last: xr.Dataset) -> list[dict[str, Any]]:
    """Each of several adapters that are not added up; empty where they are, or there is only one."""
    names = last["matrix"].values.tolist()
    owners = [name.rpartition("@")[2] if "@" in name else "" for name in names]
    if len(set(owners)) < 2 or "" in owners:
        return []
    norm, known = last["frobenius_norm"].values, last["count"].values > 0
    rows = {owner: [i for i, one in enumerate(owners) if one == owner] for owner in dict.fromkeys(owners)}
    return [
        {
            "adapter": owner,
            "matrices": int(known[members].sum()),
            "frobenius_norm": finite(np.sqrt(np.sum(norm[members][known[members]] ** 2))),
        }
        for owner, members in rows.items()
    ]


def _base(tree: xr.DataTree) -> dict[str, Any] | None:
    if "base" not in tree.children:
        return None
    base = tree["base"].to_dataset().load()
    last = base.isel(step=-1)
    names = [name for name in _BESIDE_BASE if name in last]
    return {
        "step": int(last["step"]),
        "k": int(base.attrs["k"]),
        "matrices": int(np.isfinite(last["relative_size"].values).sum()),
        "of": base.sizes["matrix"],
        **{name: finite(last[name].median("matrix")) for name in names},
    }


def _over_matrices(summary: xr.Dataset) -> dict[str, dict[str, float | None]]:
    """Quartiles over matrices at the last step, and what a random LoRA would have (medians over matrices)."""
    last = summary.isel(step=-1).sel(kind="total")
    return {
        name: {
            **{
                word: finite(last[f"{name}_quantile"].sel(quantile=quantile))
                for word, quantile in (("lower_quartile", 0.25), ("median", 0.5), ("upper_quartile", 0.75))
            },
            **{
                word: finite(last[f"{name}_null{bound}"])
                for word, bound in (("null_mean", ""), ("null_5_percent", "_low"), ("null_95_percent", "_high"))
                if f"{name}_null{bound}" in last
            },
        }
        for name in _OVER_MATRICES
    }


def _roles(last: xr.Dataset) -> list[dict[str, Any]]:
    members = last["role"].values.tolist()
    rows = [
        {
            "role": str(role),
            "matrices": members.count(role),
            "frobenius_norm": finite(last["frobenius_norm_by_role"].sel(role_name=role)),
            "energy_share": finite(last["energy_share_by_role"].sel(role_name=role)),
        }
        for role in last["role_name"].values
    ]
    return sorted(rows, key=lambda row: -(row["energy_share"] or 0.0))


def _table(last: xr.Dataset) -> list[dict[str, Any]]:
    columns = {name: last[name].values.tolist() for name in (*_PER_MATRIX, *_FLAGS, "suggested_rank", "count")}
    coordinates = {
        name: last[name].values.tolist() for name in ("matrix", "layer", "role", "out", "in", "adapter_rank")
    }
    rows = [
        {
            "name": coordinates["matrix"][row],
            "layer": coordinates["layer"][row] if coordinates["layer"][row] >= 0 else None,
            **{name: coordinates[name][row] for name in ("role", "out", "in", "adapter_rank")},
            **{name: finite(columns[name][row]) for name in _PER_MATRIX},
            "suggested_rank": integer(columns["suggested_rank"][row]),
            "flags": [
                *(flag for flag in _FLAGS if columns[flag][row]),
                *(["not_in_last_checkpoint"] if columns["count"][row] == 0 else []),
            ],
        }
        for row in range(last.sizes["matrix"])
    ]
    return sorted(rows, key=lambda row: -(row["frobenius_norm"] or 0.0))
