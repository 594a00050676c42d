"""The content of ``summary.json``: a run's result at its last step, as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

from dynamics.fisher.task_structure import simultaneous_interval
from dynamics.report.answers import answers, answers_of_runs
from dynamics.report.answers.conflicts import pair_sentence
from dynamics.report.interventions import intervention_summary, sharpness_summary
from dynamics.report.loss_summary import loss_summary
from dynamics.report.routing_summary import routing_summary
from dynamics.report.score_summary import checkpoint_choice, checkpoint_table, score_summary
from dynamics.schema import ALL, FISHER_GROUPS, GLOBAL, last_step_with
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
#: Numbers of the permutation test of χ; without χ of equal traces they belong to another χ and are left out.
_OF_THE_TEST = ("null_low", "null_high", "p_value")
_OF_SCORES = ("difference", "low", "high", "normal_low", "normal_high", "effect_size", "p_adjusted")
_ENDS = {"value": "", "low": "_low", "high": "_high"}


def summarise(tree: xr.DataTree) -> dict[str, Any]:
    """Return a result at its last step as JSON-compatible content.

    Args:
        tree: A result of one run, or of several under ``/runs``.

    Returns:
        Strictly valid JSON, missing and infinite numbers as ``None``. For one run:

        - ``answers`` to the questions that a result is asked first, see ``report.answers.answer.Answer``;
        - ``toolkit_version``, ``run``, ``label`` (group of runs), ``created``;
        - ``steps``, ``last_step``, ``segments`` (each training and its steps), ``matrices`` (how many);
        - ``captured``: ``None``, or how many ``steps`` were recorded in training and how many ``checkpoints`` read;
        - ``gradient``: ``None``, or medians over matrices at the last ``step`` at which gradients were recorded;
        - ``fisher``: ``None``, or informative directions, the update in them, and tasks, see ``fisher_summary``;
        - ``intervention``: ``None``, or what the parts of the last update do to the loss, see ``intervention_summary``;
        - ``sharpness``: ``None``, or how far a step could have gone, see ``sharpness_summary``;
        - ``routing``: ``None``, or how tokens are spread over experts, see ``routing_summary``;
        - ``losses``: how the loss of each task's probe samples changed, a row each, see ``loss_summary``;
        - ``path``: ``None``, or the shape of the newest training's path through its checkpoints, and of a random
          walk with steps of the same lengths;
        - ``base``: ``None``, or medians over matrices of updates beside the weights they changed, and how many
          ``matrices`` could be compared;
        - ``scores``: each score at the start, at its last step and at its best, see ``score_changes``; and
          ``checkpoints``: a row for each step with the size of the update, the increment, and the scores;
        - ``checkpoint_choice``: ``None`` without losses of probe samples and scores, else which checkpoint to keep, see
          :func:`dynamics.choose_checkpoint`;
        - ``score_comparison`` and ``comparison`` of groups in scores and measures, and ``association`` of both:
          ``None``, or the ``headline`` and ``statements``, those about the headline first; of scores also ``rows``,
          with the ``verdict`` and numbers of each;
        - ``totals`` of the direct sum of all updates, and the number of ``matrices`` in it; ``adapters``: the size of
          each, where several are not added up; ``over_matrices``: quartiles, and the medians of the null;
        - ``roles``, most energy first; ``table``, a row for each matrix, largest update first;
        - ``suggested_rank_energy``, the share of energy that the suggested ranks hold; ``findings``.

        Numbers are those of the total update (since the start of training) at the last step. For several runs
        ``{"answers": […], "runs": {name: …}, "score_comparison": …, "comparison": …, "association": …,
        "findings": […]}``; these findings are about all runs together and about runs that could not be opened.

    Example: ``summarise(dynamics.open_run("runs/imax"))["totals"]["frobenius_norm_all"]``
    """
    if "runs" in tree.children:
        runs = {str(name): summarise(run) for name, run in tree["runs"].children.items()}
        content = {"runs": runs, **_related(tree), "findings": _findings(tree)}
        return {"answers": [answer.to_json() for answer in answers_of_runs(tree, content)], **content}
    update = tree["update"].to_dataset().load()
    last = update.isel(step=-1).sel(kind="total")
    scores = score_summary(tree)
    content = {
        "toolkit_version": str(tree.attrs["toolkit_version"]),
        "run": str(tree.attrs["run"]),
        "label": str(tree.attrs.get("label", "")),
        "created": str(tree.attrs["created"]),
        "steps": update["step"].values.tolist(),
        "segments": _segments(update),
        "matrices": update.sizes["matrix"],
        "last_step": int(last["step"]),
        "captured": _recorded(tree),
        "gradient": _gradient(tree),
        "fisher": fisher_summary(tree),
        "intervention": intervention_summary(tree),
        "sharpness": sharpness_summary(tree),
        "routing": routing_summary(tree),
        "losses": loss_summary(tree),
        "path": _path(tree),
        "base": _base(tree),
        "scores": scores,
        "checkpoints": checkpoint_table(update, tree, scores),
        "checkpoint_choice": checkpoint_choice(tree),
        **_related(tree),
        "suggested_rank_energy": float(update["suggested_rank"].attrs["energy"]),
        "totals": _totals(last),
        "adapters": _adapters(last),
        "over_matrices": _over_matrices(tree["summary"].to_dataset().load()),
        "roles": _roles(last),
        "table": _table(last),
        "findings": _findings(tree),
    }
    return {"answers": [answer.to_json() for answer in answers(tree, content)], **content}


def all_findings(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the findings of a summary; of several runs one after the other."""
    runs: Iterable[Mapping[str, Any]] = summary.get("runs", {}).values()
    return [*summary["findings"], *(finding for run in runs for finding in run["findings"])]


