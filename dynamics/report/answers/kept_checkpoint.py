"""Which checkpoint to keep, and did it forget?"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xarray as xr

from dynamics.relate.directions import is_of_task
from dynamics.relate.score_changes import score_changes
from dynamics.report.answers.answer import Answer, Evidence, Verdict
from dynamics.report.loss_summary import retained_rises
from dynamics.report.score_summary import saved_steps, scores_of_newest
from dynamics.text import counted, listed, number, some

_QUESTION = "checkpoint"
#: Tasks of a kind, and other checkpoints, that the sentence names.
_NAMED = 3
#: A loss that rose by a smaller share of its value at the start is not called worse, however sure that is.
_LEAST = 0.001
_HOW = (
    "Pass --probe MODULE:FUNCTION with tasks of both kinds (retained=True for what the base could do), or --scores "
    "FILE with scores of each checkpoint and of step 0, and --retained TASK."
)
_FINITE = (
    "If losses are finite at the start, the training diverged: begin again before they are not, "
    "with a smaller learning rate. Otherwise look at the probe samples."
)
_MARK = "Mark samples of what the base could do: Task(..., retained=True), or --retained TASK for scores."
_START = "Evaluate the model before training, too (step 0)."
_ERRORS = "Give standard errors of the scores (--scores FILE)."
_MORE = "Probe more groups of samples."
_SAVE = "Save checkpoints at the steps that are evaluated."


def which_checkpoint(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Which checkpoint to keep, and did it forget?"

    It reads ``summary["checkpoint_choice"]``, see :func:`dynamics.choose_checkpoint`: of the newest training, from
    losses of probe samples where there are any of a new task, else from scores. The trade-off weighs new and retained
    tasks equally. Scores that did not take part, and retained losses beside a choice by scores, are looked at for
    forgetting as well.

    - ``yes``: the checkpoint is better than the start (the 95 % interval of its value lies above 0), and nothing that
      was measured is shown to be worse than at the start.
    - ``mixed``: it is better than the start, and something is shown to be worse: it forgot. A rise of a loss by less
      than 0.1 % does not count. Or the best is not shown to be better, and by the last step a retained loss has risen.
    - ``no``: no checkpoint is better than the start: the interval of each one's value lies below 0. Or, where nothing
      can be chosen (every task is retained), something is shown to be worse.
    - ``undecided``: neither is shown, or the start was not measured, or no loss after it is finite.
    - ``not_asked``: there are neither losses of probe samples nor scores of a checkpoint.

    Steps that were evaluated and not saved are no candidates, unless none was saved. Where the best is not the last
    step, the sentence says which retained losses have risen by then.

    Intervals are 95 %: of the value alone, of tasks all together. With claims from a second source ``sure`` is 0.90.

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    choice = summary["checkpoint_choice"]
    if choice is None:
        return Answer(_QUESTION, "not_asked", "No losses of probe samples and no scores were given.", surer=_HOW)
    reported = choice["reported"] or {"value": None, "low": None, "high": None, "tasks": []}
    of_losses = choice["based_on"] == "losses"
    worse = [task for task in reported["tasks"] if _is_worse(task, of_losses)]
    beside, paths = _worse_beside(tree, choice)
    if choice["best"] is None and choice["reported"] is None:
        sentence = "; ".join([f"No checkpoint can be chosen: {choice['reason']}", *beside])
        verdict: Verdict = "no" if beside else "undecided" if of_losses else "not_asked"
        all_paths = ["/loss/sample_loss", *paths] if of_losses else paths
        how = _FINITE if of_losses else _HOW
        return Answer(_QUESTION, verdict, f"{sentence}.", (*map(Evidence, all_paths),), 0.95 if beside else None, how)
    evidence = (
        Evidence("checkpoint_choice", *(_nan(reported[name]) for name in ("value", "low", "high"))),
        Evidence("/loss/sample_loss" if of_losses else "/score/score"),
        *map(Evidence, paths),
    )
    later = _worse_later(tree, choice)
    sure = None if reported["low"] is None else 0.90 if beside or later else 0.95
    is_saved = _is_saved(tree, choice)
    if choice["best"] is None:
        verdict = "no" if worse or beside else "undecided"
        sentence = f"{_changes(reported['tasks'], of_losses, reported['candidate'])}; {choice['reason']}"
        surer = "Probe samples of the tasks that training is for."
    else:
        verdict = _verdict(choice, bool(worse or beside))
        verdict = "mixed" if verdict == "undecided" and later else verdict
        sentence = _sentence(choice, reported, of_losses, verdict, is_saved)
        surer = " ".join(filter(None, ("" if is_saved else _SAVE, _surer(choice, verdict))))
    newest = "of the newest training, " if len(summary["segments"]) > 1 else ""
    sentence = "; ".join([f"{newest}{sentence}", *beside, *later])
    return Answer(_QUESTION, verdict, f"{sentence[:1].upper()}{sentence[1:]}.", evidence, sure, surer)


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _is_worse(task: Mapping[str, Any], of_losses: bool) -> bool:
    return task["high"] is not None and task["high"] < 0 and not (of_losses and task["improvement"] > -_LEAST)


def _verdict(choice: Mapping[str, Any], forgot: bool) -> Verdict:
    reported = choice["reported"]
    if choice["candidates"][0]["kind"] != "start" or reported is None or reported["low"] is None:
        return "undecided"
    if choice["best"] == "start":
        highs = [candidate["high"] for candidate in choice["candidates"][1:]]
        return "no" if all(high is not None and high < 0 for high in highs) else "undecided"
    if reported["low"] > 0:
        return "mixed" if forgot else "yes"
    return "undecided"


def _is_saved(tree: xr.DataTree, choice: Mapping[str, Any]) -> bool:
    """Return whether the best candidate can be kept: the start, a share of an update, or a step with a checkpoint."""
    best = next((one for one in choice["candidates"] if one["name"] == choice["best"]), None)
    return best is None or best["kind"] != "step" or best["step"] in saved_steps(tree)


def _sentence(
    choice: Mapping[str, Any], reported: Mapping[str, Any], of_losses: bool, verdict: Verdict, is_saved: bool
) -> str:
    """Return the choice, what it improved and cost, and what cannot be told from it."""
    saved = sum(candidate["kind"] == "step" for candidate in choice["candidates"])
    best, others = choice["best"], choice["within_one_standard_error"] or []
    if best == "start":
        shown = "no checkpoint is" if verdict == "no" else "no checkpoint is shown to be"
        start = choice["candidates"][0]["step"]
        before = f"the start at step {start:,}" if start else "the model before training"
        text = f"{shown} better than {before} ({counted(saved, 'checkpoint')})"
    else:
        of = f"of {saved:,}" if saved > 1 else "the only one evaluated"
        of += "" if is_saved else "; no evaluated step was saved"
        text = f"keep {best} ({of})" if verdict in ("yes", "mixed") else f"{best} is best ({of})"
        if verdict == "undecided" and reported["low"] is not None:
            text += ", but not shown to be better than the start"
        if reported["tasks"]:
            text += f": {_changes(reported['tasks'], of_losses, '')}"
        elif not of_losses:
            text += f" by {_named(choice['tasks'])}"
    if others:
        cannot = "cannot be told from it" if best != "start" else "cannot be told from the start"
        text += f"; {_named(map(_in_words, others))} {cannot}"
    other_half = choice["other_half"]
    if other_half not in (None, best, *others):
        text += f"; the other half of the groups would choose {_in_words(other_half)}"
    return text


def _named(names: Iterable[str]) -> str:
    names = list(names)
    return listed(names) if len(names) <= _NAMED else some(names, _NAMED)


def _in_words(candidate: str) -> str:
    return "the start" if candidate == "start" else candidate


def _changes(tasks: Sequence[Mapping[str, Any]], of_losses: bool, candidate: str) -> str:
    """Return what was improved and what got worse, new tasks first, with intervals."""
    words = []
    for retained in (False, True):
        of_kind = [task for task in tasks if task["retained"] == retained]
        named = sorted(of_kind, key=lambda task: -abs(task["improvement"] or 0.0))[:_NAMED]
        words += [_change(task, of_losses, with_level=not words and task is named[0]) for task in named]
        words += [f"{len(of_kind) - _NAMED:,} more"] if len(of_kind) > _NAMED else []
    at = f"at {candidate}, " if candidate else ""
    return at + ", ".join(words)


def _change(task: Mapping[str, Any], of_losses: bool, with_level: bool) -> str:
    """Return one task's change: "vqa improved by 21 % (95 % interval 18 to 24)"."""
    value, low, high = task["improvement"], task["low"], task["high"]
    if value is None:
        return f"{task['task']} changed by an unknown amount"
    improved = value >= 0
    if not improved and low is not None:
        low, high = -high, -low
    name = f"{'retained ' if task['retained'] else ''}{task['task']}"
    way = "improved" if improved else "got worse"
    size = f"{number(100 * abs(value), 2)} %" if of_losses else number(abs(value))
    if low is None:
        return f"{name} {way} by {size} (no interval)"
    ends = [number(100 * end, 2) if of_losses else number(end) for end in (low, high)]
    interval = f"{'95 % interval ' if with_level else ''}{' to '.join(ends)}"
    if low <= 0 <= high:
        return f"no change of {name} is shown ({'better' if improved else 'worse'} by {size}, {interval})"
    return f"{name} {way} by {size} ({interval})"


