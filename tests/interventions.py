"""Groups `/intervention` of known effects: for what draws or tells them, and for measures across runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from dynamics.schema import INTERVENTION, label_arrays

ARMS = ("full", "on", "off", "random", "matched")
SCALES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class Outcome:
    """What one update and its parts do: effects at full length, each with the half width of its interval.

    Args:
        on, off, full: Effects of the part, the rest and the whole.
        captured: Share of the squared norm in the part.
        error: Half width of every interval of an effect.
        shorter: Arm and λ → its effect; by default λ times the effect at full length.
        separable_scale: Largest λ at which parts have shares, where they have none at full length.
        random: Share of the squared norm in random directions.
        score: Score changes of ``on`` and ``full``; without it, tasks have no score.
    """

    on: float = 0.079
    off: float = -0.031
    full: float = 0.05
    captured: float = 0.22
    error: float = 0.02
    shorter: Mapping[tuple[str, float], float] = field(default_factory=dict)
    separable_scale: float = np.nan
    random: float = 0.01
    score: tuple[float, float] | None = None


def intervention(
    *outcomes: Outcome,
    steps: Sequence[int] | None = None,
    tasks: Sequence[str] = ("all",),
    ks: Sequence[int] = (16,),
    factors: Mapping[str, float] | None = None,
    **attributes: object,
) -> xr.Dataset:
    """The group `/intervention` that holds these outcomes at every k and task; the last k is the headline's.

    Args:
        outcomes: One for each step.
        steps: By default 100, 200, …
        tasks: ``"all"`` first.
        ks: Numbers of directions.
        factors: Task → factor of all of its effects; 1 by default.
        attributes: Beside those that every group has.
    """
    steps = [100 * (1 + number) for number in range(len(outcomes))] if steps is None else list(steps)
    factors = factors or {}
    parts = [_of_step(outcome, len(ks), [factors.get(task, 1.0) for task in tasks]) for outcome in outcomes]
    arrays = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    arrays["headline"] = np.tile(np.asarray(ks) == ks[-1], (len(steps), 1))
    coords = {"step": steps, "arm": list(ARMS), "k": list(ks), "scale": list(SCALES), "task": list(tasks)}
    stated = {"space": "tangent", "splits": 2, "groups": 40, "samples": 80, "share_outside_space": 0.0}
    exact = {"norm_deviation": 3e-7, "repeat_deviation": 0.0}
    return xr.Dataset(label_arrays(INTERVENTION, arrays), coords, {**stated, **exact, **attributes})


def _of_step(outcome: Outcome, ks: int, factors: Sequence[float]) -> dict[str, np.ndarray]:
    whole = {"full": outcome.full, "on": outcome.on, "off": outcome.off}
    whole |= {"random": outcome.random * outcome.full, "matched": outcome.captured * outcome.full}
    effect = np.full((len(ARMS), ks, len(SCALES), len(factors)), np.nan)
    for row, arm in enumerate(ARMS):
        for depth, scale in enumerate(SCALES):
            if scale == 1.0 or arm in ("full", "on", "off"):
                value = outcome.shorter.get((arm, scale), scale * whole[arm])
                effect[row, :, depth] = value * np.asarray(factors)
    shape = (ks, len(factors))
    per_k = np.ones(shape) * np.asarray(factors)
    full, error = outcome.full * per_k, np.full(shape, outcome.error)
    attributed = (outcome.on + outcome.full - outcome.off) / 2 * per_k
    interaction = (outcome.full - outcome.on - outcome.off) * per_k
    captured = np.full(shape, outcome.captured)
    excess = attributed - captured * full
    resolved, separable = np.abs(full) > error, np.abs(interaction) <= np.abs(full) / 2 + 1e-12
    kept = np.where(resolved & separable, 1.0, np.nan)
    norms = {"full": 1.0, "on": outcome.captured, "off": 1 - outcome.captured}
    norms |= {"random": outcome.random, "matched": outcome.captured}
    arrays = {
        **_ends("effect", effect, np.full(effect.shape, outcome.error)),
        "predicted_effect": 2 * effect,
        "required_groups": np.full((len(ARMS), *shape), 400.0),
        "captured": captured,
        **_ends("interaction", interaction, error),
        **_ends("attributed", attributed, error),
        **_ends("excess", excess, error),
        "excess_p": np.where(np.abs(excess) > error, 0.0012, 0.4),
        **_ends("share", kept * attributed / full, error / np.abs(full)),
        **_ends("efficiency", kept * attributed / full / captured, error / np.abs(full) / captured),
        **_ends("sufficiency", kept * outcome.on * per_k / full, error / np.abs(full)),
        **_ends("necessity", kept * (1 - outcome.off * per_k / full), error / np.abs(full)),
        "relative_excess": np.where(resolved, excess / full, np.nan),
        "resolved": resolved,
        "separable": separable,
        "separable_scale": np.where(separable, 1.0, outcome.separable_scale),
        "norm": np.sqrt(np.array([[norms[arm]] * ks for arm in ARMS])),
    }
    if outcome.score is not None:
        score = np.full((len(ARMS), *shape), np.nan)
        score[ARMS.index("on")], score[ARMS.index("full")] = outcome.score
        arrays |= _ends("score_effect", score, np.full(score.shape, 0.05))
    return arrays


def _ends(name: str, value: np.ndarray, error: np.ndarray) -> dict[str, np.ndarray]:
    return {name: value, f"{name}_low": value - error, f"{name}_high": value + error}


def with_intervention(tree: xr.DataTree, group: xr.Dataset) -> xr.DataTree:
    """The result with `/intervention` beside its groups."""
    whole = xr.DataTree.from_dict({**tree.to_dict(), "/intervention": group})
    whole.attrs = dict(tree.attrs)
    return whole


CASES: Mapping[str, Outcome] = {
    "more": Outcome(),
    "less": Outcome(on=0.03, off=0.26, full=0.3, captured=0.5),
    "no_gain": Outcome(on=-0.01, off=0.12, full=0.1, captured=0.74),
    "as_much": Outcome(on=0.06, off=0.04, full=0.1, captured=0.6),
    "unresolved": Outcome(on=0.004, off=0.002, full=0.006, captured=0.22),
    "together": Outcome(
        on=-0.011,
        off=-0.037,
        full=0.07,
        captured=0.015,
        shorter={("on", 0.25): 0.011, ("off", 0.25): 0.019, ("full", 0.25): 0.037, ("full", 0.5): 0.06},
        separable_scale=0.25,
    ),
}
