"""Losses of samples summed by group: what each candidate improves, its jackknife, and halves of the groups.

Samples of one group (an image, a patient) resemble each other, so a group is left out whole, and is in one half whole.
A candidate's improvement of a task, (L₀ − L)/L₀ in mean losses, is 1 − ΣL/ΣL₀: both sums are over the same samples.
Weights, ``[task]``, make one number of a candidate: a weighted sum of its improvements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from scipy import special

from dynamics.fisher.samples import ratio


@dataclass(frozen=True)
class GroupedLosses:
    """Losses summed over the samples of each group and task.

    Args:
        sums: In nats, the candidate that is the start first.
        counts: How many samples a group has of a task.
    """

    sums: Float[np.ndarray, "candidate group task"]
    counts: Float[np.ndarray, "group task"]

    @classmethod
    def of(
        cls,
        losses: Float[np.ndarray, "candidate sample"],
        task_of_sample: np.ndarray,
        group: np.ndarray,
        tasks: Sequence[str],
    ) -> GroupedLosses:
        """Sum losses by group and task; samples of other tasks are left out.

        >>> losses = np.array([[2.0, 2.0, 4.0], [1.0, 1.0, 1.0]])
        >>> GroupedLosses.of(losses, np.array(["vqa", "vqa", "wiki"]), np.array([7, 8, 8]), ["vqa"]).sums.tolist()
        [[[2.0], [2.0]], [[1.0], [1.0]]]
        """
        columns = [task_of_sample == task for task in tasks]
        names = np.unique(group[np.any(columns, axis=0)])
        counts = np.zeros((len(names), len(tasks)))
        sums = np.zeros((len(losses), *counts.shape))
        for task, members in enumerate(columns):
            rows = np.searchsorted(names, group[members])
            np.add.at(counts[:, task], rows, 1)
            np.add.at(sums[:, :, task].T, rows, losses[:, members].T)
        return cls(sums, counts)

    def part(self, groups: Bool[np.ndarray, " group"]) -> GroupedLosses:
        """Return the losses of some of the groups."""
        return GroupedLosses(self.sums[:, groups], self.counts[groups])

    @property
    def improvement(self) -> Float[np.ndarray, "candidate task"]:
        """Share of the mean loss at the start that is gone."""
        total = self.sums.sum(1)
        return 1 - ratio(total, total[0])

    def covariance(self, weights: Float[np.ndarray, " task"]) -> Float[np.ndarray, "candidate candidate_"]:
        """Return covariances between candidates of their weighted improvement, by the delete-one-group jackknife.

        (g − 1)/g Σ (θ_r − θ̄)(θ_r − θ̄)ᵀ over the g groups with samples of a task that has a weight. NaN for fewer than
        two groups, or where one group has all samples of a task. The start has none.
        """
        chosen = weights != 0
        relevant = (self.counts[:, chosen] > 0).any(1)
        groups = int(relevant.sum())
        if groups < 2:
            return np.full((len(self.sums),) * 2, np.nan)
        sums = self.sums[:, relevant][..., chosen]
        without = sums.sum(1, keepdims=True) - sums
        left_out = (1 - ratio(without, without[:1])) @ weights[chosen]
        centred = left_out - left_out.mean(1, keepdims=True)
        return (groups - 1) / groups * centred @ centred.T

    def freedom(self, weights: Float[np.ndarray, " task"]) -> float:
        """Return degrees of freedom: the effective groups of the task that has fewest, less one; at least 1.

        Of shares s of groups in a task's loss at the start, (Σs)²/Σs² are effective: few where a few have most samples.
        """
        shares = self.sums[0][:, weights != 0]
        effective = ratio(shares.sum(0) ** 2, (shares**2).sum(0))
        return max(float(effective.min(initial=math.inf)) - 1, 1.0)

    def interval(self, candidate: int, weights: Float[np.ndarray, " task"], level: float) -> tuple[float, float, float]:
        """Return a weighted improvement with the low and high end of its interval.

        Args:
            level: Probability that the interval misses.
        """
        value = float(self.improvement[candidate] @ weights)
        error = math.sqrt(self.covariance(weights)[candidate, candidate])
        reach = float(special.stdtrit(self.freedom(weights), 1 - level / 2)) * error
        return value, value - reach, value + reach

    def halves(self, seed: int) -> Bool[np.ndarray, " group"]:
        """Return which groups are in the first half.

        Groups with samples of the same tasks are sorted by their number of samples, and a coin sends one of each two
        neighbours to either half, so that the halves are alike in size.
        """
        random = np.random.default_rng(seed)
        _, kinds = np.unique(self.counts > 0, axis=0, return_inverse=True)
        order = np.lexsort((random.permutation(len(kinds)), -self.counts.sum(1)))
        first = np.zeros(len(kinds), dtype=bool)
        odd = 0
        for kind in np.unique(kinds):
            members = order[kinds[order] == kind]
            for pair in np.split(members, range(2, len(members), 2)):
                if len(pair) == 2:
                    first[pair[random.integers(2)]] = True
                else:  # in turns
                    first[pair[0]] = odd % 2 == 0
                    odd += 1
        return first
