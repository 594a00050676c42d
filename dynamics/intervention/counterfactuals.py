r"""Counterfactual versions of an update: its part along informative directions, the rest, and what to compare them to.

Directions come from the gradients of some groups of probe samples, losses from the others (:func:`intervene`): with the
same samples for both, any part along their gradients seems to work. Each split of the groups gives two folds, with
the halves exchanged.

====================  ===================================================================================
``full``              the update δ as it is
``on``                Π_k δ, its part in the k leading directions
``off``               δ − Π_k δ, the rest, with what lies outside the space
``random``            its part in k random directions of the gradients' span
``matched``           cδ ± z with z ⟂ δ random: the norm and the inner product with δ of ``on``, no direction of its own
``bottom``            its part in the k last directions that K resolves
``sigma_top``         its k leading singular directions, of each matrix
``sigma_tail``        the others
``layer:3``           its matrices of layer 3; ``layer:NAME`` one matrix; ``without_layer:…`` all others
====================  ===================================================================================

A part along gradients is Gᵀw, one backward pass of a weighted loss, and stays an adapter: of rank 2r in tangent space,
``off`` of rank 3r, as an update leaves that space by dB dA. Parts are kept in single precision beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from dynamics.fisher.concentration import LEAST_GROUPS
from dynamics.fisher.samples import StackedGram, as_array, half_splits
from dynamics.intervention.export import save_arm
from dynamics.intervention.parts import RESOLVED, Part, bottom_part, leading_part, random_part
from dynamics.intervention.update_vectors import (
    Change,
    as_matrices,
    energy,
    in_format,
    inner,
    of_layer,
    random_change,
    sigma_top,
    weighted_sum,
)
from dynamics.schema import GLOBAL
from probes.blocks import trained_parameters
from probes.gram import ProbeGram
from probes.low_rank import LowRankMatrix
from probes.scores import device_of
from probes.tasks import Task, require_names, subset
from probes.undisturbed import bare, undisturbed
from probes.watched import Matrix, find, whole
from probes.weighted_gradients import weighted_gradients

#: What is scored unless other arms are chosen.
ARMS = ("full", "on", "off", "random", "matched")
#: All that are known by a name alone.
ALL_ARMS = (*ARMS, "bottom", "sigma_top", "sigma_tail")
_WITHOUT_K = ("full", "layer:", "without_layer:")
PAIR = ("matched+", "matched-")
#: Numbers of directions from which the headline's is taken: the largest of at most a quarter of a fold's samples.
HEADLINE = (1, 2, 4, 8, 16)
#: No probe has as many samples.
_MOST_DIRECTIONS = 10**6
#: Share of ‖on‖² by which its three forms may differ: in single precision, and in half.
DEVIATION, DEVIATION_HALF = 1e-5, 2e-2
#: Cosine of on and δ below which rounding of b and ⟨on, δ⟩, relative to ‖on‖‖δ‖, counts for more than that of ‖on‖².
_COSINE = 0.1
#: Eigenvalues of K are rounding below so many units of the largest: of the single precision in which inner products are
#: formed, and of the squared one of gradients, whose own rounding is like noise of independent signs.
_ROUNDING, _SINGLE = 100.0, torch.finfo(torch.float32).eps


#: Losses of the same samples may differ by this part of their mean size: in single precision, and in half.
_SAME_LOSS, _SAME_LOSS_HALF = 1e-3, 0.1
#: Adapters this close to the update, as a part of ‖δ‖², are the update.
_SAME_ADAPTER = 1e-10


class Fold(NamedTuple):
    """Directions from some groups, to be scored on the others.

    Args:
        fit: Groups whose gradients give the directions.
        held_out: The other groups.
        arms: Arm → matrix → its change; made when first asked for.
    """

    fit: tuple[str, ...]
    held_out: tuple[str, ...]
    arms: Arms


@dataclass(frozen=True)
class Counterfactuals:
    """Arms of one update: by fold, to be scored, and from all groups, to be exported.

    Args:
        folds: Each split of the groups twice, the halves exchanged.
        whole: Arms whose directions come from all groups: never score them on these.
        gram: K and b behind the directions.
        splits: Number of splits.
        update: What is taken apart.
    """

    folds: tuple[Fold, ...]
    whole: Arms
    gram: ProbeGram
    splits: int
    update: _Update

    @property
    def k(self) -> tuple[int, ...]:
        """Numbers of directions. The first is the headline's: its arms are ``on``, …, others ``on(4)``, …."""
        return self.update.k

    @property
    def names(self) -> tuple[str, ...]:
        """The chosen arms."""
        return self.update.names

    def require(self, model: nn.Module, tasks: Sequence[Task]) -> None:
        """Refuse another model or other samples than those of the arms.

        Raises:
            ValueError: If the model is not at the weights where the update began, or the tasks are not those behind K.
        """
        self.update.require_start(model)
        _numbers(tasks, self.gram)

    def require_losses(self, rows: Int[np.ndarray, " some"], losses: Float[np.ndarray, " some"]) -> None:
        """Refuse samples that have the names of those behind K, and other losses.

        Args:
            rows: Of K.
            losses: Of their samples, at the weights where the update began.

        Raises:
            ValueError: If they are not those stored beside K, up to rounding.
        """
        if self.gram.losses is None:
            return
        stored = as_array(self.gram.losses)[rows]
        limit = _SAME_LOSS_HALF if self.update.tolerance > DEVIATION else _SAME_LOSS
        size = np.maximum(np.abs(stored), np.nanmean(np.abs(stored)))
        if other := int((np.abs(losses - stored) > limit * size).sum()):
            raise ValueError(
                f"Expected the samples behind K, got {other} of {len(rows)} with another loss. Pass the tasks "
                "that K was measured with."
            )

    def save(self, folder: str | Path, arm: str, *, scale: float = 1.0) -> Path:
        """Write an arm, added to the adapter at the increment's start, as an adapter that any evaluator loads.

        See :func:`dynamics.intervention.export.save_arm`.

        Args:
            folder: New or empty.
            arm: ``full``, ``on``, ``on(4)``, …; of the matched pair ``matched+`` or ``matched-``.
            scale: λ, the arm's length.
        """
        change = weighted_sum([(scale, self.whole[arm])])
        return save_arm(self.update.model, change, Path(folder), arm if scale == 1 else f"{scale:g} · {arm}")


