"""Did updates follow informative directions, and does it matter?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import xarray as xr

from dynamics.report.answers.answer import Answer, Evidence, Verdict
from dynamics.text import counted, number, percent, sentence_case

#: Share of steps or blocks that chance alone may call concentrated.
CHANCE = 0.05
#: A gain below this one is no more than chance has; so are fewer steps than chance would have, of this many.
ABOUT, _MANY = 1.25, 10
_ENDS = ("value", "low", "high")
#: What each null has of the leading directions.
_SHARES: Mapping[str, str] = {
    "": "a fresh gradient's share",
    "_optimizer": "the share of a fresh gradient that went through the optimizer",
}
_PROBE = "Record with tasks (DynamicsCallback(run, tasks)), or pass --probe module:function."
_INTERVENE = "Pass --intervene with --probe, or record with intervene=, to run the parts of updates."
#: What would decide whether it matters.
_SURER: Mapping[str, str] = {
    "unresolved": "Probe samples of more groups, or take apart a longer increment.",
    "together": "Take apart shorter increments.",
    "as_much": "Probe samples of more groups.",
}
#: What follows for the answer from the verdict of an intervention.
_MATTERS: Mapping[str, str] = {
    "unresolved": "whether that matters is not resolved: the whole update's effect cannot be told from 0",
    "together": "the two parts of the update work only together, so neither has a share of the effect",
    "as_much": "{part} is not shown to pay more or less than its share of the norm",
    "less": "{part} lowers the loss by less than its share of the norm",
    "no_gain": "{part} does not lower the loss",
}

State = Literal["concentrated", "chance", "less", "beyond_null", "not_shown", "no_null"]


def chance_steps(count: int) -> int:
    """Return in how many of several steps chance alone may find an update concentrated.

    >>> chance_steps(12), chance_steps(30)
    (1, 2)
    """
    return math.ceil(CHANCE * count)


def concentration_state(concentration: Mapping[str, Any], null: str = "") -> State:
    """Return what the last update's concentration shows, at its largest k with a gain.

    ``"concentrated"``: the intervals of the gain over gradients of the same batch, uncentred and centred, both lie
    above 1, and of several steps this holds at more than chance would have; ``"chance"``: at no more; ``"less"``: the
    interval lies below 1; ``"beyond_null"``: the null cannot stand for so large a batch; ``"no_null"``: there is no
    gain; else ``"not_shown"``.

    Args:
        concentration: Of ``fisher_summary``.
        null: ``"_optimizer"``: beside steps of the optimizer instead of gradients.
    """
    row, limit = concentration["at_k"], concentration["null_batch_limit"]
    gain, steps = row[f"gain{null}"], concentration[f"steps{null}"]
    if gain["value"] is None:
        return "no_null"
    if row[f"concentrated{null}"]:
        by_chance = steps["of"] > 1 and steps["concentrated"] <= chance_steps(steps["of"])
        return "chance" if by_chance else "concentrated"
    if gain["high"] is not None and gain["high"] < 1:
        return "less"
    return "beyond_null" if limit is not None and concentration["null_batch"] > limit else "not_shown"


def did_updates_concentrate(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Did updates follow informative directions more than chance, and does it matter?"

    Of one update, it is concentrated if the 95 % intervals of its gain over gradients of the same batch, uncentred and
    centred, both lie above 1; of several, if that holds at more than 5 % of them, rounded up: more than chance would
    have. Whether it matters is the headline of ``/intervention``, a k chosen before looking.

    Where the optimizer's preconditioner is known, the same is asked beside fresh gradients that went through it.

    - ``yes``: concentrated, and the part along the leading directions pays more than its share of the squared norm.
    - ``mixed``: concentrated, but that part does not pay more, or this was not measured or not resolved; or
      concentrated beside gradients only, or beside steps of the optimizer only.
    - ``no``: concentrated beside neither. The interval of the last gain ends below 1.25, or of ten updates or more no
      more are concentrated than chance would have: at even odds to detect each, one or none of ten has a probability
      of 1 %.
    - ``undecided``: otherwise, or there is no gradient null for this batch.
    - ``not_asked``: no Fisher, or no update for its gradients.

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    fisher = summary["fisher"]
    if fisher is None or fisher["concentration"] is None:
        what = "No Fisher was measured" if fisher is None else "No update is known for the gradients of the Fisher"
        return Answer("concentration", "not_asked", f"{what}, so directions of updates are not compared.", surer=_PROBE)
    concentration = fisher["concentration"]
    row = concentration["at_k"]
    nulls = [""] if has_one_null(row) else ["", "_optimizer"]
    rows = [
        Evidence(f"/concentration/gain{null}", *map(_or_nan, (row[f"gain{null}"][end] for end in _ENDS)))
        for null in nulls
    ]
    held = [null for null in nulls if _is_often(concentration, null)]
    if not held:
        verdict, words, surer = _not_concentrated(concentration, concentration_state(concentration))
        if len(nulls) > 1:
            beside, others, more = _not_concentrated(
                concentration, concentration_state(concentration, nulls[1]), nulls[1]
            )
            verdict, surer = (verdict, surer) if verdict == beside or verdict != "no" else (beside, more)
            words = f"{words} {others}"
        return Answer("concentration", verdict, words, tuple(rows), 0.95 if verdict == "no" else None, surer)
    matters, pays, evidence = _does_it_matter(summary["intervention"], row["k"])
    return Answer(
        "concentration",
        "yes" if pays and held == nulls else "mixed",
        f"{_held(concentration, held[0])}{_beside(row, nulls, held)}; {matters}.",
        (*rows, *evidence),
        0.95,
        _SURER.get(summary["intervention"]["verdict"], "") if evidence else _INTERVENE,
    )


def has_one_null(row: Mapping[str, Any]) -> bool:
    """Return whether there is no null of the optimizer, or it is the gradient's: plain SGD.

    Args:
        row: At one k, of ``fisher_summary``.
    """
    return row["gain_optimizer"]["value"] is None or row["gain_optimizer"] == row["gain"]


def _is_often(concentration: Mapping[str, Any], null: str) -> bool:
    """Return whether the update is concentrated beside a null, or updates are more often than by chance."""
    steps = concentration[f"steps{null}"]
    if steps["of"] > 1:
        return steps["concentrated"] > chance_steps(steps["of"])
    return concentration_state(concentration, null) == "concentrated"


def _beside(row: Mapping[str, Any], nulls: Sequence[str], held: Sequence[str]) -> str:
    """Return what the other null says."""
    if len(nulls) == 1:
        return ""
    gain = _gain(row, nulls[1] if held[0] == nulls[0] else nulls[0])
    if list(held) == list(nulls):
        return f", and more than {_SHARES[nulls[1]]} (gain {gain})"
    if held[0] == nulls[0]:
        return f", but are not shown to hold more than {_SHARES[nulls[1]]} (gain {gain}): the optimizer may explain it"
    return f", but not more than {_SHARES[nulls[0]]} (gain {gain}): the optimizer flattens its steps"


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _held(concentration: Mapping[str, Any], null: str) -> str:
    """Return at how many updates the leading directions hold more than the null's share of them."""
    row, steps = concentration["at_k"], concentration[f"steps{null}"]
    directions = counted(row["k"], "leading direction")
    holds = "holds" if row["k"] == 1 else "hold"
    several = steps["of"] > 1
    where = (
        f"in {steps['concentrated']:,} of {steps['of']:,} updates"
        if several
        else f"in the update to step {concentration['step']:,}"
    )
    last = "at the last " if several else ""
    chance = f"; chance: up to {chance_steps(steps['of']):,}" if several else "; chance: 1"
    return sentence_case(
        f"{where} the {directions} {holds} more than {_SHARES[null]} ({last}gain {_gain(row, null)}{chance})"
    )


