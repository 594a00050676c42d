"""Answers made up for summaries: for what shows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamics.report.answers.answer import QUESTIONS, Answer, Evidence, Verdict

#: One question for each verdict, and two that were not asked.
VERDICTS: Mapping[str, Verdict] = {
    "trained": "yes",
    "rank": "mixed",
    "checkpoint": "yes",
    "tasks": "not_asked",
    "concentration": "undecided",
    "stable": "no",
    "recipe": "not_asked",
}


def made_up(question: str, verdict: Verdict, words: str = "") -> dict[str, Any]:
    """An answer as ``summary.json`` has it: with evidence, a confidence and a remedy where it is undecided."""
    undecided = verdict == "undecided"
    surer = "Probe more samples." if undecided else "not asked: pass --probe MODULE:FUNCTION" * (verdict == "not_asked")
    evidence = () if verdict == "not_asked" else (Evidence("/update/frobenius_norm_all", -2.5, -3.0, -2.0),)
    words = words or f"The answer to {question}."
    return Answer(question, verdict, words, evidence, 0.95 if undecided else None, surer).to_json()


def answered(summary: Mapping[str, Any], words: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A summary with made-up answers, of several runs with the same ones for each of them.

    Args:
        summary: See ``summarise``.
        words: Question → answer, in place of the made-up ones.
    """
    words = words or {}
    answers = [made_up(question, VERDICTS[question], words.get(question, "")) for question in QUESTIONS]
    runs = {name: {**run, "answers": answers} for name, run in summary.get("runs", {}).items()}
    return {**summary, "answers": answers, **({"runs": runs} if runs else {})}