class Arms(Mapping[str, dict[str, Matrix]]):
    """Arms whose directions come from the gradients of some samples: name → matrix → its change.

    They are made in one pass over these samples when the first is asked for, while the model must be at the weights
    where the update began. :meth:`release` gives their memory back.

    Args:
        update: What is taken apart, and by which gradients.
        rows: Rows of K whose gradients give the directions, ascending.
        seed: Of the random directions.

    Raises:
        KeyError: If an arm was not chosen.
        ValueError: If the model has moved, or its gradients are not those behind K.
    """

    def __init__(self, update: _Update, rows: Int[np.ndarray, " fit"], seed: int) -> None:
        self._update, self.rows, self._seed = update, rows, seed
        self._changes: dict[tuple[str, int], Change] = {}
        self._deviation = np.nan
        self._keys: dict[str, tuple[str, int]] = {}
        first = update.k[0]
        for arm in update.names:
            for name in PAIR if arm == "matched" else (arm,):
                self._keys[name] = (name, first)
                if not arm.startswith(_WITHOUT_K):
                    self._keys |= {f"{name}({k})": (name, k) for k in update.k}

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, arm: str) -> dict[str, Matrix]:
        if arm not in self._keys:
            raise KeyError(f"Expected one of the arms {', '.join(self._keys)}, got {arm!r}.")
        return self.matrices(*self._keys[arm])

    @cached_property
    def parts(self) -> dict[tuple[str, int], Part]:
        """Arm and k → its part along gradients, as weights of the rows: ``on``; ``random``, ``bottom`` if chosen."""
        gram = self._update.gram[np.ix_(self.rows, self.rows)]
        product = self._update.product[self.rows]
        generator = np.random.default_rng(self._seed)
        parts = {("on", k): leading_part(gram, product, k, self._update.resolved) for k in self._update.k}
        for k in self._update.k:
            if "random" in self._update.names:
                parts["random", k] = random_part(gram, product, k, generator, self._update.resolved)
            if "bottom" in self._update.names:
                parts["bottom", k] = bottom_part(gram, product, k, self._update.resolved)
        return parts

    def captured(self, arm: str, k: int) -> float:
        """Return c = ‖Πδ‖²/‖δ‖² of a part along gradients, of all of δ."""
        return self.parts[arm, k].energy / self._update.energy

    @property
    def deviation(self) -> float:
        """The largest relative difference between ‖Πδ‖² from K and that of the change made; makes the changes."""
        self._made("on", self._update.k[0])
        return self._deviation

    def matrices(self, arm: str, k: int) -> dict[str, Matrix]:
        """Return an arm as changes of matrices, and of vectors by their parameter's name.

        Raises:
            ValueError: If the model has moved, or its gradients are not those behind K.
        """
        self._update.require_start(self._update.model)
        return as_matrices(self._update.model, self.change(arm, k), self._update.space)

    def change(self, arm: str, k: int) -> Change:
        """Return an arm in the space of the update: in factor space, as changes of the factors."""
        delta = self._update.change
        if arm == "full":
            return delta
        if arm.startswith(("layer:", "without_layer:")):
            return of_layer(delta, arm)
        if arm == "sigma_top":
            return sigma_top(delta, k)
        if arm == "sigma_tail":
            return weighted_sum([(1.0, delta), (-1.0, sigma_top(delta, k))])
        if arm in PAIR:
            share = self.captured("on", k)
            size = float(np.sqrt(max(share * (1 - share), 0.0) * self._update.energy))
            return weighted_sum([(share, delta), (size if arm == PAIR[0] else -size, self._direction())])
        if arm == "off":
            return weighted_sum([(1.0, delta), (-1.0, self._made("on", k))])
        return self._made(arm, k)

    def release(self) -> None:
        """Let the changes' memory go; they are made again when asked for."""
        self._changes.clear()

    def _direction(self) -> Change:
        """Return a random direction of norm 1 in the space, orthogonal to the update."""
        key = ("direction", 0)
        if key not in self._changes:
            model, delta, space = self._update.model, self._update.change, self._update.space
            self._changes[key] = random_change(model, delta, space, self._seed)
        return self._changes[key]

    def _made(self, arm: str, k: int) -> Change:
        """Return a part along gradients; the first time, make all of them in one pass over the samples behind them."""
        if (arm, k) not in self._changes:
            update = self._update
            weights = torch.tensor(np.stack([part.weights for part in self.parts.values()]))
            tasks = tasks_of(update.tasks, update.numbers[self.rows])
            changes: list[dict[str, Matrix]] = [{} for _ in weights]
            if weights.any():  # else nothing of the update lies along the gradients
                changes = weighted_gradients(update.model, tasks, weights, space=update.space, blocks=update.blocks)
            self._changes.update(zip(self.parts, changes, strict=True))
            self._deviation = max(self._apart(self.parts["on", k].energy, self._changes["on", k]) for k in update.k)
            if not self._deviation <= update.tolerance:
                raise ValueError(
                    f"Expected gradients as those behind K, whose projection of the update has the same norm to "
                    f"{update.tolerance:g}, got a difference of {self._deviation:.2g}. Measure K and the arms with the "
                    "same weights, samples and loss, in evaluation mode and in single precision."
                )
        return self._changes[arm, k]

    def _apart(self, energy_of_gram: float, change: Change) -> float:
        """Return how far ‖on‖² and ⟨on, δ⟩ are from wᵀKw, relative to it, or to 0.1 ‖on‖‖δ‖ where that is more."""
        norms = (energy(change), inner(change, self._update.change))
        size = max(energy_of_gram, _COSINE * float(np.sqrt(energy_of_gram * self._update.energy)))
        return max(abs(norm - energy_of_gram) for norm in norms) / size if size > 0 else 0.0


