"""The study's seven tasks as questions and answers about an image, and how answers are scored.

A score is Σ numerator / Σ denominator over entries, so that the micro-averaged F1 is one too; elsewhere the denominator
is 1 and the score a mean. BLEU-4 is sacreBLEU's sentence score (with its exponential smoothing), ROUGE-L rouge-score's
F measure, both from 0 to 1.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.bleu import BLEU

from examples.imax.phantom import GRADES, SIDES, ZONES, Truth

GRID = 16  # places on an image's side that a box's corner can have
TASKS = ("calculation", "report", "grade", "findings", "comprehension", "generation", "vqa")
#: At most so many different questions about one image.
MOST = {"calculation": 2, "report": 1, "grade": 1, "findings": 1, "comprehension": 3, "generation": 3, "vqa": 4}
SENTENCES = 4  # of a caption
UNREADABLE = 1.0  # the absolute error of an answer that is no number

Questions = list[tuple[str, str]]
Fraction = tuple[float, float]


class Metric(NamedTuple):
    """How one answer counts: a function (answer, reference) → numerator and denominator."""

    name: str
    of: Callable[[str, str], Fraction]
    higher_is_better: bool = True


def questions(task: str, truth: Truth, image: int) -> Questions:
    """All questions of a task about an image, with their answers.

    Raises:
        ValueError: If there is no such task.

    >>> from examples.imax.phantom import phantoms
    >>> questions("grade", phantoms(1, seed=0)[1], 0)[0][0]
    'grade the oedema'
    """
    if task not in TASKS:
        raise ValueError(f"Expected one of {', '.join(TASKS)}, got {task!r}.")
    return _ASKED[task](truth, image)


def caption(truth: Truth, image: int, random: np.random.Generator) -> str:
    """What the base is taught to say of an image: as often as not the report, or four of :func:`sentences`, shuffled.

    >>> from examples.imax.phantom import phantoms
    >>> caption(phantoms(1, seed=0)[1], 0, np.random.default_rng(1)).count(".")
    4
    """
    if random.random() < 0.5:
        return report(truth, image)
    told = sentences(truth, image)
    return " ".join(told[number] for number in random.permutation(len(told))[:SENTENCES])


def sentences(truth: Truth, image: int) -> list[str]:
    """Of each structure and finding one sentence: what it is, and where.

    >>> from examples.imax.phantom import phantoms
    >>> len(sentences(phantoms(1, seed=0)[1], 0))
    8
    """
    told = [
        f"{_heart(truth, image)} heart at {place(truth.heart_box[image])} .",
        f"{GRADES[truth.oedema[image]]} oedema .",
    ]
    for side, name in enumerate(SIDES):
        told.append(f"{name} lung at {place(truth.lung_box[image, side])} .")
        zone, box = ZONES[truth.opacity_zone[image, side]], truth.opacity_box[image, side]
        opaque, wet = truth.opacity[image, side], truth.effusion[image, side]
        told.append(f"{name} opacity in the {zone} zone at {place(box)} ." if opaque else f"no {name} opacity .")
        told.append(
            f"{name} effusion at {place(truth.effusion_box[image, side])} ." if wet else f"no {name} effusion ."
        )
    return told


def report(truth: Truth, image: int) -> str:
    """A radiologist's sentence or four.

    >>> from examples.imax.phantom import phantoms
    >>> report(phantoms(1, seed=0)[1], 0).startswith("the heart is")
    True
    """
    told = ["the heart is enlarged ." if truth.cardiomegaly[image] else "the heart is normal in size ."]
    seen = [
        f"opacity in the {ZONES[truth.opacity_zone[image, side]]} zone of the {SIDES[side]} lung ."
        for side in range(2)
        if truth.opacity[image, side]
    ]
    told += seen or ["the lungs are free of opacities ."]
    wet = [SIDES[side] for side in range(2) if truth.effusion[image, side]]
    told.append(f"pleural effusion on the {' and '.join(wet)} ." if wet else "no pleural effusion .")
    told.append(f"{GRADES[truth.oedema[image]]} oedema ." if truth.oedema[image] else "no oedema .")
    return " ".join(told)


def described(truth: Truth, image: int, lungs: Float[np.ndarray, "2 4"], zones: Int[np.ndarray, " 2"]) -> Questions:
    """A place, and what is there: which of two things cannot be told from the place alone.

    Args:
        truth: Of the images.
        image: Which.
        lungs: Boxes of both lungs, as fractions; the places asked are a third of each, and its lowest sixth.
        zones: Of each lung, the third that is asked about.

    >>> from examples.imax.phantom import phantoms
    >>> boxes, zones = np.array([[0, 0, 0.5, 0.75], [0.5, 0, 1, 0.75]]), np.array([0, 2])
    >>> described(phantoms(1, seed=0)[1], 0, boxes, zones)[0][0]
    'what is at <0> <0> <8> <4>'
    """
    asked = []
    for side, name in enumerate(SIDES):
        left, top, right, bottom = lungs[side]
        zone, third = int(zones[side]), (bottom - top) / 3
        box = place(np.array([left, top + zone * third, right, top + (zone + 1) * third]))
        what = "opacity in" if truth.opacity_zone[image, side] == zone else "clear"
        asked.append((f"what is at {box}", f"{what} the {ZONES[zone]} zone of the {name} lung"))
        angle = place(np.array([left, bottom - third / 2, right, bottom]))
        what = "fluid in" if truth.effusion[image, side] else "clear"
        asked.append((f"what is at {angle}", f"{what} the {name} costophrenic angle"))
    return asked


def place(box: Float[np.ndarray, " 4"]) -> str:
    """A box as four words, each a line of a grid of 16 by 16.

    >>> place(np.array([0.0, 0.5, 0.26, 1.0]))
    '<0> <8> <4> <16>'
    """
    return " ".join(f"<{round(float(side) * GRID)}>" for side in box)


def box_of(text: str) -> list[int] | None:
    """The four lines that a box in words names, or ``None`` if it is no box.

    >>> box_of("<0> <0> <4> <8>"), box_of("<4> <0> <0> <8>")
    ([0, 0, 4, 8], None)
    """
    words = text.split()
    sides = [int(word[1:-1]) for word in words if re.fullmatch(r"<\d+>", word)]
    ordered = len(sides) == len(words) == 4 and sides[0] <= sides[2] and sides[1] <= sides[3]
    return sides if ordered else None


def intersection_over_union(answer: str, reference: str) -> float:
    """Of two boxes in words; 0 if the answer is no box.

    >>> intersection_over_union("<0> <0> <4> <4>", "<0> <0> <4> <8>")
    0.5
    >>> intersection_over_union("the heart", "<0> <0> <4> <8>")
    0.0
    """
    ours, theirs = box_of(answer), box_of(reference)
    if ours is None or theirs is None:
        return 0.0
    width = min(ours[2], theirs[2]) - max(ours[0], theirs[0])
    height = min(ours[3], theirs[3]) - max(ours[1], theirs[1])
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (ours, theirs))
    return shared / (areas - shared) if areas > shared else 0.0


def absolute_error(answer: str, reference: str) -> float:
    """Of a ratio in words; 1 if the answer is no number.

    >>> round(absolute_error("0 . 4 7", "0 . 5 0"), 3), absolute_error("none", "0 . 5 0")
    (0.03, 1.0)
    """
    try:
        return abs(float(answer.replace(" ", "")) - float(reference.replace(" ", "")))
    except ValueError:
        return UNREADABLE


def f1_counts(answer: str, reference: str) -> Fraction:
    """Twice the true positives, and with them all positives of both: summed over entries, micro-F1.

    >>> f1_counts("opacity , effusion", "effusion , oedema , cardiomegaly")
    (2.0, 5.0)
    """
    ours, theirs = ({part.strip() for part in text.split(",") if part.strip()} for text in (answer, reference))
    return 2.0 * len(ours & theirs), float(len(ours) + len(theirs))


def bleu4(answer: str, reference: str) -> float:
    """BLEU of up to four words, from 0 to 1.

    >>> bleu4("the heart is normal in size .", "the heart is normal in size .")
    1.0
    """
    return round(_BLEU.sentence_score(answer, [reference]).score / 100, 12)


def rouge_l(answer: str, reference: str) -> float:
    """F measure of the longest common subsequence of words, from 0 to 1.

    >>> rouge_l("the heart is enlarged", "the heart is normal")
    0.75
    """
    return float(_ROUGE.score(reference, answer)["rougeL"].fmeasure)


def total(fractions: Sequence[Fraction]) -> tuple[float, float]:
    """Score and its standard error from the numerators and denominators of independent entries.

    R = Σn/Σd with standard error √(N/(N−1) Σ(n − R·d)²)/Σd, the linearised one of a ratio (Cochran 1977, 6.4).

    Raises:
        ValueError: If there are fewer than two entries.

    >>> total([(1, 1), (0, 1), (1, 1), (0, 1)])
    (0.5, 0.28867513459481287)
    """
    if len(fractions) < 2:
        raise ValueError(f"Expected at least 2 entries for a standard error, got {len(fractions)}.")
    above, below = np.asarray(fractions, float).T
    ratio = above.sum() / below.sum()
    error = np.sqrt(len(above) / (len(above) - 1) * ((above - ratio * below) ** 2).sum()) / below.sum()
    return float(ratio), float(error)


def _heart(truth: Truth, image: int) -> str:
    words = ("small", "slender", "medium", "wide", "large", "huge")
    return words[int(np.clip((truth.cardiothoracic_ratio[image] - 0.36) / 0.05, 0, 5))]


def _number(value: float) -> str:
    return " ".join(f"{value:.2f}")


def _regions(truth: Truth, image: int) -> list[tuple[str, str]]:
    """Everything that can be pointed at: its name and its box."""
    found = [("the heart", place(truth.heart_box[image]))]
    for side, name in enumerate(SIDES):
        found.append((f"the {name} lung", place(truth.lung_box[image, side])))
        if truth.opacity[image, side]:
            found.append((f"the opacity in the {name} lung", place(truth.opacity_box[image, side])))
        if truth.effusion[image, side]:
            found.append((f"the effusion on the {name}", place(truth.effusion_box[image, side])))
    return found


def _described(truth: Truth, image: int) -> Questions:
    zones = np.where(truth.opacity[image], truth.opacity_zone[image], image % 3)
    return described(truth, image, truth.lung_box[image], zones)


def _calculation(truth: Truth, image: int) -> Questions:
    return [
        ("cardiothoracic ratio", _number(truth.cardiothoracic_ratio[image])),
        ("cardiopulmonary area ratio", _number(truth.cardiopulmonary_area_ratio[image])),
    ]


def _findings(truth: Truth, image: int) -> Questions:
    present = {
        "cardiomegaly": truth.cardiomegaly[image],
        "opacity": truth.opacity[image].any(),
        "effusion": truth.effusion[image].any(),
        "oedema": truth.oedema[image] > 0,
    }
    return [("list the findings", " , ".join(name for name, there in present.items() if there) or "no finding")]


def _vqa(truth: Truth, image: int) -> Questions:
    def said(there: bool) -> str:
        return "yes" if there else "no"

    asked = [("is the heart enlarged", said(truth.cardiomegaly[image])), ("is there oedema", said(truth.oedema[image]))]
    for side, name in enumerate(SIDES):
        asked.append((f"is there an opacity in the {name} lung", said(truth.opacity[image, side])))
        asked.append((f"is there an effusion on the {name}", said(truth.effusion[image, side])))
        if truth.opacity[image, side]:
            asked.append((f"in which zone is the opacity in the {name} lung", ZONES[truth.opacity_zone[image, side]]))
    return asked


def _mean_of(value: Callable[[str, str], float]) -> Callable[[str, str], Fraction]:
    return lambda answer, reference: (value(answer, reference), 1.0)


def _exact(answer: str, reference: str) -> float:
    return float(answer == reference)


_BLEU = BLEU(effective_order=True, tokenize="none")
_ROUGE = RougeScorer(["rougeL"])
_ASKED: dict[str, Callable[[Truth, int], Questions]] = {
    "calculation": _calculation,
    "report": lambda truth, image: [("write the report", report(truth, image))],
    "grade": lambda truth, image: [("grade the oedema", GRADES[truth.oedema[image]])],
    "findings": _findings,
    "comprehension": lambda truth, image: [(f"where is {name}", box) for name, box in _regions(truth, image)],
    "generation": _described,
    "vqa": _vqa,
}
#: The metrics of each task, the primary one first.
METRICS: dict[str, tuple[Metric, ...]] = {
    "calculation": (Metric("mean absolute error", _mean_of(absolute_error), higher_is_better=False),),
    "report": (Metric("BLEU-4", _mean_of(bleu4)), Metric("ROUGE-L", _mean_of(rouge_l))),
    "grade": (Metric("accuracy", _mean_of(_exact)),),
    "findings": (Metric("micro-F1", f1_counts),),
    "comprehension": (Metric("mean IoU", _mean_of(intersection_over_union)),),
    "generation": (Metric("exact match", _mean_of(_exact)), Metric("BLEU-4", _mean_of(bleu4))),
    "vqa": (Metric("accuracy", _mean_of(_exact)),),
}
