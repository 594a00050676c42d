"""A run's scores: its checkpoints as a table, the best ones, and whether it forgot, in sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from dynamics.relate.checkpoint_choice import choose_checkpoint
from dynamics.relate.directions import is_of_task
from dynamics.relate.score_changes import score_changes
from dynamics.text import counted, finite, listed, number, some, with_minus

#: Scores and sentences that are named; all are in the summary.
_NAMED = 5


def score_summary(tree: xr.DataTree) -> list[dict[str, Any]]:
    """Return each score of a run: at the start, at its last step, at its best, and whether it got worse.

    Args:
        tree: A result of one run.

    Returns:
        What :func:`dynamics.relate.score_changes.score_changes` returns; nothing without scores.
    """
    return score_changes(tree["score"].to_dataset().load()) if "score" in tree.children else []


def checkpoint_choice(tree: xr.DataTree) -> dict[str, Any] | None:
    """Return which checkpoint of the newest training to keep, by losses of probe samples, else by scores.

    Args:
        tree: A result of one run.

    Returns:
        What :func:`dynamics.choose_checkpoint` returns; ``None`` without losses and scores. A task of the losses is
        retained where one of its scores is.
    """
    scores = scores_of_newest(tree)
    choices = []
    if "loss" in tree.children:
        losses = tree["loss"].to_dataset().load()
        marks = scores["task"].values[scores["retained"].values] if scores is not None and "retained" in scores else []
        tasks = dict.fromkeys(map(str, losses["sample_task"].values))
        retained = [task for task in tasks if any(is_of_task(str(score), task) for score in marks)]
        choices.append(choose_checkpoint(losses, retained=retained))
    if scores is not None and not any(choice["best"] for choice in choices):
        choices.append(choose_checkpoint(scores))
    return next((choice for choice in choices if choice["best"]), choices[0] if choices else None)


def scores_of_newest(tree: xr.DataTree) -> xr.Dataset | None:
    """Return the scores of a run without the steps of earlier trainings in its folder; ``None`` without scores."""
    if "score" not in tree.children:
        return None
    scores, update = tree["score"].to_dataset().load(), tree["update"].to_dataset()
    earlier = update["step"].values[(update["segment"] < update["segment"].max()).values]
    return scores.isel(step=~np.isin(scores["step"].values, earlier))


def checkpoint_table(
    update: xr.Dataset, tree: xr.DataTree, scores: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Return a row for each step that has an update or a score.

    Args:
        update: The group ``/update``.
        tree: The result of one run.
        scores: See ``score_summary``.

    Returns:
        ``step``, ``norm`` of the whole update and ``increment`` since the step before, over all matrices, ``scores``
        (task → value) and ``best``: the tasks that are best there.
    """
    norms = {
        kind: dict(zip(update["step"].values.tolist(), update["frobenius_norm_all"].sel(kind=kind).values, strict=True))
        for kind in ("total", "increment")
    }
    values: dict[int, dict[str, float]] = {}
    if scores:
        table = tree["score"]["score"].load().transpose("step", "task")
        for step, row in zip(table["step"].values.tolist(), table.values.tolist(), strict=True):
            values_at_step = zip(map(str, table["task"].values), map(finite, row), strict=True)
            values[step] = {task: value for task, value in values_at_step if value is not None}
    best = {score["task"]: score["best"]["step"] for score in scores if score["best"] is not None}
    return [
        {
            "step": step,
            "norm": finite(norms["total"][step]) if step in norms["total"] else None,
            "increment": finite(norms["increment"][step]) if step in norms["increment"] else None,
            "scores": values.get(step, {}),
            "best": [task for task, at in best.items() if at == step],
        }
        for step in sorted({*norms["total"], *(step for step, row in values.items() if row)})
    ]


def which_checkpoint(summary: Mapping[str, Any]) -> str:
    """Return at which step each score was best; ``""`` without scores whose direction is known.

    Args:
        summary: Of one run, see ``summarise``.
    """
    with_best = [score for score in summary["scores"] if score["best"] is not None]
    if not with_best or len(summary["checkpoints"]) < 2:
        return ""
    words = [
        f"{score['task']} at step {score['best']['step']:,} ({_number(score['best']['score'])}"
        + ("" if score["best"]["step"] == score["last"]["step"] else f"; last {_number(score['last']['score'])}")
        + ")"
        for score in with_best[:_NAMED]
    ]
    more = f"; {len(with_best) - _NAMED:,} more in the table" if len(with_best) > _NAMED else ""
    return f"Best checkpoint by score: {listed(words)}{more}."


def did_it_forget(summary: Mapping[str, Any]) -> str:
    """Return which scores are worse than before training; ``""`` where none has a value at step 0.

    Args:
        summary: Of one run, see ``summarise``.
    """
    asked = [score for score in summary["scores"] if score["verdict"] != "not_asked"]
    if not asked:
        return ""
    worse = sorted((score for score in asked if score["verdict"] == "worse"), key=lambda score: score["high"])
    # Without a standard error only those that are not above their start leave a question.
    undecided = [score for score in asked if score["verdict"] == "undecided"]
    torn = [score for score in undecided if score["change"] is None or score["change"] < 0]
    sentences = []
    if worse:
        sentences.append(f"Worse than before training: {some(map(_fall, worse), _NAMED)}.")
    elif len(asked) > len(torn):
        compared = counted(len(asked) - len(torn), "score")
        sentences.append(f"No score is shown to be worse than before training ({compared} with a value at step 0).")
    if torn:
        words = [f"{score['task']} ({_ends(score)})" for score in torn]
        sentences.append(
            f"Whether {counted(len(torn), 'score')} got worse cannot be decided without standard errors and a known "
            f"direction: {some(words, _NAMED)}."
        )
    return " ".join(sentences)


def _fall(score: Mapping[str, Any]) -> str:
    low, high = -score["high"], -score["low"]
    return f"{score['task']} ({_ends(score)}: worse by {_number(low)} to {_number(high)}, 95 % interval)"


def _ends(score: Mapping[str, Any]) -> str:
    start, last = score["start"], score["last"]
    return f"{_number(start['score'])} at step 0, {_number(last['score'])} at step {last['step']:,}"


def _number(value: float) -> str:
    return with_minus(number(value))