def _gain(row: Mapping[str, Any], null: str = "") -> str:
    gain = row[f"gain{null}"]
    ends = "" if gain["low"] is None else f", {number(gain['low'])} to {number(gain['high'])}"
    return f"{number(gain['value'])}{ends}"


def _not_concentrated(concentration: Mapping[str, Any], state: State, null: str = "") -> tuple[Verdict, str, str]:
    row, steps = concentration["at_k"], concentration[f"steps{null}"]
    directions, gain = counted(row["k"], "leading direction"), row[f"gain{null}"]
    if state == "no_null":
        words = f"Whether updates follow the {directions} more than a gradient would cannot be told without a null."
        return "undecided", words, "See the findings for why there is no gradient null."
    share = _SHARES[null]
    if gain["high"] is not None and gain["high"] < ABOUT:
        less = "less than" if gain["high"] < 1 else "hardly more than" if gain["low"] > 1 else "no more than"
        return "no", f"The last update has {less} {share} in the {directions} (gain {_gain(row, null)}; chance: 1).", ""
    if steps["of"] >= _MANY:
        words = (
            f"In {steps['concentrated']:,} of {steps['of']:,} updates the {directions} hold more than {share}, no more "
            f"often than by chance (up to {chance_steps(steps['of']):,}; at the last gain {_gain(row, null)})."
        )
        return "no", words, ""
    reason = "its interval includes 1"
    if state == "beyond_null":
        reason = f"the null can imitate at most {concentration['null_batch_limit']:,.0f} samples"
    chance = "chance" if not null else "a step of the optimizer"
    words = f"whether updates follow the {directions} more than {chance} cannot be told"
    return (
        "undecided",
        sentence_case(f"{words} (gain {_gain(row, null)}: {reason})."),
        "Probe more samples, or capture more steps.",
    )


def _does_it_matter(effects: Mapping[str, Any] | None, k: int) -> tuple[str, bool, tuple[Evidence, ...]]:
    """Return what the part along the leading directions pays, whether it is more than its norm, and the numbers."""
    if effects is None or not effects["verdict"]:
        return "whether that matters was not measured", False, ()
    part, steps, share = effects["parts"][0], effects["steps"], effects["parts"][0]["share"]
    evidence = (Evidence("/intervention/share", *map(_or_nan, (share[end] for end in ("value", "low", "high")))),)
    subject = "that part" if effects["k"] == k else f"the part in {counted(effects['k'], 'leading direction')}"
    several = steps["of"] > 1
    at = f" (step {effects['step']:,}; it pays more at {steps['more']:,} of {steps['of']:,} steps)" if several else ""
    if effects["verdict"] != "more":
        return f"{_MATTERS[effects['verdict']].format(part=subject)}{at}", False, evidence
    raised = (part["full"]["value"] or 0.0) < 0
    if raised or share["value"] is None:
        but = ", but the whole update raised the loss" if raised else ""
        return f"{subject} pays more than its share of the norm{but}{at}", not raised, evidence
    ends = "" if share["low"] is None else f" ({percent(share['low'], 0)} to {percent(share['high'], 0)})"
    norm = f" with {percent(part['captured'])} of the squared norm" if part["captured"] is not None else ""
    return f"{subject} brings {percent(share['value'], 0)}{ends} of the fall of the loss{norm}{at}", True, evidence