@dataclass(frozen=True)
class _Update:
    """An update, and the gradients by which it is taken apart.

    Args:
        model: At the weights where the update began.
        tasks: All probe samples.
        gram, product: K and b of all blocks together.
        numbers: Of each row of K, the sample's number over all tasks.
        change: δ, in the space of K.
        energy: ‖δ‖², what lies outside the space included.
        k: Numbers of directions, the headline's first.
        names: The chosen arms.
        space: ``"tangent"`` or ``"factor"``.
        blocks: Names of the blocks behind K; ``None`` for all.
        start: Sum of each trained parameter where the update began.
        resolved: Eigenvalues of K below this share of the largest are rounding.
        tolerance: Of ‖on‖², relative.
    """

    model: nn.Module
    tasks: tuple[Task, ...]
    gram: Float[np.ndarray, "sample sample"]
    product: Float[np.ndarray, " sample"]
    numbers: Int[np.ndarray, " sample"]
    change: Change
    energy: float
    k: tuple[int, ...]
    names: tuple[str, ...]
    space: str
    blocks: tuple[str, ...] | None
    start: Mapping[str, float]
    resolved: float
    tolerance: float

    def require_start(self, model: nn.Module) -> None:
        """Refuse a model that has moved.

        Raises:
            ValueError: If it has.
        """
        sums = _sums(model)
        moved = [name for name in {**self.start, **sums} if sums.get(name) != self.start.get(name)]
        if moved:
            raise ValueError(
                f"Expected the model at the weights where the update began, got other numbers in {moved[:3]}. Set the "
                "weights back (probes.swapped), or make the counterfactuals anew."
            )


