"""What the parts of an update do, in sentences and findings.

The claim is made of numbers that were chosen before looking: those of the pooled loss at the headline's k. Other k and
tasks are named only where their p holds for all of them together. One run describes itself: an update is one draw.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from dynamics.findings import Finding
from dynamics.intervention.loss_changes import NOT_ASKED
from dynamics.schema import ALL
from dynamics.text import counted, finite, integer, interval, listed, number, p_value, percent, some, with_minus

#: What is said of one step's update and of its part in the leading directions, by the first rule that applies.
VERDICTS: Mapping[str, str] = {
    "unresolved": "the whole update's effect cannot be told from 0",
    "together": "the two parts have no shares",
    "more": "that part pays more than its share of the norm",
    "less": "that part lowers the loss, by less than its share of the norm",
    "no_gain": "that part does not lower the loss",
    "as_much": "that part is not shown to pay more or less than its share of the norm",
}
#: Without these nothing is said of parts.
_OF_PARTS = ("captured", "interaction", "excess", "resolved", "separable", "separable_scale")
#: p-values up to this one are significant.
_SIGNIFICANT = 0.05
#: The smallest share that a percentage with one decimal shows.
_SMALLEST_SHARE = 5e-4
#: Losses of two equal runs may differ by this part of the effect's uncertainty.
_REPEATED = 0.1
#: Beyond, the change that was run and the one that K describes differ by more than single precision rounds.
_SINGLE = 1e-5
#: Critical sharpness from this part of 2/η on, whose interval holds 2/η, is at the edge.
_AT_EDGE = 0.9
#: Cases and tasks that a sentence names; all are in the result.
_NAMED = 5
_LENGTHS = {0.25: "a quarter of its", 0.5: "half its", 0.75: "three quarters of its"}


class Value(NamedTuple):
    """A number with the ends of its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float


def measured_steps(group: xr.Dataset) -> list[int]:
    """Return the steps at which an update was run."""
    effect = group["effect"].sel(arm="full", task=ALL)
    return group["step"].values[effect.notnull().any(("k", "scale")).values].tolist()


def headline(group: xr.Dataset, step: int) -> xr.Dataset:
    """Return one step at the k of its headline, which no result influenced."""
    at_step = group.sel(step=step)
    # A flag that is stored with gaps is a number or NaN.
    flags = np.asarray(at_step["headline"].values, dtype=np.float64) == 1
    return at_step.isel(k=int(np.argmax(flags)))


def value_of(at: xr.Dataset, name: str, **chosen: str | float) -> Value:
    """Return a variable of one step, k and task with its interval; of effects, one arm and length."""
    value, low, high = (number_of(at, f"{name}{end}", **chosen) for end in ("", "_low", "_high"))
    return Value(value, low, high)


def number_of(at: xr.Dataset, name: str, **chosen: str | float) -> float:
    """Return one number of one step, k and task; NaN for a variable that was not recorded."""
    return float(at[name].sel(chosen)) if name in at else np.nan


def largest(attributes: Mapping[str, Any], name: str) -> float:
    """Return an attribute, of several steps the largest; NaN where there is none."""
    value = attributes.get(name)
    return np.nan if value is None else float(np.max(value))


def verdict(at: xr.Dataset) -> str:
    """Return which of ``VERDICTS`` holds of one step, k and task; ``""`` where ``on`` and ``off`` were not run."""
    excess = value_of(at, "excess")
    if not {"on", "off"} <= set(at["arm"].values.tolist()) or not set(_OF_PARTS) <= set(at) or np.isnan(excess.value):
        return ""
    on = value_of(at, "effect", arm="on", scale=1.0)
    if float(at["resolved"]) != 1:
        return "unresolved"
    if float(at["separable"]) != 1:
        return "together"
    if excess.low > 0:
        return "more"
    if excess.high < 0:
        return "less" if on.low > 0 else "no_gain"
    return "as_much"


def statements(group: xr.Dataset) -> list[str]:
    """Return what an intervention says: of the last step at its headline, of other k and tasks, over steps.

    Args:
        group: ``/intervention``, of one step or more.
    """
    steps = measured_steps(group)
    if not steps:
        return []
    last = headline(group, steps[-1])
    at = last.sel(task=ALL)
    paragraphs = [
        " ".join(filter(None, (_parts(at, group.attrs), _judged(at, group.attrs), *_overshoots(at), _scores(last)))),
        _elsewhere(group.sel(step=steps[-1]), int(at["k"])),
        _over_steps(group, steps),
    ]
    return [paragraph for paragraph in paragraphs if paragraph]


