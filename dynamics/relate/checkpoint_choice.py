"""Which checkpoint to keep: the best at a stated trade-off, those that cannot be told from it, and its honest value.

A choice among checkpoints flatters the chosen one: of ten equal ones, the best on the samples at hand looks better than
it is. So from losses, one half of the groups chooses, and the other half judges. From scores there are no samples to
divide: intervals hold for all checkpoints together instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from scipy import special

from dynamics.relate.directions import is_of_task, metric_of
from dynamics.relate.group_losses import GroupedLosses
from dynamics.relate.permutations import LEVEL
from dynamics.relate.score_changes import score_directions
from dynamics.text import counted, finite, some

_OF_LOSSES = "share of the loss at the start"
_OF_SCORES = "standard deviations over checkpoints"
#: What scores cannot tell: samples are not known, nor what chose what was saved.
_CAVEATS_OF_SCORES = (
    "Intervals treat evaluations as independent; of the same items they are too wide.",
    "No held-out half judges the choice; intervals hold for all checkpoints together instead.",
    "A score that stopped the training, or chose what was saved, has seen the choice.",
)
#: The means over tasks of a candidate's improvement.
_MEANS = ("value", "new", "retained")
#: Groups of a task with which each half has an interval.
_LEAST_GROUPS = 4


def choose_checkpoint(
    data: xr.Dataset, *, retained: Sequence[str] = (), retained_weight: float = 1.0, seed: int = 0
) -> dict[str, Any]:
    """Return which checkpoint to keep, by losses of probe samples or by scores.

    The value of a candidate is the mean improvement of the new tasks plus ``retained_weight`` times that of the
    retained tasks. With losses L, a task's improvement is (L₀ − L)/L₀, the share of its loss at the start that is gone;
    a retained task that got worse counts as negative. Candidates are the start (value 0: keep no checkpoint), every
    later step, and the last update times λ where ``scaled_loss`` is there. Standard errors are of the delete-one-group
    jackknife, paired by sample. One half of the groups chooses the best, and the other half reports what it improves:
    all samples of a group, of whatever task, are in one half. Intervals use Student's t with the effective groups,
    (Σs)²/Σs² of their shares s of a task's loss, less one. With fewer than four groups of a task, all choose and none
    judges.

    With scores, improvements are in standard deviations over the checkpoints, or standard errors where these are
    larger, so that a score that only fluctuates does not decide. Scores of one task share its weight. Candidates are
    the steps at which every score has a value; scores at fewer than half of all steps, or of unknown direction, are
    left out. Intervals come from standard errors and hold for all candidates together (Bonferroni).

    One candidate dominates another if it is at least as good in the new and in the retained tasks, and better in one
    of them by more than one standard error of their difference.

    Args:
        data: The group ``/loss`` of a run: ``sample_loss (step, sample)`` in nats, the first row at the start of the
            training, with ``sample_task``, ``sample_group`` and ``retained (task)``; optionally ``scaled_loss (scale,
            sample)`` with the attribute ``scaled_step``. Or ``/score``: ``score`` and ``standard_error (step, task)``.
        retained: More tasks of what the base could do, beside those that ``data`` marks; of scores, their task will do.
        retained_weight: How much a retained task counts beside a new one; not negative.
        seed: Of the halves.

    Returns:
        JSON-compatible, missing numbers ``None``:

            - ``based_on`` (``"losses"`` or ``"scores"``), ``unit`` of improvements, ``retained_weight``, ``tasks`` and
              those of them that are ``retained``;
            - ``best``: the candidate's name, ``None`` with a ``reason`` where nothing can be chosen;
            - ``within_one_standard_error``: the others whose value is less than one standard error of their difference
              below the best; ``None`` without standard errors; ``not_dominated``;
            - ``other_half``: what the half that judges would have chosen; ``None`` without one;
            - ``reported``: of the best ``candidate``, by the groups that did not choose, ``value`` with ``low`` and
              ``high``, and for each of ``tasks`` its ``improvement`` with ``low`` and ``high`` (of scores in their own
              units), these at 95 % of all tasks together; ``None`` where nothing judges. Without a new task, of the
              last step;
            - ``candidates``: ``name``, ``kind`` (``"start"``, ``"step"``, ``"scaled"``), ``step``, ``scale``, and by
              the groups that chose: ``value`` with ``low`` and ``high``, mean improvement in ``new`` and ``retained``
              tasks and in each of ``tasks``, ``dominated``, ``within_one_standard_error``;
            - ``samples`` and ``groups`` of both halves (``None`` of scores), ``left_out``, ``caveats``: in words.

    Raises:
        ValueError: If ``data`` has neither losses nor scores, a retained task is unknown, or the weight is negative.

    >>> loss = [[4.0, 4.0, 2.0, 2.0], [3.0, 3.2, 2.0, 2.1], [3.9, 3.8, 2.2, 2.1]]
    >>> coords = {"step": [0, 100, 200], "task": ["vqa", "wiki"], "retained": ("task", [False, True])}
    >>> coords |= {"sample_task": ("sample", ["vqa", "vqa", "wiki", "wiki"]), "sample_group": ("sample", [0, 1, 0, 1])}
    >>> choice = choose_checkpoint(xr.Dataset({"sample_loss": (("step", "sample"), loss)}, coords))
    >>> choice["best"], choice["not_dominated"], round(choice["candidates"][1]["value"], 3)
    ('step 100', ['start', 'step 100'], 0.2)
    """
    if not (math.isfinite(retained_weight) and retained_weight >= 0):
        raise ValueError(f"retained_weight: expected a number that is not negative, got {retained_weight}.")
    if "sample_loss" in data:
        return _by_losses(data, retained, retained_weight, seed)
    if "score" in data:
        return _by_scores(data, retained, retained_weight)
    names = some(map(str, data.data_vars), 8) or "no variables"
    raise ValueError(f"Expected the group /loss or /score of a run (sample_loss or score), got {names}.")


@dataclass(frozen=True)
class _TradeOff:
    """Weights of tasks, ``[task]``, in the mean of new tasks, in that of retained tasks, and in the value."""

    new: np.ndarray
    retained: np.ndarray
    value: np.ndarray

    @classmethod
    def of(cls, tasks: Sequence[str], retained: np.ndarray, weight: float) -> _TradeOff:
        """Return weights with which each of ``tasks`` counts once; names that are equal share its weight."""
        keys = np.array(tasks)
        shares = []
        for side in (~retained, retained):
            names, counts = np.unique(keys[side], return_counts=True)
            times = dict(zip(names.tolist(), counts.tolist(), strict=True))
            share = [1 / (len(names) * times[key]) if member else 0.0 for key, member in zip(tasks, side, strict=True)]
            shares.append(np.array(share))
        new, kept = shares
        return cls(new, kept, new + weight * kept)


@dataclass(frozen=True)
class _Candidates:
    """Candidates in their order, what each improves, and the covariances between them of the three means.

    Args:
        rows: ``name``, ``kind``, ``step``, ``scale``.
        improvement: Against the reference, ``[candidate, task]``.
        covariance: Of value, new and retained, each ``[candidate, candidate]``; NaN where not known.
        freedom: For Student's t of the value.
    """

    rows: list[dict[str, Any]]
    tasks: list[str]
    improvement: np.ndarray
    trade_off: _TradeOff
    covariance: dict[str, np.ndarray]
    freedom: float

    def mean(self, name: str) -> np.ndarray:
        return self.improvement @ getattr(self.trade_off, name)

    def best(self) -> int:
        return _first_best(self.mean("value"), self.mean("retained"))

    def within(self, best: int) -> np.ndarray | None:
        """Return which candidates are less than one standard error below the best; ``None`` without them."""
        value, error = self.mean("value"), _paired_error(self.covariance["value"])[best]
        return None if np.isnan(error).any() else value[best] - value <= error

    def dominated(self) -> np.ndarray:
        """Return which candidates another one dominates; without standard errors, by the means alone."""
        at_least = np.ones((len(self.rows),) * 2, dtype=bool)
        beyond = np.zeros_like(at_least)
        for name in ("new", "retained"):
            mean = self.mean(name)
            ahead = mean[:, None] - mean[None, :]
            at_least &= ahead >= 0
            beyond |= ahead > np.nan_to_num(_paired_error(self.covariance[name]))
        return np.any(at_least & beyond, axis=0)

    def to_json(self, best: int | None) -> dict[str, Any]:
        """Return what is said of the candidates, and of the best of them."""
        within = None if best is None else self.within(best)
        dominated = self.dominated()
        means = {name: self.mean(name) for name in _MEANS}
        present = {name: bool(getattr(self.trade_off, name).any()) for name in means}
        reach = float(special.stdtrit(self.freedom, 1 - LEVEL / 2)) * np.sqrt(np.diag(self.covariance["value"]))
        candidates = [
            {
                **row,
                **{name: finite(mean[number]) if present[name] else None for name, mean in means.items()},
                "low": finite(means["value"][number] - reach[number]),
                "high": finite(means["value"][number] + reach[number]),
                "tasks": dict(zip(self.tasks, map(finite, self.improvement[number]), strict=True)),
                "dominated": bool(dominated[number]),
                "within_one_standard_error": None if within is None else bool(within[number]),
            }
            for number, row in enumerate(self.rows)
        ]
        names = [row["name"] for row in self.rows]
        return {
            "best": None if best is None else names[best],
            "within_one_standard_error": None
            if within is None
            else [name for number, name in enumerate(names) if within[number] and number != best],
            "not_dominated": [name for name, worse in zip(names, dominated, strict=True) if not worse],
            "candidates": candidates,
        }


def _first_best(value: np.ndarray, retained: np.ndarray) -> int:
    """Return the candidate of the largest value; of equal ones, the one that retains more, then the first."""
    return int(np.lexsort((-np.arange(len(value)), retained, np.nan_to_num(value, nan=-np.inf)))[-1])


def _paired_error(covariance: np.ndarray) -> np.ndarray:
    """Return standard errors of differences between candidates."""
    variance = np.diag(covariance)
    return np.sqrt(np.maximum(variance[:, None] + variance[None, :] - 2 * covariance, 0.0))


def _named(kind: str, step: int, scale: float) -> dict[str, Any]:
    name = {"start": "start", "step": f"step {step:,}", "scaled": f"{scale:g} × the update at step {step:,}"}[kind]
    return {"name": name, "kind": kind, "step": step, "scale": scale}


def _choice(based_on: str, tasks: Sequence[str], retained: np.ndarray, weight: float) -> dict[str, Any]:
    """Return a choice in which nothing could be chosen yet."""
    return {
        "based_on": based_on,
        "unit": _OF_LOSSES if based_on == "losses" else _OF_SCORES,
        "retained_weight": weight,
        "tasks": list(tasks),
        "retained": [task for task, kept in zip(tasks, retained, strict=True) if kept],
        "best": None,
        "reason": "",
        "within_one_standard_error": None,
        "not_dominated": [],
        "other_half": None,
        "reported": None,
        "candidates": [],
        "samples": None,
        "groups": None,
        "left_out": [],
        "caveats": [],
    }


# ---- losses of samples ----


def _by_losses(data: xr.Dataset, asked: Sequence[str], weight: float, seed: int) -> dict[str, Any]:
    losses = data["sample_loss"].transpose("step", "sample").values.astype(np.float64)
    steps = data["step"].values.astype(int).tolist()
    rows = [_named("step" if number else "start", step, 1.0 if number else 0.0) for number, step in enumerate(steps)]
    if "scaled_loss" in data:
        scaled = data["scaled_loss"].transpose("scale", "sample").values.astype(np.float64)
        scales = data["scale"].values.astype(float)
        between = np.flatnonzero((scales != 0) & (scales != 1) & np.isfinite(scaled).any(1))
        losses = np.concatenate([losses, scaled[between]])
        step = int(data.attrs.get("scaled_step", data["scaled_loss"].attrs.get("scaled_step", steps[-1])))
        rows += [_named("scaled", step, scales[number].item()) for number in between]
    of_sample = data["sample_task"].values.astype(str)
    tasks = list(dict.fromkeys(of_sample.tolist()))
    marked = _marked(data, asked)
    if unknown := sorted(set(asked) - set(tasks)):
        raise ValueError(f"retained: expected tasks among {', '.join(tasks)}, got {some(map(repr, unknown))}.")
    finite_losses = np.isfinite(losses)
    kept = finite_losses[0]
    whole = np.all(finite_losses[:, kept], axis=1)
    notes = [f"{counted(int((~kept).sum()), 'sample')} without a finite loss at the start"] if not kept.all() else []
    notes += [f"{row['name']}: a loss is not finite" for row, good in zip(rows, whole, strict=True) if not good]
    rows = [row for row, good in zip(rows, whole, strict=True) if good]
    losses, of_sample = losses[whole][:, kept], of_sample[kept]
    mean = {task: losses[:1, of_sample == task].sum() for task in tasks}
    notes += [f"{task}: its loss at the start is not positive" for task in tasks if not mean[task] > 0]
    tasks = [task for task in tasks if mean[task] > 0]
    retained = np.array([task in marked for task in tasks], dtype=bool)
    choice = _choice("losses", tasks, retained, weight) | {"left_out": notes}
    if not tasks:
        return choice | {"reason": "no task has a finite, positive loss at the start"}
    if len(rows) < 2:
        return choice | {"reason": "no checkpoint after the start has finite losses"}
    group = data["sample_group"].values.astype(str)[kept]
    sums = GroupedLosses.of(losses, of_sample, group, tasks)
    choice |= {"samples": int(sums.counts.sum()), "groups": len(sums.counts)}
    trade_off = _TradeOff.of(tasks, retained, weight)
    if not trade_off.new.any():
        last = max(number for number, row in enumerate(rows) if row["kind"] != "scaled")
        reported = {"candidate": rows[last]["name"], **_judged(sums, last, trade_off, tasks)}
        candidates = _of_losses(rows, tasks, sums, trade_off).to_json(None)
        return choice | candidates | {"reason": "every task is retained", "reported": reported}
    fewest = int((sums.counts > 0).sum(0).min())
    if fewest < _LEAST_GROUPS:
        few = f"a task has samples of {counted(fewest, 'group')} only; {_LEAST_GROUPS} are needed"
        candidates = _of_losses(rows, tasks, sums, trade_off)
        return (
            choice | candidates.to_json(candidates.best()) | {"caveats": [f"No other half judges the choice: {few}."]}
        )
    first = sums.halves(seed)
    chooser, judge = (_of_losses(rows, tasks, sums.part(half), trade_off) for half in (first, ~first))
    best = chooser.best()
    reported = {"candidate": rows[best]["name"], **_judged(sums.part(~first), best, trade_off, tasks)}
    return choice | chooser.to_json(best) | {"other_half": rows[judge.best()]["name"], "reported": reported}


def _of_losses(rows: list[dict[str, Any]], tasks: list[str], sums: GroupedLosses, trade_off: _TradeOff) -> _Candidates:
    weights = {name: getattr(trade_off, name) for name in _MEANS}
    covariance = {
        name: sums.covariance(weight) if weight.any() else np.zeros((len(rows),) * 2)
        for name, weight in weights.items()
    }
    freedom = sums.freedom(trade_off.value) if trade_off.value.any() else math.inf
    return _Candidates(rows, tasks, sums.improvement, trade_off, covariance, freedom)


def _marked(data: xr.Dataset, asked: Sequence[str]) -> set[str]:
    """Return the tasks that are retained: as marked, and as asked."""
    marks = data["task"].values[data["retained"].values.astype(bool)] if "retained" in data else []
    return {*map(str, marks), *asked}


def _judged(judge: GroupedLosses, chosen: int, trade_off: _TradeOff, tasks: Sequence[str]) -> dict[str, Any]:
    """Return the value of a candidate, and what it improves of each task, at 95 % of all tasks together."""
    value, low, high = judge.interval(chosen, trade_off.value, LEVEL)
    rows = []
    for task, weights in zip(tasks, np.eye(len(tasks)), strict=True):
        kept = bool(trade_off.retained @ weights > 0)
        numbers = zip(("improvement", "low", "high"), judge.interval(chosen, weights, LEVEL / len(tasks)), strict=True)
        rows.append({"task": task, "retained": kept, **{name: finite(number) for name, number in numbers}})
    return {"value": finite(value), "low": finite(low), "high": finite(high), "tasks": rows}


# ---- scores ----


def _by_scores(data: xr.Dataset, asked: Sequence[str], weight: float) -> dict[str, Any]:
    directions = score_directions(data)
    names, steps = list(directions), data["step"].values.astype(int)
    marked = _marked(data, ())
    for task in asked:
        members = {name for name in names if is_of_task(name, task)}
        if not members:
            raise ValueError(f"retained: expected tasks among {some(names, 8)}, got {task!r}.")
        marked |= members
    score = data["score"].transpose("step", "task").values.astype(np.float64)
    unknown = np.full_like(score, np.nan)
    error = data["standard_error"].transpose("step", "task").values if "standard_error" in data else unknown
    columns = _compared(score, steps, np.array(list(directions.values())))
    tasks = [names[column] for column in columns]
    retained = np.array([task in marked for task in tasks], dtype=bool)
    left_out = [
        f"{name}: {'values at too few steps' if directions[name] else 'which direction is better is not known'}"
        for number, name in enumerate(names)
        if np.isfinite(score[:, number]).any() and number not in columns
    ]
    choice = _choice("scores", tasks, retained, weight)
    choice |= {"left_out": left_out, "caveats": list(_CAVEATS_OF_SCORES)}
    complete = (
        np.flatnonzero(np.all(np.isfinite(score[:, columns]), axis=1)) if columns else np.empty(0, dtype=np.int64)
    )
    after = complete[steps[complete] > 0]
    if not after.size:
        return choice | {"reason": "no score of known direction has a value after the start"}
    if len(complete) < 2:
        return choice | {"reason": f"only step {steps[after[0]]:,} has scores"}
    values = score[complete][:, columns] * np.array([directions[task] for task in tasks])
    errors = error[complete][:, columns]
    pooled = np.sqrt((errors**2).mean(0))
    scale = np.fmax(values.std(0), np.where(pooled > 0, pooled, np.nan))
    scale = np.where(scale > 0, scale, 1.0)
    trade_off = _TradeOff.of([metric_of(task).task for task in tasks], retained, weight)
    if not trade_off.new.any():
        return choice | {"reason": "every score is of a retained task"}
    rows = [_named("step" if step else "start", int(step), float(step > 0)) for step in steps[complete]]
    relative = np.where(errors > 0, errors, np.nan) / scale
    candidates = _Candidates(
        rows,
        tasks,
        (values - values[0]) / scale,
        trade_off,
        {name: _against_first(relative, getattr(trade_off, name)) for name in _MEANS},
        math.inf,
    )
    best = candidates.best()
    reported = None
    if rows[0]["kind"] == "start":
        reported = _against_start(candidates, best, values, errors, retained)
    return choice | candidates.to_json(best) | {"reported": reported}


def _compared(score: np.ndarray, steps: np.ndarray, directions: np.ndarray) -> list[int]:
    """Return scores of known direction at half of the steps after the start or more; where they share none, one."""
    present = np.isfinite(score) & (directions != 0)
    after = present & (steps > 0)[:, None]
    times = after.sum(0)
    columns = np.flatnonzero((times > 0) & (2 * times >= after.any(1).sum())).tolist()
    shared = present[:, columns].all(1).sum() if columns else 0
    return columns if shared > 1 or len(columns) < 2 else [int(np.argmax(times))]


def _against_first(relative: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return covariances of weighted sums against the first candidate from independent errors ``[candidate, task]``."""
    chosen = weights != 0
    variance = ((relative[:, chosen] * weights[chosen]) ** 2).sum(1)
    covariance = np.diag(variance) + variance[0]
    covariance[0] = covariance[:, 0] = 0.0 if np.isfinite(variance).all() else np.nan
    return covariance


def _against_start(
    candidates: _Candidates, best: int, values: np.ndarray, errors: np.ndarray, retained: np.ndarray
) -> dict[str, Any]:
    """Return the best candidate's value and changes of its scores, with intervals for all candidates together."""
    others = len(values) - 1
    tasks = values.shape[1]

    def ends(value: float, error: float, times: int) -> dict[str, float | None]:
        reach = float(special.ndtri(1 - LEVEL / (2 * times))) * error
        return {"low": finite(value - reach), "high": finite(value + reach)}

    value = float(candidates.mean("value")[best])
    of_tasks = []
    for number, task in enumerate(candidates.tasks):
        improvement = float(values[best, number] - values[0, number])
        error = float(np.hypot(errors[0, number], errors[best, number])) if best else 0.0
        row = {"task": task, "retained": bool(retained[number]), "improvement": improvement}
        of_tasks.append(row | ends(improvement, error or (math.nan if best else 0.0), others * tasks))
    error = math.sqrt(candidates.covariance["value"][best, best])
    return {"candidate": candidates.rows[best]["name"], "value": value, **ends(value, error, others), "tasks": of_tasks}