def counterfactuals(
    model: nn.Module,
    tasks: Task | Sequence[Task],
    gram: ProbeGram,
    change: Mapping[str, Matrix],
    *,
    k: int | Sequence[int] | None = None,
    arms: Sequence[str] = ARMS,
    splits: int = 2,
    seed: int = 0,
) -> Counterfactuals:
    """Take an update apart along the informative directions of probe samples; only one batch is run yet.

    Args:
        model: At the weights where the update began; it is left as it was.
        tasks: The probe samples behind ``gram``.
        gram: K and b of this update, in tangent or factor space: ``probes.gradient_gram(model, tasks, update=change)``.
        change: The update, as given to ``gradient_gram``.
        k: Numbers of directions; the first is the headline's. By default 16, or the largest of 1, 2, 4, 8, 16 that is
            at most a quarter of a fold's samples: fixed before effects are looked at.
        arms: Which versions of the update; ``full`` is always among them, and ``off`` where ``on`` is.
        splits: Random splits of the groups into halves, each used both ways.
        seed: Of the splits and the random directions.

    Raises:
        ValueError: If K is not of these samples and this update, an arm is unknown, there are fewer than four groups,
            k exceeds the number of samples, or the update is zero.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> def squares(model, batch):
    ...     return (model(batch["x"])[:, 0] - 1) ** 2 / 2
    >>> samples = [{"x": [1.0, 0.1 * number]} for number in range(8)]
    >>> tasks, change = [Task("line", samples, loss=squares)], {"weight": torch.tensor([[0.3, 0.2]])}
    >>> from probes import gradient_gram
    >>> arms = counterfactuals(layer, tasks, gradient_gram(layer, tasks, update=change), change, k=1)
    >>> fit, held_out, parts = arms.folds[0]
    >>> len(fit), len(held_out), torch.allclose(parts["on"]["weight"] + parts["off"]["weight"], change["weight"])
    (4, 4, True)
    """
    tasks = (tasks,) if isinstance(tasks, Task) else tuple(tasks)
    require_names(tasks)
    names = chosen_arms(arms)
    together = _together(gram)
    stacked = StackedGram.of(together)
    stacked.require_exact()
    group = stacked.labels.group
    if len(np.unique(group)) < LEAST_GROUPS:
        raise ValueError(
            f"Expected at least {LEAST_GROUPS} groups, half for directions and half for losses, got "
            f"{len(np.unique(group))}. Probe samples of more groups."
        )
    numbers = _numbers(tasks, gram)
    size = energy(change)
    _require_not_at_the_end(model, change, size)
    if not size > 0:
        raise ValueError("Expected an update other than zero, got none: nothing can be taken apart.")
    if not np.isfinite(stacked.gram).all() or not np.isfinite(stacked.update_product).all():
        raise ValueError(
            "Expected K and b = Gδ of the update, got some that is missing or not finite. Pass update=change."
        )
    if splits < 1:
        raise ValueError(f"Expected at least one split, got {splits}.")
    halves = list(half_splits(group, splits, seed))
    counts = _directions(k, min(len(fit) for fit, _ in halves))
    if max(counts) > len(numbers):
        raise ValueError(
            f"Expected k of at most the number of probe samples, {len(numbers):,}, got {max(counts):,}. There are no "
            "more directions than samples."
        )
    blocks = tuple(name for name in gram.blocks if name != GLOBAL) or None
    precision = _precision(model, tasks[0])
    exact = torch.finfo(precision).eps
    update = _Update(
        model,
        tasks,
        stacked.gram[0],
        stacked.update_product[0],
        numbers,
        in_format(model, change, torch.promote_types(precision, torch.float32)),
        size,
        counts,
        names,
        gram.space or "tangent",
        blocks,
        _sums(model),
        max(RESOLVED, _ROUNDING * min(exact, _SINGLE), _ROUNDING * exact**2),
        DEVIATION if exact < 1e-6 else DEVIATION_HALF,
    )
    labels = np.asarray(gram.groups if len(gram.groups) else gram.sample_ids if len(gram.sample_ids) else group).astype(
        str
    )
    folds = [
        Fold(_groups(labels, fit), _groups(labels, held_out), Arms(update, fit, seed + number))
        for number, (fit, held_out) in enumerate(halves)
    ]
    return Counterfactuals(tuple(folds), Arms(update, np.arange(len(numbers)), seed), gram, splits, update)