def _parts(at: xr.Dataset, attributes: Mapping[str, Any]) -> str:
    """Return the effects of the part, the rest and the whole."""
    step, full = int(at["step"]), value_of(at, "effect", arm="full", scale=1.0)
    if not verdict(at):
        return f"The update to step {step:,} {_lowers(full, 'the held-out loss', first=True)}."
    k = int(at["k"])
    directions = "in the leading direction" if k == 1 else f"in the {k} leading directions"
    on, off = (value_of(at, "effect", arm=arm, scale=1.0) for arm in ("on", "off"))
    sentence = (
        f"Of the update to step {step:,}, {percent(float(at['captured']))} of the squared norm lies {directions} (of "
        f"other groups). Alone, that part {_lowers(on, 'the held-out loss', first=True)}, the rest {_lowers(off)}, the "
        f"whole {_lowers(full)}."
    )
    outside = largest(attributes, "share_outside_space")
    if outside >= _SMALLEST_SHARE:
        sentence += f" The rest includes the {percent(outside)} of the update that no gradient reaches."
    return sentence


def _lowers(effect: Value, loss: str = "it", *, first: bool = False) -> str:
    """Return an effect in words.

    >>> _lowers(Value(0.079, 0.062, 0.097), first=True), _lowers(Value(-0.01, -0.03, 0.01))
    ('lowers it by 0.079 (95 % interval 0.062 to 0.097)', 'may raise it by 0.010 (−0.010 to 0.030)')
    """
    raises, resolved = effect.value < 0, effect.low > 0 or effect.high < 0
    size, low, high = (-effect.value, -effect.high, -effect.low) if raises else effect
    ends = interval(low, high, _nat)
    ends = ends if first or np.isnan(low) else ends.removeprefix("95 % interval ")
    verb = "raise" if raises else "lower"
    return f"{f'{verb}s' if resolved else f'may {verb}'} {loss} by {_nat(size)} ({ends})"


def _judged(at: xr.Dataset, attributes: Mapping[str, Any]) -> str:
    """Return what follows of the part: the sentence of its verdict."""
    excess, harmful = value_of(at, "excess"), value_of(at, "effect", arm="full", scale=1.0).high < 0
    nearer, farther = sorted((abs(excess.low), abs(excess.high)))
    ends = interval(nearer, farther, _nat)
    size = f"{_nat(abs(excess.value))}, {ends}"
    match verdict(at):
        case "unresolved":
            undecided = (
                "The whole update's effect on these samples cannot be told from 0, so nothing is said of shares."
            )
            return undecided + _needed(at, attributes)
        case "together":
            return _inseparable(at) + _at_shorter_length(at)
        case "more":
            return f"That part pays more than its share of the norm (by {size})."
        case "as_much":
            ends = interval(excess.low, excess.high, _nat)
            unshown = "That part is not shown to pay more or less than its share of the norm"
            return f"{unshown} (excess {_nat(excess.value)}, {ends})."
        case "less" if harmful:
            return (
                "Alone, that part lowers the loss, but in the update it does more of the harm than its share of the "
                f"norm (by {size})."
            )
        case "less":
            short = f"{_nat(abs(excess.value))} short, {ends}"
            return f"That part lowers the loss, by less than its share of the norm ({short})."
        case "no_gain":
            worse = f" It does more of the harm than its share of the norm (by {size})." if harmful else ""
            return f"{_concentrated(at)} does not lower the loss.{worse}"
    return ""


def _needed(at: xr.Dataset, attributes: Mapping[str, Any]) -> str:
    """Return how many groups would resolve the whole update's effect, if it is as large as it was found."""
    needed, groups = integer(number_of(at, "required_groups", arm="full")), int(attributes.get("groups", 0))
    if needed is None or needed <= groups:
        return ""
    return f" If it is as large as estimated, about {needed:,} groups instead of {groups:,} would show it."


def _inseparable(at: xr.Dataset) -> str:
    whole, interaction = value_of(at, "effect", arm="full", scale=1.0), value_of(at, "interaction")
    together = whole.value * interaction.value > 0
    how = "work only together" if together else "undo much of each other's effect"
    return (
        f"The two parts {how} (interaction {_nat(interaction.value)} of {_nat(whole.value)}), so neither has a share."
    )


