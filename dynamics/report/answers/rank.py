"""Is the rank right?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from dynamics.report.answers.answer import Answer, Evidence, Verdict
from dynamics.schema import ALL
from dynamics.spectra.dataset import parts_of_sums
from dynamics.spectra.measures import ENERGY
from dynamics.spectra.training_noise import FEWEST_INCREMENTS, STATES, energy_above_noise, states_of_rank
from dynamics.text import counted, interval, listed, percent

#: Share of the matrices from which a state is that of the run.
MOST = 2 / 3
_OF_MOST: Mapping[str, Verdict] = {"idle": "no", "ends within": "yes", "used up": "undecided"}
#: Rise of the held-out loss, over that loss, up to which a smaller rank is as good.
HARMLESS = 0.01
#: Roles that a sentence names.
_NAMED = 3
_BY_PROBE = "Pass --probe module:function --intervene to see what a smaller rank costs."
_BY_PATTERN = "To train with fewer, pass rank_pattern.json as rank_pattern, and keep α/r by an alpha_pattern."
_BY_TWICE = "Train once more with twice the rank, and compare held-out losses."


def is_the_rank_right(tree: xr.DataTree, summary: Mapping[str, Any]) -> Answer:
    """Return the answer to "Is the rank right?"

    Each adapter of the newest training is idle, used up, or ends within its rank, see
    :func:`dynamics.spectra.training_noise.states_of_rank`: by the energy of its update (99 %), and with four
    checkpoints or more by the noise of its increments (6 times the noise is a direction that is used, up to 1 time is
    noise). An effect counts more than either: where adapters cut to the ranks of rank_pattern.json were evaluated, up
    to 1 % more held-out loss is harmless.

    - ``yes``: two thirds of the adapters end within their rank; or, though some are idle and fewer than half used up,
      cutting costs more than 1 % of the loss, so that the rank is not too high;
    - ``no``: two thirds of them are idle and, where it was evaluated, cutting is harmless: the rank is too high;
    - ``mixed``: half of them or more are in one of the three states, but no two thirds in the same;
    - ``undecided``: else. A rank that is used up is undecided too: just right and too low look the same;
    - ``not_asked``: no matrix of the newest training has a low-rank update (DoRA's is none).

    Claims by noise were wrong for 1 % of simulated trainings or fewer (docs/answers.md), and intervals are of 95 %;
    shares of energy are what was measured, so ``sure`` is ``None`` for them.

    Args:
        tree: A result of one run.
        summary: Its summary.
    """
    update = tree["update"].to_dataset()
    adapters = _adapters(update[["count", "frobenius_norm", "suggested_rank", "singular_value"]])
    if adapters is None:
        return Answer(
            "rank", "not_asked", "No matrix of the newest training has a low-rank update, so it has no rank to judge."
        )
    if not adapters.states:
        words = (
            "No adapter of the newest training has a total update that is known and not zero, so none uses its rank."
        )
        return Answer("rank", "undecided", words)
    effect = _effect(tree)
    is_by_noise = bool(np.isfinite(adapters.above_noise).any())
    verdict = _verdict(adapters.states, effect)
    numbers = [Evidence("/update/suggested_rank", float(np.median(adapters.needed)))]
    if is_by_noise:
        numbers.append(Evidence("/update/singular_value"))
    if effect is not None:
        numbers += effect.evidence
    claims = is_by_noise and any(state in ("used up", "ends within") for state in adapters.states)
    sure = 0.95 if effect is not None or claims else None
    words = _sentence(adapters, effect, is_by_noise, len(summary["segments"]))
    return Answer("rank", verdict, words, tuple(numbers), sure, _surer(adapters, effect, is_by_noise))


@dataclass(frozen=True)
class _Adapters:
    """The adapters of the newest training whose update is known and not zero.

    Args:
        roles: Of each.
        rank: Of each, r; its directions are at most min(out, in).
        needed: Fewest directions that hold 99 % of its energy.
        sides: out + in.
        above_noise: See :func:`energy_above_noise`.
        states: See :func:`states_of_rank`.
    """

    roles: Sequence[str]
    rank: Float[np.ndarray, " matrix"]
    needed: Float[np.ndarray, " matrix"]
    sides: Float[np.ndarray, " matrix"]
    above_noise: Float[np.ndarray, "matrix index"]
    states: Sequence[str]

    @property
    def share(self) -> float:
        """Share of the parameters that adapters of the needed ranks have."""
        return float((self.needed * self.sides).sum() / (self.rank * self.sides).sum())


def _adapters(update: xr.Dataset) -> _Adapters | None:
    """Return the adapters, ``None`` if there are none; of several on one matrix each, and not their sum."""
    newest = update.isel(step=update["segment"].values == update["segment"].values[-1])
    names = update["matrix"].values.tolist()
    sums = {name.rpartition("@")[0] for name, is_part in zip(names, parts_of_sums(names), strict=True) if is_part}
    is_adapter = (update["adapter_rank"].values > 0) & ~np.isin(names, list(sums))
    present = is_adapter & (newest["count"].values[-1] > 0).any(0)
    if not present.any():
        return None
    last = newest.isel(step=-1, matrix=present).sel(kind="total").load()
    moved = last["frobenius_norm"].values > 0
    last = last.isel(matrix=moved)
    sides = [last[name].values.astype(np.float64) for name in ("adapter_rank", "out", "in")]
    directions = np.minimum.reduce(sides)
    needed = last["suggested_rank"].values
    above = _above_noise(newest.isel(matrix=present).isel(matrix=moved), last["singular_value"].values)
    states = states_of_rank(directions, needed, above) if len(directions) else []
    return _Adapters(last["role"].values.tolist(), sides[0], needed, sides[1] + sides[2], above, states)


def _above_noise(newest: xr.Dataset, total: np.ndarray) -> Float[np.ndarray, "matrix index"]:
    steps, origin = newest["step"].values, newest["from_step"].values
    has_origin = origin > 0
    increments = newest["singular_value"].sel(kind="increment").isel(step=has_origin).values
    return energy_above_noise(total, increments, (steps - origin)[has_origin].tolist(), int(steps[-1]))


@dataclass(frozen=True)
class _Effect:
    """What adapters cut to 99 % of their energy do to the held-out loss.

    Args:
        rise, low, high: Of the loss, over the loss of the whole adapter, with its 95 % interval.
        share: Share of the parameters that the cut adapters have.
        evidence: The numbers as they are in the result.
    """

    rise: float
    low: float
    high: float
    share: float
    evidence: Sequence[Evidence]

    @property
    def is_harmless(self) -> bool:
        """Whether the loss rises by no more than 1 %."""
        return self.high <= HARMLESS

    @property
    def is_costly(self) -> bool:
        """Whether it rises by more."""
        return self.low > HARMLESS


def _effect(tree: xr.DataTree) -> _Effect | None:
    """Return the effect at the newest step of ``/sensitivity``, ``None`` where it was not measured at the last one."""
    if "sensitivity" not in tree.children:
        return None
    last = tree["sensitivity"].to_dataset().isel(step=-1).load()
    at = last.sel(truncation="energy", task=ALL)
    loss = float(at["loss"])
    ends = [float(at[f"truncation_effect{end}"]) for end in ("", "_low", "_high")]
    newest = int(tree["update"].to_dataset()["step"].values[-1])
    if int(last["step"]) != newest or not np.isfinite(ends).all() or not loss > 0:
        return None
    directions = np.isfinite(last["singular_value"].values).sum(1)
    whole = float((directions * (last["out"].values + last["in"].values)).sum())
    kept = float(at["parameters"])
    evidence = [Evidence("/sensitivity/truncation_effect", *ends), Evidence("/sensitivity/parameters", kept)]
    rise, high, low = (-end / loss for end in ends)
    return _Effect(rise, low, high, kept / whole, evidence)


def _verdict(states: Sequence[str], effect: _Effect | None) -> Verdict:
    share = {state: states.count(state) / len(states) for state in STATES}
    if effect is not None and share["idle"]:
        if effect.is_costly:
            return "yes" if share["used up"] < 1 / 2 else "undecided"
        if not effect.is_harmless:
            return "undecided"
    for state, verdict in _OF_MOST.items():
        if share[state] >= MOST:
            return verdict
    return "mixed" if share["unclear"] <= 1 / 2 else "undecided"


def _sentence(adapters: _Adapters, effect: _Effect | None, is_by_noise: bool, trainings: int) -> str:
    ranks = sorted({int(rank) for rank in adapters.rank})
    subject = f"rank {ranks[0]}" if len(ranks) == 1 else f"the rank ({ranks[0]} to {ranks[-1]})"
    claims = [
        f"{words} {_where(adapters, state)}"
        for state, words in (
            ("used up", "used up in"),
            ("ends within", "used, with room to spare, in"),
            ("idle", "at least half idle in"),
        )
        if state in adapters.states
    ]
    basis = "By energy and training noise" if is_by_noise else "By energy alone"
    needed = sorted({int(rank) for rank in adapters.needed})
    all_of_it = f"{needed[0]}" if len(needed) == 1 else f"{needed[0]} to {needed[-1]}"
    if not claims:
        claims = [f"not shown to be too high or too low: {percent(ENERGY, 0)} of an update's energy needs {all_of_it}"]
    together = claims[0] if len(claims) == 1 else f"{', '.join(claims[:-1])}, and {claims[-1]}"
    newest = " of the newest training" if trainings > 1 else ""
    share = adapters.share if effect is None else effect.share
    pattern = f"adapters with the ranks of rank_pattern.json have {percent(share, 0)} of the parameters"
    if effect is None and share >= 1:
        pattern = "the ranks of rank_pattern.json would save no parameters"
    if effect is None:
        return f"{basis}, {subject}{newest} is {together}; {pattern}."
    digits = 2 if max(abs(effect.low), abs(effect.high)) < HARMLESS else 1
    ends = interval(effect.low, effect.high, lambda end: percent(end, digits))
    rise = f"{'rises' if effect.rise >= 0 else 'falls'} by {percent(abs(effect.rise), digits)}"
    return f"{basis}, {subject}{newest} is {together}; {pattern}, and with them the held-out loss {rise} ({ends})."


def _where(adapters: _Adapters, state: str) -> str:
    """Return in how many matrices of which roles a state is found."""
    members = Counter(adapters.roles)
    by_role = Counter(role for role, other in zip(adapters.roles, adapters.states, strict=True) if other == state)
    total = sum(by_role.values())
    if total == len(adapters.roles):
        return f"all {counted(total, 'matrix', 'matrices')}" if total > 1 else f"its one matrix, {adapters.roles[0]}"
    roles = [f"{count:,} of {members[role]:,} {role}" for role, count in by_role.most_common(_NAMED)]
    rest = len(by_role) - _NAMED
    return listed([*roles, f"in {counted(rest, 'other role')}"] if rest > 0 else roles)


def _surer(adapters: _Adapters, effect: _Effect | None, is_by_noise: bool) -> str:
    """Return what to do next."""
    used = adapters.states.count("used up")
    advice = [_BY_PROBE] if effect is None else []
    if not is_by_noise:
        advice.append(f"Keep {FEWEST_INCREMENTS + 1} checkpoints or more to tell used directions from training noise.")
    if "idle" in adapters.states and (effect is None or not effect.is_costly):
        advice.append(_BY_PATTERN)
    if used > len(adapters.states) / 2:
        advice.append(_BY_TWICE)
    return " ".join(advice)