def tasks_of(tasks: Sequence[Task], numbers: Int[np.ndarray, " some"]) -> list[Task]:
    """Return tasks with some of their samples, numbered over all tasks, ascending; a task without any is left out."""
    ends = np.cumsum([len(task) for task in tasks])
    parts = [
        numbers[(numbers >= end - len(task)) & (numbers < end)] - (end - len(task))
        for task, end in zip(tasks, ends, strict=True)
    ]
    return [subset(task, part.tolist()) for task, part in zip(tasks, parts, strict=True) if len(part)]


def chosen_arms(arms: Sequence[str]) -> tuple[str, ...]:
    """Return the chosen arms, each once, ``full`` first.

    Raises:
        ValueError: If one is unknown.

    >>> chosen_arms(["random", "on"])
    ('full', 'on', 'off', 'random')
    """
    if isinstance(arms, str):
        raise ValueError(f"Expected a list of arms, got the text {arms!r}.")
    wrong = [arm for arm in arms if arm not in (*ALL_ARMS, "scale") and not arm.startswith(_WITHOUT_K[1:])]
    if wrong:
        raise ValueError(
            f"Expected arms among {', '.join(ALL_ARMS)}, layer:NUMBER and without_layer:NUMBER, got "
            f"{', '.join(map(repr, wrong))}."
        )
    apart = ("on", "off") if {"on", "off", "matched"} & {*arms} else ()
    return tuple(dict.fromkeys(["full", *apart, *(arm for arm in arms if arm != "scale")]))


def _together(gram: ProbeGram) -> ProbeGram:
    """Return K and b of all blocks together."""
    if GLOBAL not in gram.gram:
        raise ValueError(f"Expected K of all blocks together, {GLOBAL!r}, got {', '.join(gram.blocks[:3])}.")
    if gram.fisher != "empirical":
        raise ValueError("Expected the empirical Fisher, whose gradients can be taken again, got sampled labels.")
    if gram.space == "weight":
        raise ValueError("Expected K in tangent or factor space, got weight space, whose projections are no adapters.")
    if GLOBAL not in gram.update_product:
        raise ValueError("Expected b = Gδ beside K, got none. Pass update=change to gradient_gram.")

    def only(values: Mapping[str, Any]) -> dict[str, Any]:
        return {GLOBAL: values[GLOBAL]} if GLOBAL in values else {}

    return replace(
        gram,
        gram=only(gram.gram),
        update_product=only(gram.update_product),
        update_norm_squared=only(gram.update_norm_squared),
        share_outside_space=only(gram.share_outside_space),
        dimension=only(gram.dimension),
    )