def _at_shorter_length(at: xr.Dataset) -> str:
    scale = float(at["separable_scale"])
    if np.isnan(scale):
        return " They cannot be split at any shorter length that was run."
    on, off, full = (value_of(at, "effect", arm=arm, scale=scale) for arm in ("on", "off", "full"))
    return (
        f" At {_length(scale)} length they can be split: alone, that part {_lowers(on, 'the loss', first=True)}, the "
        f"rest {_lowers(off)}, the whole {_lowers(full)}."
    )


def _length(scale: float) -> str:
    """Return a length λ in words.

    >>> _length(0.5), _length(0.3)
    ('half its', '0.3 of its')
    """
    return _LENGTHS.get(scale, f"{scale:g} of its")


def _concentrated(at: xr.Dataset) -> str:
    """Return the subject: called concentrated unless as many random directions hold as much of the update."""
    on = float(at["norm"].sel(arm="on"))
    random = float(at["norm"].sel(arm="random")) if "random" in at["arm"] else np.nan
    return "That part" if random >= on else "Concentrated, but that part"


def _overshoots(at: xr.Dataset) -> Iterator[str]:
    """Yield whether a shorter part, or a shorter update, would have lowered the loss by more.

    The difference of two lengths has no interval of its own. Where theirs do not overlap, its excludes 0: a standard
    error of a difference is at most the sum of both.
    """
    for arm, subject in (("on", "that part"), ("full", "the whole update")):
        curve = at["effect"].sel(arm=arm) if arm in at["arm"] else at["effect"][:0, 0]
        curve = curve[np.isfinite(curve.values)]
        best = float(curve["scale"][np.argmax(curve.values)]) if curve.size else 1.0
        if best >= 1:
            continue
        shorter, whole = (value_of(at, "effect", arm=arm, scale=scale) for scale in (best, 1.0))
        if shorter.low > max(whole.high, 0.0):
            yield f"At {_length(best)} length, {subject} would have lowered the loss by more ({_nat(shorter.value)})."
        elif arm == "on" and shorter.value > 0 and best != number_of(at, "separable_scale"):
            higher = f"the estimate for {subject} is higher ({_nat(shorter.value)}), but the intervals overlap"
            yield f"At {_length(best)} length, {higher}."


def _scores(last: xr.Dataset) -> str:
    """Return what the part and the whole do to the scores of tasks that have one."""
    if "score_effect" not in last or "on" not in last["arm"]:
        return ""
    tasks = _tasks(last)
    tasks = [task for task in tasks if np.isfinite(value_of(last, "score_effect", arm="on", task=task).value)]
    changes: list[str] = []
    same: list[str] = []
    for task in tasks[:_NAMED]:
        alone, whole = (value_of(last, "score_effect", arm=arm, task=task) for arm in ("on", "full"))
        if not np.any([*alone, *whole]):
            same.append("the score" if task == ALL else f"the score of {task}")
            continue
        of = "the score" if task == ALL else task
        ends = [interval(value.low, value.high, _nat) for value in (alone, whole)]
        ends = [
            end if not changes and not number else end.removeprefix("95 % interval ") for number, end in enumerate(ends)
        ]
        changes.append(
            f"{of} by {_nat(alone.value)} ({ends[0]}) with that part alone and by {_nat(whole.value)} ({ends[1]}) with "
            "the whole update"
        )
    sentences = [f"Scores change: {'; '.join(changes)}."] if changes else []
    if same:
        sentences.append(f"Neither that part nor the whole update changes {listed(same)}.")
    return " ".join(sentences)


def _tasks(at_step: xr.Dataset) -> list[str]:
    """Return the tasks; of a single one, whose numbers are the pooled ones, ``all``."""
    names = [str(task) for task in at_step["task"].values if task != ALL]
    return names if len(names) > 1 else [ALL]


