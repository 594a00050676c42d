"""The Fisher's numbers as labelled datasets: of one Gram matrix, and of the records of all steps.

The groups of a result are ``fisher`` (spectrum and what follows from it), ``concentration`` (the update along
informative directions) and ``tasks`` (how tasks share or contest directions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, replace
from typing import Any

import numpy as np
import xarray as xr

from dynamics.fisher.concentration import (
    DRAWS,
    MOST_TIMES,
    effective_batches,
    energy_share,
    isotropic_null,
    matched_gains,
    rayleigh_ratio,
    relative_rayleigh_ratio,
)
from dynamics.fisher.deprecated import accepting
from dynamics.fisher.rarefaction import rarefied, sizes_up_to
from dynamics.fisher.samples import (
    SPLITS,
    Estimate,
    SampleGroups,
    StackedGram,
    confidence_interval,
    counted_groups,
    weight_of,
)
from dynamics.fisher.spectrum import (
    centred_eigenvalues,
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
    fisher_entropy,
    log_participation_ratio,
    normalised_by_sample_rank,
    participation_ratio_plug_in,
    shares_by_group,
    spectral_entropy_block_diagonal,
)
from dynamics.fisher.task_structure import (
    conflict_rate,
    cosines,
    decomposition,
    divergence_test,
    first_order_transfer,
    noise_scale,
    overlap,
    purity_gap,
)
from dynamics.schema import (
    CONCENTRATION,
    FISHER,
    FISHER_RECORD,
    GLOBAL,
    OPTIMIZER_RECORD,
    SAMPLE_LABELS,
    TASKS,
    Variable,
    label_arrays,
)
from dynamics.spectra.workers import available_cores, single_threaded_workers
from probes.gram import ProbeGram

#: Numbers of leading directions in which the share of an update is measured.
LEADING = (1, 2, 4, 8, 16)
#: A share above 1 by more than rounding means that b, ‖δ‖ and K do not belong together.
_SHARE_LIMIT = 1 + 1e-3


def _at_one_step(variables: Mapping[str, Variable], arrays: Mapping[str, np.ndarray]) -> dict[str, xr.Variable]:
    """Label arrays of one step: the schema's dimensions but for ``step``, which comes first."""
    return label_arrays({name: replace(variables[name], dims=variables[name].dims[1:]) for name in arrays}, arrays)


@accepting("tasks", "groups", "dimension")
def fisher_measures(gram: ProbeGram, *, seed: int = 0) -> xr.Dataset:
    """Return spectrum, SE, ρ and participation ratio of the Fisher, for all samples and for each task.

    Args:
        gram: K with the tasks and groups of its samples, as :func:`probes.gradient_gram` returns it. For gradients that
            were randomly projected, the participation ratio is corrected for that; other measures are those of the
            projected gradients.
        seed: Seed of random halves and subsets.

    Returns:
        Variables over ``block``, ``task`` (with ``"all"``), ``index`` and ``n``, each with its definition. NaN where a
        number does not exist: a zero or non-finite K, intervals of fewer than two or three groups.

    Raises:
        ValueError: If K is not square, symmetric and positive semi-definite, or labels do not fit the samples.

    >>> from probes import ProbeGram
    >>> measures = fisher_measures(ProbeGram({"global": np.diag([2.0, 1.0, 1.0])}))
    >>> measures["dominant_ratio"].sel(block="global", task="all").item()
    0.5
    """
    samples = StackedGram.of(gram)
    (arrays,) = _by_parts(samples, lambda part: [_fisher_arrays(part, fisher_eigenvectors(part.gram), seed)])
    return _fisher_dataset(samples, arrays)


def _by_parts(
    gram: StackedGram, measure: Callable[[StackedGram], list[dict[str, np.ndarray]]]
) -> list[dict[str, np.ndarray]]:
    """Return arrays of all blocks, from those of a few at a time, each ``[block, …]``.

    Parts are measured side by side, on one core each: then numbers do not depend on how many cores there are.
    """
    parts = gram.parts()
    with single_threaded_workers(min(len(parts), available_cores())) as executor:
        measured = list(executor.map(measure, parts))
    return [
        {name: np.concatenate([part[name] for part in group]) for name in group[0]}
        for group in zip(*measured, strict=True)
    ]


