"""Numbers and summaries in words, the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
