"""How tasks share or contest directions, by block and pair of tasks: the labelled K in, a dataset out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import xarray as xr

from dynamics.described import labelled
from dynamics.fisher import entropy, sharing
from dynamics.fisher import task_structure as between
from dynamics.fisher.pairs import Estimate, Labels
from dynamics.fisher.samples import blocks_of, codes_of, members_of, own, require_exact
from dynamics.fisher.spectrum import fisher_eigenvalues
from dynamics.fisher.variables import TASKS
from dynamics.schema import GLOBAL


def task_structure(
    gram: Any,
    tasks: Sequence[str] | np.ndarray,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    losses: Sequence[float] | np.ndarray | None = None,
    space: str | None = None,
    permuted: Sequence[str] = (GLOBAL,),
    seed: int = 0,
) -> xr.Dataset:
    """How tasks share or contest directions: cosines, overlap, noise scale, transfer, and the parts of SE.

    Args:
        gram: K = GGᵀ; as in :func:`fisher_measures`.
        tasks, groups: Task and group of each sample; without groups each is taken to be independent.
        losses: Loss of each sample, for the transfer.
        space: Space of the gradients; transfer is NaN in every other than ``"factor"``. By default the Gram's own.
        permuted: Blocks whose χ is tested by permutations, which is costly; the rest have NaN.
        seed: Of the permutations.

    Returns:
        Variables over ``block``, ``task`` and ``task_``, each with its definition. ``"all"`` is among the tasks (how a
        task's gradient stands to the pooled one), but not in the conflict rate and the parts of SE.

    Raises:
        ValueError: If K or the labels do not fit.

    >>> found = task_structure(np.eye(4), ["x", "x", "y", "y"])
    >>> found["divergence"].item() == found["divergence_largest"].item()  # nothing is shared
    True
    """
    require_exact(gram)
    names, stacked = blocks_of(gram)
    samples = stacked.shape[-1]
    group, members = codes_of(groups, samples, "group"), members_of(tasks, samples)
    entropies = [
        entropy.spectral_entropy(fisher_eigenvalues(stacked[:, places[:, None], places]))
        for places in map(np.flatnonzero, members.values())
    ]
    return task_dataset(
        names,
        stacked,
        np.stack(entropies, axis=1),
        group,
        members,
        losses=losses,
        space=own(space, gram, "space"),
        permuted=permuted,
        seed=seed,
    )


def task_dataset(
    names: Sequence[str],
    stacked: np.ndarray,
    entropies: np.ndarray,
    group: np.ndarray,
    members: Mapping[str, np.ndarray],
    *,
    losses: Any,
    space: str | None,
    permuted: Sequence[str] = (GLOBAL,),
    seed: int = 0,
) -> xr.Dataset:
    """:func:`task_structure` of blocks already stacked, with SE of all samples and of each task, ``[block, task]``."""
    member = np.stack(list(members.values()), axis=1)
    labels, only = Labels(group, member), Labels(group, member[:, 1:])
    cosines = between.cosines(stacked, labels)
    in_conflict, decided = between.conflict_rate(cosines.cosine.low[:, 1:, 1:], cosines.cosine.high[:, 1:, 1:])
    traces = np.diagonal(stacked, axis1=1, axis2=2) @ only.member
    parts = sharing.decomposition(entropies[:, 0], entropies[:, 1:], traces)
    gap = sharing.purity_gap(stacked, only)
    arrays = {
        **_ends("cosine", cosines.cosine),
        "unresolved": cosines.unresolved,
        "cosine_raw": cosines.raw,
        "magnitude_similarity": cosines.magnitude_similarity,
        "conflict_rate": in_conflict,
        "decided_pairs": decided,
        **_ends("overlap", between.overlap(stacked, labels)),
        **_ends("noise_scale", between.noise_scale(stacked, labels)),
        **_ends("transfer", _transfer(stacked, labels, losses, space)),
        "spectral_entropy_mixture": parts.mixture,
        "spectral_entropy_within": parts.within,
        "divergence": parts.divergence,
        "divergence_largest": parts.largest,
        **_divergence_test(names, stacked, only, permuted, seed),
        **_ends("purity_gap", gap.gap),
        "sharing": gap.sharing,
    }
    coords = {"block": names, "task": list(members), "task_": list(members)}
    return xr.Dataset(labelled(TASKS, {name: arrays[name] for name in TASKS}), coords)


def _ends(name: str, found: Estimate) -> dict[str, np.ndarray]:
    return {name: found.estimate, f"{name}_low": found.low, f"{name}_high": found.high}


def _transfer(stacked: np.ndarray, labels: Labels, losses: Any, space: str | None) -> Estimate:
    if losses is None or space != "factor":
        return Estimate(*[np.full((len(stacked), *[labels.member.shape[1]] * 2), np.nan)] * 3)
    loss = np.asarray(losses, dtype=np.float64)
    if loss.shape != labels.group.shape:
        raise ValueError(f"Expected one loss for each of {len(labels.group)} samples, got shape {loss.shape}.")
    return between.first_order_transfer(stacked, labels, loss)


def _divergence_test(
    names: Sequence[str], stacked: np.ndarray, labels: Labels, permuted: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    found = np.full((5, len(names)), np.nan)
    tested = [place for place, name in enumerate(names) if name in permuted and labels.member.shape[1] > 1]
    for place in tested:
        found[:, [place]] = astuple(sharing.divergence_test(stacked[[place]], labels, seed=seed))
    known = ("normalised", "normalised_largest", "null_low", "null_high", "p_value")
    return {f"divergence_{name}": row for name, row in zip(known, found, strict=True)}