def _elsewhere(at_step: xr.Dataset, leading: int) -> str:
    """Return which other k and tasks differ from their share of the norm, by the p of all together."""
    if "excess_p" not in at_step or (tested := int(at_step["excess_p"].notnull().sum())) < 2:
        return ""
    shown: dict[str, dict[int, list[str]]] = {"more": {}, "less": {}}
    largest = 0.0
    for k in at_step["k"].values.tolist():
        for task in dict.fromkeys([ALL, *_tasks(at_step)]):
            at = at_step.sel(k=k, task=task)
            decided, p = verdict(at) not in ("", "unresolved", "together"), float(at["excess_p"])
            if (k, task) != (leading, ALL) and decided and p <= _SIGNIFICANT:
                way = "more" if float(at["excess"]) > 0 else "less"
                shown[way].setdefault(k, []).append("all samples" if task == ALL else task)
                largest = max(largest, p)
    clauses = []
    for way, by_k in shown.items():
        cases = [f"k = {k} ({some(names, _NAMED)})" for k, names in by_k.items()]
        clauses += [f"{way} than its share of the norm for {listed(cases)}"] if cases else []
    if not clauses:
        return ""
    adjusted = f"p ≤ {p_value(largest)}, adjusted for all {tested} pairs of k and task"
    return f"Beside the headline, that part pays {'; '.join(clauses)}: {adjusted}."


def _over_steps(group: xr.Dataset, steps: list[int]) -> str:
    """Return how often each verdict was given, and that a count of one run proves nothing of others."""
    counts = Counter(filter(None, (verdict(headline(group, step).sel(task=ALL)) for step in steps)))
    if not counts:
        return ""
    total = counts.total()
    cases = [f"{words} ({counts[name]:,} of {total:,})" for name, words in VERDICTS.items() if counts[name]]
    overview = f"Over {total:,} steps: {'; '.join(cases)}. " if total > 1 else ""
    subject = "These are updates" if total > 1 else "This is one update"
    return (
        f"{overview}{subject} of one run, and intervals hold for the directions found: to say something of a recipe, "
        "compare several runs."
    )


def _nat(value: float) -> str:
    return with_minus(number(value, 2))


def findings_of(group: xr.Dataset) -> list[Finding]:
    """Return what a reader of ``/intervention`` must know: one finding for each subject.

    Args:
        group: ``/intervention``, of one step or more.
    """
    steps = measured_steps(group)
    at = {step: headline(group, step).sel(task=ALL) for step in steps}
    verdicts = {step: verdict(at_step) for step, at_step in at.items()}
    return [
        *_unresolved(at, verdicts, group.attrs),
        *_together(at, verdicts),
        *_no_gain(at, verdicts),
        *_repeated(at, group.attrs),
        *_imprecise(group.attrs),
    ]


def _with(verdicts: Mapping[int, str], name: str) -> list[int]:
    return [step for step, verdict in verdicts.items() if verdict == name]


def _at(steps: list[int], verdicts: Mapping[int, str]) -> str:
    """Return at which of the steps, as the opening of a sentence."""
    if len(verdicts) == 1:
        return f"At step {steps[0]:,}"
    return f"At {len(steps):,} of {counted(len(verdicts), 'step')}"


def _unresolved(
    at: Mapping[int, xr.Dataset], verdicts: Mapping[int, str], attributes: Mapping[str, Any]
) -> Iterator[Finding]:
    if steps := _with(verdicts, "unresolved"):
        groups = int(attributes.get("groups", 0))
        needed = [integer(number_of(at[step], "required_groups", arm="full")) for step in steps]
        more = needed[-1] is not None and needed[-1] > groups
        advice = f"Probe samples of about {needed[-1]:,} groups" if more else "Probe samples of more groups"
        yield Finding(
            "OD701",
            f"{_at(steps, verdicts)} the effect of the whole update on the loss of the probe samples cannot be told "
            "from 0, so its parts have no shares.",
            f"{advice}, or take apart a longer increment.",
            evidence={"steps": steps, "groups": groups, "required_groups": needed},
            step=steps[-1] if len(verdicts) == 1 else None,
        )


def _together(at: Mapping[int, xr.Dataset], verdicts: Mapping[int, str]) -> Iterator[Finding]:
    if steps := _with(verdicts, "together"):
        scales = [finite(at[step]["separable_scale"]) for step in steps]
        yield Finding(
            "OD702",
            f"{_at(steps, verdicts)} the interaction of the two parts exceeds half of the whole update's effect, so "
            "neither has a share.",
            "Read the effects at a shorter length, or take apart shorter increments.",
            evidence={"steps": steps, "separable_scale": scales},
            step=steps[-1] if len(verdicts) == 1 else None,
        )


