"""Results in plain sentences, each with its numbers; what cannot be decided is said so, without stars."""

from __future__ import annotations

import math
from collections.abc import Callable

from dynamics.relate.power import LEVEL


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


def undecidable(what: str, units: int, smallest_p: float, least: int, unit: str = "runs") -> str:
    """That a test cannot reach the level with so few units.

    >>> undecidable("Whether the groups differ in gini", 3, 0.25, 6, "pairs")
    'Whether the groups differ in gini cannot be decided with n = 3; the smallest possible p is 0.25 (6 pairs could).'
    """
    return f"{what} cannot be decided with n = {units}; the smallest possible p is {p_text(smallest_p)}" + (
        f" ({least} {unit} could)." if least > units else "."
    )


def needed_text(needed: float, units: int, unit: str = "runs") -> str:
    """How many units it would take, as a sentence with a space before it, or nothing.

    >>> needed_text(16.0, 8)
    ' If it is as strong as estimated, about 16 runs would show it (power 0.8).'
    """
    if math.isnan(needed) or needed <= units:
        return ""
    if needed > 1000:
        return f" If it is no stronger than estimated, more than 1000 {unit} would be needed to show it (power 0.8)."
    return f" If it is as strong as estimated, about {needed:.0f} {unit} would show it (power 0.8)."


def association_statement(
    measure: str,
    task: str,
    *,
    question: str,
    direction: int,
    coefficient: float,
    low: float,
    high: float,
    p: float,
    correction: str,
    smallest_p: float,
    units: int,
    steps: int,
    effective_steps: float,
    least: int,
    needed: float,
    reason: str,
    unit: str,
) -> str:
    """One association in words.

    Args:
        measure, task: Names.
        question: ``"over_steps"``, ``"between_runs"`` or ``"one_run"``.
        direction: Of the score; 0 if not known.
        coefficient, low, high: Correlation with the score (higher is better) and its interval.
        p: The p-value that decides, ``correction`` says over what it is adjusted.
        smallest_p: Least that an unadjusted p could have been.
        units, unit: Independent units, and what they are called.
        steps, effective_steps: Steps that count.
        least: Units with which a decision would be possible.
        needed: Units that would show it.
        reason: Why there is no coefficient.
    """
    score = _score(task, direction)
    if reason:
        return f"Nothing can be said of {measure} and {score}: {reason}."
    numbers = f"r = {number(coefficient)} ({interval_text(low, high)})"
    if question == "one_run":
        return (
            f"Within this one run {measure} and {score} fluctuate together with {numbers}, {steps} steps worth "
            f"{effective_steps:.1f} independent ones; this describes the run, and no p-value is given for one run."
        )
    where = f"{units} {unit} × {steps} steps" if question == "over_steps" else f"{units} {unit} at their last step"
    if not smallest_p <= LEVEL:
        asked = undecidable(f"Whether {measure} goes with {score}", units, smallest_p, least, unit)
        return f"{asked} Observed: {numbers} over {where}."
    if p <= LEVEL:
        way = "higher" if coefficient > 0 else "lower"
        subject = f"{score[0].upper()}{score[1:]}"
        return f"{subject} is {way} where {measure} is higher: {numbers}, p = {p_text(p)}{correction}, {where}."
    return (
        f"No association of {measure} with {score} was shown: {numbers}, p = {p_text(p)}{correction}, {where}."
        + needed_text(needed, units, unit)
    )


def _score(task: str, direction: int) -> str:
    if task == "all":
        return "the mean standardised score"
    if direction == 0:
        return f"the value of {task} (better direction unknown)"
    return f"the score of {task}" + (", sign turned," if direction < 0 else "")


def difference_statement(
    measure: str,
    contrast: tuple[str, str],
    *,
    difference: float,
    low: float,
    high: float,
    effect_size: float,
    p: float,
    correction: str,
    smallest_p: float,
    units: int,
    unit: str,
    steps: int,
    least: int,
    needed: float,
) -> str:
    """One difference of two groups, first minus second, in words; parameters as in :func:`association_statement`.

    Args:
        contrast: Names of the first and the second group.
    """
    first, second = contrast
    if steps == 0 or math.isnan(difference):
        return f"Nothing can be said of {measure}: there is no step at which every run has it."
    size = "" if math.isnan(effect_size) else f", effect size {number(effect_size)}"
    numbers = f"{significant(difference)} ({interval_text(low, high, significant)}){size}"
    where = f"{units} {unit}, at the one step" if steps == 1 else f"{units} {unit}, mean over {steps} steps"
    if not smallest_p <= LEVEL:
        asked = undecidable(f"Whether {measure} differs between {first} and {second}", units, smallest_p, least, unit)
        return f"{asked} Observed difference: {numbers}, {where}."
    if p <= LEVEL:
        way = "higher" if difference > 0 else "lower"
        return f"{measure} is {way} in {first} than in {second} by {numbers}, p = {p_text(p)}{correction}, {where}."
    shown = f"No difference in {measure} between {first} and {second} was shown: {numbers}"
    return f"{shown}, p = {p_text(p)}{correction}, {where}.{needed_text(needed, units, unit)}"


def significant(value: float) -> str:
    """Three significant digits, for numbers with units of their own.

    >>> significant(-0.00123456), significant(1234.5)
    ('−0.00123', '1.23e+03')
    """
    return f"{value:.3g}".replace("-", "−", 1) if value < 0 else f"{value:.3g}"