def _numbers(tasks: Sequence[Task], gram: ProbeGram) -> Int[np.ndarray, " sample"]:
    """Return the number, over all tasks, of the sample behind each row of K."""
    names = [name for task in tasks for name in task.sample_ids()]
    left_out = set(gram.left_out)
    numbers = np.array([number for number in range(len(names)) if number not in left_out], dtype=np.int64)
    rows = len(gram.gram[GLOBAL])
    if len(numbers) != rows or (len(gram.sample_ids) and [names[n] for n in numbers] != list(gram.sample_ids)):
        raise ValueError(
            f"Expected the tasks behind K, got {len(numbers)} samples for {rows} rows, or others. Measure K with these "
            "tasks."
        )
    return numbers


def _directions(k: int | Sequence[int] | None, samples: int) -> tuple[int, ...]:
    if k is None:
        return (max([count for count in HEADLINE if count <= samples / 4], default=1),)
    return chosen_k(k)


def chosen_k(k: int | Sequence[int]) -> tuple[int, ...]:
    """Return the chosen numbers of directions, each once, the headline's first.

    Raises:
        ValueError: If there is none, or one is out of range.

    >>> chosen_k([16, 4, 16])
    (16, 4)
    """
    given = [k] if isinstance(k, int | float | np.number) else list(k)
    if any(int(count) != count for count in given):
        raise ValueError(f"Expected whole numbers of directions, got k={k}.")
    counts = tuple(dict.fromkeys(map(int, given)))
    if not counts or min(counts) < 1 or max(counts) > _MOST_DIRECTIONS:
        got = ", ".join(map(str, counts)) or "none"
        raise ValueError(f"Expected k, numbers of directions, from 1 to the number of probe samples, got {got}.")
    return counts


def _require_not_at_the_end(model: nn.Module, change: Change, size: float) -> None:
    """Refuse adapters that are the update itself: where they began at zero, the model is where the update ends.

    Raises:
        ValueError: If they are.
    """
    present = {watched.name: watched.read() for watched in find(model).watched if watched.name in change}
    adapters = {name: matrix for name, matrix in present.items() if isinstance(matrix, LowRankMatrix)}
    if len(adapters) == len(change) and size > 0:
        apart = weighted_sum([(1.0, adapters), (-1.0, {name: change[name] for name in adapters})])
        if abs(energy(apart)) < _SAME_ADAPTER * size:
            raise ValueError(
                "Expected the model at the weights where the update began, got adapters that are the update: it is "
                "where the update ends. Set the weights back before K is measured (probes.swapped)."
            )


def _groups(labels: np.ndarray, rows: np.ndarray) -> tuple[str, ...]:
    return tuple(dict.fromkeys(labels[rows].tolist()))


def _sums(model: nn.Module) -> dict[str, float]:
    """Return the sum of each trained parameter, by which a move is noticed."""
    return {name: float(whole(p).sum(dtype=torch.float64)) for name, p in trained_parameters(model).items()}


def _precision(model: nn.Module, task: Task) -> torch.dtype:
    """Return the coarsest format in which the model computes: its weights', autocast's anywhere in its forward, TF32's.

    Of TF32, which has the digits of half precision, float16.
    """
    device = device_of(model)
    formats = {p.dtype for p in bare(model).parameters() if p.is_floating_point()}
    if torch.float32 in formats and torch.get_float32_matmul_precision() != "highest":
        formats.add(torch.float16)

    def look(*_: object) -> None:
        if torch.is_autocast_enabled(device.type):
            formats.add(torch.get_autocast_dtype(device.type))

    with undisturbed(model) as quiet, torch.no_grad(), ExitStack() as stack:
        for module in quiet.modules():
            stack.callback(module.register_forward_pre_hook(look).remove)
        task.losses(quiet, next(task.batches()).to(device))
    return max(formats, key=lambda dtype: torch.finfo(dtype).eps)
