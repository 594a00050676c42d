"""Numbers and summaries in words, the same in the terminal and on the page.

What the Fisher says of a run, in sentences.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynamics.text import counted, number, percent


def what_was_analysed(summary: Mapping[str, Any]) -> str:
    """One sentence: how many checkpoints of what, or how many captured steps beside them.

    Args:
        summary: Of one run, see ``summarise``.
    """
    steps, ranks = summary["steps"], sorted({row["adapter_rank"] for row in summary["table"] if row["adapter_rank"]})
    span = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    captured = summary["captured"]
    what = counted(len(steps), "checkpoint")
    if captured is not None:
        read = counted(captured["checkpoints"], "checkpoint")
        beside = f", with {read} beside them" if captured["checkpoints"] else ", without checkpoints"
        what = f"Captured at {counted(captured['steps'], 'step')} during training{beside}"
    matrices = counted(summary["matrices"], "weight matrix", "weight matrices")
    kind = ""
    if ranks:
        kind = f" with LoRA updates of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    trainings = len(summary["segments"])
    apart = f", of {trainings} different trainings" if trainings > 1 else ""
    return f"{what} ({span}){apart}; {matrices}{kind}."


def answers(summary: Mapping[str, Any]) -> list[str]:
    """What there is to say of a run's updates and gradients, a sentence or two each."""
    sentences = (how_far, beside_the_base, how_many_directions, how_straight, how_steep)
    return [said for sentence in sentences if (said := sentence(summary))]


def how_far(summary: Mapping[str, Any]) -> str:
    """One sentence: the size of the whole update at the last step, of several adapters of each by itself."""
    step = f"At step {summary['last_step']:,}"
    if summary["adapters"]:
        return f"{step} {_joined(map(_of_adapter, summary['adapters']))}. They are not added up."
    norm = summary["totals"]["frobenius_norm_all"]
    if norm is None:
        return f"The size of the whole update at step {summary['last_step']:,} is not known."
    if norm == 0:
        return f"{step} no matrix has moved: every update is exactly zero."
    return f"{step} the update has Frobenius norm {number(norm)} over {which_matrices(summary)}."


def _of_adapter(adapter: Mapping[str, Any]) -> str:
    size = f"Frobenius norm {number(adapter['frobenius_norm'])}"
    return f"the update of {adapter['adapter']} has {size} over {counted(adapter['matrices'], 'matrix', 'matrices')}"


def _joined(parts: Iterable[str]) -> str:
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def which_matrices(summary: Mapping[str, Any]) -> str:
    """How many matrices a sum stands for: those that are part of a sum of adapters are not counted twice."""
    names = {row["name"] for row in summary["table"]}
    every = sum(not ("@" in name and name.rpartition("@")[0] in names) for name in names)
    known = summary["totals"]["matrices"]
    return "all matrices" if known >= every else f"{known:,} of {counted(every, 'matrix', 'matrices')}"


def how_many_directions(summary: Mapping[str, Any]) -> str:
    """One sentence: effective rank over matrices, beside chance; ``""`` where nothing is known."""
    rank = summary["over_matrices"]["effective_rank_energy"]
    if rank["median"] is None:
        return ""
    adapted = any(row["adapter_rank"] for row in summary["table"])
    who = f"a random {'LoRA' if adapted else 'matrix'} of the same shape has"
    if summary["matrices"] == 1:
        return f"The effective rank (energy) of its update is {number(rank['median'])}{_chance(rank, who)}."
    quartiles = f"quartiles {number(rank['lower_quartile'])} to {number(rank['upper_quartile'])}"
    middle = f"{number(rank['median'])} in the median ({quartiles})"
    return f"The effective rank (energy) of a matrix's update is {middle}{_chance(rank, who)}."


