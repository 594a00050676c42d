"""The questions that a result is asked first, each answered in one sentence from finished numbers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import QUESTIONS, Answer, Evidence, Verdict, verdict_words
from dynamics.report.answers.concentrated import did_updates_concentrate
from dynamics.report.answers.conflicts import do_tasks_fight
from dynamics.report.answers.kept_checkpoint import which_checkpoint
from dynamics.report.answers.rank import is_the_rank_right
from dynamics.report.answers.recipe import which_recipe
from dynamics.report.answers.stable import may_training_stop
from dynamics.report.answers.trained import did_it_train
from dynamics.text import sentence_case, some

_OF_A_RUN = (
    did_it_train,
    is_the_rank_right,
    which_checkpoint,
    do_tasks_fight,
    did_updates_concentrate,
    may_training_stop,
    which_recipe,
)
#: Runs that differ and are named.
_NAMED = 5
_NUMBERS = ("value", "low", "high")


def answers(tree: xr.DataTree, summary: Mapping[str, Any]) -> list[Answer]:
    """Return the answers of one run, in the order of ``QUESTIONS``.

    Args:
        tree: A result of one run.
        summary: Its summary, without ``answers``.
    """
    return [answer(tree, summary) for answer in _OF_A_RUN]


def answers_of_runs(tree: xr.DataTree, summary: Mapping[str, Any]) -> list[Answer]:
    """Return the answers of several runs: what they share, and which runs differ; of recipes, those of all together.

    The verdict is the one that all runs reach to which the question was put, else ``mixed``. ``sure`` is the lowest
    confidence among them, of each run by itself.

    Args:
        tree: A result of several runs.
        summary: Its summary, without ``answers``.
    """
    return [
        which_recipe(tree, summary) if question == "recipe" else _of_all(question, summary["runs"])
        for question in QUESTIONS
    ]


def _of_all(question: str, runs: Mapping[str, Mapping[str, Any]]) -> Answer:
    """Return one answer for all runs: the majority's verdict with an example, then the runs that differ by name."""
    answered = {
        name: next(answer for answer in run["answers"] if answer["id"] == question) for name, run in runs.items()
    }
    members: dict[Verdict, list[str]] = {}
    for name, answer in answered.items():
        verdict: Verdict = answer["verdict"]
        members.setdefault(verdict, []).append(name)
    ranked = sorted(members, key=lambda verdict: -len(members[verdict]))
    asked: dict[Verdict, list[str]] = {verdict: names for verdict, names in members.items() if verdict != "not_asked"}
    confidence = [answer["sure"] for answer in answered.values() if answer["sure"] is not None]
    remedies = Counter(answer["surer"] for answer in answered.values() if answer["surer"])
    return Answer(
        question,
        "mixed" if len(asked) > 1 else next(iter(asked)) if asked else "not_asked",
        " ".join(_in_runs(one, members[one], answered, most=one == ranked[0]) for one in ranked),
        tuple(
            Evidence(f"/runs/{name}/{number['path'].lstrip('/')}", *(_nan(number[end]) for end in _NUMBERS))
            for name, answer in answered.items()
            for number in answer["evidence"]
        ),
        min(confidence) if confidence else None,
        remedies.most_common(1)[0][0] if remedies else "",
    )


def _in_runs(verdict: Verdict, names: Sequence[str], answered: Mapping[str, Any], *, most: bool) -> str:
    """Return in which runs a verdict was reached: those of the majority counted, others named, and one's answer."""
    total, count = len(answered), len(names)
    every = {1: "the one run", 2: "both runs"}.get(total, f"all {total:,} runs")
    where = (every if count == total else f"{count:,} of {total:,} runs") if most else some(names, _NAMED)
    answer = answered[names[0]]["answer"]
    shared = all(answered[name]["answer"] == answer for name in names)
    example = "" if shared else f", for example {names[0]}"
    return f"{sentence_case(verdict_words(verdict))} in {where}" + (
        "." if verdict == "not_asked" else f"{example}: {answer}"
    )


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
