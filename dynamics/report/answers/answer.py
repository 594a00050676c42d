"""An answer to one of the questions that a result is asked first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from dynamics.text import finite, percent

Verdict = Literal["yes", "no", "mixed", "undecided", "not_asked"]
VERDICTS: tuple[Verdict, ...] = ("yes", "no", "mixed", "undecided", "not_asked")


def verdict_words(verdict: str) -> str:
    """Return a verdict as the terminal and the page write it.

    >>> verdict_words("not_asked")
    'not asked'
    """
    return verdict.replace("_", " ")


#: The questions by their identifiers, in the order in which they are answered.
QUESTIONS: Mapping[str, str] = MappingProxyType(
    {
        "trained": "Did it train, everywhere?",
        "rank": "Is the rank right?",
        "checkpoint": "Which checkpoint to keep, and did it forget?",
        "tasks": "Do the tasks share directions, or fight?",
        "concentration": "Did updates follow informative directions more than chance, and does it matter?",
        "stable": "Is training stable, is it still moving, may I stop?",
        "recipe": "Which recipe is better, and can these runs decide it?",
    }
)


@dataclass(frozen=True)
class Evidence:
    """A number behind an answer.

    Args:
        path: Where it is in the tree, such as ``/update/frobenius_norm_all``; of a table or file beside it, its key in
            ``summary.json``.
        value: The number; NaN where it is a whole array that was looked at.
        low, high: Ends of its interval; NaN where it has none.
    """

    path: str
    value: float = math.nan
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True)
class Answer:
    """What a result says to a question.

    Args:
        id: A key of ``QUESTIONS``.
        verdict: What ``yes``, ``no`` and ``mixed`` mean is said where each question is answered; ``undecided`` if the
            data cannot tell, ``not_asked`` if nothing was measured that could.
        answer: One sentence.
        evidence: The numbers behind it.
        sure: Confidence level of its claims; ``None`` where it states what was measured and infers nothing.
        surer: What would make it surer, or answer it at all; ``""`` if nothing would.

    Raises:
        ValueError: If the identifier is none of ``QUESTIONS``.
    """

    id: str
    verdict: Verdict
    answer: str
    evidence: tuple[Evidence, ...] = ()
    sure: float | None = None
    surer: str = ""

    def __post_init__(self) -> None:
        if self.id not in QUESTIONS:
            raise ValueError(f"Expected one of {', '.join(QUESTIONS)}, got {self.id!r}.")

    @property
    def question(self) -> str:
        """The question."""
        return QUESTIONS[self.id]

    def to_json(self) -> dict[str, Any]:
        """Return the answer as ``summary.json`` has it, missing numbers as ``None``.

        >>> Answer("rank", "not_asked", "No matrix has low rank.").to_json()["question"]
        'Is the rank right?'
        """
        return {
            "id": self.id,
            "question": self.question,
            "answer": self.answer,
            "verdict": self.verdict,
            "evidence": [
                {"path": number.path, **{name: finite(getattr(number, name)) for name in ("value", "low", "high")}}
                for number in self.evidence
            ],
            "sure": self.sure,
            "surer": self.surer,
        }


def how_sure(answer: Mapping[str, Any]) -> str:
    """Return the confidence in an answer, and what would make it surer, for the terminal and the page.

    Args:
        answer: See ``Answer.to_json``.

    >>> how_sure({"verdict": "undecided", "sure": 0.95, "surer": "Probe more samples."})
    'Confidence 95 %. To be surer: probe more samples.'
    """
    confidence = "" if answer["sure"] is None else f"Confidence {percent(answer['sure'], 0)}."
    remedy = remedy_of(answer)
    aim = "To ask" if answer["verdict"] == "not_asked" else "To be surer"
    return " ".join(filter(None, (confidence, f"{aim}: {remedy}." if remedy else "")))


def remedy_of(answer: Mapping[str, Any]) -> str:
    """Return what would make an answer surer, to be written after a colon or in brackets.

    >>> remedy_of({"surer": "not asked: Pass --probe MODULE:FUNCTION."})
    'pass --probe MODULE:FUNCTION'
    """
    remedy = answer["surer"].strip().removeprefix("not asked: ").removesuffix(".")
    return remedy if remedy[1:2].isupper() else remedy[:1].lower() + remedy[1:]


def recipe_first(answers: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the answers of several runs as they are read: what compares the runs, then what all of them say."""
    return sorted(answers, key=lambda answer: answer["id"] != "recipe")