def how_straight(summary: Mapping[str, Any]) -> str:
    """One sentence: in how few directions the whole training moved; ``""`` where fewer than three checkpoints tell.

    Args:
        summary: Of one run, see ``summarise``.
    """
    path = summary["path"]
    if path is None or path["checkpoints"] < 3 or path["participation_ratio"] is None:
        return ""
    first = path["component_share"][0]
    straight = "" if path["straightness"] is None else f", and a straightness of {number(path['straightness'])}"
    return (
        f"The path through {counted(path['checkpoints'], 'checkpoint')}, all matrices as one, has "
        f"{percent(first)} of its squared distances in one direction (participation ratio "
        f"{number(path['participation_ratio'])}){straight} (1: a straight line)."
    )


def beside_the_base(summary: Mapping[str, Any]) -> str:
    """One or two sentences: updates beside the weights they changed; ``""`` without a base."""
    base = summary["base"]
    if base is None:
        return ""
    if not base["matrices"]:
        return f"None of the {counted(base['of'], 'matrix', 'matrices')} could be compared with the base."
    median = "in the median matrix"
    if base["matrices"] < base["of"]:
        median = f"in the median of the {base['matrices']:,} of {base['of']:,} matrices that the base has"
    found = f"It is {percent(base['relative_size'])} of the norm of the weights before training, {median}."
    if base.get("overlap_left") is None:
        return found
    return (
        f"{found} Its {base['k']} leading directions overlap with those of the base by {number(base['overlap_left'])} "
        f"(chance {number(base['overlap_left_null'])}), and intruder dimensions hold "
        f"{percent(base['intruder_energy'])} of the energy in the leading directions "
        f"(chance {percent(base['intruder_energy_null'])})."
    )


def how_steep(summary: Mapping[str, Any]) -> str:
    """One sentence: the last captured gradient; ``""`` where none was captured."""
    gradient = summary["gradient"]
    if gradient is None or gradient["norm_before_clip"]["median"] is None:
        return ""
    before, after = (gradient[f"norm_{when}_clip"]["median"] for when in ("before", "after"))
    clipping = "clipping left it as it was" if after == before else f"{number(after)} after clipping"
    sentence = (
        f"The gradient of a matrix at step {gradient['step']:,} has norm {number(before)} in the median ({clipping})"
    )
    rank = gradient["effective_rank_energy"]
    if rank["median"] is None:
        return f"{sentence}."
    return (
        f"{sentence}, and an effective rank (energy) of {number(rank['median'])}{_chance(rank, 'random factors have')}."
    )


def _chance(rank: Mapping[str, float | None], who: str) -> str:
    return "" if rank["null_mean"] is None else f"; {who} {number(rank['null_mean'])}"


#: More of the blocks or steps than this must be concentrated before it is said of any: so many would be by chance.
_CHANCE = 0.05
#: Pairs of tasks named in a sentence; all are in the summary.
_NAMED = 5
#: A share that percents with one decimal show.
_SHOWN = 5e-4
_KINDS = {"empirical": "empirical Fisher", "sampled": "Fisher with sampled labels"}


def informative_directions(summary: Mapping[str, Any]) -> list[str]:
    """Whether updates followed informative directions: the Fisher, the update in it, the tasks; a paragraph each.

    "Concentrated" is said only where the result's own flag says so: the gain over gradients of the same batch lies
    above 1 with its interval, centred too.

    Args:
        summary: Of one run, see ``summarise``.

    Returns:
        Nothing where no Fisher was measured.
    """
    fisher = summary["fisher"]
    if fisher is None:
        return []
    paragraphs = [_spectrum(fisher), *_update(fisher["concentration"]), _tasks(fisher)]
    return [paragraph for paragraph in paragraphs if paragraph]