def _fisher_arrays(gram: StackedGram, spectrum: tuple[np.ndarray, np.ndarray], seed: int) -> dict[str, np.ndarray]:
    """Return the measures of each block, given the eigenvalues and eigenvectors of all samples together."""
    labels = gram.labels
    curve = sizes_up_to(len(np.unique(labels.group)))
    by_task = [
        _measures_of_task(gram, spectrum if member.all() else None, member, curve, seed) for member in labels.member.T
    ]
    arrays = {name: np.stack([measures[name] for measures in by_task], axis=1) for name in by_task[0]}
    for suffix, k in (("", gram.gram), ("_directional", directional(gram.gram))):
        found = log_participation_ratio(k, labels, gram.projection, gram.dimension)
        ends = _with_ends(f"ln_participation_ratio{suffix}", found)
        arrays |= ends | {name.removeprefix("ln_"): np.exp(value) for name, value in ends.items()}
    weight = weight_of(gram.gram, labels)
    return arrays | {
        "effective_groups": weight.groups,
        "largest_group_share": weight.largest_group,
        "largest_samples_share": weight.largest_samples,
    }


def _fisher_dataset(gram: StackedGram, arrays: dict[str, np.ndarray]) -> xr.Dataset:
    """Return :func:`fisher_measures`, given the measures of each block."""
    labels = gram.labels
    curve = sizes_up_to(len(np.unique(labels.group)))
    arrays |= {
        "samples": labels.samples.astype(np.float64),
        "groups": labels.groups.astype(np.float64),
        "spectral_entropy_block_diagonal": _block_diagonal(gram.blocks, arrays),
    }
    coords = {"block": list(gram.blocks), "task": list(gram.tasks), "index": range(len(labels.group)), "n": curve}
    return xr.Dataset(_at_one_step(FISHER, {name: arrays[name] for name in FISHER if name in arrays}), coords)


def _measures_of_task(
    gram: StackedGram,
    spectrum: tuple[np.ndarray, np.ndarray] | None,
    member: np.ndarray,
    curve: Sequence[int],
    seed: int,
) -> dict[str, np.ndarray]:
    """Return measures of one task's samples, each ``[block, …]``, the spectrum padded with NaN."""
    samples = np.flatnonzero(member)
    k = gram.gram if member.all() else gram.gram[:, samples[:, None], samples]
    group = gram.labels.group[samples]
    labels = SampleGroups.of_one_task(group)
    values, vectors = fisher_eigenvectors(k) if spectrum is None else spectrum
    around_mean, of_directions = centred_eigenvalues(values, vectors), fisher_eigenvalues(directional(k))
    by_group, counted = shares_by_group(vectors, labels), counted_groups(k, labels)
    errors = eigenvalue_errors(values, by_group, labels.membership.mean(0))
    low, high = confidence_interval(np.zeros_like(values), errors, counted)
    entropy = fisher_entropy(values)
    entropy_low, entropy_high = confidence_interval(entropy, entropy_error(values, by_group), counted[:, 0])
    rarefaction = rarefied(k, group, curve, seed=seed, eigenvalues=values)
    plug_in, split = dominant_ratio_plug_in(values), dominant_ratio_split(k, group, seed=seed)
    error = dominant_ratio_error(values, by_group)
    ratio_low, ratio_high = dominant_ratio_interval(split, plug_in, error, by_group.shape[1])
    padding = ((0, 0), (0, len(member) - len(samples)))
    return {
        "trace": np.trace(k, axis1=1, axis2=2) / len(samples),
        "eigenvalue": np.pad(values, padding, constant_values=np.nan),
        "eigenvalue_low": np.pad(values * np.exp(low), padding, constant_values=np.nan),
        "eigenvalue_high": np.pad(values * np.exp(high), padding, constant_values=np.nan),
        "spectral_entropy": entropy,
        "spectral_entropy_low": entropy_low,
        "spectral_entropy_high": entropy_high,
        "spectral_entropy_normalised": normalised_by_sample_rank(entropy, len(samples), gram.dimension),
        "spectral_entropy_centred": fisher_entropy(around_mean),
        "spectral_entropy_directional": fisher_entropy(of_directions),
        "dominant_ratio": plug_in,
        "dominant_ratio_low": ratio_low,
        "dominant_ratio_high": ratio_high,
        "dominant_ratio_split": split,
        "dominant_ratio_noise_reduced": dominant_ratio_noise_reduced(values),
        "dominant_ratio_centred": dominant_ratio_plug_in(around_mean),
        "dominant_ratio_directional": dominant_ratio_plug_in(of_directions),
        "participation_ratio_plug_in": participation_ratio_plug_in(values),
        "participation_ratio_centred": participation_ratio_plug_in(around_mean),
        "rarefied_spectral_entropy": rarefaction.spectral_entropy,
        "rarefied_spectral_entropy_deviation": rarefaction.spectral_entropy_deviation,
        "rarefied_dominant_ratio": rarefaction.dominant_ratio,
        "rarefied_participation_ratio": rarefaction.participation_ratio,
    }