def _findings(tree: xr.DataTree) -> list[dict[str, Any]]:
    return json.loads(tree.attrs.get("findings", "[]"))


def _segments(update: xr.Dataset) -> list[dict[str, Any]]:
    steps: dict[int, list[int]] = {}
    for segment, step in zip(update["segment"].values.tolist(), update["step"].values.tolist(), strict=True):
        steps.setdefault(segment, []).append(step)
    return [{"segment": segment, "steps": members} for segment, members in sorted(steps.items())]


def _recorded(tree: xr.DataTree) -> dict[str, int] | None:
    if "captured" not in tree.attrs:
        return None
    recorded = json.loads(tree.attrs["captured"])
    return {name: len(recorded[name]) for name in ("steps", "checkpoints")}


def _gradient(tree: xr.DataTree) -> dict[str, Any] | None:
    """Return medians over matrices, and the median of the null's mean where there is one."""
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
    """Return the sentences about groups of runs, in scores and in measures, and about measures and scores."""
    relations: dict[str, Any] = dict.fromkeys(("score_comparison", "comparison", "association"))
    for name in relations.keys() & tree.children.keys():
        attributes = tree[name].attrs
        relations[name] = {"headline": str(attributes["headline"]), "statements": [*map(str, attributes["statements"])]}
    if "score_comparison" in tree.children:
        relations["score_comparison"]["rows"] = _score_rows(tree["score_comparison"].to_dataset().load())
    return relations


def _score_rows(compared: xr.Dataset) -> list[dict[str, Any]]:
    """Return verdict and numbers of each comparison and score."""
    return [
        {
            "comparison": str(comparison),
            "task": str(task),
            "verdict": str(row["verdict"].item()),
            **{name: finite(row[name]) for name in _OF_SCORES},
            **{name: int(row[name]) for name in ("n_first", "n_second", "n_pairs")},
        }
        for comparison in compared["comparison"].values
        for task in compared["task"].values
        for row in [compared.sel(comparison=comparison, task=task)]
    ]


def _path(tree: xr.DataTree) -> dict[str, Any] | None:
    if "path" not in tree.children:
        return None
    path = tree["path"].to_dataset().load()
    last = path.isel(segment=-1)
    newest = path.isel(step=path["step_segment"].values == int(last["segment"]))
    return {
        "checkpoints": newest.sizes["step"],
        **{name: _number(newest.isel(step=-1), name) for name in ("straightness", "straightness_null")},
        **{name: _number(last, name) for name in ("participation_ratio", "participation_ratio_null")},
        "component_share": [finite(share) for share in last["component_share"].values[:2]],
        "component_share_null": _number(last.isel(component=0), "component_share_null"),
        "matrices": integer(last["matrices"]),
    }


def _totals(last: xr.Dataset) -> dict[str, Any]:
    """Return numbers of the direct sum of all matrices; ``None`` where adapters are not added up."""
    separate = bool(_adapters(last))
    names = last["matrix"].values.tolist()
    counted = (last["count"].values > 0) & ~np.array(parts_of_sums(names), dtype=bool)
    return {**{name: None if separate else finite(last[name]) for name in _TOTALS}, "matrices": int(counted.sum())}


