"""Do the tasks share directions, or fight?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xarray as xr

from dynamics.report.answers.answer import Answer, Evidence, Verdict
from dynamics.text import counted, listed, number, one_line, p_value, percent, sentence_case, with_minus

#: p-values up to this one are significant.
_SIGNIFICANT = 0.05
#: Share of the largest possible χ from which tasks are said to use largely different directions.
_LARGELY = 0.5
#: Pairs that the answer names; the sentences of all are in the summary.
_NAMED = 3
#: A learning rate that makes a transfer a percentage.
_RATE = 1e-3


def do_tasks_fight(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Do the tasks share directions, or fight?", of all trainable parameters together.

    - ``yes``: every pair of tasks that is resolved shares directions: the interval of the cosine of their mean
      gradients lies above 0, so that a small gradient step for one lowers the other's loss.
    - ``no``: every resolved pair fights: the interval lies below 0.
    - ``mixed``: some pairs share, others fight.
    - ``undecided``: no pair is resolved: a mean gradient cannot be told from 0, or the interval includes 0.
    - ``not_asked``: no Fisher was measured, or of one task only.

    Intervals hold with 95 % for all pairs together (Bonferroni over those whose two mean gradients can be told from 0).

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    fisher = summary["fisher"]
    if fisher is None or not fisher["pairs"]:
        what = "No Fisher was measured" if fisher is None else "The Fisher was measured of one task only"
        return Answer(
            "tasks",
            "not_asked",
            f"{what}, so nothing is known of tasks.",
            surer="Record with two tasks or more (DynamicsCallback(run, tasks)), or pass --probe module:function.",
        )
    pairs = fisher["pairs"]
    decided = sorted(
        (pair for pair in pairs if pair["state"] in ("share", "conflict")),
        key=lambda pair: -abs(pair["cosine"]["value"]),
    )
    clauses = [_clause(pair) for pair in decided[:_NAMED]]
    if clauses:
        clauses[0] = f"tasks {clauses[0]}"
    if len(decided) > _NAMED:
        rest = [pair["state"] for pair in decided[_NAMED:]]
        kinds = (
            (rest.count("share"), "share directions", "shares directions"),
            (rest.count("conflict"), "fight", "fights"),
        )
        clauses.append(listed([f"{count:,} more {many if count > 1 else one}" for count, many, one in kinds if count]))
    open_ = len(pairs) - len(decided)
    samples = counted(fisher["samples"] or 0, "sample")
    if open_:
        verb = "is" if open_ == 1 else "are"
        subject = f"{open_:,} of {counted(len(pairs), 'pair')} {verb}"
        if len(pairs) == 1:
            subject = f"whether {' and '.join(map(one_line, pairs[0]['tasks']))} share directions or fight is"
        clauses.append(f"{subject} not resolved with {samples}")
    mixture = fisher["mixture"]
    if degree := degree_of_difference(mixture):
        divergence, largest = (number(mixture[f"normalised_{name}"]) for name in ("divergence", "largest"))
        clauses.append(f"{degree} (χ = {divergence} of at most {largest} nat, p = {p_value(mixture['p_value'])})")
    states = {pair["state"] for pair in decided}
    verdict: Verdict = "undecided"
    if states:
        verdict = "mixed" if len(states) > 1 else "yes" if states == {"share"} else "no"
    surer = f"Probe more than {samples}, with more groups." if open_ else ""
    return Answer(
        "tasks",
        verdict,
        f"{sentence_case('; '.join(clauses))}.",
        tuple(_evidence(fisher, decided)),
        0.95 if decided else None,
        surer,
    )


def _evidence(fisher: Mapping[str, Any], decided: Sequence[Mapping[str, Any]]) -> list[Evidence]:
    rows = [
        Evidence("/tasks/cosine", *(pair["cosine"]["value"], *(pair["together"][end] for end in ("low", "high"))))
        for pair in decided[:_NAMED]
    ]
    mixture = fisher["mixture"]
    if degree_of_difference(mixture):
        rows.append(Evidence("/tasks/divergence_normalised", mixture["normalised_divergence"]))
        rows.append(Evidence("/tasks/divergence_p_value", mixture["p_value"]))
    return rows


def _clause(pair: Mapping[str, Any]) -> str:
    """Return what a resolved pair does, without overlap and transfer."""
    first, second = map(one_line, pair["tasks"])
    does, follows = ("fight", "raises") if pair["state"] == "conflict" else ("share directions", "lowers")
    ends = _ends(pair["together"])
    cosine = _signed(pair["cosine"]["value"])
    return f"{first} and {second} {does}: cosine {cosine} ({ends}), a gradient step for one {follows} the other's loss"


def pair_sentence(pair: Mapping[str, Any], samples: int) -> str:
    """Return what is known of a pair of tasks: conflict, overlap and transfer.

    Args:
        pair: A pair of ``fisher_summary``.
        samples: Number of all probe samples.
    """
    first, second = map(one_line, pair["tasks"])
    parts = []
    if pair["state"] == "unresolved":
        parts.append(
            f"whether {first} and {second} fight is not resolved: a mean gradient is indistinguishable from zero with "
            f"{counted(samples, 'sample')}"
        )
    elif pair["state"] == "undecided":
        cosine = f"cosine {_signed(pair['cosine']['value'])} ({_ends(pair['together'])})"
        parts.append(f"whether {first} and {second} fight is not resolved: {cosine}")
    else:
        parts.append(f"tasks {_clause(pair)}")
    if pair["overlap"]["value"] is not None:
        ends = "" if pair["overlap"]["low"] is None else f" ({_ends(pair['overlap'])})"
        parts.append(f"their Fishers overlap by {number(pair['overlap']['value'])}{ends}")
    transfers = [
        f"{target} by {_signed_percent(-_RATE * pair[way]['value'])}"
        for way, target in (("transfer", second), ("transfer_back", first))
        if pair[way]["value"] is not None
    ]
    if transfers and pair["state"] in ("share", "conflict"):
        parts.append(
            f"to first order, a plain gradient step for the other of learning rate {_RATE} changes the loss of "
            f"{listed(transfers)}"
        )
    return f"{sentence_case('; '.join(parts))}."


def degree_of_difference(mixture: Mapping[str, float | None]) -> str:
    """Return whether tasks use different directions, by the test with every task's trace made 1; ``""`` without it.

    Args:
        mixture: Parts of SE of ``fisher_summary``.
    """
    divergence, largest, p = (mixture[name] for name in ("normalised_divergence", "normalised_largest", "p_value"))
    if divergence is None or p is None or mixture["null_low"] is None:
        return ""
    if p > _SIGNIFICANT:
        return "the tasks are not shown to use different directions"
    degree = "largely" if largest and divergence >= _LARGELY * largest else "partly"
    return f"the tasks use {degree} different directions"


def _ends(interval: Mapping[str, float | None]) -> str:
    return f"{_signed(interval['low'])} to {_signed(interval['high'])}"


def _signed(value: float | None) -> str:
    return number(None) if value is None else with_minus(f"{value:z.2f}")


def _signed_percent(share: float) -> str:
    return f"{'+' if share > 0 else ''}{percent(share, 2)}"