def _block_diagonal(blocks: Sequence[str], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return SE of the block-diagonal Fisher, over all blocks but the global one; NaN where there is no other."""
    parts = np.array([name != GLOBAL for name in blocks])
    if not parts.any():
        return np.full(arrays["trace"].shape[1], np.nan)
    return np.asarray(spectral_entropy_block_diagonal(arrays["trace"][parts].T, arrays["spectral_entropy"][parts].T))


@accepting("update_product", "update_norm", "groups", "batch_size", "dimension")
def concentration(
    gram: ProbeGram,
    *,
    k: Sequence[int] = LEADING,
    splits: int = SPLITS,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """Return the share of an update in the Fisher's leading directions, beside an isotropic and a gradient null.

    Args:
        gram: K, b and ‖δ‖² of held-out samples and an update, as ``probes.gradient_gram(model, tasks, update=change,
            batch_size=…)`` returns them. Without ``batch_size`` there is no gradient null, and nothing is called
            concentrated.
        k: Numbers of leading directions.
        splits: Number of random halves.
        draws: Number of null gradients for each half.
        seed: Seed of both.

    Returns:
        Variables over ``block`` and ``k``, each with its definition. ``captured`` is the share in directions from all
        samples; compare it with ``null_isotropic``. ``captured_split`` has directions from half of the samples; compare
        it with ``null_gradient``. ``concentrated`` is true only where both gains, centred and not, are above 1 with
        their intervals, and ``batch_size`` is at most ``null_batch_limit``. Decoupled weight decay is part of the
        update.

    Raises:
        ValueError: If shapes or blocks do not fit, there is no update, or b and ‖δ‖ cannot belong to K.

    >>> from probes import ProbeGram
    >>> gram = ProbeGram(
    ...     {"global": np.diag([4.0, 1.0])},
    ...     update_product={"global": np.array([2.0, 0.0])},
    ...     update_norm_squared={"global": 1.0},
    ...     dimension={"global": 10},
    ... )
    >>> shares = concentration(gram, k=[1, 2])
    >>> shares["captured"].values.tolist(), shares["null_isotropic"].values.tolist()
    ([[1.0, 1.0]], [[0.1, 0.2]])
    """
    if not len(k) or min(k) < 1:
        raise ValueError(f"Expected numbers of leading directions of at least 1, got {list(k)}.")
    if not gram.update_product or not gram.update_norm_squared:
        raise ValueError(
            "Expected a Gram with update_product = Gδ and update_norm_squared = ‖δ‖² of an update, got none. "
            "Measure it with probes.gradient_gram(model, tasks, update=change)."
        )
    samples = StackedGram.of(gram)
    samples.require_exact()
    options = {"splits": splits, "draws": draws, "seed": seed}
    (arrays,) = _by_parts(
        samples, lambda part: [_concentration_arrays(part, fisher_eigenvectors(part.gram), k, **options)]
    )
    shares = _concentration_dataset(samples, arrays, k)
    largest = np.nan_to_num(shares["captured"].values).max(1)
    if (largest > _SHARE_LIMIT).any():
        block = int(largest.argmax())
        raise ValueError(
            f"Expected b = Gδ and ‖δ‖² of one update, got a share of {largest[block]:.3g} of block "
            f"{gram.blocks[block]!r} in its directions, above 1. Give K unnormalised, and the square of ‖δ‖."
        )
    return shares


def _concentration_arrays(
    gram: StackedGram, spectrum: tuple[np.ndarray, np.ndarray], k: Sequence[int], **sampling: Any
) -> dict[str, np.ndarray]:
    """Return the shares of each block; ``sampling`` is for the gradient null."""
    product, norm = gram.update_product, gram.update_norm
    arrays = {
        "captured": energy_share(*spectrum, product, norm, k),
        **_with_ends("null_isotropic", Estimate(*isotropic_null(gram.dimension, k))),
    }
    for suffix in ("", "_centred"):
        gains = matched_gains(gram, k, centre=bool(suffix), **sampling)
        arrays[f"captured_split{suffix}"] = gains[0].captured
        for gain, null, over in zip(
            gains, ("null_gradient", "null_optimizer"), ("gain", "gain_optimizer"), strict=True
        ):
            arrays |= {
                f"{null}{suffix}": gain.null,
                f"{null}_low{suffix}": gain.null_low,
                f"{null}_high{suffix}": gain.null_high,
                f"{over}{suffix}": gain.gain,
                f"ln_{over}{suffix}": gain.ln_gain,
                f"{over}_low{suffix}": gain.low,
                f"{over}_high{suffix}": gain.high,
            }
    return arrays | {
        **_with_ends("rayleigh_ratio", rayleigh_ratio(gram)),
        "relative_rayleigh_ratio": relative_rayleigh_ratio(spectrum[0], product, norm),
        "update_norm": norm,
    }


def _concentration_dataset(gram: StackedGram, arrays: dict[str, np.ndarray], k: Sequence[int]) -> xr.Dataset:
    """Return :func:`concentration` without its check of b and ‖δ‖ against K, given the shares of each block."""
    batch_size, limit = gram.batch_size, MOST_TIMES * (len(gram.labels.group) // 2)
    within = batch_size <= limit
    arrays |= {
        **{
            name: within & (arrays[f"{gain}_low"] > 1) & (arrays[f"{gain}_low_centred"] > 1)
            for name, gain in (("concentrated", "gain"), ("concentrated_optimizer", "gain_optimizer"))
        },
        "null_batch": np.array(batch_size if batch_size > 0 else np.nan),
        "null_batch_limit": np.array(float(limit)),
        "optimizer_gradients": np.array(gram.optimizer_gradients),
    }
    ordered = {name: arrays[name] for name in CONCENTRATION if name in arrays}
    return xr.Dataset(_at_one_step(CONCENTRATION, ordered), {"block": list(gram.blocks), "k": list(k)})


@accepting("tasks", "groups", "losses", "space")
def task_structure(gram: ProbeGram, *, permuted: Sequence[str] = (GLOBAL,), seed: int = 0) -> xr.Dataset:
    """Return how tasks share or contest directions: cosines, overlap, noise scale, transfer, and the parts of SE.

    Args:
        gram: K with the task of each sample, as :func:`probes.gradient_gram` returns it. Transfer needs losses and
            ``space="factor"``; it is NaN otherwise.
        permuted: Blocks whose χ is tested by permutations, which is costly; the rest have NaN.
        seed: Seed of the permutations.

    Returns:
        Variables over ``block``, ``task`` and ``task_``, each with its definition. ``"all"`` is among the tasks (how a
        task's gradient relates to the pooled one), but not in the conflict rate and the parts of SE.

    Raises:
        ValueError: If there are no tasks, or K or the labels do not fit.

    >>> from probes import ProbeGram
    >>> shared = task_structure(ProbeGram({"global": np.eye(4)}, tasks=["x", "x", "y", "y"]))
    >>> shared["divergence"].item() == shared["divergence_largest"].item()  # no direction is shared
    True
    """
    if not len(gram.tasks):
        raise ValueError(
            "Expected a Gram with the task of each sample, got none. Measure it with Tasks, or state tasks."
        )
    samples = StackedGram.of(gram)
    samples.require_exact()
    by_task = [np.flatnonzero(task) for task in samples.labels.member.T]

    def measure(part: StackedGram) -> list[dict[str, np.ndarray]]:
        entropies = [fisher_entropy(fisher_eigenvalues(part.gram[:, task[:, None], task])) for task in by_task]
        return [_task_arrays(part, np.stack(entropies, axis=1), permuted, seed)]

    return _task_dataset(samples, *_by_parts(samples, measure))


def _task_arrays(
    gram: StackedGram, entropies: np.ndarray, permuted: Sequence[str] = (GLOBAL,), seed: int = 0
) -> dict[str, np.ndarray]:
    """Return the measures of each block, given SE of all samples and of each task, ``[block, task]``."""
    k, labels = gram.gram, gram.labels
    only_tasks = SampleGroups(labels.group, labels.member[:, 1:])
    angles = cosines(k, labels)
    in_conflict, decided = conflict_rate(angles.cosine.low[:, 1:, 1:], angles.cosine.high[:, 1:, 1:])
    parts = decomposition(entropies[:, 0], entropies[:, 1:], gram.norms @ only_tasks.member)
    gap = purity_gap(k, only_tasks)
    return {
        **_with_ends("cosine", angles.cosine),
        "unresolved": angles.unresolved,
        "cosine_raw": angles.raw,
        "magnitude_similarity": angles.magnitude_similarity,
        "conflict_rate": in_conflict,
        "decided_pairs": decided,
        **_with_ends("overlap", overlap(k, labels)),
        **_with_ends("noise_scale", noise_scale(k, labels)),
        **_with_ends("transfer", _transfer(gram)),
        "spectral_entropy_mixture": parts.mixture,
        "spectral_entropy_within": parts.within,
        "divergence": parts.divergence,
        "divergence_largest": parts.largest,
        **_divergence_test(gram, only_tasks, permuted, seed),
        **_with_ends("purity_gap", gap.gap),
        "sharing": gap.sharing,
    }


def _task_dataset(gram: StackedGram, arrays: Mapping[str, np.ndarray]) -> xr.Dataset:
    """Return :func:`task_structure`, given the measures of each block."""
    coords = {"block": list(gram.blocks), "task": list(gram.tasks), "task_": list(gram.tasks)}
    return xr.Dataset(_at_one_step(TASKS, {name: arrays[name] for name in TASKS}), coords)


def _with_ends(name: str, estimate: Estimate) -> dict[str, np.ndarray]:
    return {name: estimate.estimate, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def _transfer(gram: StackedGram) -> Estimate:
    if gram.space != "factor" or np.isnan(gram.losses).all():
        return Estimate(*[np.full((len(gram.blocks), *[len(gram.tasks)] * 2), np.nan)] * 3)
    return first_order_transfer(gram.gram, gram.labels, gram.losses)


def _divergence_test(
    gram: StackedGram, labels: SampleGroups, permuted: Sequence[str], seed: int
) -> dict[str, np.ndarray]:
    numbers = np.full((5, len(gram.blocks)), np.nan)
    for row, name in enumerate(gram.blocks):
        if name in permuted and labels.member.shape[1] > 1:
            numbers[:, [row]] = astuple(divergence_test(gram.gram[[row]], labels, seed=seed))
    names = ("normalised", "normalised_largest", "null_low", "null_high", "p_value")
    return {f"divergence_{name}": row for name, row in zip(names, numbers, strict=True)}


def measure_fisher(record: xr.Dataset, *, k: Sequence[int] = LEADING, seed: int = 0) -> dict[str, xr.Dataset]:
    """Return the groups of a result that follow from the Fisher's records of all steps.

    Gradients are those at ``evaluated_at_step``, for a recorded training the start of the increment. The batch of the
    null gradients is the optimizer's times the :func:`effective_batches` of the steps since then and of the momentum.
    That is what one batch of all those samples would give, the most concentrated that plain gradient descent could be.
    Unknown momentum counts as none; a finding says so.

    Args:
        record: As :data:`dynamics.schema.FISHER_RECORD` has it, with the task, group and id of each ``sample``;
            ``evaluated_at_step(step)``; attributes ``space``, ``fisher``, ``unit``, ``reduction``, ``batch_size`` of
            one step (0 if unknown); ``momentum(step)`` where it is known.
        k: Numbers of leading directions.
        seed: Seed of random halves, subsets, null gradients and permutations; the same at every step.

    Returns:
        ``fisher`` (with K and b themselves), ``concentration`` and ``tasks``, each with ``step`` in front. Unknown
        numbers are NaN; a sample without gradients in every block at a step is left out there.

    Raises:
        ValueError: If a K is not a Gram matrix, or there is no step.
    """
    if not record.sizes["step"]:
        raise ValueError("Expected at least one record of the Fisher, got none.")
    by_step = [_at_step(record.isel(step=number), k, seed) for number in range(record.sizes["step"])]
    groups = {
        name: xr.concat([step[name] for step in by_step], dim=record["step"].variable.to_index(), join="outer")
        for name in ("fisher", "concentration", "tasks")
    }
    recorded = {name: record[name] for name in FISHER_RECORD if name in FISHER}
    kept = {name: array.assign_attrs(FISHER[name].attributes) for name, array in recorded.items()}
    kept |= {name: record[name] for name in ("momentum",) if name in record}
    kept = xr.Dataset(kept).assign_coords({name: record[name] for name in SAMPLE_LABELS})
    groups["fisher"] = xr.merge([kept, groups["fisher"]], combine_attrs="drop_conflicts")
    share = record["share_outside_space"]
    groups["concentration"]["share_outside_space"] = share.assign_attrs(CONCENTRATION["share_outside_space"].attributes)
    for group in groups.values():
        group.coords["evaluated_at_step"] = record["evaluated_at_step"]
        group.attrs = dict(record.attrs)
    return groups


def _at_step(record: xr.Dataset, k: Sequence[int], seed: int) -> dict[str, xr.Dataset]:
    """Return the three groups of one step."""
    gram = StackedGram.of(gram_of(record))

    def measure(part: StackedGram) -> list[dict[str, np.ndarray]]:
        spectrum = fisher_eigenvectors(part.gram)
        fisher = _fisher_arrays(part, spectrum, seed)
        shares = _concentration_arrays(part, spectrum, k, seed=seed)
        return [fisher, shares, _task_arrays(part, fisher["spectral_entropy"], seed=seed)]

    fisher, shares, tasks = _by_parts(gram, measure)
    return {
        "fisher": _fisher_dataset(gram, fisher),
        "concentration": _concentration_dataset(gram, shares, k),
        "tasks": _task_dataset(gram, tasks),
    }


def gram_of(record: xr.Dataset) -> ProbeGram:
    """Return the ``ProbeGram`` of one step's record, without the samples that have no gradient in any block.

    Args:
        record: As in :func:`measure_fisher`, at one step.
    """
    blocks = record["block"].values.tolist()
    finite = np.asarray(np.isfinite(np.diagonal(record["gram"].values, axis1=1, axis2=2)).any(0))
    # If no sample has a gradient, all stay, and the measures are NaN.
    present = finite if finite.any() else np.ones_like(finite)
    step = record if present.all() else record.isel(sample=present, sample_=present)

    def by_block(name: str) -> dict[str, Any]:
        return dict(zip(blocks, step[name].values, strict=True))

    tasks, groups, sample_ids = (tuple(step[name].values.tolist()) for name in SAMPLE_LABELS)
    before = int(record["evaluated_at_step"])
    momentum = float(record["momentum"]) if "momentum" in record else 0.0
    batches = effective_batches(max(int(record["step"]) - before, 1), before, momentum)
    return ProbeGram(
        update_product=by_block("update_product"),
        update_norm_squared=by_block("update_norm_squared"),
        share_outside_space=by_block("share_outside_space"),
        dimension=by_block("dimension"),
        losses=step["loss"].values,
        tasks=tasks,
        groups=groups,
        sample_ids=sample_ids,
        batch_size=round(int(record.attrs["batch_size"]) * batches),
        space=record.attrs["space"],
        fisher=record.attrs["fisher"],
        left_out=tuple(np.flatnonzero(~present).tolist()),
        gram=(gram := by_block("gram")),
        **_of_optimizer(step, gram),
    )


def _of_optimizer(step: xr.Dataset, gram: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a ``ProbeGram`` on the optimizer, of one step's record."""
    if "plain_optimizer" in step and float(step["plain_optimizer"]) == 1:
        return {"preconditioned_product": gram, "preconditioned_gram": gram}
    if "optimizer_gradients" not in step:
        return {}
    fields: dict[str, Any] = {"optimizer_gradients": float(step["optimizer_gradients"])}
    for name in OPTIMIZER_RECORD.keys() - {"plain_optimizer", "optimizer_gradients"}:
        if name in step:
            passed = {
                block: values
                for block, values in zip(step["block"].values.tolist(), step[name].values, strict=True)
                if np.isfinite(values).all()
            }
            fields |= {name: passed} if passed else {}
    return fields