def _no_gain(at: Mapping[int, xr.Dataset], verdicts: Mapping[int, str]) -> Iterator[Finding]:
    if steps := _with(verdicts, "no_gain"):
        last = at[steps[-1]]
        on, excess = value_of(last, "effect", arm="on", scale=1.0), value_of(last, "excess")
        where = "Alone," if len(verdicts) == 1 else f"Alone, at step {steps[-1]:,},"
        yield Finding(
            "OD703",
            f"{_at(steps, verdicts)} the update's part in the leading directions contributes less than its share of "
            f"the norm and is not shown to lower the loss. {where} it {_lowers(on, 'the loss', first=True)}.",
            "Do not read the captured share as progress. Compare with the rest of the update (off).",
            evidence={"steps": steps, "effect": on.value, "excess": excess.value, "captured": float(last["captured"])},
            step=steps[-1] if len(verdicts) == 1 else None,
        )


def _repeated(at: Mapping[int, xr.Dataset], attributes: Mapping[str, Any]) -> Iterator[Finding]:
    apart = largest(attributes, "repeat_deviation")
    full = [value_of(at_step, "effect", arm="full", scale=1.0) for at_step in at.values()]
    reach = min([(effect.high - effect.low) / 2 for effect in full if np.isfinite(effect.low)], default=np.nan)
    if apart > _REPEATED * reach:
        yield Finding(
            "OD704",
            f"Two equal passes over the samples give losses that differ by up to {_nat(apart)}, more than a tenth of "
            f"the uncertainty of the whole update's effect ({_nat(reach)}).",
            "Turn off what is random in evaluation mode, and use deterministic kernels "
            "(torch.use_deterministic_algorithms).",
            evidence={"repeat_deviation": apart, "half_width": reach},
        )


def _imprecise(attributes: Mapping[str, Any]) -> Iterator[Finding]:
    apart = largest(attributes, "norm_deviation")
    if apart > _SINGLE:
        yield Finding(
            "OD705",
            f"The parts that were run differ from those that K describes by up to {percent(apart, 3)} of their squared "
            "norm: the gradients are of half precision.",
            "Measure gradients in single precision for exact parts.",
            evidence={"norm_deviation": apart},
        )


def loss_findings(group: xr.Dataset) -> list[Finding]:
    """Return what could not be measured of the losses at the last step, and why.

    Args:
        group: ``/loss``.
    """
    reason = str(group["reason"].values[-1])
    if reason in ("", NOT_ASKED):
        reason = ""
    lacking = {"Changes of the losses are not predicted": reason, _NOT_SCALED: str(group.attrs["scaled_reason"])}
    return [
        Finding(
            "OD417",
            f"{what}: {why}.",
            "The losses themselves are measured. To have the rest, train and probe weights whose start is known.",
            step=int(group["step"].values[-1]),
        )
        for what, why in lacking.items()
        if why
    ]


_NOT_SCALED = "Losses with shares of the update are not measured"


def sharpness_findings(group: xr.Dataset) -> list[Finding]:
    """Return whether the last step of gradient descent that was measured is as long as the loss allows, or longer.

    Only where the learning rate of plain gradient descent is known: other optimizers are stable beyond 2/η.

    Args:
        group: ``/sharpness``, of one step or more.
    """
    rated = group["step"][np.isfinite(group["learning_rate"])]
    if not rated.size:
        return []
    at = group.sel(step=rated.values[-1], task=ALL)
    rate, value = float(at["learning_rate"]), value_of(at, "critical_sharpness")
    edge = 2 / rate
    beyond = value.low > edge
    if not beyond and not (_AT_EDGE * edge <= value.value and value.low <= edge <= value.high):
        return []
    relation, follows = ("exceeds", "raises the loss") if beyond else ("is at", "leaves the loss where it was")
    return [
        Finding(
            "OD706",
            f"At step {int(at['step']):,} the critical sharpness {number(value.value)} "
            f"({interval(value.low, value.high, number)}) {relation} 2/η = {number(edge)} of the learning rate "
            f"{number(rate)}: the step as it is {follows}.",
            "At this edge the loss goes up and down and often falls in the long run. If it does not, lower the "
            "learning rate.",
            evidence={"critical_sharpness": value.value, "learning_rate": rate, "edge": edge},
            step=int(at["step"]),
        )
    ]
