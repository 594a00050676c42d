"""Rarefaction: plug-in measures of fewer samples, so that two conditions can be compared at the same number.

SE, ρ and PR of N samples depend on N more than on most conditions one compares. As ecologists do with species counts
(Gotelli & Colwell 2001), smaller samples are drawn without replacement, here groups with one sample of each, so that
the n samples are independent whatever the groups' sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dynamics.fisher.spectrum import (
    dominant_ratio_plug_in,
    fisher_eigenvalues,
    fisher_entropy,
    participation_ratio_plug_in,
)

#: Random subsets behind each point of a curve.
DRAWS = 4


@dataclass(frozen=True)
class Rarefied:
    """Mean and standard deviation over subsets of n groups, ``[block, n]``; NaN where there are fewer groups.

    The deviation shows how much a subset matters, not how far the mean is from the truth: subsets share samples.
    """

    spectral_entropy: Float[np.ndarray, "block n"]
    spectral_entropy_deviation: Float[np.ndarray, "block n"]
    dominant_ratio: Float[np.ndarray, "block n"]
    participation_ratio: Float[np.ndarray, "block n"]


def sizes_up_to(groups: int) -> list[int]:
    """Return 4, 8, 16, … and the number of groups.

    >>> sizes_up_to(20)
    [4, 8, 16, 20]
    """
    powers = [4 * 2**power for power in range(max(groups, 4).bit_length()) if 4 * 2**power < groups]
    return [*powers, groups]


def rarefied(
    gram: Float[np.ndarray, "block sample sample"],
    group: Int[np.ndarray, " sample"],
    sizes: Sequence[int],
    draws: int = DRAWS,
    seed: int = 0,
    eigenvalues: Float[np.ndarray, "block sample"] | None = None,
) -> Rarefied:
    """Return measures of n groups with one sample of each, for every n of ``sizes``, over random subsets.

    Args:
        gram: K.
        group: Group of each sample.
        sizes: Values of n.
        draws: Random subsets of each size.
        seed: Seed of the subsets.
        eigenvalues: Those of all samples, where they are known.

    >>> rarefied(np.eye(4)[None], np.arange(4), [2, 4]).participation_ratio
    array([[2., 4.]])
    """
    curves = np.full((4, len(gram), len(sizes)), np.nan)
    groups = len(np.unique(group))
    for column, size in enumerate(sizes):
        if not 1 <= size <= groups:
            continue
        if size == len(group):  # one subset: all samples
            values = fisher_eigenvalues(gram) if eigenvalues is None else eigenvalues
        else:
            subsets = _subsets(group, size, draws, seed)
            values = fisher_eigenvalues(gram[:, subsets[:, :, None], subsets[:, None, :]].reshape(-1, size, size))
        entropy, ratio, participation = _measures(values).reshape(3, len(gram), -1)
        deviation = entropy.std(-1, ddof=1) if entropy.shape[1] > 1 else np.zeros(len(gram))
        curves[:, :, column] = entropy.mean(-1), deviation, ratio.mean(-1), participation.mean(-1)
    return Rarefied(*curves)


def _subsets(group: np.ndarray, size: int, draws: int, seed: int) -> Int[np.ndarray, "draw n"]:
    """Return the samples of random subsets: one random sample of each of ``size`` random groups."""
    generator, codes = np.random.default_rng([seed, size]), np.unique(group)
    subsets = []
    for _ in range(draws):
        order = generator.permutation(len(group))[::-1]
        one_each = order[np.unique(group[order], return_index=True)[1]]  # of each group the last in random order
        subsets.append(one_each[np.searchsorted(codes, generator.permutation(codes)[:size])])
    return np.array(subsets)


def _measures(eigenvalues: np.ndarray) -> np.ndarray:
    return np.stack(
        [fisher_entropy(eigenvalues), dominant_ratio_plug_in(eigenvalues), participation_ratio_plug_in(eigenvalues)]
    )
