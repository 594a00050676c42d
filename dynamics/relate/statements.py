"""Results in plain sentences, each with its numbers; what cannot be decided is said so, without stars."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dynamics.relate.permutations import LEVEL

_NAMED = 8


def number(value: float) -> str:
    """Two decimals, a minus sign as such.

    >>> number(-0.314)
    '−0.31'
    """
    return f"{value:.2f}".replace("-", "−")


def p_text(value: float) -> str:
    """Two significant digits.

    >>> p_text(0.25), p_text(0.00012)
    ('0.25', '0.00012')
    """
    return f"{value:.2g}" if value >= 1e-5 else f"{value:.1e}"


def interval_text(low: float, high: float, write: Callable[[float], str] = number) -> str:
    """The interval in words, or that there is none.

    >>> interval_text(-0.1, 0.4), interval_text(math.nan, math.nan)
    ('95 % interval −0.10 to 0.40', 'no interval')
    """
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return f"95 % interval {write(low)} to {write(high)}"


def undecidable(what: str, units: int, smallest_p: float, correction: str, least: str) -> str:
    """That a test cannot reach the level with so few units.

    >>> undecidable("Whether the groups differ in gini", 3, 0.25, "", "6 pairs")
    'Whether the groups differ in gini cannot be decided with n = 3; the smallest possible p is 0.25 (6 pairs could).'
    """
    could = (
        f"{correction[:-1]}; {least} could)" if correction and least else f" ({least} could)" if least else correction
    )
    return f"{what} cannot be decided with n = {units}; the smallest possible p is {p_text(smallest_p)}{could}."


@dataclass(frozen=True)
class Asked:
    """What was asked of all pairs.

    Args:
        question: ``"over_steps"``, ``"between_runs"`` or ``"one_run"``.
        given: What is held equal: ``"loss"``, ``"trend"``, or ``None``.
        unit: What independent units are called.
        least: Units with which one pair alone can be decided.
        pairs: Measures × tasks.
    """

    question: str
    given: str | None
    unit: str
    least: int
    pairs: int


#: What an association over steps is beside.
_BEYOND = {
    None: "within runs, beyond the curve that all share",
    "loss": "within runs, with the training loss held equal",
    "trend": "within runs, beyond each run's own straight line",
}
#: What an association over steps may come from.
_COMMON_CAUSE = {
    None: " Runs that learn faster can show both",
    "loss": "",
    "trend": " Runs whose curves bend faster can show both",
}


def association_statement(
    measure: str, task: str, direction: int, asked: Asked, row: Mapping[str, float | str], *, alone: bool
) -> str:
    """One association in words.

    Args:
        measure, task: Names.
        direction: Of the score; 0 if it is not known.
        asked: What was asked of all pairs.
        row: Variables of :func:`dynamics.relate.associate` of this pair.
        alone: Whether it was named before looking.
    """
    score = _score(task, direction)
    if row["reason"]:
        return nothing_said(measure, [task], str(row["reason"]))
    value, units, steps = float(row["coefficient"]), int(row["n_units"]), int(row["n_steps"])
    correlation = f"r = {number(value)} ({interval_text(float(row['low']), float(row['high']))})"
    if asked.question == "one_run":
        return (
            f"One run cannot show whether {measure} goes with {score}: give several runs. In this one, beside its "
            f"trend, {correlation} over {steps} steps, worth {row['effective_steps']:.1f} independent ones; no p-value "
            "is given for one run."
        )
    over_steps = asked.question == "over_steps"
    where = f"{units} {asked.unit} × {steps} steps" if over_steps else f"{units} {asked.unit} at their last step"
    beyond = _BEYOND[asked.given] if over_steps else "between runs"
    correction = "" if alone or asked.pairs == 1 else f" (adjusted for {asked.pairs} associations)"
    smallest_p = float(row["smallest_p_adjusted"])
    if not smallest_p <= LEVEL:
        question = f"Whether {measure} goes with {score} {beyond}"
        least = f"{asked.least} {asked.unit}" if asked.least > units else f"more {asked.unit}"
        sentence = undecidable(question, units, smallest_p, correction, least)
        return f"{sentence} Observed: r = {number(value)} over {where}."
    p = f"p = {p_text(float(row['p_value' if alone else 'p_familywise']))}{correction}"
    if not row["holds"]:
        return (
            f"No association of {measure} with {score} was shown {beyond}: {correlation}, {p}, {where}. "
            "Correlations outside the interval are excluded."
        )
    way = {1: "better", -1: "worse"} if direction else {1: "higher", -1: "lower"}
    sentence = (
        f"A higher {measure} goes with {way[1 if value > 0 else -1]} {score}, {beyond}: {correlation}, {p}, {where}."
    )
    given_loss = float(row["coefficient_given_loss"])
    held = (
        "" if math.isnan(given_loss) or asked.given else f"; with the training loss held equal r = {number(given_loss)}"
    )
    cause = _COMMON_CAUSE[asked.given] if over_steps else ""
    return f"{sentence}{cause}{held}." if cause else sentence


def nothing_said(measure: str, tasks: Sequence[str], reason: str) -> str:
    """That there is no coefficient.

    >>> nothing_said("gini", ["qa", "vqa"], "one of the two does not vary")
    'Nothing can be said of gini and qa, vqa: one of the two does not vary.'
    """
    more = f" and {len(tasks) - _NAMED} more" if len(tasks) > _NAMED else ""
    return f"Nothing can be said of {measure} and {', '.join(tasks[:_NAMED])}{more}: {reason}."


def _score(task: str, direction: int) -> str:
    if task == "all":
        return "scores, mean over tasks"
    if direction == 0:
        return f"values of {task} (whether higher is better is not known)"
    return f"scores of {task}" + (" (lower is better; sign turned)" if direction < 0 else "")


def difference_statement(
    measure: str,
    contrast: tuple[str, str],
    *,
    difference: float,
    error: float,
    low: float,
    high: float,
    effect_size: float,
    p: float,
    correction: str,
    smallest_p: float,
    tested: bool,
    units: str,
    count: int,
    least: str,
    steps: int,
) -> str:
    """One difference of two groups, first minus second, in words.

    Args:
        measure: Name.
        contrast: Names of the first and the second group.
        difference, error: Of the means, and its standard error.
        low, high: The interval that belongs to the decision.
        effect_size: Standardised difference.
        p: The p-value that decides, ``correction`` says over what it is adjusted.
        smallest_p: Least that it could have been.
        tested: Whether the groups are large enough to be tested.
        units, count: What was compared, in words, and how many units that is.
        least: With how many units a decision would be possible.
        steps: Steps that count.
    """
    first, second = contrast
    if steps == 0 or math.isnan(difference):
        return f"Nothing can be said of {measure}: there is no step at which every run has it."
    size = "" if math.isnan(effect_size) else f", effect size {number(effect_size)}"
    spread = "" if math.isnan(error) else f" (standard error {significant(error)})"
    where = f"{units}, at the one step" if steps == 1 else f"{units}, mean over {steps} steps"
    observed = f"Observed difference: {significant(difference)}{spread}{size}, {where}."
    asked = f"Whether {measure} differs between {first} and {second}"
    if not tested:
        return f"{asked} cannot be decided: a group of fewer than 3 runs is described only. {observed}"
    if not smallest_p <= LEVEL:
        return f"{undecidable(asked, count, smallest_p, correction, least)} {observed}"
    numbers = f"{significant(difference)} ({interval_text(low, high, significant)}){size}"
    if p <= LEVEL:
        way = "higher" if difference > 0 else "lower"
        return f"{measure} is {way} in {first} than in {second} by {numbers}, p = {p_text(p)}{correction}, {where}."
    return (
        f"No difference in {measure} between {first} and {second} was shown: {numbers}, p = {p_text(p)}{correction}, "
        f"{where}. Differences outside the interval are excluded."
    )


def significant(value: float) -> str:
    """Three significant digits, for numbers with units of their own.

    >>> significant(-0.00123456), significant(1234.5)
    ('−0.00123', '1.23e+03')
    """
    return f"{value:.3g}".replace("-", "−", 1) if value < 0 else f"{value:.3g}"
