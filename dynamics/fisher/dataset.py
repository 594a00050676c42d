"""The Fisher's spectrum and what follows from it, by block and task: Gram matrices in, a dataset out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import xarray as xr

from dynamics.described import labelled
from dynamics.fisher import dominance, entropy
from dynamics.fisher.pairs import Labels, counted_groups, interval, weight_of
from dynamics.fisher.participation import log_participation_ratio, participation_ratio_plug_in
from dynamics.fisher.rarefaction import rarefied, sizes_up_to
from dynamics.fisher.samples import blocks_of, codes_of, members_of, numbers_of, own
from dynamics.fisher.spectrum import (
    centred,
    directional,
    eigenvalue_errors,
    fisher_eigenvalues,
    fisher_eigenvectors,
)
from dynamics.fisher.variables import FISHER
from dynamics.schema import GLOBAL


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
    spectral = entropy.spectral_entropy(values)
    reach = interval(spectral, entropy.entropy_error(values, vectors, own.membership), counted[:, 0])
    few = rarefied(gram, groups, curve, seed=seed)
    plug_in, split = dominance.dominant_ratio_plug_in(values), dominance.dominant_ratio_split(gram, groups, seed=seed)
    error = dominance.dominant_ratio_error(values, vectors, own.membership)
    ends = dominance.dominant_ratio_interval(split, plug_in, error, own.membership.shape[1])
    padding = ((0, 0), (0, len(member) - len(places)))
    return {
        "trace": np.trace(gram, axis1=1, axis2=2) / len(places),
        "eigenvalue": np.pad(values, padding, constant_values=np.nan),
        "eigenvalue_low": np.pad(values * np.exp(low), padding, constant_values=np.nan),
        "eigenvalue_high": np.pad(values * np.exp(high), padding, constant_values=np.nan),
        "spectral_entropy": spectral,
        "spectral_entropy_low": reach[0],
        "spectral_entropy_high": reach[1],
        "spectral_entropy_normalised": entropy.normalised_by_sample_rank(spectral, len(places), size),
        "spectral_entropy_centred": entropy.spectral_entropy(around_mean),
        "spectral_entropy_directional": entropy.spectral_entropy(of_directions),
        "dominant_ratio": plug_in,
        "dominant_ratio_low": ends[0],
        "dominant_ratio_high": ends[1],
        "dominant_ratio_split": split,
        "dominant_ratio_noise_reduced": dominance.dominant_ratio_noise_reduced(values),
        "dominant_ratio_centred": dominance.dominant_ratio_plug_in(around_mean),
        "dominant_ratio_directional": dominance.dominant_ratio_plug_in(of_directions),
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
    return np.asarray(entropy.spectral_entropy_block_diagonal(traces.T, entropies.T))