def _worse_beside(tree: xr.DataTree, choice: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return what is shown to be worse by what did not choose, in words, and the paths of it.

    Scores that were not compared, at their last step; and retained losses, where scores chose, at that step.
    """
    words, paths = [], []
    scores = scores_of_newest(tree)
    if scores is not None:
        compared = choice["tasks"] if choice["based_on"] == "scores" and choice["reported"] else []
        rows = [row for row in score_changes(scores) if row["task"] not in compared]
        if choice["based_on"] == "losses":  # the samples of the losses have scores, too
            rows = [row for row in rows if not _of_any(row["task"], choice["tasks"])]
        worse = [row for row in rows if row["verdict"] == "worse"]
        words += _some_worse(
            f"score {row['task']} is {number(row['last']['score'])} at step {row['last']['step']:,} against "
            f"{number(row['start']['score'])} at the start"
            for row in worse
        )
        paths += ["/score/score"] * bool(worse)
    if choice["based_on"] == "scores" and "loss" in tree.children:
        losses = tree["loss"].to_dataset().load()
        best = next((row["step"] for row in choice["candidates"] if row["name"] == choice["best"]), None)
        if best in losses["step"].values:
            worse = [
                f"the loss of retained {task} rose by {number(rise)} nat ({number(low)} to {number(high)})"
                for task, rise, low, high in retained_rises(losses.sel(step=best))
            ]
            words += _some_worse(worse)
            paths += ["/loss/change"] * bool(worse)
    return words, paths


def _worse_later(tree: xr.DataTree, choice: Mapping[str, Any]) -> list[str]:
    """Return which retained losses have risen by the last step, where a choice by losses is an earlier one."""
    last = choice["candidates"][-1]["step"] if choice["candidates"] else None
    best = next((row for row in choice["candidates"] if row["name"] == choice["best"]), None)
    if choice["based_on"] != "losses" or best is None or best["step"] == last or best["kind"] == "scaled":
        return []
    at_last = tree["loss"].to_dataset().load().sel(step=last)
    rises = retained_rises(at_last) if "change_low" in at_last else []
    worse = [
        f"the loss of retained {task} has risen by {number(rise)} nat ({number(low)} to {number(high)})"
        for task, rise, low, high in rises
    ]
    return [f"by step {last:,} {some(worse, _NAMED)}"] if worse else []


def _of_any(score: str, tasks: Iterable[str]) -> bool:
    return any(is_of_task(score, task) for task in tasks)


def _some_worse(sentences: Iterable[str]) -> list[str]:
    sentences = list(sentences)
    return [some(sentences, _NAMED)] if sentences else []


def _surer(choice: Mapping[str, Any], verdict: Verdict) -> str:
    advice = []
    if not choice["retained"]:
        advice.append(_MARK)
    lacks_start = choice["candidates"][0]["kind"] != "start"
    lacks_errors = choice["reported"] is None or choice["reported"]["low"] is None
    if choice["based_on"] == "scores" and verdict == "undecided" and (lacks_start or lacks_errors):
        advice += [_START] * lacks_start + [_ERRORS] * lacks_errors
    elif choice["based_on"] == "losses" and (verdict == "undecided" or choice["within_one_standard_error"]):
        advice.append(_MORE)
    elif choice["based_on"] == "scores":
        advice.append("Evaluate more items; probe losses by --probe judge a choice on other samples than chose it.")
    return " ".join(advice)
