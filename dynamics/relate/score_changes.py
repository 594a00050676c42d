"""Scores of one run since its start: which got worse beyond their standard errors, and where each was best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from scipy import special

from dynamics.relate.directions import metric_of
from dynamics.relate.permutations import LEVEL


def score_directions(scores: xr.Dataset) -> dict[str, int]:
    """Return whether higher (1) or lower (−1) is better for each task of a run's ``/score``; 0 where not known.

    >>> scores = xr.Dataset({"score": (("step", "task"), [[1.0, 2.0]])}, {"step": [5], "task": ["eval_loss", "oddity"]})
    >>> score_directions(scores)
    {'eval_loss': -1, 'oddity': 0}
    """
    names = [str(task) for task in scores["task"].values]
    if "direction" not in scores:
        return {name: metric_of(name).direction for name in names}
    stated = np.nan_to_num(scores["direction"].transpose("step", "task").values)
    signs = np.where((stated > 0).any(0), 1, np.where((stated < 0).any(0), -1, 0)).tolist()
    return {name: sign or metric_of(name).direction for name, sign in zip(names, signs, strict=True)}


def score_changes(scores: xr.Dataset) -> list[dict[str, Any]]:
    """Return how each score of a run changed from before training, step 0, to its last step.

    A change is improvement where positive. Its interval is ± z·√(SE₀² + SE₁²), as if the items of the two evaluations
    were independent (items that are the same make it too wide), at 95 % of all scores together (Bonferroni).

    Args:
        scores: ``score`` and ``standard_error`` ``(step, task)``, the group ``/score`` of one run.

    Returns:
        For each task with a value: ``task``, ``direction``; ``last`` and ``best`` (``None`` where the direction is not
        known) with ``step`` and ``score``; ``start`` likewise, ``None`` where there is no value at step 0; ``change``,
        ``low``, ``high``, ``None`` where unknown; and ``verdict``: ``"worse"``, ``"better"``, ``"not_shown"``,
        ``"undecided"`` (no standard errors, no direction), or ``"not_asked"`` (no start).

    >>> arrays = {"score": (("step", "task"), [[0.6], [0.5]]), "standard_error": (("step", "task"), [[0.01], [0.01]])}
    >>> [change] = score_changes(xr.Dataset(arrays, {"step": [0, 100], "task": ["mmlu/acc"]}))
    >>> change["verdict"], round(change["low"], 3), round(change["high"], 3)
    ('worse', -0.128, -0.072)
    """
    values, errors = (scores[name].transpose("step", "task").values for name in ("score", "standard_error"))
    steps, directions = scores["step"].values, score_directions(scores)
    rows = []
    for column, (task, direction) in enumerate(directions.items()):
        having = np.flatnonzero(np.isfinite(values[:, column]))
        if not having.size:
            continue
        points = {int(steps[row]): (float(values[row, column]), float(errors[row, column])) for row in having}
        best = max(points, key=lambda step: direction * points[step][0])
        last = max(points)
        rows.append(
            {
                "task": task,
                "direction": direction,
                "start": _point(points, 0) if 0 in points and last > 0 else None,
                "last": _point(points, last),
                "best": _point(points, best) if direction else None,
                **_change(points, last, direction),
            }
        )
    asked = [row for row in rows if row["error"] is not None]
    z = float(special.ndtri(1 - LEVEL / 2 / max(len(asked), 1)))
    return [_judged(row, z) for row in rows]


def _point(points: Mapping[int, tuple[float, float]], step: int) -> dict[str, Any]:
    return {"step": step, "score": points[step][0]}


def _change(points: Mapping[int, tuple[float, float]], last: int, direction: int) -> dict[str, float | None]:
    """Return improvement since step 0, and its standard error."""
    if 0 not in points or last == 0 or not direction:
        return {"change": None, "error": None}
    (first, first_error), (end, end_error) = points[0], points[last]
    error = float(np.hypot(first_error, end_error))
    return {"change": direction * (end - first), "error": error if np.isfinite(error) and error > 0 else None}


def _judged(row: dict[str, Any], z: float) -> dict[str, Any]:
    change, error = row["change"], row.pop("error")
    low, high = (None, None) if error is None else (change - z * error, change + z * error)
    if row["start"] is None:
        verdict = "not_asked"
    elif low is None or high is None:
        verdict = "undecided"
    else:
        verdict = "worse" if high < 0 else "better" if low > 0 else "not_shown"
    return row | {"low": low, "high": high, "verdict": verdict}