def _spectrum(fisher: Mapping[str, Any]) -> str:
    what = _KINDS.get(fisher["fisher"], f"{fisher['fisher']} Fisher".strip())
    samples, groups = fisher["samples"], fisher["groups"]
    measured = (
        f"The {what} of {counted(samples or 0, 'probe sample')} in {counted(groups or 0, 'group')} at step "
        f"{fisher['step']:,}, in {fisher['space']} space ({_timing(fisher)})"
    )
    entropy, ratio, participation = (
        fisher[name] for name in ("spectral_entropy", "dominant_ratio", "participation_ratio")
    )
    if entropy["value"] is None:
        return f"{measured}, has no spectrum: see the findings."
    parts = [_entropy(entropy, samples or 0)]
    if ratio["low"] is not None:
        parts.append(f"a dominant ratio ρ between {number(ratio['low'])} and {number(ratio['high'])} (95 % interval)")
    elif ratio["value"] is not None:
        parts.append(f"a dominant ratio ρ of {number(ratio['value'])} (plug-in, too large in expectation)")
    if participation["value"] is not None:
        parts.append(f"a participation ratio of {_with_interval(participation)}")
    sentence = f"{measured}, has {_listed(parts)}."
    directional = fisher["participation_ratio_directional"]
    if directional["value"] is not None:
        sentence += (
            " With all gradients normalised to the same length the participation ratio is "
            f"{_with_interval(directional)}. By their share of the trace, the groups count as "
            f"{number(fisher['effective_groups'])} of one size."
        )
    return sentence


def _entropy(entropy: Mapping[str, float | None], samples: int) -> str:
    """The plug-in at this N, which is less than the Fisher's own SE in expectation, and what bounds that from below."""
    reach = "" if entropy["low"] is None else f"sampling error at this N: {_ends(entropy)}; "
    bound = entropy["lower_bound"]
    at_least = "" if bound is None else f", and at least {number(bound)}, the low end of ln PR"
    return (
        f"a plug-in spectral entropy SE of {number(entropy['value'])} nat at N = {samples:,} ({reach}the Fisher's own "
        f"is larger by an unknown amount{at_least})"
    )


def _timing(fisher: Mapping[str, Any]) -> str:
    at = fisher["evaluated_at_step"]
    if at is None or at == fisher["step"]:
        return "gradients at the weights of that step"
    return f"gradients at the weights of step {at:,}, before the update"


