"""A run in sentences, the same in the terminal and on the page: its updates, its gradients, and its Fisher.

Every sentence is made of the numbers of a summary (see ``summarise``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynamics.report.answers.concentrated import CHANCE, chance_steps, concentration_state, has_one_null
from dynamics.report.answers.conflicts import degree_of_difference
from dynamics.text import counted, listed, number, percent, sentence_case

#: Share of the squared distance in one direction from which a path is called almost a line.
_ONE_LINE = 0.9
#: A gain within this factor of 1 is called about as much.
_ABOUT = 1.25
#: Pairs of tasks that a sentence names; all are in the summary.
_NAMED = 5
#: The smallest share that a percentage with one decimal shows.
_SMALLEST_SHARE = 5e-4
_FISHERS = {"empirical": "empirical Fisher", "sampled": "Fisher with sampled labels"}


def what_was_analysed(summary: Mapping[str, Any]) -> str:
    """Return one sentence: how many checkpoints or recorded steps, of which matrices.

    Args:
        summary: Of one run, see ``summarise``.
    """
    steps, recorded = summary["steps"], summary["captured"]
    span = f"step {steps[0]:,}" if len(steps) == 1 else f"steps {steps[0]:,} to {steps[-1]:,}"
    what = counted(len(steps), "checkpoint")
    if recorded is not None:
        checkpoints = f"with {counted(recorded['checkpoints'], 'checkpoint')}" if recorded["checkpoints"] else ""
        what = f"Recorded at {counted(recorded['steps'], 'step')}, {checkpoints or 'without checkpoints'}"
    trainings = len(summary["segments"])
    apart = f", of {trainings} different trainings" if trainings > 1 else ""
    matrices = counted(summary["matrices"], "weight matrix", "weight matrices")
    ranks = sorted({row["adapter_rank"] for row in summary["table"] if row["adapter_rank"]})
    kind = f" with LoRA updates of rank {' to '.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}" if ranks else ""
    return f"{what} ({span}){apart}; {matrices}{kind}."


def what_was_compared(summary: Mapping[str, Any]) -> str:
    """Return how many runs there are, in which groups.

    >>> what_was_compared({"runs": {"a": {"label": "imax"}, "b": {"label": ""}}})
    '2 runs: 1 of imax and 1 without a group.'
    """
    labels = [run["label"] for run in summary["runs"].values()]
    groups = [
        f"{labels.count(label):,} {f'of {label}' if label else 'without a group'}" for label in dict.fromkeys(labels)
    ]
    return f"{counted(len(labels), 'run')}{f': {listed(groups)}' if any(labels) else ''}."


def answers(summary: Mapping[str, Any]) -> list[str]:
    """Return what there is to say about a run's updates and gradients, a sentence or two each."""
    tellers = (how_far, beside_the_base, how_many_directions, how_straight, how_steep)
    return [sentence for tell in tellers if (sentence := tell(summary))]


def how_far(summary: Mapping[str, Any]) -> str:
    """Return the size of the whole update at the last step; of several adapters, the size of each."""
    step = f"At step {summary['last_step']:,}"
    if summary["adapters"]:
        return f"{step} {listed(map(_of_adapter, summary['adapters']))}. Adapters are not added up."
    norm = summary["totals"]["frobenius_norm_all"]
    if norm is None:
        return f"{step} the size of the whole update is not known."
    if norm == 0:
        return f"{step} no matrix has moved: every update is exactly zero."
    return f"{step} the update has Frobenius norm {number(norm)} over {which_matrices(summary)}."


def _of_adapter(adapter: Mapping[str, Any]) -> str:
    size = f"Frobenius norm {number(adapter['frobenius_norm'])}"
    return f"the update of {adapter['adapter']} has {size} over {counted(adapter['matrices'], 'matrix', 'matrices')}"


def which_matrices(summary: Mapping[str, Any]) -> str:
    """Return over how many matrices a sum runs; the parts of a sum of adapters do not count again."""
    names = {row["name"] for row in summary["table"]}
    total = sum(not ("@" in name and name.rpartition("@")[0] in names) for name in names)
    summed = summary["totals"]["matrices"]
    return "all matrices" if summed >= total else f"{summed:,} of {counted(total, 'matrix', 'matrices')}"


def how_many_directions(summary: Mapping[str, Any]) -> str:
    """Return the effective rank over matrices, beside chance; ``""`` where it is not known."""
    rank = summary["over_matrices"]["effective_rank_energy"]
    if rank["median"] is None:
        return ""
    adapted = any(row["adapter_rank"] for row in summary["table"])
    chance = _chance(rank, f"a random {'LoRA' if adapted else 'matrix'} of the same shape has")
    if summary["matrices"] == 1:
        return f"The effective rank (energy) of the update is {number(rank['median'])}{chance}."
    quartiles = f"quartiles {number(rank['lower_quartile'])} to {number(rank['upper_quartile'])}"
    median = number(rank["median"])
    moved = [row["effective_rank_energy"] for row in summary["table"] if row["frobenius_norm"]]
    known = len(moved) - moved.count(None)
    stated = "" if known == len(moved) else f", known of {known:,} of {len(moved):,} matrices,"
    return f"The median effective rank (energy) of a matrix's update{stated} is {median} ({quartiles}){chance}."


