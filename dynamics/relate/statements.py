"""Associations and differences in sentences, each with its numbers; too few runs are called too few, without stars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dynamics.relate.permutations import LEVEL
from dynamics.text import counted, interval, number, p_value, sentence_case, signed, some

#: Tasks that a sentence names.
_NAMED = 8


@dataclass(frozen=True)
class AssociationContext:
    """What holds for every association of one table.

    Args:
        question: ``"over_steps"``, ``"between_runs"`` or ``"one_run"``.
        given: What is held equal: ``"loss"``, ``"trend"``, or ``None``.
        unit: One independent unit in words.
        least: Units with which one pair alone can be decided.
        pairs: Measures × tasks.
    """

    question: str
    given: str | None
    unit: str
    least: int
    pairs: int


#: Where an association over steps is looked for.
_BEYOND = {
    None: "within runs, beyond the curve that all share",
    "loss": "within runs, with the training loss held equal",
    "trend": "within runs, beyond each run's own straight line",
}
#: What else may cause an association over steps.
_COMMON_CAUSE = {
    None: " Faster learning alone could cause both.",
    "loss": "",
    "trend": " Curves that bend faster could cause both.",
}


def association_statement(row: Mapping[str, Any], context: AssociationContext) -> str:
    """Return one association in words.

    Args:
        row: Variables of :func:`dynamics.relate.associate` for one pair, with its ``measure``, ``task``, ``direction``,
            and ``leading``: whether it was named before looking.
        context: What holds for all pairs.
    """
    measure, task = row["measure"], row["task"]
    if row["reason"]:
        return unrelated(measure, [task], row["reason"])
    units = counted(row["n_units"], context.unit, _plural(context.unit))
    correlation = f"r = {signed(row['coefficient'])}"
    range_ = interval(row["low"], row["high"])
    score = _score(task, row["direction"])
    if context.question == "one_run":
        return (
            f"One run cannot show whether {measure} goes with {score}: give several runs. In this run, beyond its "
            f"trend, {correlation} ({range_}; {row['n_steps']} steps, worth {row['effective_steps']:.1f} independent "
            "ones). There is no p-value for one run."
        )
    over_steps = context.question == "over_steps"
    where = f"{units} × {counted(row['n_steps'], 'step')}" if over_steps else f"{units} at their last step"
    beyond = _BEYOND[context.given] if over_steps else "between runs"
    adjusted = "" if row["leading"] or context.pairs == 1 else f", adjusted for {context.pairs} associations"
    if not row["smallest_p_adjusted"] <= LEVEL:
        more = f"{context.least} {_plural(context.unit)}" if context.least > row["n_units"] else ""
        question = f"whether {measure} goes with {score} {beyond}"
        return f"{_too_few(units, question, row, adjusted, more)} Observed: {correlation}."
    p = f"p = {p_value(row['p_value' if row['leading'] else 'p_familywise'])}{adjusted}"
    numbers = f"({correlation}, {range_}, {p}; {where})"
    if not row["holds"]:
        if row["low"] < -0.995 and row["high"] > 0.995:
            rest = f"Every correlation is still possible: more {_plural(context.unit)} are needed."
        else:
            rest = "Correlations outside the interval are ruled out."
        return f"{measure} and {score}: no association shown {beyond} {numbers}. {rest}"
    ways = ("better", "worse") if row["direction"] else ("higher", "lower")
    sentence = f"Higher {measure} goes with {ways[row['coefficient'] < 0]} {score} {beyond} {numbers}."
    if not over_steps:
        return sentence
    given_loss = row["coefficient_given_loss"]
    sentence += _COMMON_CAUSE[context.given]
    if math.isnan(given_loss) or context.given:
        return sentence
    return f"{sentence} With the training loss held equal, r = {signed(given_loss)}."


def unrelated(measure: str, tasks: Sequence[str], reason: str) -> str:
    """Return in words that tasks have no correlation with a measure, and why.

    >>> unrelated("gini", ["qa", "vqa"], "one of the two does not vary")
    'gini cannot be related to qa, vqa: one of the two does not vary.'
    """
    return f"{measure} cannot be related to {some(tasks, _NAMED)}: {reason}."


def _score(task: str, direction: int) -> str:
    if task == "all":
        return "scores (mean over tasks)"
    return task + {1: "", -1: " (lower is better)", 0: " (which direction is better is unknown)"}[direction]


def _plural(unit: str) -> str:
    first, *rest = unit.split(" ", 1)
    return " ".join([f"{first}s", *rest])


def _too_few(units: str, question: str, row: Mapping[str, Any], adjusted: str, could: str) -> str:
    """Return in words that no result of so few units could be significant, and how many could."""
    verb = "is" if units.startswith("1 ") and "+" not in units else "are"
    enough = f"{could} can reach {LEVEL}." if could else "More runs are needed."
    smallest = f"smallest possible p: {p_value(row['smallest_p_adjusted'])}{adjusted}"
    return f"{units} {verb} too few to decide {question} ({smallest}). {enough}"


@dataclass(frozen=True)
class ComparisonContext:
    """What holds for every difference between two groups.

    Args:
        first, second: Names of the groups; differences are first minus second.
        units: Units that are compared, in words: ``"6 pairs"``, ``"3 + 4 runs"``.
        pairing: How runs were paired, or why not, in words.
        tested: Whether the groups are large enough to be tested.
        least: Units with which a decision would be possible, in words; ``""`` where it is not their number that lacks.
        measures, comparisons: How many there are, over which p-values are adjusted.
    """

    first: str
    second: str
    units: str
    pairing: str
    tested: bool
    least: str
    measures: int
    comparisons: int

    def adjustment(self, leading: bool) -> str:
        """Return over what a p-value is adjusted, in words."""
        counts = [] if leading or self.measures == 1 else [f"{self.measures} measures"]
        counts += [] if self.comparisons == 1 else [f"{self.comparisons} comparisons"]
        return f", adjusted for {' and '.join(counts)}" if counts else ""


def difference_statement(row: Mapping[str, Any], context: ComparisonContext) -> str:
    """Return the difference between two groups, mean over steps, in words.

    Args:
        row: Variables of :func:`dynamics.relate.compare` for one comparison and measure, with its ``measure``,
            ``leading`` (whether it was named before looking), and ``p_value``, the one that decides.
        context: What holds for all measures.
    """
    measure, first, second = row["measure"], context.first, context.second
    difference, size = row["mean_difference"], row["mean_effect_size"]
    if row["n_steps"] == 0 or math.isnan(difference):
        return f"{measure} cannot be compared: no step has it for every run of {first} and {second}."
    steps = "one step" if row["n_steps"] == 1 else f"mean over {row['n_steps']} steps"
    where = f"{context.units}{context.pairing}, {steps}"
    if context.tested and math.isnan(size) and row["mean_error"] >= 0 and row["smallest_p"] >= 1:
        return f"{measure} is equal in {first} and {second} ({where}): there is nothing to test."
    details = [] if math.isnan(row["mean_error"]) else [f"standard error {number(row['mean_error'])}"]
    details += [] if math.isnan(size) else [f"effect size {signed(size)}"]
    observed = f"Observed difference: {_quantity(difference)} ({', '.join([*details, where])})."
    question = f"whether {measure} differs between {first} and {second}"
    if not context.tested:
        return f"Groups of fewer than 3 runs are described, not tested: {question} is undecided. {observed}"
    adjusted = context.adjustment(row["leading"])
    if not row["smallest_p_adjusted"] <= LEVEL:
        return f"{_too_few(context.units, question, row, adjusted, context.least)} {observed}"
    low, high, way = row["mean_low"], row["mean_high"], "higher"
    shown = row["p_value"] <= LEVEL
    if shown and difference < 0:
        difference, low, high, size, way = -difference, -high, -low, -size, "lower"
    effect = "" if math.isnan(size) else f", effect size {signed(size)}"
    numbers = f"{interval(low, high, _quantity)}{effect}, p = {p_value(row['p_value'])}{adjusted}; {where}"
    if shown:
        return f"{measure} is {way} in {first} than in {second} by {_quantity(difference)} ({numbers})."
    return (
        f"{measure}: no difference between {first} and {second} shown ({_quantity(difference)}, {numbers}). "
        "Differences outside the interval are ruled out."
    )


@dataclass(frozen=True)
class ScoreContext:
    """What holds for one score of two groups.

    Args:
        first, second: Names of the groups; differences are first minus second.
        units: Units that are compared, in words: ``"6 pairs"``, ``"3 + 4 runs"``.
        where: How runs were paired, at which step scores are compared, and how many runs lack it, in words.
        tested: Whether the groups are large enough to be tested.
        could: The smallest design that can decide, in words; ``""`` where it is not the number of runs that lacks.
        adjusted: Over what the p-value is adjusted, in words.
        scores: How many scores the mean of all is over.
        beside: Whether another score is the headline, whose sentence says how many runs could decide.
    """

    first: str
    second: str
    units: str
    where: str
    tested: bool
    could: str
    adjusted: str
    scores: int
    beside: bool


def score_statement(row: Mapping[str, Any], context: ScoreContext) -> str:
    """Return which of two groups has the better score, or why that cannot be decided, in words.

    Args:
        row: Variables of :func:`dynamics.relate.compare_scores` for one comparison and task, with its ``task``,
            ``leading`` (whether it was named before looking), ``direction``, and both groups' means.
        context: What holds for this score.
    """
    first, second, difference = context.first, context.second, row["difference"]
    task = f"the mean over {context.scores} scores" if row["mean_of_all"] else row["task"]
    subject = sentence_case(task) if row["mean_of_all"] else task
    if row["verdict"] == "not_comparable":
        return f"{subject}: {first} and {second} cannot be compared, since no run of one of them has this score."
    if row["verdict"] == "equal":
        return f"{subject}: {first} and {second} are equal ({context.units}{context.where}). There is nothing to test."
    sign = 1 if difference >= 0 else -1
    better = sign * (row["direction"] or 1)
    winner, loser = (first, second) if better > 0 else (second, first)
    unit = " standard deviations" if row["mean_of_all"] else ""
    means = [row["first_mean"], row["second_mean"]][:: 1 if better > 0 else -1]
    against = "" if row["mean_of_all"] else " against ".join(map(_quantity, means))
    size = "" if math.isnan(row["effect_size"]) else f"effect size {signed(abs(row['effect_size']))}"
    by = f"{_quantity(abs(difference))}{unit}"
    way = "higher" if sign * better > 0 else "lower"
    if row["verdict"] == "undecided":
        normal = _turned(row["normal_low"], row["normal_high"], sign)
        range_ = "" if math.isnan(normal[0]) else f"{interval(*normal, _quantity)} if runs are normally distributed"
        is_better = f"{winner} is {'better' if row['direction'] else 'higher'} by {by}"
        is_better = is_better if difference else "no difference"
        observed = f"Observed: {is_better} ({', '.join(filter(None, (against, range_, size)))}{context.where})."
        smallest = f"smallest possible p: {p_value(row['smallest_p_adjusted'])}{context.adjusted}"
        reason = smallest if context.tested else "groups of fewer than 3 runs are described, not tested"
        if context.beside:
            return f"{subject}: undecided with {context.units} ({reason}). {observed}"
        question = f"Which of {first} and {second} is better in {task}"
        if not row["direction"]:
            question = f"Whether {task} differs between {first} and {second}"
        enough = f"{context.could} could decide it." if context.could else "More runs are needed."
        return f"{question} cannot be decided with {context.units} ({reason}). {enough} {observed}"
    p = f"p = {p_value(row['p_adjusted'])}{context.adjusted}; {context.units}{context.where}"
    if row["verdict"] == "not_shown":
        range_ = interval(row["low"], row["high"], _quantity)
        numbers = f"{_quantity(difference)}{unit}, {range_}, {p}"
        shown = f"{subject}: no difference between {first} and {second} shown ({numbers})."
        return f"{shown} Differences outside the interval are ruled out."
    range_ = interval(*_turned(row["low"], row["high"], sign), _quantity)
    numbers = f"({', '.join(filter(None, (against, range_, size, p)))})"
    if row["verdict"] == "different":
        return f"{task} is higher in {winner} than in {loser} by {by} {numbers}. Which is better is not known."
    lower = f": {way} by" if not row["mean_of_all"] else " by"
    return f"{winner} is better than {loser} in {task}{lower} {by} {numbers}."


def _turned(low: float, high: float, sign: int) -> tuple[float, float]:
    """Return the interval of a difference, or of its negative."""
    return (low, high) if sign > 0 else (-high, -low)


def _quantity(value: float) -> str:
    """Return a number with units of its own: three significant digits."""
    return number(value)
