"""The questions that a result is asked first, each answered in one sentence from finished numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import QUESTIONS, Answer
from dynamics.report.answers.checkpoint import which_checkpoint
from dynamics.report.answers.concentration import did_updates_concentrate
from dynamics.report.answers.rank import is_the_rank_right
from dynamics.report.answers.recipe import which_recipe
from dynamics.report.answers.stable import may_training_stop
from dynamics.report.answers.tasks import do_tasks_fight
from dynamics.report.answers.trained import did_it_train
from dynamics.text import listed, sentence_case

_OF_A_RUN = (
    did_it_train,
    is_the_rank_right,
    which_checkpoint,
    do_tasks_fight,
    did_updates_concentrate,
    may_training_stop,
    which_recipe,
)


def answers(tree: xr.DataTree, summary: Mapping[str, Any]) -> list[Answer]:
    """Return the answers of one run, in the order of ``QUESTIONS``.

    Args:
        tree: A result of one run.
        summary: Its summary, without ``answers``.
    """
    return [answer(tree, summary) for answer in _OF_A_RUN]


def answers_of_runs(tree: xr.DataTree, summary: Mapping[str, Any]) -> list[Answer]:
    """Return the answers of several runs: in how many each verdict was reached; of recipes, those of all together.

    Args:
        tree: A result of several runs.
        summary: Its summary, without ``answers``.
    """
    return [
        which_recipe(tree, summary) if question == "recipe" else _counted(question, summary) for question in QUESTIONS
    ]


def _counted(question: str, summary: Mapping[str, Any]) -> Answer:
    """Return one answer for all runs: the verdict that they share, else ``mixed``."""
    answered = {
        name: next(answer for answer in run["answers"] if answer["id"] == question)
        for name, run in summary["runs"].items()
    }
    verdicts = Counter(answer["verdict"] for answer in answered.values())
    shared = next(iter(verdicts)) if len(verdicts) == 1 else "mixed"
    words = listed(
        [
            f"{verdict.replace('_', ' ')} in {count:,} of {len(answered):,} runs"
            for verdict, count in verdicts.most_common()
        ]
    )
    surer = next((answer["surer"] for answer in answered.values() if answer["surer"]), "")
    return Answer(question, shared, f"{sentence_case(words)}.", surer=surer)