def how_straight(summary: Mapping[str, Any]) -> str:
    """Return how close the path of training was to a line; ``""`` for fewer than three checkpoints."""
    path = summary["path"]
    if path is None or path["checkpoints"] < 3 or path["participation_ratio"] is None:
        return ""
    share, by_chance = path["component_share"][0], path.get("component_share_null")
    ratio = f"participation ratio {number(path['participation_ratio'])}"
    chance = ""
    if by_chance is not None:
        walk_ratio = number(path["participation_ratio_null"])
        chance = f"; a random walk with steps of these lengths has {percent(by_chance)} and {walk_ratio}"
    where = "lie almost on one line" if share >= _ONE_LINE else "do not lie on one line"
    expected = ", as a random walk's would" if by_chance is not None and _ONE_LINE <= share <= by_chance else ""
    shape = (
        f"The checkpoints {where}{expected}: the leading direction holds {percent(share)} of the squared distance "
        f"({ratio}{chance})."
    )
    if not path["straightness"]:
        return shape
    longer = number(1 / path["straightness"], 2)
    walked = path.get("straightness_null")
    beside = f" (the random walk: {number(1 / walked, 2)} times)" if walked else ""
    return f"{shape} The path was {longer} times as long as the straight line from start to end{beside}."


def beside_the_base(summary: Mapping[str, Any]) -> str:
    """Return how updates compare with the weights they changed; ``""`` without a base."""
    base = summary["base"]
    if base is None:
        return ""
    if not base["matrices"]:
        return f"None of the {counted(base['of'], 'matrix', 'matrices')} could be compared with the base."
    matrices = "matrices"
    if base["matrices"] < base["of"]:
        matrices = f"the {base['matrices']:,} of {base['of']:,} matrices that the base has"
    size = f"The update has {percent(base['relative_size'])} of the norm of the base weights (median over {matrices})."
    if base.get("overlap_left") is None:
        return size
    return (
        f"{size} Its {base['k']} leading directions overlap with those of the base by {number(base['overlap_left'])} "
        f"(chance {number(base['overlap_left_null'])}). Intruder dimensions hold {percent(base['intruder_energy'])} of "
        f"the energy in its leading directions (chance {percent(base['intruder_energy_null'])})."
    )


def how_steep(summary: Mapping[str, Any]) -> str:
    """Return size and effective rank of the last recorded gradient; ``""`` where none was recorded."""
    gradient = summary["gradient"]
    if gradient is None or gradient["norm_before_clip"]["median"] is None:
        return ""
    before, after = (gradient[f"norm_{when}_clip"]["median"] for when in ("before", "after"))
    clipping = "clipping left it unchanged" if after == before else f"{number(after)} after clipping"
    sentence = f"At step {gradient['step']:,} the median gradient norm of a matrix is {number(before)} ({clipping})"
    rank = gradient["effective_rank_energy"]
    if rank["median"] is None:
        return f"{sentence}."
    chance = _chance(rank, "random factors have")
    return f"{sentence}, and the median effective rank (energy) of a gradient is {number(rank['median'])}{chance}."


def _chance(rank: Mapping[str, float | None], subject: str) -> str:
    return "" if rank["null_mean"] is None else f"; {subject} {number(rank['null_mean'])}"


