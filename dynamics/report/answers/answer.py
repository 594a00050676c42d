"""An answer to one of the questions that a result is asked first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from dynamics.text import finite

Verdict = Literal["yes", "no", "mixed", "undecided", "not_asked"]
VERDICTS: tuple[Verdict, ...] = ("yes", "no", "mixed", "undecided", "not_asked")

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