def _update(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["No update beside these gradients is known, so nothing is said of its directions."]
    row = found["at_k"]
    directions = counted(row["k"], "leading direction")
    isotropic = row["null_isotropic"]
    sentences = [
        f"Of the squared norm of the update to step {found['step']:,} in that space, {percent(row['captured'])} lies "
        f"in the {directions} of the Fisher; of a random direction's it would be {_percents(isotropic)}."
    ]
    if found["rayleigh_ratio"]["value"] is not None:
        sentences.append(f"Its Rayleigh ratio is {_with_interval(found['rayleigh_ratio'])}; a random direction has 1.")
    if (found["share_outside_space"] or 0.0) >= _SHOWN:
        sentences.append(f"The space does not hold {percent(found['share_outside_space'])} of the update.")
    if row["gain"]["value"] is None:
        sentences.append("There is no gradient null (see the findings), and any gradient exceeds a random direction.")
        return [" ".join(sentences)]
    batch = counted(found["null_batch"], "sample")
    compared = (
        f"With directions from half of the groups the update has {percent(row['captured_split'])} of its squared norm "
        f"in them, a fresh gradient of {batch} {_percents(row['null_gradient'])}: a gain of "
        f"{_with_interval(row['gain'])}, centred {_with_interval(row['gain_centred'])}."
    )
    return [" ".join(sentences), f"{compared} {_verdict(found)}"]


def _verdict(found: Mapping[str, Any]) -> str:
    row, steps, blocks = found["at_k"], found["steps"], found["blocks"]
    several = steps["of"] > 1
    at_steps = f"at {steps['concentrated']:,} of {steps['of']:,} steps" if several else ""
    by_chance = f"up to {math.ceil(_CHANCE * steps['of']):,} would be by chance"
    if row["concentrated"] and several and steps["concentrated"] <= _CHANCE * steps["of"]:
        sentence = f"The gain's interval lies above 1 {at_steps}, no more than by chance ({by_chance})."
    elif row["concentrated"]:
        sentence = "So the update is concentrated along informative directions, more than a gradient of its batch"
        sentence += f", as {at_steps} ({by_chance})." if several else "."
    elif row["gain"]["high"] is not None and row["gain"]["high"] < 1:
        sentence = (
            "So less of the update lies along informative directions than of a plain gradient of as many held-out "
            "samples; Adam's scaling and momentum alone would do this."
        )
    elif found["null_batch_limit"] is not None and found["null_batch"] > found["null_batch_limit"]:
        sentence = (
            "Whether the update goes further along informative directions than such a gradient cannot be decided: that "
            f"takes a gradient of at most {found['null_batch_limit']:,.0f} samples, eight times half of those probed."
        )
    else:
        sentence = (
            "That the update goes further along informative directions than a gradient of its batch is not shown."
        )
    if blocks["of"] and blocks["concentrated"] / blocks["of"] > _CHANCE:
        sentence += (
            f" Block by block, {blocks['concentrated']:,} of {blocks['of']:,} updates are concentrated; about 2.5 % "
            "each would be by chance, together or not at all, for blocks share samples and draws."
        )
    return sentence


def _tasks(fisher: Mapping[str, Any]) -> str:
    sentences = [
        f"{words}: {_named(pairs)}."
        for state, words in (
            ("share", "Tasks whose mean gradients agree"),
            ("conflict", "Tasks in conflict"),
            ("undecided", "Undecided, since the cosine's interval holds 0"),
            ("unresolved", "Not resolved, since a mean gradient cannot be told from 0"),
        )
        if (pairs := [pair for pair in fisher["pairs"] if pair["state"] == state])
    ]
    if sentences and (mixture := _mixture(fisher["mixture"])):
        sentences.append(mixture)
    return " ".join(sentences)


def _named(pairs: Sequence[Mapping[str, Any]]) -> str:
    said = []
    for pair in pairs[:_NAMED]:
        first, second = pair["tasks"]
        cosine = (
            "" if pair["cosine"]["value"] is None else f" (cosine {_with_interval(pair['cosine'], brackets=False)})"
        )
        said.append(f"{first} and {second}{cosine}")
    rest = [f"{len(pairs) - _NAMED:,} more pairs"] if len(pairs) > _NAMED else []
    return "; ".join([*said, *rest])


def _mixture(mixture: Mapping[str, float | None]) -> str:
    if mixture["divergence"] is None or mixture["within_tasks"] is None:
        return ""
    sentence = (
        f"Of SE, {number(mixture['within_tasks'])} nat are within tasks and χ = {number(mixture['divergence'])} nat "
        f"between them (0: all tasks have the same normalised Fisher, {number(mixture['largest_divergence'])}: they "
        "share no direction)."
    )
    if mixture["null_low"] is None:
        return sentence
    return (
        f"{sentence} With every task's trace made 1, χ is {number(mixture['normalised_divergence'])} of at most "
        f"{number(mixture['normalised_largest'])} nat; exchanged labels, with traces made 1 under each, give "
        f"{number(mixture['null_low'])} to {number(mixture['null_high'])} (p = {number(mixture['p_value'], 2)})."
    )


def _interval(found: Mapping[str, float | None]) -> str:
    if found["low"] is None or found["high"] is None:
        return ""
    return f"95 % interval {_ends(found)}"


def _ends(found: Mapping[str, float | None]) -> str:
    return f"{number(found['low'])} to {number(found['high'])}"


def _with_interval(found: Mapping[str, float | None], *, brackets: bool = True) -> str:
    value, interval = number(found["value"]), _interval(found)
    if not interval:
        return value
    return f"{value} ({interval})" if brackets else f"{value}, {interval}"


def _percents(found: Mapping[str, float | None]) -> str:
    if found["low"] is None or found["high"] is None:
        return percent(found["value"])
    return f"{percent(found['value'])} (95 %: {percent(found['low'])} to {percent(found['high'])})"


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
