r"""Which singular directions of an adapter the loss needs, and whether an adapter of those alone does as well.

Of ΔW = Σ σ_i u_i v_iᵀ, removing direction i changes the loss by −σ_i g_i to first order, g_i = ∂L/∂σ_i
(:mod:`probes.singular_directions`). Its effects have one unit, that of the loss, in all matrices: so directions of all
matrices are put in one order, and the fewest are kept that hold a share of all positive effects. First order is no
proof. Near a minimum all slopes are noise about zero, and removing a direction is no small step. So the truncated
adapter is evaluated on groups that the choice has not seen, beside controls of the same ranks: the directions of
largest σ, random ones, those of smallest σ (Shortcuts in the Tail, arXiv 2606.07596); and beside the truncation to 99 %
of the energy.

Weights that are trained as they are have no such directions without the base; they stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from torch import nn

from dynamics import schema
from dynamics.intervention.truncations import (
    TRUNCATIONS,
    Adapters,
    Halves,
    TruncationEffects,
    not_truncated,
    padded,
    truncation_effects,
)
from dynamics.schema import ALL, label_arrays
from dynamics.spectra.measures import ENERGY
from probes.singular_directions import loss_slopes, low_rank_matrices
from probes.tasks import Task, require_names
from probes.undisturbed import undisturbed
from probes.watched import Watched

#: Share of all positive first-order effects that the kept directions hold.
SHARE = 0.99
#: Random truncations, whose effects are averaged.
DRAWS = 3


def sensitivity(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    *,
    matrices: str | None = None,
    share: float = SHARE,
    check: bool = True,
    draws: int = DRAWS,
    seed: int = 0,
    step: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> xr.Dataset:
    r"""Return the slope of each task's loss along each singular direction of a model's adapters, and what follows.

    Directions are ranked by their first-order effect on the pooled loss. The check cuts the adapter to those that one
    half of the groups chooses, and compares its losses with the whole adapter's on the other half, sample by sample;
    then with the halves exchanged. Truncations are added to the layers' outputs in single precision at least; weights,
    ``.grad``, modes and random states are as before afterwards.

    Costs one forward and backward pass over all samples, and 6 + ``draws`` forward passes for the check.

    Args:
        model: With trainable low-rank adapters (LoRA, rsLoRA, AdaLoRA); of several on one matrix, their sum counts.
            Weights trained as they are are left alone.
        tasks: Held-out samples; for the check of at least two groups a task.
        matrices: Regular expression; only matrices whose name matches.
        share: Of all positive first-order effects, the share that the kept directions hold.
        check: Evaluate truncated adapters; else their numbers are NaN.
        draws: Random truncations to average.
        seed: Of the random truncations.
        step: Of the training, for the result's coordinate.
        progress: Called with the number of samples passed through the model, and of all.

    Returns:
        The group ``/sensitivity``, see ``schema.SENSITIVITY``: ``loss_slope(step, matrix, index, task)``,
        ``rank_by_effect(step, matrix)``, ``truncation_effect(step, truncation, task)`` and more. ``reason`` says why a
        matrix has none.

    Raises:
        ValueError: If there are no adapters or tasks, a task cannot be split by groups, a loss, a gradient or a
            factor is not finite, or ``share`` or ``draws`` is out of range.

    >>> from peft import LoraConfig, get_peft_model
    >>> layer = nn.Linear(2, 2, bias=False)
    >>> _ = nn.init.zeros_(layer.weight)
    >>> lora = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    >>> model = get_peft_model(nn.Sequential(layer), lora).double()
    >>> squares = lambda model, batch: model(batch["x"].double()).square().sum(1)
    >>> task = Task("zero", [{"x": [1.0, 0.0]}, {"x": [0.0, 1.0]}], loss=squares)
    >>> result = sensitivity(model, [task])  # L = ½Σσ², so each slope is σ, and no direction is needed
    >>> np.allclose(result["loss_slope"].sel(task="zero"), result["singular_value"])
    True
    >>> result["rank_by_effect"].item()
    0.0
    >>> effect = result["truncation_effect"].sel(task="all", truncation="effect")
    >>> np.allclose(effect, result["loss"].sel(task="all"))
    True
    """
    tasks = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    if not 0 < share <= 1:
        raise ValueError(f"Expected a share in (0, 1], got {share}.")
    if draws < 1:
        raise ValueError(f"Expected at least 1 random truncation as draws, got {draws}.")
    with undisturbed(model) as quiet:
        require_names(tasks)
        halves = Halves.of(tasks) if check else Halves.whole(tasks)
        watched = low_rank_matrices(quiet, matrices)
        adapters = Adapters.of(watched)
        passes = 1 + (len(TRUNCATIONS) + draws if check else 0)
        advance = _counter(progress, passes * sum(map(len, tasks)))
        slopes = _measured(quiet, halves, watched, adapters, advance)
        reasons = _reasons(adapters, slopes.whole[0])
        is_judged = np.array([name not in reasons for name in adapters.names])
        pooled = np.where(is_judged[:, None], np.stack([slopes.whole[0], *slopes.of_halves[:, 0]]), np.nan)
        kept, *chosen = (kept_by_effect(adapters.sigma, part, share) for part in pooled)
        checked = dict.fromkeys(_OF_TRUNCATIONS, np.nan)
        if check:
            refused = not_truncated(quiet, adapters, is_judged)
            reasons |= refused
            is_cut = is_judged & ~np.isin(adapters.names, list(refused))
            result = truncation_effects(
                quiet, halves, adapters, np.stack(chosen), is_cut, draws=draws, seed=seed, advance=advance
            )
            checked = _of_truncations(result, adapters, slopes, halves)
    arrays = {
        "singular_value": adapters.sigma,
        "loss_slope": np.moveaxis(slopes.whole, 0, -1),
        "kept_by_effect": kept,
        "rank_by_effect": np.where(is_judged, kept.sum(1), np.nan),
        "rank_by_energy": adapters.rank_by_energy,
        "reason": np.array([reasons.get(name, "") for name in adapters.names], dtype=str),
        "loss": slopes.losses,
        "groups": halves.labels.groups,
        **checked,
    }
    return _dataset(arrays, adapters, tasks, step).assign_attrs(
        share=share, energy=ENERGY, draws=draws, seed=seed, checked=int(check)
    )


def kept_by_effect(
    values: Float[np.ndarray, "matrix index"], slopes: Float[np.ndarray, "matrix index"], share: float = SHARE
) -> Bool[np.ndarray, "matrix index"]:
    """Return the fewest directions, of all matrices, that hold a share of all positive first-order effects −σ g.

    Args:
        values: σ of each direction; NaN where there is none.
        slopes: g; directions without one are not kept.
        share: The share.

    >>> kept_by_effect(np.array([[3.0, 1.0], [2.0, 0.1]]), np.array([[0.1, -9.0], [-0.4, -2.0]]), 0.95).tolist()
    [[False, True], [True, False]]
    """
    effect = np.where(np.isfinite(slopes), -values * slopes, -np.inf).ravel()
    order = np.argsort(-effect, kind="stable")
    held = np.maximum(effect[order], 0.0).cumsum()
    # 1e-12, as for a rank at a share of energy: sums are rounded, and a share of 1 must be reached.
    count = 1 + int((held < (share - 1e-12) * held[-1]).sum()) if held.size and held[-1] > 0 else 0
    kept = np.zeros(effect.size, dtype=bool)
    kept[order[:count]] = True
    return kept.reshape(values.shape)


@dataclass(frozen=True)
class _Slopes:
    """Mean losses and their slopes; the first task is all together.

    Args:
        losses: Of all samples.
        whole: g of all samples.
        of_halves: g of the samples of each half.
    """

    losses: Float[np.ndarray, " task"]
    whole: Float[np.ndarray, "task matrix index"]
    of_halves: Float[np.ndarray, "half task matrix index"]


def _measured(
    model: nn.Module,
    halves: Halves,
    watched: Mapping[str, Watched],
    adapters: Adapters,
    advance: Callable[[int], None],
) -> _Slopes:
    losses, slopes = [], []
    for half in range(len(halves.numbers)):
        for task in halves.parts(half):
            loss, rows = loss_slopes(model, task, watched, adapters.directions)
            losses.append(loss)
            slopes.append(padded([rows[name] for name in adapters.names], adapters.sigma.shape[1]))
            advance(len(task))
    sizes = halves.sizes
    shape = (len(sizes), len(halves.tasks))
    loss, slope = np.reshape(losses, shape), np.reshape(slopes, (*shape, *adapters.sigma.shape))
    # A mean over samples is a mean over tasks or halves, weighted by their numbers of samples.
    loss, slope = (np.concatenate([_mean(part, sizes[:, 1:], 1)[:, None], part], 1) for part in (loss, slope))
    return _Slopes(_mean(loss, sizes, 0), _mean(slope, sizes, 0), slope)


def _mean(values: np.ndarray, sizes: Float[np.ndarray, "half task"], axis: int) -> np.ndarray:
    weights = sizes / sizes.sum(axis, keepdims=True)
    return (values * weights.reshape(*sizes.shape, *[1] * (values.ndim - 2))).sum(axis)


def _reasons(adapters: Adapters, slopes: Float[np.ndarray, "matrix index"]) -> dict[str, str]:
    """Return the matrices that cannot be judged, and why."""
    is_zero = ~adapters.present.any(1)
    is_unknown = (adapters.present & ~np.isfinite(slopes)).any(1)
    texts = np.select([is_zero, is_unknown], ["the update is zero", "a frozen adapter is part of the update"], "")
    return {name: str(text) for name, text in zip(adapters.names, texts, strict=True) if text}


#: Variables that need the check.
_OF_TRUNCATIONS = tuple(name for name, variable in schema.SENSITIVITY.items() if "truncation" in variable.dims)


def _of_truncations(
    result: TruncationEffects, adapters: Adapters, slopes: _Slopes, halves: Halves
) -> dict[str, np.ndarray]:
    kept = result.kept.mean(0)  # truncation, matrix, index
    removed = adapters.present - result.kept
    # What the first half chooses is evaluated on the second.
    held_out = np.nan_to_num(adapters.sigma * slopes.of_halves[::-1])
    predicted = np.einsum("hami,htmi->hat", removed, held_out)
    weights = halves.sizes[::-1] / halves.sizes.sum(0)
    return {
        "directions": kept.sum((1, 2)),
        "parameters": kept.sum(2) @ adapters.shapes.sum(1),
        "truncation_effect": result.effect.estimate,
        "truncation_effect_low": result.effect.low,
        "truncation_effect_high": result.effect.high,
        "predicted_truncation_effect": np.einsum("hat,ht->at", predicted, weights),
    }


def _dataset(
    arrays: Mapping[str, np.ndarray | float], adapters: Adapters, tasks: Sequence[Task], step: int
) -> xr.Dataset:
    coordinates = {
        "step": np.array([step], dtype=np.int64),
        "matrix": np.array(adapters.names, dtype=str),
        "index": np.arange(adapters.sigma.shape[1]),
        "task": np.array([ALL, *(task.name for task in tasks)], dtype=str),
        "truncation": np.array(TRUNCATIONS, dtype=str),
    }
    full = {
        name: np.broadcast_to(array, [len(coordinates[dim]) for dim in schema.SENSITIVITY[name].dims]).copy()
        for name, array in arrays.items()
    }
    shapes = {name: ("matrix", sizes) for name, sizes in zip(("out", "in"), adapters.shapes.T, strict=True)}
    return xr.Dataset(label_arrays(schema.SENSITIVITY, full), coords={**coordinates, **shapes})


def _counter(progress: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Return a function that adds up what is done and passes it on."""
    done = 0

    def advance(samples: int) -> None:
        nonlocal done
        done += samples
        progress(done, total)

    return advance
