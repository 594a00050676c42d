"""Rows of scores → scores(run, step, task), each with its direction; what could not be placed becomes a finding."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import cast

import numpy as np
import pandas as pd
import xarray as xr

from dynamics.findings import Finding
from dynamics.relate.directions import direction_remedy, directions_of, is_of_task, metric_of
from dynamics.relate.score_files import ScoreRow
from dynamics.schema import RETAINED, SCORE, SCORE_DIRECTION
from dynamics.text import counted, some

#: The task that is the mean of all tasks.
ALL = "all"
#: What a score is of: rows that agree in these are of one score.
_KEYS = ["run", "step", "task"]
_NAMED = 8


@dataclass(frozen=True)
class ScoreTable:
    """Scores of all runs, and what a reader must know of them.

    Args:
        scores: ``score``, ``items``, ``standard_error`` ``(run, step, task)`` as they were given, and the coordinate
            ``direction(task)``: +1 if higher is better, −1 if lower, 0 if not known.
        findings: OD501 to OD503, OD505 (score files that contradict each other) and OD512.
    """

    scores: xr.Dataset
    findings: tuple[Finding, ...]


def score_table(
    rows: Iterable[ScoreRow],
    *,
    runs: Mapping[str, Collection[int]] | None = None,
    directions: Mapping[str, str] | None = None,
) -> ScoreTable:
    """Place rows on a grid of runs, steps and tasks.

    A score without a step belongs to the last step of its run. Rows that say the same twice count once; rows of one
    (run, step, task) that differ are left out.

    Args:
        rows: In any order.
        runs: Run → steps that have measures. Rows of other runs are left out; scores at other steps are kept and named.
        directions: Task → ``"higher"`` or ``"lower"`` where names do not tell which is better.

    Raises:
        ValueError: On another direction than these two.

    >>> table = score_table([ScoreRow("a", 10, "vqa/accuracy", 0.5), ScoreRow("a", 20, "vqa/accuracy", 0.7)])
    >>> table.scores["score"].sel(run="a", task="vqa/accuracy").values.tolist()
    [0.5, 0.7]
    """
    placed, findings = _with_steps(list(rows), runs)
    scores, repeated = _grid(placed)
    findings += repeated
    if runs is not None:
        findings += _steps_without_measures(scores["score"], runs)
    tasks = scores["task"].values.tolist()
    stated, contradictions = _stated_directions(placed)
    direction = directions_of(tasks, directions, stated)
    findings += [*contradictions, *_unknown_tasks(tasks, directions or {})]
    signs = np.array([direction[task] for task in tasks], dtype=np.int64)
    scores = scores.assign_coords(direction=("task", signs, SCORE_DIRECTION.attributes))
    return ScoreTable(scores, tuple(findings))


def _with_steps(
    rows: list[ScoreRow], runs: Mapping[str, Collection[int]] | None
) -> tuple[list[ScoreRow], list[Finding]]:
    """Return rows of known runs, each at a step, and findings about the others."""
    findings = []
    unknown = [row.run for row in rows if runs is not None and row.run not in runs]
    if runs is not None and unknown:
        findings.append(
            Finding(
                "OD501",
                f"Expected scores of {_named(runs)}, got {len(unknown)} of {_named(set(unknown))}.",
                "Give runs the same names in the score file as on the command line (the folder's name).",
                evidence={"runs": sorted(set(unknown)), "rows": len(unknown)},
            )
        )
        rows = [row for row in rows if row.run in runs]
    if runs is None:
        last = {row.run: row.step for row in sorted(rows, key=lambda row: row.step or 0) if row.step is not None}
    else:
        last = {run: max(steps) for run, steps in runs.items() if steps}
    placed = [replace(row, step=last.get(row.run)) if row.step is None else row for row in rows]
    without = [row.run for row in rows if row.step is None]
    left_out = sum(row.step is None for row in placed)
    if without:
        is_ = "is" if len(without) == 1 else "are"
        except_ = f" {left_out} of them {'is' if left_out == 1 else 'are'} left out: that step is not known."
        findings.append(
            Finding(
                "OD502",
                f"{counted(len(without), 'score')} of {_named(set(without))} {is_} without a step and count"
                f"{'s' if len(without) == 1 else ''} for the run's last step.{except_ if left_out else ''}",
                "Put evaluations beside the checkpoint they are of, or give a step column.",
                evidence={"rows": len(without), "left_out": left_out},
            )
        )
    return [row for row in placed if row.step is not None], findings


def _grid(rows: Sequence[ScoreRow]) -> tuple[xr.Dataset, list[Finding]]:
    """Return the scores as ``(run, step, task)``, and a finding about scores that are given more than once.

    Rows that contradict each other are left out; of rows that agree, the one that says most counts.
    """
    names = [list(dict.fromkeys(texts)) for texts in ((row.run for row in rows), (row.task for row in rows))]
    # Numbers instead of names: pandas refuses names that are not UTF-8, as those of folders may be.
    run_number, task_number = ({name: number for number, name in enumerate(texts)} for texts in names)
    keys = [(run_number[row.run], row.step, task_number[row.task]) for row in rows]
    table = pd.DataFrame(keys, columns=_KEYS, dtype="int64").assign(
        **{name: np.array([getattr(row, name) for row in rows], dtype=np.float64) for name in SCORE}
    )
    scores = table.groupby(_KEYS, sort=False)["score"]
    cell, repeated = scores.ngroup().to_numpy(), scores.transform("size").to_numpy() > 1
    values, first = table["score"].to_numpy(), scores.transform("first").to_numpy()
    # As math.isclose has it: equal up to rounding at the scores' own scale.
    tolerance = np.maximum(1e-9 * np.maximum(np.abs(values), np.abs(first)), 1e-12)
    with np.errstate(invalid="ignore"):  # a loss may be infinite
        agrees = (values == first) | (np.abs(values - first) <= tolerance)
    torn = np.isin(cell, cell[repeated & ~agrees])
    kept = table.loc[~torn]
    fullest = kept.loc[kept.isna().sum(axis=1).sort_values(kind="stable").index].drop_duplicates(_KEYS)
    grid = fullest.set_index(_KEYS).to_xarray().reindex({name: kept[name].unique() for name in ("run", "task")})
    dataset = xr.Dataset(
        {name: (("run", *SCORE[name].dims), grid[name].values, SCORE[name].attributes) for name in SCORE},
        {
            "run": np.array([names[0][number] for number in grid["run"].values], dtype=str),
            "step": grid["step"].values,
            "task": np.array([names[1][number] for number in grid["task"].values], dtype=str),
        },
    )
    if not repeated.any():
        return dataset, []
    run, step, task = keys[int(np.argmax(torn if torn.any() else repeated))]
    count, contradictions = (len(np.unique(cell[chosen])) for chosen in (repeated, torn))
    fate = "with equal values"
    if contradictions:
        fate = f"{contradictions} of them, with different values, {'is' if contradictions == 1 else 'are'} left out"
    return dataset, [
        Finding(
            "OD503",
            f"{counted(count, 'score')} {'is' if count == 1 else 'are'} given more than once, {fate} (for example run "
            f"{names[0][run]!r}, step {step}, task {names[1][task]!r}).",
            "Keep one row for each run, step and task.",
            step=step,
            evidence={"places": count, "contradictions": contradictions},
        )
    ]


def _steps_without_measures(scores: xr.DataArray, runs: Mapping[str, Collection[int]]) -> Iterator[Finding]:
    names, steps = scores["run"].values.tolist(), scores["step"].values.tolist()
    cells = zip(product(names, steps), scores.notnull().sum("task").values.ravel().tolist(), strict=True)
    # Before training, at step 0, there is no update that could have measures.
    apart = {(run, step): count for (run, step), count in cells if count and step > 0 and step not in runs[run]}
    if apart:
        run, step = min(apart)
        count = sum(apart.values())
        has, is_ = ("has", "is") if count == 1 else ("have", "are")
        yield Finding(
            "OD502",
            f"{counted(count, 'score')} {has} no checkpoint with measures at the same step and {is_} not related to "
            f"any (for example step {step} of run {run!r}).",
            "Evaluate and save at the same steps.",
            step=step,
            evidence={"places": len(apart), "first": [list(cell) for cell in sorted(apart)[:_NAMED]]},
        )


def _stated_directions(rows: Sequence[ScoreRow]) -> tuple[dict[str, bool], list[Finding]]:
    """Return whether higher is better, task by task, as files say; and a finding where they contradict each other."""
    words = defaultdict(set)
    for row in rows:
        if row.higher_is_better is not None:
            words[row.task].add(row.higher_is_better)
    stated = {task: higher for task, (higher, *more) in words.items() if not more}
    torn = [task for task in words if task not in stated]
    if not torn:
        return stated, []
    return stated, [
        Finding(
            "OD505",
            f"Score files contradict each other on whether higher is better for {_named(torn)}. The user's word "
            "decides, else the name of the score.",
            direction_remedy(torn[0]),
            evidence={"tasks": torn},
        )
    ]


def _unknown_tasks(tasks: Sequence[str], directions: Mapping[str, str]) -> Iterator[Finding]:
    absent = sorted(set(directions) - set(tasks))
    if absent:
        yield Finding(
            "OD512",
            f"A direction is given for {_named(absent)}, but there are only scores of {_named(tasks)}.",
            "Check the task's name.",
            evidence={"tasks": absent},
        )


def rows_of(groups: Mapping[str, xr.Dataset]) -> Iterator[ScoreRow]:
    """Yield the scores in each run's group ``/score``; missing scores are no rows.

    Args:
        groups: Run → group.

    >>> arrays = {name: (("step", "task"), [[value, np.nan]]) for name, value in (("score", 0.5), ("direction", -1))}
    >>> score = xr.Dataset(arrays, {"step": [5], "task": ["ratio", "loss"]})
    >>> [(row.run, row.step, row.task, row.score, row.higher_is_better) for row in rows_of({"a": score})]
    [('a', 5, 'ratio', 0.5, False)]
    """
    for run, group in groups.items():
        nothing = xr.full_like(group["score"], np.nan, dtype=np.float64)
        scores, items, errors, directions = (group.get(name, nothing).values for name in (*SCORE, "direction"))
        for i, j in np.argwhere(~np.isnan(scores)).tolist():
            step, task = int(group["step"].values[i]), str(group["task"].values[j])
            higher = {1: True, -1: False}.get(directions[i, j])
            yield ScoreRow(run, step, task, float(scores[i, j]), float(items[i, j]), float(errors[i, j]), higher)


def with_file_scores(recorded: xr.Dataset | None, scores: xr.Dataset, retained: Collection[str] = ()) -> xr.Dataset:
    """Return all scores of one run as the group ``/score``: what was recorded, and what files add.

    Args:
        recorded: The run's group ``/score``, ``None`` if it has none.
        scores: The run's part of a :class:`ScoreTable`'s dataset, ``(step, task)``, whose directions count.
        retained: Tasks of what the base could do, beside those that the recorded scores mark: the coordinate
            ``retained (task)``, where there are any.
    """
    present = scores["score"].notnull()
    of_files = scores[list(SCORE)].drop_vars(["run", "direction"], errors="ignore")
    of_files = of_files.isel(step=present.any("task").values, task=present.any("step").values)
    marked: set[str] = set()
    joined = of_files
    if recorded is not None:
        if "retained" in recorded:
            marks = recorded["retained"].astype(bool)
            marks = marks.any("step") if "step" in marks.dims else marks
            marked = {*map(str, recorded["task"].values[marks.values])}
        joined = recorded.drop_vars(["direction", "retained"], errors="ignore").combine_first(of_files)
    known = dict(zip(scores["task"].values.tolist(), scores["direction"].values.tolist(), strict=True))
    signs = [known.get(task, metric_of(task).direction) for task in joined["task"].values.tolist()]
    directions = np.tile(np.array(signs, dtype=np.float64), (joined.sizes["step"], 1))
    kept = [
        name in marked or any(is_of_task(name, task) for task in retained) for name in map(str, joined["task"].values)
    ]
    if any(kept):
        joined = joined.assign_coords(retained=("task", kept, RETAINED.attributes))
    return joined.assign(direction=(("step", "task"), directions, SCORE_DIRECTION.attributes))


def as_scores(scores: xr.DataArray | xr.Dataset, directions: Mapping[str, str] | None) -> xr.DataArray:
    """Return scores as ``(run, step, task)`` in float64 with the coordinate ``direction(task)``.

    Raises:
        ValueError: If dimensions are missing, or a direction is neither ``"higher"`` nor ``"lower"``.
    """
    values = run_step_grid(scores["score"] if isinstance(scores, xr.Dataset) else scores, "task", "scores")
    tasks = values["task"].values.tolist()
    signs = values["direction"].values.tolist() if "direction" in values.coords else []
    stated = {task: sign > 0 for task, sign in zip(tasks, signs, strict=False) if sign}
    asked = {task: word for task, word in (directions or {}).items() if task in tasks}
    direction = directions_of(tasks, asked, stated)
    return values.assign_coords(direction=("task", np.array([direction[task] for task in tasks], dtype=np.int64)))


def run_step_grid(values: xr.DataArray, last: str, name: str) -> xr.DataArray:
    """Return values as ``(run, step, last)`` in float64.

    Args:
        last: The third dimension.
        name: What the values are called in messages.

    Raises:
        ValueError: If a dimension or its coordinate is missing, or a coordinate has a value twice.
    """
    expected = ("run", "step", last)
    if set(values.dims) != set(expected):
        raise ValueError(f"{name}: expected the dimensions {expected}, got {values.dims}.")
    lacking = [dim for dim in expected if dim not in values.indexes]
    if lacking:
        raise ValueError(f"{name}: expected a coordinate for each dimension, got none for {', '.join(lacking)}.")
    doubled = [dim for dim in expected if not values.indexes[dim].is_unique]
    if doubled:
        raise ValueError(f"{name}: expected each {doubled[0]} once, got some of them twice.")
    return values.transpose(*expected).astype(np.float64)


def better(scores: xr.DataArray) -> xr.DataArray:
    """Return scores turned so that higher is better, with the mean over standardised tasks as task ``"all"``.

    Each score is standardised over all its runs and steps, (x − mean)/standard deviation, before the mean: a perplexity
    of 20 does not outweigh an accuracy of 0.7. Scores of one task (its loss, its perplexity, its accuracy) are averaged
    first and standardised again, so that each task counts once. The mean is over all scores of known direction, where a
    run has every one of them at a step; NaN elsewhere. There is none if fewer than two scores have a direction.

    Args:
        scores: ``(run, step, task)`` with ``direction(task)``; those of direction 0 stay as they are.

    >>> raw = xr.DataArray([[[1.0, 9.0], [2.0, 1.0]]], dims=("run", "step", "task"), coords={"task": ["up", "down"]})
    >>> better(raw.assign_coords(direction=("task", [1, -1]))).sel(task="all").values.tolist()
    [[-1.0, 1.0]]
    """
    direction = scores["direction"]
    turned = scores * xr.where(direction == 0, 1, direction)
    directed = turned.isel(task=np.flatnonzero(direction.values != 0))
    if directed.sizes["task"] < 2 or ALL in scores["task"].values:
        return turned
    by_task: dict[str, list[int]] = defaultdict(list)
    for column, name in enumerate(directed["task"].values.tolist()):
        by_task[metric_of(name).task].append(column)
    standard = _standardised(directed.values)
    of_tasks = np.stack([standard[..., columns].mean(-1) for columns in by_task.values()], axis=-1)
    values = _standardised(of_tasks).mean(-1, keepdims=True)
    mean = directed.isel(task=[0]).copy(data=values).assign_coords(task=[ALL], direction=("task", [1]))
    return cast(xr.DataArray, xr.concat([mean, turned], dim="task"))


def _standardised(values: np.ndarray) -> np.ndarray:
    """Return each column less its mean, over its standard deviation where that is not 0; NaN stays."""
    finite = np.isfinite(values)
    count = np.maximum(finite.sum((0, 1)), 1)
    centred = values - np.where(finite, values, 0.0).sum((0, 1)) / count
    deviation = np.sqrt(np.where(finite, centred**2, 0.0).sum((0, 1)) / count)
    return centred / np.where(deviation > 0, deviation, 1.0)


def _named(names: Iterable[str]) -> str:
    return some(map(repr, sorted(names)), _NAMED)
