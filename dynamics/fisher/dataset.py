"""The Fisher's spectrum and what follows from it, by block and task: Gram matrices in, a dataset out.

Concentration of an update along informative directions, by block and k: K and b in, a dataset out.

How tasks share or contest directions, by block and pair of tasks: the labelled K in, a dataset out.

Raw Fisher records, of a training or of probed checkpoints → the groups ``fisher``, ``concentration``, ``tasks``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
import xarray as xr

from dynamics.fisher import task_structure as structure
from dynamics.fisher.concentration import (
    DRAWS,
    MOST_TIMES,
    captured,
    effective_batches,
    isotropic_null,
    matched_gain,
    rayleigh_ratio,
    relative_rayleigh_ratio,
)
from dynamics.fisher.rarefaction import rarefied, sizes_up_to
from dynamics.fisher.samples import (
    SPLITS,
    Estimate,
    Labels,
    blocks_of,
    codes_of,
    counted_groups,
    interval,
    members_of,
    numbers_of,
    own,
    require_exact,
    vectors_of,
    weight_of,
)
from dynamics.fisher.spectrum import (
    centred,
    directional,
    dominant_ratio_error,
    dominant_ratio_interval,
    dominant_ratio_noise_reduced,
    dominant_ratio_plug_in,
    dominant_ratio_split,
    eigenvalue_errors,
    entropy_error,
    fisher_eigenvalues,
    fisher_eigenvectors,
    log_participation_ratio,
    normalised_by_sample_rank,
    participation_ratio_plug_in,
    spectral_entropy,
    spectral_entropy_block_diagonal,
)
from dynamics.fisher.variables import CONCENTRATION, FISHER, TASKS
from dynamics.schema import GLOBAL, labelled


def fisher_measures(
    gram: Any,
    tasks: Sequence[str] | np.ndarray | None = None,
    groups: Sequence[Any] | np.ndarray | None = None,
    *,
    dimension: Mapping[str, Any] | float | int | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """Spectrum, SE, ρ and participation ratio of the Fisher, for all samples and for each task.

    Args:
        gram: K = GGᵀ, unnormalised: ``[sample, sample]``, a mapping of block to such, or what ``gradient_gram``
            returns. Of gradients that were randomly projected, the participation ratio is corrected for that; other
            measures are those of the projected gradients.
        tasks: Task of each sample; without it there is only ``"all"``.
        groups: What samples belong to (an image, a patient); without it each is taken to be independent.
        dimension: d, numbers that the gradient of a block has; by default the Gram's own, else larger than N.
        seed: Of random halves and subsets.

    Returns:
        Variables over ``block``, ``task`` (with ``"all"``), ``index`` and ``n``, each with its definition. NaN where a
        number does not exist: a zero or non-finite K, intervals of fewer than two or three groups.

    Raises:
        ValueError: If K is not square, symmetric and positive semi-definite, or labels do not fit the samples.

    >>> found = fisher_measures(np.diag([2.0, 1.0, 1.0]))
    >>> found["dominant_ratio"].sel(block="global", task="all").item()
    0.5
    """
    names, stacked = blocks_of(gram)
    samples = stacked.shape[-1]
    group, members = codes_of(groups, samples, "group"), members_of(tasks, samples)
    size = numbers_of(own(dimension, gram, "dimension"), names, "dimension")
    projection = getattr(gram, "projection", 0)
    return fisher_dataset(names, stacked, fisher_eigenvectors(stacked), group, members, size, seed, projection)


def fisher_dataset(
    names: Sequence[str],
    stacked: np.ndarray,
    spectrum: tuple[np.ndarray, np.ndarray],
    group: np.ndarray,
    members: Mapping[str, np.ndarray],
    size: np.ndarray,
    seed: int,
    projection: int = 0,
) -> xr.Dataset:
    """:func:`fisher_measures` of blocks already stacked, with the eigenvectors of all samples together."""
    samples = stacked.shape[-1]
    curve = sizes_up_to(len(np.unique(group)))
    each = [
        _of_task(stacked, spectrum if member.all() else None, group, member, size, curve, seed)
        for member in members.values()
    ]
    arrays = {name: np.stack([part[name] for part in each], axis=1) for name in each[0]}
    labels = Labels(group, np.stack(list(members.values()), axis=1))
    for suffix, gram in (("", stacked), ("_directional", directional(stacked))):
        ratio = log_participation_ratio(gram, labels, projection)
        for end, part in (("", ratio.estimate), ("_low", ratio.low), ("_high", ratio.high)):
            arrays |= {f"ln_participation_ratio{suffix}{end}": part, f"participation_ratio{suffix}{end}": np.exp(part)}
    weight = weight_of(stacked, labels)
    arrays |= {
        "effective_groups": weight.groups,
        "largest_group_share": weight.largest_group,
        "largest_samples_share": weight.largest_samples,
    }
    arrays |= {"samples": labels.samples.astype(np.float64), "groups": labels.groups.astype(np.float64)}
    arrays["spectral_entropy_block_diagonal"] = _block_diagonal(names, arrays)
    coords = {"block": names, "task": list(members), "index": np.arange(samples), "n": curve}
    return xr.Dataset(labelled(FISHER, {name: arrays[name] for name in FISHER}), coords)


def _of_task(
    stacked: np.ndarray,
    spectrum: tuple[np.ndarray, np.ndarray] | None,
    group: np.ndarray,
    member: np.ndarray,
    size: np.ndarray,
    curve: Sequence[int],
    seed: int,
) -> dict[str, np.ndarray]:
    """Measures of some of the samples, each ``[block, …]``, the spectrum padded with NaN."""
    places = np.flatnonzero(member)
    gram, groups = stacked[:, places[:, None], places], group[places]
    own = Labels(groups, np.ones((len(places), 1), dtype=bool))
    values, vectors = fisher_eigenvectors(gram) if spectrum is None else spectrum
    around_mean, of_directions = fisher_eigenvalues(centred(gram)), fisher_eigenvalues(directional(gram))
    counted = counted_groups(gram, own)
    low, high = interval(np.zeros_like(values), eigenvalue_errors(values, vectors, own.membership), counted)
    spectral = spectral_entropy(values)
    reach = interval(spectral, entropy_error(values, vectors, own.membership), counted[:, 0])
    few = rarefied(gram, groups, curve, seed=seed)
    plug_in, split = dominant_ratio_plug_in(values), dominant_ratio_split(gram, groups, seed=seed)
    error = dominant_ratio_error(values, vectors, own.membership)
    ends = dominant_ratio_interval(split, plug_in, error, own.membership.shape[1])
    padding = ((0, 0), (0, len(member) - len(places)))
    return {
        "trace": np.trace(gram, axis1=1, axis2=2) / len(places),
        "eigenvalue": np.pad(values, padding, constant_values=np.nan),
        "eigenvalue_low": np.pad(values * np.exp(low), padding, constant_values=np.nan),
        "eigenvalue_high": np.pad(values * np.exp(high), padding, constant_values=np.nan),
        "spectral_entropy": spectral,
        "spectral_entropy_low": reach[0],
        "spectral_entropy_high": reach[1],
        "spectral_entropy_normalised": normalised_by_sample_rank(spectral, len(places), size),
        "spectral_entropy_centred": spectral_entropy(around_mean),
        "spectral_entropy_directional": spectral_entropy(of_directions),
        "dominant_ratio": plug_in,
        "dominant_ratio_low": ends[0],
        "dominant_ratio_high": ends[1],
        "dominant_ratio_split": split,
        "dominant_ratio_noise_reduced": dominant_ratio_noise_reduced(values),
        "dominant_ratio_centred": dominant_ratio_plug_in(around_mean),
        "dominant_ratio_directional": dominant_ratio_plug_in(of_directions),
        "participation_ratio_plug_in": participation_ratio_plug_in(values),
        "participation_ratio_centred": participation_ratio_plug_in(around_mean),
        "rarefied_spectral_entropy": few.spectral_entropy,
        "rarefied_spectral_entropy_deviation": few.spectral_entropy_deviation,
        "rarefied_dominant_ratio": few.dominant_ratio,
        "rarefied_participation_ratio": few.participation_ratio,
    }


def _block_diagonal(names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """By the chain rule over all blocks that are parts; NaN where there is only the whole."""
    parts = np.array([name != GLOBAL for name in names])
    if not parts.any():
        return np.full(arrays["trace"].shape[1], np.nan)
    traces, entropies = arrays["trace"][parts], arrays["spectral_entropy"][parts]
    return np.asarray(spectral_entropy_block_diagonal(traces.T, entropies.T))


#: Numbers of leading directions in which the share of an update is measured.
LEADING = (1, 2, 4, 8, 16)
#: A share above 1 by more than rounding means that b, ‖δ‖ and K do not belong together.
_SHARE_LIMIT = 1 + 1e-3


def concentration(
    gram: Any,
    update_product: Any = None,
    update_norm: Mapping[str, Any] | float | int | None = None,
    *,
    groups: Sequence[Any] | np.ndarray | None = None,
    batch_size: int | None = None,
    dimension: Mapping[str, Any] | float | int | None = None,
    k: Sequence[int] = LEADING,
    splits: int = SPLITS,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """Share of an update inside the Fisher's leading directions, beside an isotropic and a gradient null.

    Args:
        gram: K = GGᵀ of probe samples that took no part in the update; as in :func:`fisher_measures`.
        update_product: b = Gδ: ``[sample]``, a mapping of block to such, or left out where the Gram has its own.
        update_norm: ‖δ‖, not squared, inside the space in which gradients live; or left out likewise.
        groups: What samples belong to; without it each is taken to be independent.
        batch_size: Samples behind the update: the optimizer's batch times the steps; with momentum β the batch of a
            single step counts (1 + β)/(1 − β) times. Without it there is no gradient null, and nothing is called
            concentrated.
        dimension: d, for the isotropic null; by default the Gram's own.
        k: Numbers of leading directions.
        splits, draws, seed: Of random halves and null gradients.

    Returns:
        Variables over ``block`` and ``k``, each with its definition. ``captured`` has directions from all samples, and
        belongs beside ``null_isotropic``; ``captured_split`` has those of half of them, and belongs beside
        ``null_gradient``. ``concentrated`` only where both gains, centred and not, are above 1 with their intervals,
        and ``batch_size`` is at most ``null_batch_limit``. Decoupled weight decay is part of the update as given.

    Raises:
        ValueError: If shapes or blocks do not fit, or b and ‖δ‖ cannot belong to K.

    >>> found = concentration(np.diag([4.0, 1.0]), np.array([2.0, 0.0]), 1.0, dimension=10, k=[1, 2])
    >>> found["captured"].values.tolist(), found["null_isotropic"].values.tolist()
    ([[1.0, 1.0]], [[0.1, 0.2]])
    """
    require_exact(gram)
    names, stacked = blocks_of(gram)
    samples = stacked.shape[-1]
    if not len(k) or min(k) < 1:
        raise ValueError(f"Expected numbers of leading directions of at least 1, got {list(k)}.")
    group = codes_of(groups, samples, "group")
    norm = _norm_of(gram, update_norm, names)
    product = vectors_of(own(update_product, gram, "update_product"), names, samples, "an update product b = Gδ")
    size = numbers_of(own(dimension, gram, "dimension"), names, "dimension")
    spectrum = fisher_eigenvectors(stacked)
    found = concentration_dataset(
        names, stacked, spectrum, product, norm, group, batch_size or 0, size, k, splits=splits, draws=draws, seed=seed
    )
    share = np.nan_to_num(found["captured"].values).max(1)
    if (share > _SHARE_LIMIT).any():
        place = int(share.argmax())
        raise ValueError(
            f"Expected b = Gδ and ‖δ‖ of one update, got a share of {share[place]:.3g} of "
            f"block {names[place]!r} in its directions, above 1. Give K unnormalised, and ‖δ‖, not its square."
        )
    return found


def _norm_of(gram: Any, update_norm: Any, names: Sequence[str]) -> np.ndarray:
    if update_norm is None:
        update_norm = {name: value**0.5 for name, value in getattr(gram, "update_norm_squared", {}).items()}
        if not update_norm:
            raise ValueError("Expected update_norm = ‖δ‖ of each block, got none, and the Gram has no update.")
    return numbers_of(update_norm, names, "update norm ‖δ‖")


def concentration_dataset(
    names: Sequence[str],
    stacked: np.ndarray,
    spectrum: tuple[np.ndarray, np.ndarray],
    product: np.ndarray,
    norm: np.ndarray,
    group: np.ndarray,
    batch_size: int,
    size: np.ndarray,
    k: Sequence[int],
    *,
    splits: int = SPLITS,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """:func:`concentration` of blocks already stacked, without its check of b and ‖δ‖ against K."""
    values, vectors = spectrum
    labels = Labels(group, np.ones((len(group), 1), dtype=bool))
    most = MOST_TIMES * (len(group) // 2)
    ratio = rayleigh_ratio(stacked, product, norm, size, labels)
    null, null_low, null_high = isotropic_null(size, k)
    arrays = {
        "captured": captured(values, vectors, product, norm, k),
        "null_isotropic": null,
        "null_isotropic_low": null_low,
        "null_isotropic_high": null_high,
    }
    for suffix in ("", "_centred"):
        gain = matched_gain(
            stacked, product, norm, group, batch_size, k, centre=bool(suffix), splits=splits, draws=draws, seed=seed
        )
        arrays |= {
            f"captured_split{suffix}": gain.captured,
            f"null_gradient{suffix}": gain.null,
            f"null_gradient_low{suffix}": gain.null_low,
            f"null_gradient_high{suffix}": gain.null_high,
            f"gain{suffix}": gain.gain,
            f"ln_gain{suffix}": gain.ln_gain,
            f"gain_low{suffix}": gain.low,
            f"gain_high{suffix}": gain.high,
        }
    arrays |= {
        "concentrated": (batch_size <= most) & (arrays["gain_low"] > 1) & (arrays["gain_low_centred"] > 1),
        "null_batch": np.array(batch_size if batch_size > 0 else np.nan),
        "null_batch_limit": np.array(float(most)),
        "rayleigh_ratio": ratio.estimate,
        "rayleigh_ratio_low": ratio.low,
        "rayleigh_ratio_high": ratio.high,
        "relative_rayleigh_ratio": relative_rayleigh_ratio(values, product, norm),
        "update_norm": norm,
    }
    return xr.Dataset(labelled(CONCENTRATION, arrays), {"block": list(names), "k": list(k)})


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
        spectral_entropy(fisher_eigenvalues(stacked[:, places[:, None], places]))
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
    cosines = structure.cosines(stacked, labels)
    in_conflict, decided = structure.conflict_rate(cosines.cosine.low[:, 1:, 1:], cosines.cosine.high[:, 1:, 1:])
    traces = np.diagonal(stacked, axis1=1, axis2=2) @ only.member
    parts = structure.decomposition(entropies[:, 0], entropies[:, 1:], traces)
    gap = structure.purity_gap(stacked, only)
    arrays = {
        **_ends("cosine", cosines.cosine),
        "unresolved": cosines.unresolved,
        "cosine_raw": cosines.raw,
        "magnitude_similarity": cosines.magnitude_similarity,
        "conflict_rate": in_conflict,
        "decided_pairs": decided,
        **_ends("overlap", structure.overlap(stacked, labels)),
        **_ends("noise_scale", structure.noise_scale(stacked, labels)),
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
    return structure.first_order_transfer(stacked, labels, loss)


def _divergence_test(
    names: Sequence[str], stacked: np.ndarray, labels: Labels, permuted: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    found = np.full((5, len(names)), np.nan)
    tested = [place for place, name in enumerate(names) if name in permuted and labels.member.shape[1] > 1]
    for place in tested:
        found[:, [place]] = astuple(structure.divergence_test(stacked[[place]], labels, seed=seed))
    known = ("normalised", "normalised_largest", "null_low", "null_high", "p_value")
    return {f"divergence_{name}": row for name, row in zip(known, found, strict=True)}


#: Variables of the record that the result keeps, so that everything else can be computed again.
_KEPT = ("gram", "update_product", "update_norm_squared", "dimension", "loss")
#: And what older records lack.
_STATED = ("momentum",)
_LABELS = ("sample_task", "sample_group", "sample_id")
_SHARE_OUTSIDE = {
    "units": "1",
    "long_name": "share of the update outside the space",
    "definition": "share of ‖δ‖² that no gradient in this space can produce",
}


def measured(record: xr.Dataset, *, k: Sequence[int] = LEADING, seed: int = 0) -> dict[str, xr.Dataset]:
    """Groups of the result from the raw records of all steps.

    Timing is the record's: gradients at the start of the increment (``evaluated_at_step``) if it is a capture's. The
    null gradient's batch is the optimizer's, times the :func:`effective_batches` of the steps between that and ``step``
    and of the momentum: what one batch of all those samples would give, which is the most concentrated that plain
    gradient descent could be. Unknown momentum counts as none, which a finding says.

    Args:
        record: ``gram(step, block, sample, sample_)``, ``update_product(step, block, sample)``,
            ``update_norm_squared``, ``share_outside_space``, ``dimension`` ``(step, block)``, ``loss(step, sample)``;
            task, group and id of each ``sample``; ``evaluated_at_step(step)``; attributes ``space``, ``fisher``,
            ``unit``, ``reduction``, ``batch_size`` (0 if not known). ``momentum(step)`` where it is known.
        k: Numbers of leading directions.
        seed: Of random halves, subsets, null gradients and permutations; the same at every step.

    Returns:
        ``fisher`` (with K and b themselves), ``concentration`` and ``tasks``, each with ``step`` in front. What is not
        known is NaN; a sample without gradients in every block at a step is left out there.

    Raises:
        ValueError: If a K is not a Gram matrix, or there is no step.
    """
    if not record.sizes["step"]:
        raise ValueError("Expected at least one record of the Fisher, got none.")
    found = [_of_step(record.isel(step=place), k, seed) for place in range(record.sizes["step"])]
    groups = {
        name: xr.concat([step[name] for step in found], dim=record["step"].variable.to_index(), join="outer")
        for name in ("fisher", "concentration", "tasks")
    }
    kept = record[[*_KEPT, *(name for name in _STATED if name in record)]].assign_coords(
        {name: record[name] for name in _LABELS}
    )
    groups["fisher"] = xr.merge([kept, groups["fisher"]], combine_attrs="drop_conflicts")
    groups["concentration"]["share_outside_space"] = record["share_outside_space"].assign_attrs(_SHARE_OUTSIDE)
    for group in groups.values():
        group.coords["evaluated_at_step"] = record["evaluated_at_step"]
        group.attrs = dict(record.attrs)
    return groups


def _of_step(record: xr.Dataset, k: Sequence[int], seed: int) -> dict[str, xr.Dataset]:
    names = record["block"].values.tolist()
    diagonal = np.diagonal(record["gram"].values, axis1=1, axis2=2)
    known = np.asarray(np.isfinite(diagonal).any(0))
    # No gradient at all: nothing is known of any sample.
    present = known if known.any() else np.ones_like(known)
    here = record.isel(sample=present, sample_=present)
    _, stacked = blocks_of(dict(zip(names, here["gram"].values, strict=True)))
    spectrum = fisher_eigenvectors(stacked)
    members = members_of(here["sample_task"].values, len(stacked[0]))
    group = codes_of(here["sample_group"].values, len(stacked[0]), "group")
    dimension = here["dimension"].values
    fisher = fisher_dataset(names, stacked, spectrum, group, members, dimension, seed)
    tasks = task_dataset(
        names,
        stacked,
        fisher["spectral_entropy"].values,
        group,
        members,
        losses=here["loss"].values,
        space=here.attrs["space"],
        seed=seed,
    )
    concentration = concentration_dataset(
        names,
        stacked,
        spectrum,
        here["update_product"].values,
        np.sqrt(here["update_norm_squared"].values),
        group,
        _batch_of(here),
        dimension,
        k,
        seed=seed,
    )
    return {"fisher": fisher, "concentration": concentration, "tasks": tasks}


def _batch_of(record: xr.Dataset) -> int:
    """Samples behind the update."""
    before = int(record["evaluated_at_step"])
    momentum = float(record["momentum"]) if "momentum" in record else 0.0
    return round(
        int(record.attrs["batch_size"]) * effective_batches(max(int(record["step"]) - before, 1), before, momentum)
    )
