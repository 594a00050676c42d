"""What a result says of the Fisher at its last step, as plain JSON: the key ``fisher`` of a summary."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

from dynamics.schema import ALL, FISHER_GROUPS, GLOBAL, last_step_with
from dynamics.text import finite, integer

_OF_THE_TEST = ("null_low", "null_high", "p_value")
_ENDS = {"value": "", "low": "_low", "high": "_high"}


def fisher_summary(tree: xr.DataTree) -> dict[str, Any] | None:
    """Spectrum, concentration and tasks of all trainable parameters together, at the last step that has them.

    Args:
        tree: A result of one run.

    Returns:
        ``None`` without a Fisher, else, with missing numbers as ``None``:

        - ``step``, ``evaluated_at_step``, ``space``, ``fisher``, ``samples``, ``groups``;
        - ``spectral_entropy``, ``dominant_ratio`` (both plug-in), ``participation_ratio`` and
          ``participation_ratio_directional`` with ``value``, ``low``, ``high``. Those of ``spectral_entropy`` are the
          plug-in's sampling error at this N; its ``lower_bound``, the low end of ln PR, is that of the Fisher's own.
          ``effective_groups`` and ``largest_samples_share``: how unequally samples carry the trace. ``by_task`` with
          samples, groups, effective groups and both participation ratios of each task;
        - ``concentration``: ``None`` if no update is known, else at its own ``step``: ``by_k``, and in ``at_k`` the row
          of the largest k that has a gain, which no result chose; ``steps`` and ``blocks``: how many of those with a
          gain at that k are concentrated;
        - ``pairs`` of tasks with their cosine and ``state``: ``"share"`` or ``"conflict"`` where its 95 % interval
          lies above or below 0, ``"undecided"`` where it holds 0, ``"unresolved"`` where there is none; ``mixture``:
          the parts of SE, and the permutation test of χ with every task's trace made 1.
    """
    if not set(FISHER_GROUPS) <= set(tree.children):
        return None
    fisher, shares, tasks = (tree[name].to_dataset() for name in FISHER_GROUPS)
    if GLOBAL not in fisher["block"].values:
        return None
    measured = fisher.drop_vars(["gram", "update_product"], errors="ignore").sel(block=GLOBAL).load()
    last = measured.sel(step=last_step_with(measured["trace"]))
    of_all = last.sel(task=ALL)
    between = tasks.sel(block=GLOBAL).load()
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
        **_between_tasks(between.sel(step=int(last["step"]))),
    }


def _number(here: xr.Dataset, name: str) -> float | None:
    """``None`` as well where the result is of a version that did not have it."""
    return finite(here[name]) if name in here else None


def _interval(here: xr.Dataset, name: str, suffix: str = "") -> dict[str, float | None]:
    return {word: _number(here, f"{name}{end}{suffix}") for word, end in _ENDS.items()}


def _of_task(here: xr.Dataset) -> dict[str, Any]:
    return {**{name: integer(here[name]) for name in ("samples", "groups")}, **_participation(here)}


def _participation(here: xr.Dataset) -> dict[str, Any]:
    known = {name: _interval(here, name) for name in ("participation_ratio", "participation_ratio_directional")}
    return {**known, "effective_groups": _number(here, "effective_groups")}


def _concentration(shares: xr.Dataset) -> dict[str, Any] | None:
    of_all = shares.sel(block=GLOBAL)
    here = of_all.sel(step=last_step_with(of_all["captured"]))
    if not np.isfinite(here["captured"].values).any():
        return None
    rows = [_of_k(here.sel(k=k)) for k in here["k"].values]
    known = [row for row in rows if row["gain"]["value"] is not None]
    known = known or [row for row in rows if row["captured"] is not None]
    k = known[-1]["k"]
    return {
        "step": int(here["step"]),
        "evaluated_at_step": integer(here["evaluated_at_step"]),
        "null_batch": integer(here["null_batch"]),
        "null_batch_limit": _number(here, "null_batch_limit"),
        "share_outside_space": finite(here["share_outside_space"]),
        "rayleigh_ratio": _interval(here, "rayleigh_ratio"),
        "at_k": known[-1],
        "by_k": rows,
        "steps": _count(of_all.sel(k=k)),
        "blocks": _count(shares.sel(step=int(here["step"]), k=k).drop_sel(block=GLOBAL)),
    }


def _of_k(here: xr.Dataset) -> dict[str, Any]:
    return {
        "k": int(here["k"]),
        "captured": finite(here["captured"]),
        "captured_split": finite(here["captured_split"]),
        "null_isotropic": _interval(here, "null_isotropic"),
        "null_gradient": _interval(here, "null_gradient"),
        "gain": _interval(here, "gain"),
        "gain_centred": _interval(here, "gain", "_centred"),
        "ln_gain": _number(here, "ln_gain"),
        "concentrated": float(here["concentrated"]) == 1,
    }


def _count(here: xr.Dataset) -> dict[str, int]:
    """How many are concentrated, of those that could be. A flag that is missing is no flag."""
    possible = np.isfinite(here["gain_low"].values) & np.isfinite(here["gain_low_centred"].values)
    if "null_batch_limit" in here:
        possible &= np.asarray(here["null_batch"].values <= here["null_batch_limit"].values)
    return {"concentrated": int((here["concentrated"].values.astype(float) == 1).sum()), "of": int(possible.sum())}


def _between_tasks(here: xr.Dataset) -> dict[str, Any]:
    names = [str(name) for name in here["task"].values if name != ALL]
    if len(names) < 2:
        return {"pairs": [], "mixture": None}
    # A result without χ of equal traces has a band of another χ, which is not told.
    mixture = {
        word: _number(here, name) if word not in _OF_THE_TEST or "divergence_normalised" in here else None
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
    pairs = [_pair(here.sel(task=first, task_=second)) for first, second in combinations(names, 2)]
    return {"pairs": pairs, "mixture": mixture}


def _pair(here: xr.Dataset) -> dict[str, Any]:
    cosine = _interval(here, "cosine")
    low, high = cosine["low"], cosine["high"]
    if cosine["value"] is None or low is None or high is None:
        state = "unresolved"
    elif low > 0:
        state = "share"
    else:
        state = "conflict" if high < 0 else "undecided"
    return {"tasks": [str(here["task"].item()), str(here["task_"].item())], "state": state, "cosine": cosine}
