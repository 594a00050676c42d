r"""Gram matrices of labelled samples as checked arrays, and means over pairs of samples with their jackknife intervals.

K = GGᵀ is unnormalised everywhere: rows of G are per-sample gradients, and the Fisher's eigenvalues are eig(K)/N.

Samples of one group (an image, a patient) resemble each other; pairs within a group would count that as structure of
the Fisher. Over pairs i, j of different groups the products separate, so that

    mean K_ij = ⟨μ_s, μ_t⟩,   mean K_ij² = tr F_s F_t,   mean K_ii K_jj = tr F_s tr F_t,   i in task s, j in task t,

hold without bias. Everything here is O(N²) a block, leaving out each group in turn included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import special

from dynamics.schema import ALL
from probes.gram import ProbeGram

#: Numbers in the K of as many blocks as are measured at a time (8 MiB).
_PART = 2**20
#: K and Kᵀ may differ by this share of the largest entry: sums in float32 do.
_ASYMMETRY = 1e-4


def ratio(numerator: Any, denominator: Any) -> np.ndarray:
    """Return numerator/denominator, NaN where the denominator is not positive.

    >>> ratio([1.0, 1.0], [2.0, 0.0])
    array([0.5, nan])
    """
    top, bottom = np.broadcast_arrays(np.asarray(numerator, np.float64), np.asarray(denominator, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom > 0)


def log(values: Any) -> np.ndarray:
    """Return the natural logarithm, NaN where the value is not positive.

    >>> log([1.0, 0.0])
    array([ 0., nan])
    """
    array = np.asarray(values, np.float64)
    return np.log(array, out=np.full(array.shape, np.nan), where=array > 0)


def root(values: Any) -> np.ndarray:
    """Return the square root, NaN where the value is negative.

    >>> root([4.0, -1.0])
    array([ 2., nan])
    """
    array = np.asarray(values, np.float64)
    return np.sqrt(array, out=np.full(array.shape, np.nan), where=array >= 0)


@dataclass(frozen=True)
class SampleGroups:
    """Group and tasks of each sample; tasks may overlap (``"all"`` holds every sample).

    Args:
        group: Number of each sample's group.
        member: Whether a sample belongs to a task.
    """

    group: Int[np.ndarray, " sample"]
    member: Bool[np.ndarray, "sample task"]

    @classmethod
    def of_one_task(cls, group: Int[np.ndarray, " sample"]) -> SampleGroups:
        """Return the groups of samples that all belong to one task."""
        return cls(group, np.ones((len(group), 1), dtype=bool))

    @cached_property
    def membership(self) -> Float[np.ndarray, "sample group"]:
        """1 where a sample belongs to a group."""
        return (self.group[:, None] == np.unique(self.group)[None]).astype(np.float64)

    @cached_property
    def apart(self) -> Bool[np.ndarray, "sample sample"]:
        """Whether two samples are of different groups."""
        return self.group[:, None] != self.group[None]

    @cached_property
    def pairs(self) -> tuple[Float[np.ndarray, "1 task task"], Float[np.ndarray, "1 group task task"]]:
        """Number of pairs (i in task s, j in task t) of different groups: all, and without each group."""
        return _sums_of_products(np.ones((1, len(self.group))), self)

    @cached_property
    def holds(self) -> Bool[np.ndarray, "group task"]:
        """Whether a group has a sample of a task."""
        return self.membership.T @ self.member > 0

    @property
    def groups(self) -> Int[np.ndarray, " task"]:
        """Number of groups that have a sample of each task."""
        return self.holds.sum(0)

    @property
    def samples(self) -> Int[np.ndarray, " task"]:
        """Number of samples of each task."""
        return self.member.sum(0)


@dataclass(frozen=True)
class StackedGram:
    """A :class:`probes.ProbeGram` as checked float64 arrays: its blocks stacked, its labels as numbers.

    Args:
        blocks: Names of the blocks.
        gram: K of each block, exactly symmetric. A block with a number that is not finite is NaN throughout: no
            statistic of it exists.
        labels: Group and tasks of each sample.
        tasks: Name of each task; the first is ``"all"``.
        update_product: b = Gδ; NaN if unknown.
        update_norm: ‖δ‖ inside the space, not squared; NaN if unknown.
        dimension: d; NaN if unknown.
        losses: Loss of each sample in nats; NaN if unknown.
        space, batch_size, projection, optimizer_gradients: As in the ``ProbeGram``.
        preconditioned: G P Gᵀ and G P² Gᵀ, P the optimizer's preconditioner; ``None`` if unknown, NaN for a block of
            which it is, K itself twice where P is 1.
        drawn: Products with drawn gradients passed through the optimizer, and their squared norms, likewise.
    """

    blocks: tuple[str, ...]
    gram: Float[np.ndarray, "block sample sample"]
    labels: SampleGroups
    tasks: tuple[str, ...]
    update_product: Float[np.ndarray, "block sample"]
    update_norm: Float[np.ndarray, " block"]
    dimension: Float[np.ndarray, " block"]
    losses: Float[np.ndarray, " sample"]
    space: str
    batch_size: int
    projection: int
    preconditioned: tuple[Float[np.ndarray, "block sample sample"], Float[np.ndarray, "block sample sample"]] | None
    drawn: tuple[Float[np.ndarray, "block sample draw"], Float[np.ndarray, "block draw"]] | None
    optimizer_gradients: float

    @classmethod
    def of(cls, gram: ProbeGram) -> StackedGram:
        """Return the arrays of a ``ProbeGram``.

        Raises:
            ValueError: If a K is not square and symmetric, or labels or numbers do not fit the samples or the blocks.

        >>> stacked = StackedGram.of(ProbeGram({"global": np.eye(2)}, tasks=("x", "y")))
        >>> stacked.gram.shape, stacked.tasks
        ((1, 2, 2), ('all', 'x', 'y'))
        """
        k = _stack(gram.gram)
        samples = k.shape[-1]
        members = _members(gram.tasks, samples)
        losses = np.full(samples, np.nan) if gram.losses is None else as_array(gram.losses)
        if losses.shape != (samples,):
            raise ValueError(f"Expected one loss for each of {samples} samples, got shape {losses.shape}.")
        return cls(
            gram.blocks,
            k,
            SampleGroups(codes_of(gram.groups, samples, "group"), np.stack(list(members.values()), axis=1)),
            tuple(members),
            # Column-major, as records are read: sums over samples then keep their last bit.
            np.asfortranarray(_by_block(gram.update_product, gram.blocks, (samples,), "an update product b = Gδ")),
            np.sqrt(_by_block(gram.update_norm_squared, gram.blocks, (), "a squared update norm ‖δ‖²")),
            _by_block(gram.dimension, gram.blocks, (), "a dimension"),
            losses,
            gram.space,
            gram.batch_size,
            gram.projection,
            (k, k)
            if gram.preconditioned_gram is gram.gram
            else _pair(gram.preconditioned_product, gram.preconditioned_gram, gram.blocks),
            _pair(gram.drawn_product, gram.drawn_norm_squared, gram.blocks),
            gram.optimizer_gradients,
        )

    @cached_property
    def norms(self) -> Float[np.ndarray, "block sample"]:
        """Squared norm of each gradient, K_ii."""
        return np.diagonal(self.gram, axis1=1, axis2=2)

    @property
    def is_plain(self) -> bool:
        """Whether the optimizer's preconditioner is 1, so that K stands for both products with it."""
        return self.preconditioned is not None and self.preconditioned[1] is self.gram

    def parts(self) -> list[StackedGram]:
        """Return the blocks, a few at a time where there are many samples, so that temporary arrays stay small."""
        size = max(1, _PART // self.gram.shape[-1] ** 2)
        slices = [slice(start, start + size) for start in range(0, len(self.blocks), size)]
        return [
            replace(
                self,
                blocks=self.blocks[part],
                gram=(gram := self.gram[part]),
                update_product=self.update_product[part],
                update_norm=self.update_norm[part],
                dimension=self.dimension[part],
                preconditioned=(gram, gram) if self.is_plain else _part(self.preconditioned, part),
                drawn=_part(self.drawn, part),
            )
            for part in slices
        ]

    def require_exact(self) -> None:
        """Refuse a K estimated from projected gradients, where directions or squares are needed.

        Raises:
            ValueError: If it is one.
        """
        if self.projection:
            raise ValueError(
                f"Expected K of whole gradients, got that of gradients projected to {self.projection} numbers, which "
                "has other directions. Measure fewer blocks or samples at a time with projection=0."
            )


def as_array(values: Any) -> np.ndarray:
    """Return float64 of an array, a labelled array, a sequence, or a tensor on any device."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values, dtype=np.float64)


def _stack(grams: Mapping[str, Any]) -> Float[np.ndarray, "block sample sample"]:
    """Return K of all blocks, exactly symmetric and checked."""
    if not grams:
        raise ValueError("Expected at least one block with its Gram matrix, got none.")
    first = as_array(next(iter(grams.values())))
    samples = len(first) if first.ndim else 0
    stacked = np.empty((len(grams), samples, samples))
    for block, (name, values) in enumerate(grams.items()):
        array = as_array(values)
        if array.ndim != 2 or array.shape[0] != array.shape[1] or not array.size:
            raise ValueError(
                f"Expected the Gram matrix K = GGᵀ of block {str(name)!r} as [sample, sample], got shape {array.shape}."
            )
        if len(array) != samples:
            raise ValueError(f"Expected {samples} samples in every block, got {len(array)} in {str(name)!r}.")
        stacked[block] = _symmetric(array, str(name)) if np.isfinite(array).all() else np.nan
    return stacked


def _symmetric(array: np.ndarray, name: str) -> np.ndarray:
    """Return (K + Kᵀ)/2, and refuse what is no Gram matrix."""
    if np.abs(array - array.T).max() > _ASYMMETRY * np.abs(array).max():
        raise ValueError(f"Expected a symmetric K = GGᵀ, got one that is not for block {name!r}.")
    if np.diagonal(array).min() < 0:
        raise ValueError(f"Expected squared norms on the diagonal of K = GGᵀ, got a negative one for {name!r}.")
    return (array + array.T) / 2


def _by_block(values: Mapping[str, Any], blocks: Sequence[str], shape: tuple[int, ...], what: str) -> np.ndarray:
    """Return one array of a shape for each block; NaN if there are no values at all."""
    if not values:
        return np.full((len(blocks), *shape), np.nan)
    if missing := [name for name in blocks if name not in values]:
        raise ValueError(f"Expected {what} of each of {len(blocks)} blocks, got none of {missing[0]!r}.")
    arrays = [as_array(values[name]) for name in blocks]
    for name, array in zip(blocks, arrays, strict=True):
        if array.shape != shape:
            raise ValueError(f"Expected {what} of block {name!r} with shape {shape}, got {array.shape}.")
    return np.stack(arrays)


def _pair(
    first: Mapping[str, Any], second: Mapping[str, Any], blocks: Sequence[str]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return two arrays stacked over blocks, NaN for a block that has none; ``None`` if there is nothing."""
    if not first:
        return None
    return _filled(first, blocks), _filled(second, blocks)


def _filled(values: Mapping[str, Any], blocks: Sequence[str]) -> np.ndarray:
    by_block = {name: as_array(array) for name, array in values.items()}
    missing = np.full(next(iter(by_block.values())).shape, np.nan)
    return np.stack([by_block.get(name, missing) for name in blocks])


def _part(pair: tuple[np.ndarray, np.ndarray] | None, part: slice) -> tuple[np.ndarray, np.ndarray] | None:
    return None if pair is None else (pair[0][part], pair[1][part])


def codes_of(labels: Sequence[Any] | np.ndarray, samples: int, what: str) -> Int[np.ndarray, " sample"]:
    """Return labels as numbers 0, 1, …; without labels each sample gets its own.

    Raises:
        ValueError: If there is not one label for each sample.

    >>> codes_of(["b", "a", "b"], 3, "group").tolist()
    [1, 0, 1]
    """
    if not len(labels):
        return np.arange(samples)
    array = np.asarray(labels)
    if array.shape != (samples,):
        raise ValueError(f"Expected one {what} for each of {samples} samples, got labels of shape {array.shape}.")
    return np.unique(array, return_inverse=True)[1]


def _members(tasks: Sequence[Any] | np.ndarray, samples: int) -> dict[str, np.ndarray]:
    """Return which samples belong to each task: ``"all"`` first, then the tasks by name, even if there is only one."""
    everything = {ALL: np.ones(samples, dtype=bool)}
    if not len(tasks):
        return everything
    labels = np.asarray(tasks).astype(str)
    if labels.shape != (samples,):
        raise ValueError(f"Expected one task for each of {samples} samples, got labels of shape {labels.shape}.")
    names = sorted(set(labels.tolist()))
    if ALL in names:
        raise ValueError(f"Expected names of tasks other than {ALL!r}, which stands for all samples. Rename the task.")
    return everything | {name: labels == name for name in names}


@dataclass(frozen=True)
class Weight:
    """How unequally samples contribute to tr K, ``[block, task]``; NaN where tr K is 0.

    Args:
        groups: N_eff = (Σ k_g)²/Σ k_g², k_g = Σ K_ii over a group's samples (Kish 1965).
        largest_group: Largest share k_g/Σ k_g.
        largest_samples: Share of the three largest K_ii.
    """

    groups: np.ndarray
    largest_group: np.ndarray
    largest_samples: np.ndarray


def weight_of(gram: Float[np.ndarray, "block sample sample"], labels: SampleGroups) -> Weight:
    """Return how many groups are behind tr K, and the share of the largest.

    >>> weight = weight_of(np.diag([3.0, 1.0, 1.0, 1.0])[None], SampleGroups.of_one_task(np.arange(4)))
    >>> weight.groups, weight.largest_group
    (array([[3.]]), array([[0.5]]))
    """
    norms = np.where(labels.member.T, np.diagonal(gram, axis1=1, axis2=2)[:, None], 0.0)  # block, task, sample
    by_group = norms @ labels.membership
    total = norms.sum(-1)
    return Weight(
        ratio(total**2, (by_group**2).sum(-1)),
        ratio(by_group.max(-1), total),
        ratio(np.sort(norms, axis=-1)[..., -3:].sum(-1), total),
    )


def counted_groups(
    gram: Float[np.ndarray, "block sample sample"], labels: SampleGroups
) -> Float[np.ndarray, "block task"]:
    """Return the groups that count for Student's t: min(groups, N_eff), but 2 where N_eff is less; 1 if there is one.

    A few samples that dominate tr K are few independent terms, however many others there are. Simulated with lognormal
    and t₃ norms, or 3 % of samples with ten times the norm, 95 % intervals of ln PR hold the truth in 89 to 97 % of
    cases; with the number of groups, in 81 to 92 %.
    """
    return np.minimum(labels.groups, np.maximum(weight_of(gram, labels).groups, 2.0))


@dataclass(frozen=True)
class PairMeans:
    """Mean over pairs of samples, from all groups and leaving out each one; NaN where there is no pair."""

    mean: Float[np.ndarray, "block task task"]
    left_out: Float[np.ndarray, "block group task task"]


def pair_means(values: Float[np.ndarray, "block sample sample"], labels: SampleGroups) -> PairMeans:
    """Return means of a symmetric ``values`` over pairs (i in task s, j in task t) of different groups.

    >>> labels = SampleGroups.of_one_task(np.array([0, 0, 1]))
    >>> pair_means(np.array([[[9.0, 9.0, 1.0], [9.0, 9.0, 3.0], [1.0, 3.0, 9.0]]]), labels).mean
    array([[[2.]]])
    """
    member = labels.member.astype(np.float64)
    by_task = np.where(labels.apart, values, 0.0) @ member  # of sample i with all j of task t
    products = member[:, :, None] * by_task[:, :, None, :]
    tasks = member.shape[1]
    rows = labels.membership.T @ products.reshape(*by_task.shape[:2], -1)
    return _means(*_sums(rows.reshape(len(values), -1, tasks, tasks)), labels)


def pair_means_of_products(numbers: Float[np.ndarray, "block sample"], labels: SampleGroups) -> PairMeans:
    """Return :func:`pair_means` of the products x_i x_j, from sums by group: O(N) a block.

    >>> labels = SampleGroups.of_one_task(np.array([0, 0, 1]))
    >>> pair_means_of_products(np.array([[1.0, 3.0, 5.0]]), labels).mean
    array([[[10.]]])
    """
    return _means(*_sums_of_products(numbers, labels), labels)


def _sums_of_products(numbers: np.ndarray, labels: SampleGroups) -> tuple[np.ndarray, np.ndarray]:
    by_group = labels.membership.T @ (numbers[:, :, None] * labels.member)
    # Of all other groups, without a difference that would cancel where one group is far larger.
    before, after = (np.zeros_like(by_group) for _ in range(2))
    before[:, 1:] = np.cumsum(by_group, axis=1)[:, :-1]
    after[:, :-1] = np.cumsum(by_group[:, ::-1], axis=1)[:, -2::-1]
    return _sums(by_group[:, :, :, None] * (before + after)[:, :, None, :])


def _means(sums: np.ndarray, without: np.ndarray, labels: SampleGroups) -> PairMeans:
    counts, counts_without = labels.pairs
    return PairMeans(ratio(sums, counts), ratio(without, counts_without))


def _sums(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sums over all pairs, and without each group, from those of each group with all others."""
    total = rows.sum(1)
    return total, total[:, None] - rows - rows.swapaxes(2, 3)


def diagonal_means(values: Float[np.ndarray, "block sample"], labels: SampleGroups) -> tuple[np.ndarray, np.ndarray]:
    """Return means of one number a sample over each task: from all groups, and without each.

    Returns:
        ``[block, task]`` and ``[block, group, task]``.
    """
    by_group = np.einsum("ng,nt,bn->bgt", labels.membership, labels.member.astype(np.float64), values)
    counts = np.einsum("ng,nt->gt", labels.membership, labels.member.astype(np.float64))
    total, count = by_group.sum(1), counts.sum(0)
    return ratio(total, count), ratio(total[:, None] - by_group, count - counts)


def jackknife_error(
    left_out: Float[np.ndarray, "block group ..."], relevant: Bool[np.ndarray, "group ..."]
) -> Float[np.ndarray, "block ..."]:
    """Return the standard error √((g−1)/g Σ(θ_r − θ̄)²) of a statistic from its values θ_r without each of g groups.

    Args:
        left_out: θ_r.
        relevant: Whether the statistic depends on a group.

    Returns:
        NaN for fewer than two groups, or where the statistic does not exist without one of them.
    """
    count = relevant.sum(0)
    mean = ratio(np.where(relevant, left_out, 0.0).sum(1), count)
    squares = np.where(relevant, (left_out - mean[:, None]) ** 2, 0.0).sum(1)
    return np.sqrt(np.where(count > 1, ratio(count - 1, count), np.nan) * squares)


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval; NaN where either does not exist."""

    estimate: np.ndarray
    low: np.ndarray
    high: np.ndarray


def jackknifed(
    estimate: Float[np.ndarray, "block ..."],
    left_out: Float[np.ndarray, "block group ..."],
    relevant: Bool[np.ndarray, "group ..."],
    groups: np.ndarray | np.integer,
) -> Estimate:
    """Return a smooth function of means corrected for its bias of O(1/g), g θ − (g − 1) θ̄, with its 95 % interval.

    The ratio of two unbiased means is biased: simulated, the overlap of one Fisher with itself read 1.03 with 64
    groups a task, and its interval held 1 in half of all cases; corrected, 1.00 and 98 %.

    Args:
        estimate: θ from all groups.
        left_out: θ without each group.
        relevant: Whether θ depends on a group.
        groups: Number of groups for Student's t.

    Returns:
        Uncorrected and without an interval where θ does not exist without one of the groups.
    """
    count = relevant.sum(0)
    mean = ratio(np.where(relevant, left_out, 0.0).sum(1), count)
    corrected = count * estimate - (count - 1) * mean
    low, high = confidence_interval(corrected, jackknife_error(left_out, relevant), groups)
    return Estimate(np.where(np.isnan(low), estimate, corrected), low, high)


def confidence_interval(
    estimate: np.ndarray, error: np.ndarray, groups: np.ndarray | np.integer | int, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray]:
    """Return estimate ± t·error with Student's t of groups − 1 degrees of freedom; NaN for fewer than two groups.

    >>> low, high = confidence_interval(np.array([0.0]), np.array([1.0]), 3)
    >>> high.round(3)
    array([4.303])
    """
    degrees = np.where(np.asarray(groups) > 1, np.asarray(groups) - 1.0, np.nan)
    reach = special.stdtrit(degrees, (1 + level) / 2) * error
    return estimate - reach, estimate + reach


#: Number of random splits, each used in both directions.
SPLITS = 4
#: What costs O(N³) a time is done on fewer halves, or on so many samples, where there are more, in many groups.
MOST_SAMPLES, _MANY_GROUPS = 256, 64


def splits_of(group: Int[np.ndarray, " sample"]) -> int:
    """Return how many random splits do: four, or one of more than 256 samples in more than 64 groups.

    For what hardly depends on the split where halves are large, such as the dominant ratio: simulated at N = 512, its
    intervals hold the truth in 98 to 99 % of cases with one split as with four.

    >>> splits_of(np.arange(256)), splits_of(np.arange(512)), splits_of(np.arange(512) // 8)
    (4, 1, 4)
    """
    return 1 if len(group) > MOST_SAMPLES and len(np.unique(group)) > _MANY_GROUPS else SPLITS


def half_splits(
    group: Int[np.ndarray, " sample"], splits: int, seed: int
) -> Iterator[tuple[Int[np.ndarray, " first"], Int[np.ndarray, " second"]]]:
    """Yield the samples of two random halves of the groups. Each split comes twice, the halves exchanged.

    >>> halves = list(half_splits(np.array([0, 0, 1, 1]), 1, seed=0))
    >>> sorted(tuple(first.tolist()) for first, _ in halves)
    [(0, 1), (2, 3)]
    """
    codes = np.unique(group)
    generator = np.random.default_rng(seed)
    for _ in range(splits):
        first = np.isin(group, generator.permutation(codes)[: len(codes) // 2])
        for half in (first, ~first):
            yield np.flatnonzero(half), np.flatnonzero(~half)
