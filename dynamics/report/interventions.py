"""What the summary says of ``/intervention``: at its last step, and how often over the steps."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import xarray as xr

from dynamics.intervention.findings import (
    VERDICTS,
    headline,
    largest,
    measured_steps,
    number_of,
    statements,
    value_of,
    verdict,
)
from dynamics.schema import ALL
from dynamics.text import finite, integer

_OF_PARTS = ("interaction", "attributed", "excess", "share", "efficiency", "sufficiency", "necessity")
_DEVIATIONS = ("share_outside_space", "norm_deviation", "repeat_deviation")


def intervention_summary(tree: xr.DataTree) -> dict[str, Any] | None:
    """Return what the parts of the last update do to the loss.

    Args:
        tree: A result of one run.

    Returns:
        ``None`` where no update was run, else, with missing numbers as ``None``:

        - ``step``, ``k`` (the headline's, chosen before looking), ``space``, ``splits``, ``groups``, ``samples``, and
          the attributes ``share_outside_space``, ``norm_deviation``, ``repeat_deviation``;
        - ``statements``: what is said of it, a paragraph each;
        - ``verdict``: a key of ``intervention.findings.VERDICTS``, ``""`` where ``on`` and ``off`` were not run;
          ``steps``: how many steps have each, and ``of`` how many;
        - ``parts``: a row for each k and task, the headline's first: effects at full length and what follows of them,
          with ``value``, ``low``, ``high``;
        - ``arms``: a row for each arm, at the headline's k and λ = 1, of all samples.
    """
    if "intervention" not in tree.children:
        return None
    group = tree["intervention"].to_dataset().load()
    steps = measured_steps(group)
    if not steps:
        return None
    at_step, last = group.sel(step=steps[-1]), headline(group, steps[-1])
    verdicts = Counter(verdict(headline(group, step).sel(task=ALL)) for step in steps)
    ks = sorted(group["k"].values.tolist(), key=lambda k: k != int(last["k"]))
    tasks = sorted(map(str, group["task"].values), key=lambda task: task != ALL)
    return {
        "step": steps[-1],
        "k": ks[0],
        "space": str(group.attrs.get("space", "")),
        **{name: integer(group.attrs.get(name, np.nan)) for name in ("splits", "groups", "samples")},
        **{name: finite(largest(group.attrs, name)) for name in _DEVIATIONS},
        "verdict": verdict(last.sel(task=ALL)),
        "statements": statements(group),
        "steps": {"of": len(steps), **{name: verdicts[name] for name in VERDICTS}},
        "parts": [_parts(at_step.sel(k=k, task=task)) for k in ks for task in tasks]
        if {"on", "off"} <= set(group["arm"].values.tolist())
        else [],
        "arms": [_arm(last.sel(task=ALL), str(arm)) for arm in group["arm"].values],
    }


def _parts(at: xr.Dataset) -> dict[str, Any]:
    effects = {arm: _interval(at, "effect", arm=arm, scale=1.0) for arm in ("full", "on", "off")}
    return {
        "k": int(at["k"]),
        "task": str(at["task"].item()),
        "verdict": verdict(at),
        "captured": finite(number_of(at, "captured")),
        **effects,
        **{name: _interval(at, name) for name in _OF_PARTS},
        **{name: finite(number_of(at, name)) for name in ("excess_p", "relative_excess", "separable_scale")},
    }


def _arm(at: xr.Dataset, arm: str) -> dict[str, Any]:
    of_arm = at.sel(arm=arm)
    return {
        "arm": arm,
        "norm": finite(of_arm["norm"]),
        "effect": _interval(of_arm, "effect", scale=1.0),
        "score_effect": _interval(of_arm, "score_effect"),
        "required_groups": integer(number_of(of_arm, "required_groups")),
    }


def _interval(at: xr.Dataset, name: str, **chosen: str | float) -> dict[str, float | None]:
    return {end: finite(number) for end, number in value_of(at, name, **chosen)._asdict().items()}
