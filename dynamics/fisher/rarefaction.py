"""Plug-in measures at fewer samples: rarefaction curves, and the comparison of two Grams at equal N.

SE, ρ and PR of N samples depend on N more than on most conditions one compares. As ecologists do with species counts
(Gotelli & Colwell 2001), smaller samples are drawn without replacement, here whole groups with one sample of each, so
that the n samples are independent whatever the groups' sizes; two conditions are compared at the same n.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from dynamics.fisher.samples import Labels
from dynamics.fisher.spectrum import (
    dominant_ratio_plug_in,
    fisher_eigenvalues,
    log_participation_ratio,
    participation_ratio_plug_in,
    spectral_entropy,
)

#: Random subsets behind each point of a curve.
DRAWS = 4
#: Subsets for the comparison of two.
COMPARISON_DRAWS = 100


@dataclass(frozen=True)
class Rarefied:
    """Mean and standard deviation over subsets of n groups, ``[block, n]``; NaN where there are fewer groups.

    The deviation says how much a subset matters, not how far the mean is from the truth: subsets share samples.
    """

    spectral_entropy: Float[np.ndarray, "block n"]
    spectral_entropy_deviation: Float[np.ndarray, "block n"]
    dominant_ratio: Float[np.ndarray, "block n"]
    participation_ratio: Float[np.ndarray, "block n"]


def sizes_up_to(groups: int) -> list[int]:
    """4, 8, 16, … and the number of groups itself.

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
) -> Rarefied:
    """Measures of n groups with one sample of each, for every n of ``sizes``, over random subsets.

    >>> rarefied(np.eye(4)[None], np.arange(4), [2, 4]).participation_ratio
    array([[2., 4.]])
    """
    curves = np.full((4, len(gram), len(sizes)), np.nan)
    groups = len(np.unique(group))
    for place, size in enumerate(sizes):
        if not 1 <= size <= groups:
            continue
        # All groups, each of one sample, are one subset.
        chosen = _subsets(group, size, 1 if size == len(group) else draws, seed)
        parts = gram[:, chosen[:, :, None], chosen[:, None, :]]
        found = _measures(parts.reshape(-1, size, size)).reshape(3, len(gram), len(chosen))
        entropy, ratio_, participation = found
        deviation = entropy.std(-1, ddof=1) if len(chosen) > 1 else np.zeros(len(gram))
        curves[:, :, place] = entropy.mean(-1), deviation, ratio_.mean(-1), participation.mean(-1)
    return Rarefied(*curves)


def _subsets(group: np.ndarray, size: int, draws: int, seed: int) -> Int[np.ndarray, "draw n"]:
    """Samples of random subsets: the first of each group after shuffling samples, of the first groups met."""
    generator = np.random.default_rng([seed, size])
    subsets = []
    for _ in range(draws):
        one_each = {code: sample for sample in generator.permutation(len(group)) for code in [group[sample]]}
        subsets.append([one_each[code] for code in generator.permutation(np.unique(group))[:size]])
    return np.array(subsets)


def _measures(gram: np.ndarray) -> np.ndarray:
    eigenvalues = fisher_eigenvalues(gram)
    return np.stack(
        [spectral_entropy(eigenvalues), dominant_ratio_plug_in(eigenvalues), participation_ratio_plug_in(eigenvalues)]
    )


@dataclass(frozen=True)
class Comparison:
    """First minus second, ``[block]``.

    Args:
        groups: The equal number of groups behind the plug-in differences.
        spectral_entropy: Difference of plug-in SE at that number, nats; the common bias cancels only in part.
        dominant_ratio: Difference of plug-in ρ at that number.
        ln_participation_ratio, low, high: Difference of ln PR_U from all samples, and its 95 % interval.
    """

    groups: int
    spectral_entropy: Float[np.ndarray, " block"]
    dominant_ratio: Float[np.ndarray, " block"]
    ln_participation_ratio: Float[np.ndarray, " block"]
    low: Float[np.ndarray, " block"]
    high: Float[np.ndarray, " block"]


def compare_at_equal_size(
    first: Float[np.ndarray, "block n n"],
    second: Float[np.ndarray, "block m m"],
    first_group: Int[np.ndarray, " n"],
    second_group: Int[np.ndarray, " m"],
    draws: int = COMPARISON_DRAWS,
    seed: int = 0,
) -> Comparison:
    """Two conditions at the same number of independent samples; the difference of ln PR_U is the one to report.

    The two must be of different probe samples (independent); for the same probe samples at two checkpoints the interval
    is too wide.
    """
    size = min(len(np.unique(first_group)), len(np.unique(second_group)))
    pair = [(first, first_group), (second, second_group)]
    curves = [rarefied(gram, group, [size], draws, seed) for gram, group in pair]
    ratios = [log_participation_ratio(gram, Labels(group, np.ones((len(group), 1), bool))) for gram, group in pair]
    difference = (ratios[0].estimate - ratios[1].estimate)[:, 0]
    # The halves of two independent intervals add as their squares do.
    reach = np.hypot(*((ratio.high - ratio.estimate)[:, 0] for ratio in ratios))
    low, high = difference - reach, difference + reach
    return Comparison(
        size,
        (curves[0].spectral_entropy - curves[1].spectral_entropy)[:, 0],
        (curves[0].dominant_ratio - curves[1].dominant_ratio)[:, 0],
        difference,
        low,
        high,
    )