def _adapters(last: xr.Dataset) -> list[dict[str, Any]]:
    """Return the size of each of several adapters that are not added up, else nothing."""
    names = last["matrix"].values.tolist()
    owners = [name.rpartition("@")[2] if "@" in name else "" for name in names]
    if len(set(owners)) < 2 or "" in owners:
        return []
    norms, present = last["frobenius_norm"].values, last["count"].values > 0
    members = {adapter: present & (np.array(owners) == adapter) for adapter in dict.fromkeys(owners)}
    return [
        {
            "adapter": adapter,
            "matrices": int(rows.sum()),
            "frobenius_norm": finite(np.sqrt(np.sum(norms[rows] ** 2))),
        }
        for adapter, rows in members.items()
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
    """Return quartiles over matrices at the last step, and the medians over matrices of the null."""
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
    roles = last["role"].values.tolist()
    rows = [
        {
            "role": str(role),
            "matrices": roles.count(role),
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


def fisher_summary(tree: xr.DataTree) -> dict[str, Any] | None:
    """Return spectrum, concentration and tasks of all trainable parameters together, at their last step.

    Args:
        tree: A result of one run.

    Returns:
        ``None`` without a Fisher, else, with missing numbers as ``None``:

        - ``step``, ``evaluated_at_step``, ``space``, ``fisher``, ``samples``, ``groups``;
        - ``spectral_entropy``, ``dominant_ratio`` (both plug-in), ``participation_ratio`` and
          ``participation_ratio_directional`` with ``value``, ``low``, ``high``. The ends of ``spectral_entropy`` are
          the sampling error of the plug-in value at this N; ``lower_bound``, the low end of ln PR, bounds the Fisher's
          own SE. ``effective_groups`` and ``largest_samples_share`` tell how unequally samples carry the trace.
          ``by_task`` has samples, groups, effective groups and both participation ratios of each task;
        - ``concentration``: ``None`` without an update, else at its own ``step``: ``by_k``, and in ``at_k`` the row of
          the largest k that has a gain, a choice that no result influenced; ``steps`` and ``blocks``: how many of
          those with a gain at that k are concentrated; ``…_optimizer``: the same beside steps of the optimizer;
        - ``pairs`` of tasks with their ``cosine``, ``overlap``, ``transfer`` (of the second by a step for the first)
          and ``transfer_back``; the ends of the cosine's 95 % interval of all pairs ``together``; ``state``:
          ``"share"`` or ``"conflict"`` if that interval lies above or below 0, ``"undecided"`` if it includes 0,
          ``"unresolved"`` if there is none; and the ``sentence`` about it;
        - ``mixture``: the parts of SE, and the permutation test of χ with the trace of every task made 1.
    """
    if not set(FISHER_GROUPS) <= set(tree.children):
        return None
    fisher, shares, tasks = (tree[name].to_dataset() for name in FISHER_GROUPS)
    if GLOBAL not in fisher["block"].values:
        return None
    over_steps = fisher.drop_vars(["gram", "update_product"], errors="ignore").sel(block=GLOBAL).load()
    last = over_steps.sel(step=last_step_with(over_steps["trace"]))
    of_all = last.sel(task=ALL)
    return {
        "step": int(last["step"]),
        "evaluated_at_step": integer(last["evaluated_at_step"]),
        "space": str(fisher.attrs.get("space", "")),
        "fisher": str(fisher.attrs.get("fisher", "")),
        "samples": integer(of_all["samples"]),
        "groups": integer(of_all["groups"]),
        "spectral_entropy": {
            **_interval(of_all, "spectral_entropy"),
            "lower_bound": finite(of_all["ln_participation_ratio_low"]),
        },
        "dominant_ratio": _interval(of_all, "dominant_ratio"),
        **_participation(of_all),
        "largest_samples_share": _number(of_all, "largest_samples_share"),
        "by_task": {str(task): _of_task(last.sel(task=task)) for task in last["task"].values if task != ALL},
        "concentration": _concentration(shares.load()),
        **_between_tasks(tasks.sel(block=GLOBAL, step=int(last["step"])).load(), last),
    }


def _number(dataset: xr.Dataset, name: str) -> float | None:
    """Return a number; ``None`` as well where the result is of a version that did not have it."""
    return finite(dataset[name]) if name in dataset else None


def _interval(dataset: xr.Dataset, name: str, suffix: str = "") -> dict[str, float | None]:
    return {word: _number(dataset, f"{name}{end}{suffix}") for word, end in _ENDS.items()}


def _of_task(fisher: xr.Dataset) -> dict[str, Any]:
    return {**{name: integer(fisher[name]) for name in ("samples", "groups")}, **_participation(fisher)}


def _participation(fisher: xr.Dataset) -> dict[str, Any]:
    ratios = {name: _interval(fisher, name) for name in ("participation_ratio", "participation_ratio_directional")}
    return {**ratios, "effective_groups": _number(fisher, "effective_groups")}


def _concentration(shares: xr.Dataset) -> dict[str, Any] | None:
    of_all = shares.sel(block=GLOBAL)
    last = of_all.sel(step=last_step_with(of_all["captured"]))
    if not np.isfinite(last["captured"].values).any():
        return None
    rows = [_of_k(last.sel(k=k)) for k in last["k"].values]
    with_gain = [row for row in rows if row["gain"]["value"] is not None]
    at_k = (with_gain or [row for row in rows if row["captured"] is not None])[-1]
    return {
        "step": int(last["step"]),
        "evaluated_at_step": integer(last["evaluated_at_step"]),
        "null_batch": integer(last["null_batch"]),
        "null_batch_limit": _number(last, "null_batch_limit"),
        "share_outside_space": finite(last["share_outside_space"]),
        "rayleigh_ratio": _interval(last, "rayleigh_ratio"),
        "at_k": at_k,
        "by_k": rows,
        "steps": _count(of_all.sel(k=at_k["k"])),
        "steps_optimizer": _count(of_all.sel(k=at_k["k"]), "_optimizer"),
        "blocks": _count(shares.sel(step=int(last["step"]), k=at_k["k"]).drop_sel(block=GLOBAL)),
    }


def _of_k(shares: xr.Dataset) -> dict[str, Any]:
    return {
        "k": int(shares["k"]),
        "captured": finite(shares["captured"]),
        "captured_split": finite(shares["captured_split"]),
        "null_isotropic": _interval(shares, "null_isotropic"),
        "null_gradient": _interval(shares, "null_gradient"),
        "gain": _interval(shares, "gain"),
        "gain_centred": _interval(shares, "gain", "_centred"),
        "ln_gain": _number(shares, "ln_gain"),
        "concentrated": float(shares["concentrated"]) == 1,
        "null_optimizer": _interval(shares, "null_optimizer"),
        "gain_optimizer": _interval(shares, "gain_optimizer"),
        "gain_optimizer_centred": _interval(shares, "gain_optimizer", "_centred"),
        "concentrated_optimizer": _number(shares, "concentrated_optimizer") == 1,
    }


def _count(shares: xr.Dataset, null: str = "") -> dict[str, int]:
    """Count what is concentrated, and what could be. A missing flag counts as no flag."""
    if f"concentrated{null}" not in shares:
        return {"concentrated": 0, "of": 0}
    low, centred = (shares[f"gain{null}_low{suffix}"].values for suffix in ("", "_centred"))
    possible = np.isfinite(low) & np.isfinite(centred)
    if "null_batch_limit" in shares:
        possible &= np.asarray(shares["null_batch"].values <= shares["null_batch_limit"].values)
    flags = shares[f"concentrated{null}"].values.astype(float) == 1
    return {"concentrated": int(flags.sum()), "of": int(possible.sum())}


def _between_tasks(tasks: xr.Dataset, fisher: xr.Dataset) -> dict[str, Any]:
    names = [str(name) for name in tasks["task"].values if name != ALL]
    if len(names) < 2:
        return {"pairs": [], "mixture": None}
    mixture = {
        word: _number(tasks, name) if word not in _OF_THE_TEST or "divergence_normalised" in tasks else None
        for word, name in {
            "spectral_entropy": "spectral_entropy_mixture",
            "within_tasks": "spectral_entropy_within",
            "divergence": "divergence",
            "largest_divergence": "divergence_largest",
            "normalised_divergence": "divergence_normalised",
            "normalised_largest": "divergence_normalised_largest",
            "null_low": "divergence_null_low",
            "null_high": "divergence_null_high",
            "p_value": "divergence_p_value",
        }.items()
    }
    groups = {name: int(fisher["groups"].sel(task=name)) for name in names}
    samples = integer(fisher["samples"].sel(task=ALL)) or 0
    intervals = tasks["cosine_low"].sel(task=names, task_=names).values
    resolved = int(np.isfinite(intervals[np.triu_indices(len(names), 1)]).sum())
    pairs = []
    for first, second in combinations(names, 2):
        pair = _pair(tasks, first, second, min(groups[first], groups[second]), resolved)
        pairs.append({**pair, "sentence": pair_sentence(pair, samples)})
    return {"pairs": pairs, "mixture": mixture}


def _pair(tasks: xr.Dataset, first: str, second: str, groups: int, comparisons: int) -> dict[str, Any]:
    at = tasks.sel(task=first, task_=second)
    cosine = _interval(at, "cosine")
    value, low, high = cosine.values()
    together: dict[str, float | None] = {"low": None, "high": None}
    state = "unresolved"
    if value is not None and low is not None and high is not None:
        low, high = simultaneous_interval(value, low, high, groups, comparisons)
        together = {"low": low, "high": high}
        state = "share" if low > 0 else "conflict" if high < 0 else "undecided"
    return {
        "tasks": [first, second],
        "state": state,
        "cosine": cosine,
        "together": together,
        "overlap": _interval(at, "overlap"),
        "transfer": _interval(at, "transfer"),
        "transfer_back": _interval(tasks.sel(task=second, task_=first), "transfer"),
    }
