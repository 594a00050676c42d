"""The dominant ratio ρ = λ_1/tr F: an interval that holds, and a point estimate for independent samples.

Plug-in ρ is too large and ρ of directions judged on other samples too small, both in expectation. In one data set noise
moves both the same way: simulated, the two alone hold the truth in 25–99 % of cases. The interval is therefore widened
by the sampling error of the plug-in, and then holds it in at least 95 %.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from dynamics.fisher.pairs import interval
from dynamics.fisher.ratios import ratio
from dynamics.fisher.splits import SPLITS, half_splits


def dominant_ratio_plug_in(eigenvalues: Float[np.ndarray, "block index"]) -> Float[np.ndarray, " block"]:
    """λ̂_1/Σλ̂: at least ρ in expectation, up to the noise of the trace.

    >>> dominant_ratio_plug_in(np.array([[3.0, 1.0]]))
    array([0.75])
    """
    return ratio(eigenvalues[:, 0], eigenvalues.sum(-1))


def dominant_ratio_noise_reduced(eigenvalues: Float[np.ndarray, "block sample"]) -> Float[np.ndarray, " block"]:
    """(λ̂_1 − (tr − λ̂_1)/(N − 1))/tr: noise reduction of Yata & Aoshima (2012), uncentred.

    For independent samples of similar norms only: with norms that vary much or samples in groups it is too large.

    Returns:
        NaN for fewer than two samples.

    >>> dominant_ratio_noise_reduced(np.array([[4.0, 1.0, 1.0]]))
    array([0.5])
    """
    samples, total = eigenvalues.shape[-1], eigenvalues.sum(-1)
    if samples < 2:
        return np.full(len(eigenvalues), np.nan)
    return ratio(eigenvalues[:, 0] - (total - eigenvalues[:, 0]) / (samples - 1), total)


def dominant_ratio_error(
    eigenvalues: Float[np.ndarray, "block sample"],
    vectors: Float[np.ndarray, "block sample sample"],
    membership: Float[np.ndarray, "sample group"],
) -> Float[np.ndarray, " block"]:
    """Standard error of ln of the plug-in ρ about its own expectation, by the infinitesimal jackknife over groups.

    Returns:
        NaN for fewer than two groups or a zero matrix.
    """
    groups = membership.shape[1]
    if groups < 2:
        return np.full(len(eigenvalues), np.nan)
    shares = ratio(eigenvalues, eigenvalues.sum(-1, keepdims=True))
    by_group = membership.T @ vectors**2  # of each λ_j
    influence = by_group[:, :, 0] - (by_group @ shares[:, :, None])[:, :, 0]
    return np.sqrt(groups / (groups - 1) * (influence**2).sum(-1))


def dominant_ratio_interval(
    split: Float[np.ndarray, " block"],
    plug_in: Float[np.ndarray, " block"],
    error: Float[np.ndarray, " block"],
    groups: int,
) -> tuple[np.ndarray, np.ndarray]:
    """95 % interval of ρ: from the split ratio less its sampling error to the plug-in ratio plus its, at most 1.

    Args:
        split, plug_in: As :func:`dominant_ratio_split` and :func:`dominant_ratio_plug_in` return them.
        error: Standard error of ln ρ, as :func:`dominant_ratio_error` returns it.
        groups: Number of groups.
    """
    down, up = interval(np.zeros_like(error), error, groups)
    return split * np.exp(down), np.minimum(plug_in * np.exp(up), 1.0)


def dominant_ratio_split(
    gram: Float[np.ndarray, "block sample sample"],
    group: Int[np.ndarray, " sample"],
    splits: int = SPLITS,
    seed: int = 0,
) -> Float[np.ndarray, " block"]:
    """Rayleigh quotient of one half's first direction on the other half, over that half's trace; mean over splits.

    No direction v has vᵀFv above λ_1, and v does not depend on the half that judges it: at most ρ in expectation, up to
    the noise of the trace. That holds for any v, so power iteration finds it well enough.

    Returns:
        NaN for fewer than two groups.

    >>> dominant_ratio_split(np.ones((1, 4, 4)), np.arange(4))
    array([1.])
    """
    if len(np.unique(group)) < 2:
        return np.full(len(gram), np.nan)
    found = []
    for first, second in half_splits(group, splits, seed):
        weights = _leading_vector(gram[:, first[:, None], first])
        projections = gram[:, second[:, None], first] @ weights[:, :, None]
        length = (weights[:, None, :] @ gram[:, first[:, None], first] @ weights[:, :, None])[:, 0, 0]
        along = ratio((projections[:, :, 0] ** 2).mean(-1), length)
        trace = np.trace(gram[:, second[:, None], second], axis1=1, axis2=2) / len(second)
        found.append(ratio(along, trace))
    return np.mean(found, axis=0)


def _leading_vector(gram: Float[np.ndarray, "block sample sample"]) -> Float[np.ndarray, "block sample"]:
    """Weights u of the samples for which Gᵀu is nearly the leading direction: the largest column of K⁶⁴."""
    power = gram
    for _ in range(6):
        size = np.trace(power, axis1=1, axis2=2)[:, None, None]
        power = ratio(power, size)
        power = power @ power
    largest = np.diagonal(power, axis1=1, axis2=2).argmax(1)
    return power[np.arange(len(power)), :, largest]
