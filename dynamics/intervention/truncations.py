"""Adapters without some of their singular directions: what they do to the loss of samples that did not choose.

Directions are chosen on one half of the groups, and the truncated adapter is compared with the whole one on the other
half, sample by sample; then with the halves exchanged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import nn

from dynamics.fisher.samples import Estimate, SampleGroups, codes_of
from dynamics.intervention.effects import effects
from dynamics.spectra.measures import ENERGY, rank_at_energy
from probes.additions import added
from probes.low_rank import LowRankMatrix
from probes.scores import device_of
from probes.singular_directions import Directions, singular_directions
from probes.tasks import Task, split_by_group, subset
from probes.watched import Watched

#: What is kept; see ``schema.SENSITIVITY``.
TRUNCATIONS = ("effect", "sigma_top", "random", "sigma_tail", "energy", "none")


@dataclass(frozen=True)
class Adapters:
    """The singular directions of all low-rank matrices of a model.

    Args:
        directions: By matrix.
        sigma: Their σ; NaN beyond a matrix's rank.
        shapes: ``(out, in)`` of each matrix.
    """

    directions: Mapping[str, Directions]
    sigma: Float[np.ndarray, "matrix index"]
    shapes: Int[np.ndarray, "matrix 2"]

    @classmethod
    def of(cls, watched: Mapping[str, Watched]) -> Adapters:
        """Return the directions of matrices as they are now.

        Raises:
            ValueError: If a factor is not finite; it names the matrix.
        """
        directions, longest = {}, 0
        for name, matrix in watched.items():
            product = matrix.read()
            assert isinstance(product, LowRankMatrix)
            try:
                directions[name] = singular_directions(product)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
            longest = max(longest, min(product.rank, *product.shape))
        shapes = [(len(part.left), len(part.right)) for part in directions.values()]
        sigma = padded([part.values for part in directions.values()], longest)
        return cls(directions, sigma, np.array(shapes, dtype=np.int64))

    @property
    def names(self) -> list[str]:
        """Of the matrices."""
        return list(self.directions)

    @property
    def present(self) -> Bool[np.ndarray, "matrix index"]:
        """Whether a matrix has a direction of this number."""
        return np.isfinite(self.sigma)

    @property
    def rank_by_energy(self) -> Float[np.ndarray, " matrix"]:
        """Fewest directions that hold 99 % of Σσ²; NaN where there are none."""
        return rank_at_energy(self.sigma, energy=ENERGY).numpy()

    def without(self, kept: Bool[np.ndarray, "matrix index"]) -> dict[str, LowRankMatrix]:
        """Return the change that removes all directions but those kept, of each matrix that it changes."""
        removed = self.present & ~kept
        return {
            name: part.part(torch.from_numpy(row[: len(part.values)]), -1.0)
            for (name, part), row in zip(self.directions.items(), removed, strict=True)
            if row.any()
        }


def padded(rows: Sequence[torch.Tensor], length: int) -> Float[np.ndarray, "matrix index"]:
    """Return rows of different length as one array, NaN beyond them.

    >>> padded([torch.ones(1)], 2)
    array([[ 1., nan]])
    """
    array = np.full((len(rows), length), np.nan)
    for row, values in zip(array, rows, strict=True):
        row[: len(values)] = values.cpu().numpy()
    return array


@dataclass(frozen=True)
class Halves:
    """The samples of all tasks in halves that share no group.

    Args:
        tasks: The tasks.
        numbers: By half and task, numbers of its samples.
    """

    tasks: Sequence[Task]
    numbers: Sequence[Sequence[Sequence[int]]]

    @classmethod
    def of(cls, tasks: Sequence[Task]) -> Halves:
        """Return two halves.

        Raises:
            ValueError: If a half of a task would be empty.
        """
        halves = split_by_group({task.name: task.groups() for task in tasks})
        return cls(tasks, [[halves[task.name][half] for task in tasks] for half in (0, 1)])

    @classmethod
    def whole(cls, tasks: Sequence[Task]) -> Halves:
        """Return all samples as one half without another."""
        return cls(tasks, [[range(len(task)) for task in tasks]])

    def parts(self, half: int) -> list[Task]:
        """Return the tasks with the samples of one half."""
        return [subset(task, numbers) for task, numbers in zip(self.tasks, self.numbers[half], strict=True)]

    def places(self, half: int) -> Int[np.ndarray, " sample"]:
        """Return where the samples of one half stand among all samples, task after task."""
        starts = np.cumsum([0, *map(len, self.tasks[:-1])])
        return np.concatenate([a + np.asarray(b) for a, b in zip(starts, self.numbers[half], strict=True)])

    @property
    def sizes(self) -> Float[np.ndarray, "half task"]:
        """Number of samples of all tasks together, and of each."""
        sizes = np.array([[len(numbers) for numbers in half] for half in self.numbers], dtype=np.float64)
        return np.concatenate([sizes.sum(1, keepdims=True), sizes], 1)

    @property
    def labels(self) -> SampleGroups:
        """Group and tasks of each sample; the first task holds all."""
        task = np.repeat(np.arange(len(self.tasks)), [len(task) for task in self.tasks])
        member = np.concatenate([np.ones((len(task), 1), dtype=bool), task[:, None] == np.arange(len(self.tasks))], 1)
        groups = [group for task in self.tasks for group in task.groups()]
        return SampleGroups(codes_of(groups, len(task), "group"), member)


@dataclass(frozen=True)
class TruncationEffects:
    """What truncations do on the halves that did not choose them.

    Args:
        effect: ``[truncation, task]``, mean of ℓ(whole) − ℓ(truncated): negative if the truncated adapter is worse.
        kept: Whether a direction is kept by what a half chooses; of random truncations, how often.
    """

    effect: Estimate
    kept: Float[np.ndarray, "half truncation matrix index"]


def truncation_effects(
    model: nn.Module,
    halves: Halves,
    adapters: Adapters,
    chosen: Bool[np.ndarray, "half matrix index"],
    is_cut: Bool[np.ndarray, " matrix"],
    *,
    draws: int,
    seed: int,
    advance: Callable[[int], None] = lambda samples: None,
) -> TruncationEffects:
    """Return the effect of each truncation, chosen on one half and evaluated on the other.

    Args:
        model: In evaluation mode (:func:`probes.undisturbed.undisturbed`).
        halves: Two of them.
        adapters: The directions of the model's matrices.
        chosen: The directions kept by effect, by the half that chooses them.
        is_cut: Whether a matrix is truncated; others stay whole.
        draws: Random truncations to average.
        seed: Of the random ones.
        advance: Called with the number of samples that have passed through the model.
    """
    labels = halves.labels
    differences = np.zeros((len(TRUNCATIONS), len(labels.group)))
    share = np.zeros((2, len(TRUNCATIONS), *adapters.sigma.shape))
    generator = np.random.default_rng(seed)
    for half, held_out in ((0, 1), (1, 0)):
        parts, places = halves.parts(held_out), halves.places(held_out)
        whole = _losses(model, parts)
        advance(len(whole))
        for arm, kept in _truncations(adapters, chosen[half], is_cut, draws, generator):
            times = draws if TRUNCATIONS[arm] == "random" else 1
            with added(model, adapters.without(kept)):
                losses = _losses(model, parts)
            advance(len(losses))
            differences[arm, places] += (whole - losses) / times
            share[half, arm] += kept / times
    return TruncationEffects(effects(differences, labels), share)


def _truncations(
    adapters: Adapters,
    chosen: Bool[np.ndarray, "matrix index"],
    is_cut: Bool[np.ndarray, " matrix"],
    draws: int,
    generator: np.random.Generator,
) -> Iterator[tuple[int, Bool[np.ndarray, "matrix index"]]]:
    """Yield the number of each truncation, and what it keeps; random ones several times."""
    present, index = adapters.present, np.arange(adapters.sigma.shape[1])
    count, rank = present.sum(1, keepdims=True), (chosen & present).sum(1, keepdims=True)

    def randomly() -> np.ndarray:
        order = np.where(present, generator.random(present.shape), np.inf).argsort(1).argsort(1)
        return order < rank

    kept: dict[str, Callable[[], np.ndarray]] = {
        "effect": lambda: chosen,
        "sigma_top": lambda: index < rank,
        "random": randomly,
        "sigma_tail": lambda: index >= count - rank,
        "energy": lambda: index < adapters.rank_by_energy[:, None],
        "none": lambda: np.zeros_like(present),
    }
    for arm, name in enumerate(TRUNCATIONS):
        for _ in range(draws if name == "random" else 1):
            yield arm, present & (kept[name]() | ~is_cut[:, None])


def not_truncated(model: nn.Module, adapters: Adapters, is_judged: Bool[np.ndarray, " matrix"]) -> dict[str, str]:
    """Return the matrices from which nothing can be taken by adding to a layer's output, and why.

    Fused experts, for example, and weights that two layers share.
    """
    changes = adapters.without(~(adapters.present & is_judged[:, None]))
    with suppress(ValueError), added(model, changes):
        return {}
    reasons = {}
    for name, change in changes.items():
        try:
            with added(model, {name: change}):
                continue
        except ValueError as error:
            reasons[name] = f"not truncated: {error}"
    return reasons


def _losses(model: nn.Module, tasks: Sequence[Task]) -> Float[np.ndarray, " sample"]:
    device = device_of(model)
    with torch.no_grad():
        losses = [task.losses(model, batch.to(device)).double().cpu() for task in tasks for batch in task.batches()]
    return torch.cat(losses).numpy()
