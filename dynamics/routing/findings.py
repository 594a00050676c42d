"""Findings about ``/routing``: experts that get no token or too many, beyond what chance gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import xarray as xr

from dynamics.findings import Finding
from dynamics.routing.dataset import SOFT, holders, matrices_by_expert
from dynamics.routing.uniform_null import LEVEL, dead_probability, largest_share
from dynamics.text import counted, number, percent, some

#: Captured steps in a row, the last ones, for which it must hold.
STEPS = 3
#: Tokens that choose as one: neighbours in a text choose alike, so that so many count as one independent choice.
DESIGN_EFFECT = 16
#: An overloaded expert has this many times its share of a uniform load, or is half of the way to the most possible.
OVERLOAD = 3.0
_NAMED = 5


def routing_findings(routing: xr.Dataset, names: Sequence[str]) -> list[Finding]:
    """Return findings about dead and overloaded experts, and about experts whose weights are not told apart.

    Dead: no token at each of the last 3 captured steps, where uniform routing would leave an expert of these layers
    without one in less than 5 % of trainings. Overloaded: at each of them the same expert has 3 times its uniform load,
    or half of the way to the largest possible, and more than uniform routing gives in 95 % of cases. For both bounds 16
    tokens count as one independent choice.

    Args:
        routing: ``/routing``.
        names: The matrices of ``/update``.
    """
    steps = routing["step"].values
    findings = []
    if len(steps) >= STEPS:
        findings += [*_dead(routing), *_overloaded(routing)]
    return [*findings, *_together(routing, names)]


def _dead(routing: xr.Dataset) -> list[Finding]:
    last = routing.isel(step=slice(-STEPS, None))
    dead = (last["assigned"].values == 0).all(0)
    chance = np.prod(_dead_chance(last), axis=0)
    # Of all experts of all layers, one would be without a token by chance in less than 5 %.
    layers = np.flatnonzero(dead.any(-1) & (chance * last["experts"].values.sum() <= LEVEL))
    if not len(layers):
        return []
    count, experts = int(dead[layers].sum()), int(last["experts"].values[layers].sum())
    where = [
        f"{last['layer'].values[row]} ({some(map(str, np.flatnonzero(dead[row]).tolist()), _NAMED)})" for row in layers
    ]
    return [
        Finding(
            "OD330",
            f"{count:,} of {counted(experts, 'expert')} in {counted(len(layers), 'layer')} got "
            f"no token at the last {STEPS} captured steps: {some(where, _NAMED)}. Uniform routing would leave an "
            "expert without a token for so long in less than 5 % of trainings.",
            "Check the loss or bias that balances the load. What no token reaches is not trained.",
            matrix=str(last["layer"].values[layers[0]]) if len(layers) == 1 else "",
            step=int(last["step"].values[-1]),
            evidence={
                "layers": [str(last["layer"].values[row]) for row in layers[:20]],
                "experts": count,
                "tokens": float(last["tokens"].values[:, layers].min()),
            },
        )
    ]


def _dead_chance(last: xr.Dataset) -> np.ndarray:
    """Return for each step and layer the probability that a given expert gets no token; 1 where it is unknown."""
    tokens, experts = last["tokens"].values, last["experts"].values.astype(np.float64)
    k = np.nansum(last["assigned"].values, -1) / np.where(tokens > 0, tokens, np.nan)
    k = np.where(last["routing"].values == SOFT, np.nan, k)
    return np.nan_to_num(dead_probability(tokens / DESIGN_EFFECT, k, np.broadcast_to(experts, k.shape)), nan=1.0)


def _overloaded(routing: xr.Dataset) -> list[Finding]:
    last = routing.isel(step=slice(-STEPS, None))
    tokens, experts = last["tokens"].values, last["experts"].values.astype(np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        k = np.nansum(last["assigned"].values, -1) / tokens
        most = np.broadcast_to(experts, k.shape)
        size = np.minimum(OVERLOAD / most, (1 / most + 1 / np.maximum(k, 1.0)) / 2)
        bound = np.fmax(size, largest_share(tokens / DESIGN_EFFECT, k, most))
    is_soft = last["routing"].values == SOFT
    over = np.all(last["load"].values > np.where(is_soft, np.inf, bound)[..., None], axis=0)
    layers = np.flatnonzero(over.any(-1))
    if not len(layers):
        return []
    load = last["load"].values[-1]
    worst = max(layers, key=lambda row: load[row][over[row]].max() * experts[row])
    expert = int(np.argmax(np.where(over[worst], load[worst], -1.0)))
    return [
        Finding(
            "OD331",
            f"In {counted(len(layers), 'layer')} one expert gets far more than its share of the tokens at the last "
            f"{STEPS} captured steps. The worst is expert {expert} of {last['layer'].values[worst]} with "
            f"{percent(load[worst, expert])}, {number(load[worst, expert] * experts[worst], 2)} times a uniform load.",
            "Check the loss or bias that balances the load. Such an expert is trained more than the others.",
            matrix=str(last["layer"].values[worst]) if len(layers) == 1 else "",
            step=int(last["step"].values[-1]),
            evidence={
                "layers": [str(last["layer"].values[row]) for row in layers[:20]],
                "load": float(load[worst, expert]),
                "uniform_load": 1 / float(experts[worst]),
                "largest_by_chance": float(last["largest_share_chance"].values[-1, worst]),
            },
        )
    ]


def _together(routing: xr.Dataset, names: Sequence[str]) -> list[Finding]:
    """Return a finding if matrices hold the weights of several experts."""
    of_one = {matrix for *_, matrix in matrices_by_expert(routing, names)}
    prefixes = tuple(f"{holder}." for holder, *_ in holders(routing))
    mixed = [name for row, name in enumerate(names) if row not in of_one and name.startswith(prefixes)]
    if not mixed:
        return []
    return [
        Finding(
            "OD333",
            f"{counted(len(mixed), 'matrix', 'matrices')} of experts cannot be told apart by expert: "
            f"{some(mixed, _NAMED)}. They are measured as they are, and missing in the norms by expert.",
            evidence={"names": mixed[:20]},
        )
    ]
