"""What can be answered without the image: the pilot gate's lower mark.

For each kind of question, the one answer that scores best on the training entries that ask it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

from examples.imax.data import Entry
from examples.imax.tasks import METRICS, TASKS

CANDIDATES, JUDGES = 40, 100  # the most frequent answers, and the entries on which they are compared


def question_only(train: Sequence[Entry], asked: Sequence[Entry]) -> list[str]:
    """The best constant answer to each kind of question.

    Args:
        train: Entries with answers.
        asked: Entries to answer, of which only task and question are read.

    Returns:
        One answer an entry; where its kind was never trained on, the best for all questions of its task.

    Raises:
        ValueError: If a task is asked that is not in the training entries.

    >>> train = [Entry(0, "vqa", "is there oedema", "yes"), Entry(1, "vqa", "is there oedema", "yes")]
    >>> question_only(train, [Entry(2, "vqa", "is there oedema", "no")])
    ['yes']
    """
    kinds: dict[tuple[str, str], list[str]] = defaultdict(list)
    for entry in train:
        kinds[entry.task, kind(entry.question)].append(entry.answer)
        kinds[entry.task, ""].append(entry.answer)
    if unknown := {entry.task for entry in asked} - {entry.task for entry in train}:
        raise ValueError(f"Expected training entries of every task asked, found none of {', '.join(sorted(unknown))}.")
    best = {key: _best(key[0], found) for key, found in kinds.items()}
    return [best.get((entry.task, kind(entry.question)), best[entry.task, ""]) for entry in asked]


def kind(question: str) -> str:
    """The question, a box in it coarsened to its side, middle and height.

    >>> kind("is there oedema"), kind("what is at <9> <2> <14> <6>")
    ('is there oedema', 'what is at left 4 4')
    """
    lines = [int(word[1:-1]) for word in question.split() if word.startswith("<")]
    if not lines:
        return question
    left, top, _, bottom = lines
    words = " ".join(word for word in question.split() if not word.startswith("<"))
    return f"{words} {'left' if left >= 7 else 'right'} {(top + bottom) // 2} {bottom - top}"


def gate(
    found: dict[str, dict[str, dict[str, float]]], baseline: dict[str, dict[str, dict[str, float]]], errors: float = 5
) -> dict[str, dict[str, Any]]:
    """Whether each task is well above the question-only baseline and below its ceiling.

    Args:
        found: Scores of a model, as :func:`examples.imax.train.scores` gives them.
        baseline: Those of the question alone, on the same entries.
        errors: How many standard errors, the larger of the two, a model has to be above the baseline. Below the
            ceiling (1, or an error of 0) it has to be by two of its own.

    Returns:
        By task, of its primary metric: both scores, the distance in standard errors, and whether it passes.
    """
    table = {}
    for task in TASKS:
        metric = METRICS[task][0]
        ours, theirs = found[task][metric.name], baseline[task][metric.name]
        sign = 1 if metric.higher_is_better else -1
        error = max(ours["standard_error"], theirs["standard_error"])
        gain = sign * (ours["score"] - theirs["score"])
        ceiling = abs((1.0 if metric.higher_is_better else 0.0) - ours["score"])
        above = gain / error if error else float("inf") * gain if gain else 0.0
        table[task] = {
            "metric": metric.name,
            "score": ours["score"],
            "standard_error": ours["standard_error"],
            "question_only": theirs["score"],
            "errors_above": above,
            "passes": bool(above >= errors and ceiling > 2 * ours["standard_error"]),
        }
    return table


def _best(task: str, answers: list[str]) -> str:
    """Ties go to the more frequent answer."""
    metric = METRICS[task][0]
    judges = answers[:JUDGES]

    def worth(candidate: str) -> float:
        above, below = (sum(part) for part in zip(*(metric.of(candidate, other) for other in judges), strict=True))
        return above / below if metric.higher_is_better else -above / below

    return max((answer for answer, _ in Counter(answers).most_common(CANDIDATES)), key=worth)