def informative_directions(summary: Mapping[str, Any]) -> list[str]:
    """Return whether updates followed informative directions: the Fisher, the update in it, tasks; a paragraph each.

    An update is called concentrated only where the result's flag says so: the intervals of the gain over gradients of
    the same batch, uncentred and centred, both lie above 1.

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


def does_it_matter(summary: Mapping[str, Any]) -> list[str]:
    """Return whether the part along informative directions lowers the loss; nothing where no update was taken apart.

    Args:
        summary: Of one run, see ``summarise``.
    """
    return [] if summary["intervention"] is None else summary["intervention"]["statements"]


def _spectrum(fisher: Mapping[str, Any]) -> str:
    name = _FISHERS.get(fisher["fisher"], f"{fisher['fisher']} Fisher".strip())
    samples, groups = fisher["samples"] or 0, fisher["groups"] or 0
    opening = (
        f"The {name} was measured at step {fisher['step']:,} with {counted(samples, 'probe sample')} in "
        f"{counted(groups, 'group')}, in {fisher['space']} space ({_timing(fisher)})."
    )
    if fisher["spectral_entropy"]["value"] is None:
        return f"{opening} It has no spectrum: see the findings."
    ratio, participation = fisher["dominant_ratio"], fisher["participation_ratio"]
    sentences = [opening, _entropy(fisher["spectral_entropy"], samples)]
    others = []
    if ratio["low"] is not None:
        others.append(
            f"the dominant ratio ρ is between {number(ratio['low'])} and {number(ratio['high'])} (95 % interval)"
        )
    elif ratio["value"] is not None:
        others.append(f"the dominant ratio ρ is {number(ratio['value'])} (plug-in, too large in expectation)")
    if participation["value"] is not None:
        others.append(f"the participation ratio is {_with_interval(participation)}")
    if others:
        sentences.append(f"{sentence_case(listed(others))}.")
    directional = fisher["participation_ratio_directional"]
    if directional["value"] is not None:
        sentences.append(
            f"With all gradients scaled to the same length the participation ratio is {_with_interval(directional)}. "
            f"By their share of the trace, the groups count as {number(fisher['effective_groups'])} of equal size."
        )
    return " ".join(sentences)


def _entropy(entropy: Mapping[str, float | None], samples: int) -> str:
    """Return the plug-in value at this N, which is too small in expectation, and a lower bound of the Fisher's SE.

    An entropy is never negative: a bound of 0 or less says nothing.
    """
    error = "" if entropy["low"] is None else f", sampling error {_ends(entropy)}"
    bound = entropy["lower_bound"]
    at_least = "" if bound is None or bound <= 0 else f" It is at least {number(bound)} nat, the low end of ln PR."
    return (
        f"The spectral entropy SE is {number(entropy['value'])} nat at N = {samples:,} (plug-in{error}); the Fisher's "
        f"own SE is larger by an unknown amount.{at_least}"
    )


def _timing(fisher: Mapping[str, Any]) -> str:
    step = fisher["evaluated_at_step"]
    if step is None or step == fisher["step"]:
        return "gradients at the weights of that step"
    return f"gradients at the weights of step {step:,}, before the update"


def _update(concentration: Mapping[str, Any] | None) -> list[str]:
    if concentration is None:
        return ["No update is known for these gradients, so its directions cannot be compared."]
    row = concentration["at_k"]
    directions = counted(row["k"], "leading direction")
    verb = "hold" if row["k"] > 1 else "holds"
    sentences = [
        f"The {directions} of the Fisher {verb} {percent(row['captured'])} of the squared norm of the update to step "
        f"{concentration['step']:,} and {_percents(row['null_isotropic'])} of a random direction."
    ]
    if concentration["rayleigh_ratio"]["value"] is not None:
        ratio = _with_interval(concentration["rayleigh_ratio"])
        sentences.append(f"The Rayleigh ratio of the update is {ratio}; a random direction has 1.")
    if (outside := concentration["share_outside_space"] or 0.0) >= _SMALLEST_SHARE:
        sentences.append(f"These gradients cannot reach {percent(outside)} of the update, which is left out.")
    if row["gain"]["value"] is None:
        sentences.append("There is no gradient null (see the findings), and any gradient exceeds a random direction.")
        return [" ".join(sentences)]
    gain, centred = (_with_interval(row[name], brackets=False) for name in ("gain", "gain_centred"))
    batch = counted(concentration["null_batch"], "sample")
    compared = (
        f"The {directions}, taken from other groups of samples, {verb} {percent(row['captured_split'])} of the update "
        f"and {_percents(row['null_gradient'])} of a fresh gradient of {batch}: {_times(row['gain']['value'])} "
        f"(gain {gain}; centred {centred})."
    )
    return [" ".join(sentences), f"{compared} {_verdict(concentration)}", *_beside_optimizer(concentration)]


def _times(gain: float) -> str:
    """Return a gain in words.

    >>> _times(0.036), _times(2.5), _times(0.97), _times(0.0)
    ('28 times less', '2.5 times as much', 'about as much', 'nothing')
    """
    if gain <= 0:
        return "nothing"
    if 1 / _ABOUT <= gain <= _ABOUT:
        return "about as much"
    return f"{number(1 / gain, 2)} times less" if gain < 1 else f"{number(gain, 2)} times as much"


def _verdict(concentration: Mapping[str, Any]) -> str:
    steps, blocks = concentration["steps"], concentration["blocks"]
    at_steps = f"at {steps['concentrated']:,} of {steps['of']:,} steps"
    by_chance = f"chance: up to {chance_steps(steps['of']):,}"
    state = concentration_state(concentration)
    if state == "chance":
        sentence = f"The interval of the gain lies above 1 {at_steps}, no more often than by chance ({by_chance})."
    elif state == "concentrated":
        sentence = "The update is concentrated along informative directions, more than a gradient of its batch."
        sentence += f" The same holds {at_steps} ({by_chance})." if steps["of"] > 1 else ""
    elif state == "less":
        sentence = "The update follows informative directions less than a plain gradient step would"
        sentence += (
            "; Adam's scaling and momentum alone can cause this." if has_one_null(concentration["at_k"]) else "."
        )
    elif state == "beyond_null":
        limit = concentration["null_batch_limit"]
        sentence = (
            "Whether the update follows informative directions more than a gradient of its batch cannot be decided: "
            f"the null can imitate at most {limit:,.0f} samples, eight times half of those probed. Probe more samples."
        )
    else:
        sentence = "The update is not shown to follow informative directions more than a gradient of its batch."
    if blocks["of"] and blocks["concentrated"] / blocks["of"] > CHANCE:
        sentence += (
            f" The updates of {blocks['concentrated']:,} of {blocks['of']:,} blocks are concentrated. Chance makes "
            "about 2.5 % so, all at once or none, since blocks share samples and draws."
        )
    return sentence


def _beside_optimizer(concentration: Mapping[str, Any]) -> list[str]:
    """Return how the update compares with fresh gradients that went through the optimizer."""
    row = concentration["at_k"]
    if row["gain_optimizer"]["value"] is None:
        return []
    if has_one_null(row):
        return ["The optimizer steps along the gradient itself, so that fresh steps of it are no other null."]
    gain, centred = (_with_interval(row[f"gain_optimizer{end}"], brackets=False) for end in ("", "_centred"))
    state = concentration_state(concentration)
    beside = concentration_state(concentration, "_optimizer")
    if beside == "concentrated":
        verdict = "The update follows informative directions more than the optimizer's scaling explains."
    elif beside == "less":
        verdict = "The update follows informative directions less than a fresh gradient does under this optimizer."
    elif beside == "not_shown" and state in ("concentrated", "less"):
        what = "concentration" if state == "concentrated" else "difference from a plain gradient"
        verdict = f"The optimizer's scaling may explain the {what}."
    else:
        verdict = "The update is not shown to differ from a fresh gradient under this optimizer."
    return [
        f"Passed through the optimizer, a fresh gradient has {_percents(row['null_optimizer'])} there; the update has "
        f"{_times(row['gain_optimizer']['value'])} (gain {gain}; centred {centred}). {verdict}"
    ]


def _tasks(fisher: Mapping[str, Any]) -> str:
    pairs = fisher["pairs"]
    resolved = [pair for pair in pairs if pair["state"] in ("share", "conflict")]
    named = (resolved + [pair for pair in pairs if pair not in resolved])[:_NAMED]
    sentences = [pair["sentence"] for pair in named]
    if len(pairs) > _NAMED:
        sentences.append(f"{counted(len(pairs) - _NAMED, 'more pair')} in summary.json.")
    if len(named) > 1:
        sentences.append("Intervals of cosines hold with 95 % for all pairs together.")
    if sentences and (mixture := _mixture(fisher["mixture"])):
        sentences.append(mixture)
    return " ".join(sentences)


def _mixture(mixture: Mapping[str, float | None]) -> str:
    """Return how far tasks use different directions: with its test where every task's trace was made 1."""
    verdict = degree_of_difference(mixture)
    if not verdict:
        if mixture["divergence"] is None or mixture["within_tasks"] is None:
            return ""
        return (
            f"Of the spectral entropy, {number(mixture['within_tasks'])} nat lie within tasks and χ = "
            f"{number(mixture['divergence'])} of at most {number(mixture['largest_divergence'])} nat between them."
        )
    divergence, largest = (number(mixture[f"normalised_{name}"]) for name in ("divergence", "largest"))
    return (
        f"{sentence_case(verdict)}: with equal traces χ = {divergence} of at most {largest} nat (with shuffled task "
        f"labels {number(mixture['null_low'])} to {number(mixture['null_high'])}; p = {number(mixture['p_value'], 2)})."
    )


def _ends(interval: Mapping[str, float | None]) -> str:
    return f"{number(interval['low'])} to {number(interval['high'])}"


def _with_interval(estimate: Mapping[str, float | None], *, brackets: bool = True) -> str:
    value = number(estimate["value"])
    if estimate["low"] is None or estimate["high"] is None:
        return value
    return f"{value} (95 % interval {_ends(estimate)})" if brackets else f"{value}, 95 % interval {_ends(estimate)}"


def _percents(estimate: Mapping[str, float | None]) -> str:
    value = percent(estimate["value"])
    if estimate["low"] is None or estimate["high"] is None:
        return value
    return f"{value} (95 % interval {percent(estimate['low'])} to {percent(estimate['high'])})"
