"""What the summary says of ``/intervention`` and ``/sharpness``: at their last steps, and how often over the steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
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
from dynamics.text import finite, integer, interval, number

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
        - ``arms``: a row for each arm, at the headline's k and λ = 1, of all samples; ``score_effects`` of the tasks
          with a score of their own.
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
        "arms": [_arm(last, str(arm)) for arm in group["arm"].values],
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


def _arm(last: xr.Dataset, arm: str) -> dict[str, Any]:
    by_task = last.sel(arm=arm)
    of_arm = by_task.sel(task=ALL)
    tasks = [str(task) for task in last["task"].values if task != ALL]
    scores = {task: _interval(by_task.sel(task=task), "score_effect") for task in tasks}
    return {
        "arm": arm,
        "norm": finite(of_arm["norm"]),
        "effect": _interval(of_arm, "effect", scale=1.0),
        "score_effect": _interval(of_arm, "score_effect"),
        "score_effects": {task: effect for task, effect in scores.items() if effect["value"] is not None},
        "required_groups": integer(number_of(of_arm, "required_groups")),
    }


def _interval(at: xr.Dataset, name: str, **chosen: str | float) -> dict[str, float | None]:
    return {end: finite(number) for end, number in value_of(at, name, **chosen)._asdict().items()}


def sharpness_summary(tree: xr.DataTree) -> dict[str, Any] | None:
    """Return how far a step could have gone, where it was last measured.

    Args:
        tree: A result of one run.

    Returns:
        ``None`` where it was not measured, else, with missing numbers as ``None``:

        - ``step``, ``from_step`` (that of the weights), ``learning_rate`` of plain gradient descent;
        - ``statement``: one sentence;
        - ``tasks``: for all samples and each task ``critical_step`` and ``critical_sharpness`` with ``value``, ``low``,
          ``high``, and the ``reason`` of one that is missing or not resolved;
        - ``pairs``: ``relative_sharpness`` of each task's loss (``of``) along each task's gradient (``along``).
    """
    if "sharpness" not in tree.children:
        return None
    last = tree["sharpness"].to_dataset().load().isel(step=-1)
    tasks = [
        {
            "task": str(task),
            **{name: _interval(last, name, task=task) for name in ("critical_step", "critical_sharpness")},
            "reason": str(last["reason"].sel(task=task).item()),
        }
        for task in last["task"].values
    ]
    summary = {
        "step": int(last["step"]),
        "from_step": integer(last["from_step"]) if "from_step" in last.coords else None,
        "learning_rate": finite(last["learning_rate"]),
        "tasks": tasks,
        "pairs": [
            {"along": str(along), "of": str(of), **_interval(last, "relative_sharpness", task=along, task_=of)}
            for along in last["task"].values
            for of in last["task_"].values
        ],
    }
    return {**summary, "statement": _how_long(summary)}


def _how_long(summary: Mapping[str, Any]) -> str:
    """Return how long the step may be, in one sentence."""
    of_all = next(row for row in summary["tasks"] if row["task"] == ALL)
    rate, start = summary["learning_rate"], summary["from_step"]
    where = f"At step {summary['step'] if start is None else start:,}"
    name = "critical_step" if rate is None else "critical_sharpness"
    value, low, high = of_all[name].values()
    if value is None:
        return f"{where} it is not known how far a step could go: {of_all['reason']}."
    ends = interval(low, high, number) if None not in (low, high) else f"not resolved: {of_all['reason']}"
    if rate is not None:
        edge = number(2 / rate)
        return (
            f"{where} the critical sharpness is {number(value)} ({ends}): gradient descent lowers the loss of the "
            f"probe samples while it is below 2/η = {edge}."
        )
    until = f"the update to step {summary['step']:,}"
    if value < 1:
        return f"{where} {until} went too far: the loss is where it began at {number(value)} of its length ({ends})."
    return f"{where} {until} could have been {number(value)} times as long before the loss is where it began ({ends})."
