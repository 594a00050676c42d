"""Records of the Fisher of a model in training, of its scores, and of interventions, on held-out probe samples.

Timing is predictive: gradients are taken at the weights where the increment began, to which all trainable parameters
are set for the moment, and multiplied with the increment that the optimizer then made. Interventions begin there, too:
parts of the increment are added to these weights. The training is not affected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from dynamics import schema
from dynamics.findings import Finding
from dynamics.fisher.concentration import predictive_draws
from dynamics.fisher.samples import codes_of
from dynamics.intervention.counterfactuals import ARMS, Counterfactuals, chosen_arms, chosen_k, counterfactuals
from dynamics.intervention.dataset import intervene
from dynamics.intervention.sharpness import critical_sharpness
from dynamics.text import some
from probes.blocks import trained_parameters
from probes.gram import ProbeGram, gradient_gram
from probes.preconditioner import Preconditioner, preconditioner_of
from probes.scores import Score, evaluate
from probes.tasks import ProbeBatch, Task, probe_batches, probe_loss
from probes.undisturbed import swapped
from probes.watched import Matrix, find, is_sharded, whole

#: The space in which gradients and updates are compared: what a step of LoRA can reach, whatever its gauge.
SPACE = "tangent"
#: A record with a larger K, in bytes, holds only that of all blocks together unless blocks are chosen: twenty captured
#: steps are 1.3 GB then, and in memory K, in float64, takes eight times as much while a step is measured.
MOST_BYTES = 64 * 2**20


def record_bytes(blocks: int, samples: int) -> int:
    """Return the size of K on disk: the upper triangle of each block's in float32.

    >>> record_bytes(28, 512)
    14708736
    """
    return blocks * samples * (samples + 1) // 2 * 4


@dataclass(frozen=True)
class Interventions:
    """Which versions of an increment are run, see :func:`dynamics.counterfactuals`.

    Args:
        arms: By name; ``full`` is always among them.
        k: Numbers of directions, the headline's first; ``None`` for its default.

    Raises:
        ValueError: If an arm is unknown, or a k is less than 1.

    >>> Interventions(("on",), 4)
    Interventions(arms=('full', 'on', 'off'), k=(4,))
    """

    arms: Sequence[str] = ARMS
    k: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", chosen_arms(self.arms))
        if self.k is not None:
            object.__setattr__(self, "k", chosen_k(self.k))


class Passing(NamedTuple):
    """The optimizer that made an increment; by default nobody asks for it, as of a checkpoint.

    Args:
        preconditioner: As after the increment's last step; ``None`` if unknown.
        batches: Equally weighted batches behind the increment, see :func:`effective_batches`.
        reason: Why it is unknown.
    """

    preconditioner: Preconditioner | None = None
    batches: float = 1.0
    reason: str = ""

    @classmethod
    def through(cls, optimizer: Any) -> Passing:
        """Return an optimizer's, of a single batch."""
        try:
            return cls(preconditioner_of(optimizer), reason="")
        except ValueError as error:
            return cls(reason=str(error))


class Increment(NamedTuple):
    """An increment and the gradients at its start.

    Args:
        gram: K, and b of the increment, with the samples' labels.
        changes: Block → its change; ``None`` for K alone.
        unknown: Blocks whose change is unknown.
    """

    gram: ProbeGram
    changes: Mapping[str, Matrix] | None
    unknown: tuple[str, ...]


def _known(increment: Increment) -> Mapping[str, Matrix]:
    """Return the changes of an increment, if they are all known."""
    if increment.changes is None or increment.unknown:
        lacking = some(increment.unknown) if increment.unknown else "any matrix"
        raise ValueError(
            f"Expected the whole increment, got none of {lacking}. Intervene at a later step: the change is known from "
            "one captured step to the next."
        )
    return increment.changes


class FisherProbe:
    """The probe samples of several tasks, and the model in training whose gradients they measure.

    A copy of every trainable parameter as of the last captured step is kept: of factors on their own device, of dense
    weights on the host.

    Args:
        model: The model in training, in its wrappers; each process measures its own copy.
        tasks: Held-out samples, each with its task and group.
        blocks: Names of the watched matrices, where they were chosen; ``None`` for all that is trained, each by itself
            unless records would be larger than ``MOST_BYTES``.
        on_host: Parameters whose copies are kept on the host.
        batch_size: Samples of one optimizer step, for the gradient null; 0 if unknown.

    Raises:
        ValueError: If there are no tasks, their samples cannot be put into batches, or the parameters are sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        tasks: Sequence[Task],
        *,
        blocks: Sequence[str] | None = None,
        on_host: Sequence[nn.Parameter] = (),
        batch_size: int = 0,
    ) -> None:
        self._batches, *labels = probe_batches(tasks)
        self._labels: dict[str, list[str]] = dict(zip(schema.SAMPLE_LABELS, labels, strict=True))
        self._trained = trained_parameters(model)
        if any(is_sharded(parameter) for parameter in self._trained.values()):
            raise ValueError(
                "Expected parameters that are whole on each rank, got shards of ZeRO-3 or tensor parallelism, of "
                "which per-sample gradients are not measured. Use FSDP 2, or leave tasks out and probe checkpoints: "
                "python -m dynamics.analyze RUN --probe module:function"
            )
        self._model, self._tasks = model, tuple(tasks)
        self._batch_size = batch_size
        self._host = {id(parameter) for parameter in on_host}
        self._matrices, self._others = self._block_names()
        self._blocks = self._chosen(blocks)
        self._before = {name: self._copied(parameter) for name, parameter in self._trained.items()}
        self._ended: list[tuple[nn.Parameter, Tensor]] = []  # trained until lately, as they were
        self._unknown: set[str] = set()  # blocks whose change is unknown

    def _block_names(self) -> tuple[set[str], list[str]]:
        """Return the names of watched matrices that are blocks, and of trained parameters outside all matrices."""
        watched = find(self._model).watched
        of_matrices = {id(parameter) for matrix in watched for parameter in matrix.parameters}
        others = [name for name, parameter in self._trained.items() if id(parameter) not in of_matrices]
        self._has_factors = any(not matrix.is_dense and matrix.parameters for matrix in watched)
        return {matrix.name for matrix in watched if not matrix.part_of and matrix.parameters}, others

    def _chosen(self, blocks: Sequence[str] | None) -> list[str] | None:
        """Return the blocks to measure, ``None`` for all, ``["global"]`` for their sum alone."""
        if blocks is not None:
            return list(blocks)
        return [schema.GLOBAL] if record_bytes(self._of_all, self._samples) > MOST_BYTES else None

    @property
    def _of_all(self) -> int:
        return len(self._matrices) + len(self._others) + 1

    @property
    def _samples(self) -> int:
        return len(self._labels["sample_id"])

    def findings(self) -> list[Finding]:
        """Return a finding on the size of a record, if it is large or would be if all blocks were in it."""
        alone = self._blocks == [schema.GLOBAL]
        blocks = self._of_all if alone or self._blocks is None else len(self._blocks) + 1
        size = record_bytes(blocks, self._samples)
        evidence = {"bytes": size, "blocks": blocks, "samples": self._samples}
        if alone:
            return [
                Finding(
                    "OD320",
                    f"A record of the Fisher would take {_mebibytes(size)} with all {blocks} blocks of {self._samples} "
                    f"probe samples. It holds only all blocks together, {_mebibytes(record_bytes(1, self._samples))}.",
                    "To record each matrix as well, choose them: matrices='.' for all. Or probe fewer samples.",
                    evidence=evidence,
                )
            ]
        if size <= MOST_BYTES:
            return []
        return [
            Finding(
                "OD320",
                f"A record of the Fisher takes {_mebibytes(size)}: {blocks} blocks of {self._samples} probe samples.",
                "If that is too much, choose fewer matrices, or probe fewer samples.",
                evidence=evidence,
            )
        ]

    def _copied(self, parameter: nn.Parameter) -> Tensor:
        return whole(parameter).to("cpu" if id(parameter) in self._host else parameter.device, copy=True)

    def follow(
        self,
        *,
        blocks: Sequence[str] | None,
        on_host: Sequence[nn.Parameter] = (),
        rewritten: Collection[int] = (),
        moved: bool = False,
    ) -> None:
        """Continue with the parameters that are trained now.

        Args:
            blocks, on_host: As for the constructor.
            rewritten: Parameters (by identity) that start afresh.
            moved: Whether new parameters may have been trained since the last captured step.
        """
        before, after = self._trained, trained_parameters(self._model)
        copies = {id(parameter): self._before[name] for name, parameter in before.items()}
        copies |= {id(parameter): copy for parameter, copy in self._ended}
        parameters = {id(parameter): parameter for parameter in (*before.values(), *(p for p, _ in self._ended))}
        copies = {key: copy for key, copy in copies.items() if key not in rewritten}
        self._host |= {id(parameter) for parameter in on_host}
        self._trained = after
        self._before = {
            name: copies[id(p)] if id(p) in copies else self._copied(p) for name, p in self._trained.items()
        }
        trained = {id(parameter) for parameter in after.values()}
        self._ended = [(parameters[key], copy) for key, copy in copies.items() if key not in trained]
        self._matrices, self._others = self._block_names()
        self._blocks = self._chosen(blocks)
        if moved:
            self._unknown |= {name for name, parameter in after.items() if id(parameter) not in copies}

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Let the next increment begin at these weights, named as by :func:`probes.blocks.trained_parameters`."""
        for name, value in self._before.items():
            value.copy_(weights[name])

    def at_start(self) -> AbstractContextManager[None]:
        """Set the model to the weights where the increment began, within a ``with`` block."""
        ended = [[*column] for column in zip(*self._ended, strict=True)] or [[], []]
        return swapped([*self._trained.values(), *ended[0]], [*self._before.values(), *ended[1]])

    def measure(
        self,
        increments: Mapping[str, Matrix] | None,
        progress: Callable[[int, int], None] = lambda done, total: None,
        passing: Passing = Passing(),  # noqa: B008
    ) -> Increment:
        """Return K, and b of the increment that ends now, at the weights where it began.

        Args:
            increments: Watched matrix → its change since then; ``None`` for K alone.
            progress: Called with the number of probe samples measured, and of all.
            passing: The optimizer that made it, through which gradients are passed.
        """
        changes = None if increments is None else self._of_blocks({**self._changes(), **increments})
        unknown = dict.fromkeys({*self._matrices, *self._others} - set(changes)) if changes is not None else {}
        lacking = self._lacking(passing)
        with torch.enable_grad(), self.at_start():
            gram = gradient_gram(
                self._model,
                self._counted(progress),
                probe_loss,
                space=SPACE,
                blocks=self._blocks,
                update=changes,
                skip_broken=True,
                optimizer=None if lacking else passing.preconditioner,
                draws=self._draws(passing.batches),
            )
        present = np.setdiff1d(np.arange(self._samples), gram.left_out).tolist()
        tasks, groups, names = ([column[row] for row in present] for column in self._labels.values())
        reason = gram.unpreconditioned or lacking
        gram = replace(gram, tasks=tasks, groups=groups, sample_ids=names, unpreconditioned=reason)
        return Increment(gram, changes, tuple(sorted(self._of_blocks(unknown))))

    def _draws(self, batches: float) -> Callable[[Tensor], Tensor]:
        """Return what draws gradients of so many batches."""
        group = codes_of(self._labels["sample_group"], self._samples, "group")

        def weights(k: Tensor) -> Tensor:
            return torch.from_numpy(predictive_draws(k.numpy(), group, round(self._batch_size * batches)))

        return weights

    def _lacking(self, passing: Passing) -> str:
        """Return why gradients are not passed through the optimizer, empty if they are."""
        preconditioner, trained = passing.preconditioner, list(self._trained.values())
        if preconditioner is None or (preconditioner.is_plain(trained) and not self._has_factors):
            return passing.reason  # plain gradients are stored once
        chosen = self._of_all if self._blocks is None else len(self._blocks) + 1
        size = record_bytes(1 if self._blocks == [schema.GLOBAL] else chosen, self._samples)
        size *= 3 if preconditioner.is_linear(trained) else 1  # products with drawn gradients are few
        return f"a record would take {_mebibytes(size)} with it" if size > MOST_BYTES else ""

    def record(self, increment: Increment, step: int, evaluated_at: int, momentum: float = math.nan) -> xr.Dataset:
        """Return the record of K and b.

        Args:
            increment: As measured.
            step: The captured step, at which it ends.
            evaluated_at: The captured step before, at which it began.
            momentum: Momentum of the optimizer, see :func:`momentum_of`; NaN if unknown.

        Returns:
            As :func:`fisher_record`. A sample whose loss or gradient is not finite has NaN, and so has the update of a
            block whose change is unknown.
        """
        return fisher_record(
            increment.gram,
            step,
            evaluated_at,
            self._labels,
            batch_size=self._batch_size,
            reduction=_reduction(self._tasks),
            unknown=increment.unknown,
            momentum=momentum,
        )

    def intervene(
        self,
        increment: Increment,
        choice: Interventions,
        step: int,
        evaluated_at: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> xr.Dataset:
        """Return what versions of the increment do to the losses: the record of :func:`dynamics.intervene`.

        Meanwhile memory holds the present weights beside those of the start, and each part along gradients of one fold
        as an adapter of twice the rank in single precision.

        Args:
            increment: As measured.
            choice: Which versions.
            step, evaluated_at: As for :meth:`record`; the latter is the coordinate ``from_step``.
            progress: Called with the number of forward passes over samples made, and of all.

        Raises:
            ValueError: If the increment is not wholly known or cannot be taken apart.
        """
        with self.at_start():
            arms = self._counterfactuals(increment, choice)
            effects = intervene(self._model, self._tasks, arms, step=step, progress=progress)
        return effects.assign_coords(from_step=("step", np.array([evaluated_at], dtype=np.int64)))

    def sharpness(
        self,
        increment: Increment,
        step: int,
        evaluated_at: int,
        earlier: xr.Dataset | None = None,
        *,
        rate: float = math.nan,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> xr.Dataset:
        """Return how far the model could have gone from where the increment began, see ``critical_sharpness``.

        Args:
            increment: As measured: the direction, unless there is a rate.
            step, evaluated_at: As for :meth:`intervene`.
            earlier: What an earlier increment gave, near which the search starts.
            rate: Learning rate of plain gradient descent, see :func:`descent_rate`: the direction is that of its step.
            progress: Called with the number of forward passes over samples made, and of all, an estimate.

        Raises:
            ValueError: If the increment is not wholly known.
        """
        direction, lr = (_known(increment), None) if math.isnan(rate) else (None, rate)
        with self.at_start():
            measured = critical_sharpness(
                self._model, self._tasks, direction, lr=lr, start=earlier, step=step, progress=progress
            )
        return measured.assign_coords(from_step=("step", np.array([evaluated_at], dtype=np.int64)))

    def export(self, increment: Increment, choice: Interventions, folder: Path) -> list[Path]:
        """Write each version of the increment, added to the weights where it began, into a folder of its own.

        Args:
            increment: As measured.
            choice: Which versions; ``matched`` is a pair for scoring, and no adapter.
            folder: It gets a folder for each arm, see :func:`dynamics.intervention.export.save_arm`.

        Raises:
            ValueError: If the increment is not wholly known, or an arm does not fit into an adapter.
            OSError: If a folder cannot be written.
        """
        with self.at_start():
            arms = self._counterfactuals(increment, choice)
            names = [arm for arm in arms.names if arm != "matched"]
            folders = [arms.save(folder / arm.replace(":", "_").replace("/", "_"), arm) for arm in names]
            arms.whole.release()
        return folders

    def _counterfactuals(self, increment: Increment, choice: Interventions) -> Counterfactuals:
        changes = _known(increment)
        return counterfactuals(self._model, self._tasks, increment.gram, changes, k=choice.k, arms=choice.arms)

    def _counted(self, progress: Callable[[int, int], None]) -> Iterator[ProbeBatch]:
        """Yield the batches; when one is measured, the next is asked for."""
        done = 0
        progress(done, self._samples)
        for batch in self._batches:
            yield batch
            done += batch.samples
            progress(done, self._samples)

    def scores(self, step: int) -> xr.Dataset | None:
        """Return the scores of the model as it is now, for tasks with a score of their own; ``None`` if none has."""
        scored = [task for task in self._tasks if task.score is not None]
        retained = [task.retained for task in scored]
        return score_record(step, evaluate(self._model, scored), retained) if scored else None

    def advance(self) -> None:
        """Let the next increment begin at the weights as they are now."""
        self._ended, self._unknown = [], set()
        for name, parameter in self._trained.items():
            self._before[name].copy_(whole(parameter))

    def _of_blocks(self, changes: Mapping[str, Matrix | None]) -> dict[str, Any]:
        """Return the changes of the measured blocks."""
        every = self._blocks is None or self._blocks == [schema.GLOBAL]
        names = {*self._matrices, *self._others} if every else set(self._blocks or ())
        return {name: change for name, change in changes.items() if name in names}

    def _changes(self) -> dict[str, Tensor]:
        """Return the changes of trainable parameters outside all watched matrices: biases, norms, factors of LoHa."""
        return {
            name: self._trained[name].detach().double().cpu() - self._before[name].double().cpu()
            for name in self._others
            if name not in self._unknown
        }


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def momentum_of(optimizer: Any) -> float:
    """Return β₁ of an optimizer like Adam or the momentum of one like SGD: the largest of its parameter groups.

    Args:
        optimizer: Any optimizer, or a wrapper that has it as ``.optimizer``.

    Returns:
        NaN where the optimizer does not say.

    >>> momentum_of(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1, momentum=0.9))
    0.9
    """
    inner = optimizer if hasattr(optimizer, "param_groups") else getattr(optimizer, "optimizer", None)
    groups = getattr(inner, "param_groups", ())
    return max((_momentum_of_group(group) for group in groups), default=math.nan)


def descent_rate(optimizer: Any) -> float:
    """Return the learning rate of plain gradient descent: one for all parameters, no momentum, no weight decay.

    Args:
        optimizer: As for :func:`momentum_of`.

    Returns:
        NaN for any other optimizer: its step is not −η∇L.

    >>> descent_rate(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1))
    0.1
    >>> descent_rate(torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=0.1))
    nan
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's wrapper has groups of its own
    if type(inner) is not torch.optim.SGD:
        return math.nan
    groups = inner.param_groups
    rates = {float(group["lr"]) for group in groups}
    plain = not any(group["momentum"] or group["weight_decay"] or group["maximize"] for group in groups)
    return rates.pop() if plain and len(rates) == 1 and min(rates) > 0 else math.nan


def _momentum_of_group(group: Mapping[str, Any]) -> float:
    betas = group.get("betas")
    stated = (
        betas[0] if isinstance(betas, tuple | list) and betas else group.get("momentum", group.get("beta1", math.nan))
    )
    if stated is None:  # Adafactor without β₁
        return 0.0
    return float(stated) if isinstance(stated, int | float | Tensor) else math.nan


def fisher_record(
    gram: ProbeGram,
    step: int,
    evaluated_at: int,
    labels: Mapping[str, Sequence[str]],
    *,
    batch_size: int = 0,
    reduction: str = "sum",
    unknown: Collection[str] = (),
    momentum: float = math.nan,
) -> xr.Dataset:
    """Return the record of one step: K and b by block, with the labels of the samples.

    :func:`dynamics.fisher.dataset.gram_of` reads it back.

    Args:
        gram: With or without an update. Samples that it left out are NaN in the record.
        step: The captured step.
        evaluated_at: Step of the weights at which gradients were taken.
        labels: ``sample_task``, ``sample_group`` and ``sample_id`` of all samples, those left out included.
        batch_size: Samples of one optimizer step; 0 if unknown.
        reduction: How losses are reduced over a sample's tokens.
        unknown: Blocks whose update is unknown; if there is one, that of all together is unknown too.
        momentum: Momentum of the optimizer; NaN if unknown.

    Returns:
        As :data:`dynamics.schema.FISHER_RECORD` has it, one step.
    """
    blocks, samples = gram.blocks, len(labels["sample_id"])
    present = np.setdiff1d(np.arange(samples), gram.left_out)
    missing = {*unknown, schema.GLOBAL} if unknown else set()
    k = np.full((1, len(blocks), samples, samples), np.nan)
    b = np.full((1, len(blocks), samples), np.nan)
    loss = np.full((1, samples), np.nan)
    loss[0, present] = gram.losses
    for row, block in enumerate(blocks):
        k[0, row][np.ix_(present, present)] = gram.gram[block]
        if block in gram.update_product and block not in missing:
            b[0, row, present] = gram.update_product[block]

    def by_block(values: Mapping[str, float]) -> np.ndarray:
        return np.array([[math.nan if block in missing else float(values.get(block, math.nan)) for block in blocks]])

    arrays = {
        "gram": k,
        "update_product": b,
        "update_norm_squared": by_block(gram.update_norm_squared),
        "share_outside_space": by_block(gram.share_outside_space),
        "dimension": np.array([[float(gram.dimension[block]) for block in blocks]]),
        "loss": loss,
        "momentum": np.array([momentum]),
        **_of_optimizer(gram, present, samples),
    }
    coords = {
        "step": np.array([step], dtype=np.int64),
        "block": np.asarray(blocks, dtype=str),
        "evaluated_at_step": ("step", np.array([evaluated_at], dtype=np.int64)),
        **{name: ("sample", np.asarray(labels[name], dtype=str)) for name in schema.SAMPLE_LABELS},
    }
    return xr.Dataset(
        schema.label_arrays(
            {**schema.FISHER_RECORD, "momentum": schema.FISHER_MOMENTUM, **schema.OPTIMIZER_RECORD}, arrays
        ),
        coords=coords,
        attrs={
            "space": gram.space,
            "fisher": gram.fisher,
            "unit": "sequence",
            "reduction": reduction,
            "batch_size": batch_size,
            "unpreconditioned": gram.unpreconditioned,
        },
    )


def _of_optimizer(gram: ProbeGram, present: np.ndarray, samples: int) -> dict[str, np.ndarray]:
    """Return what a record has of gradients passed through the optimizer: nothing if that was not measured."""
    if gram.preconditioned_gram is gram.gram:
        return {"plain_optimizer": np.ones(1)}
    pairs = {name: getattr(gram, name) for name in ("preconditioned_product", "preconditioned_gram")}
    arrays = {}
    for name, by_block in pairs.items():
        if by_block:
            array = np.full((1, len(gram.blocks), samples, samples), np.nan)
            for row, block in enumerate(gram.blocks):
                if block in by_block:
                    array[0, row][np.ix_(present, present)] = by_block[block]
            arrays[name] = array
    for name, by_block in {name: getattr(gram, name) for name in ("drawn_product", "drawn_norm_squared")}.items():
        if by_block:
            sums = {block: np.asarray(values) for block, values in by_block.items()}
            missing = np.full(next(iter(sums.values())).shape, np.nan)
            arrays[name] = np.stack([sums.get(block, missing) for block in gram.blocks])[None]
    always = {"plain_optimizer": np.zeros(1), "optimizer_gradients": np.array([gram.optimizer_gradients])}
    return {**always, **arrays} if arrays else {}


def score_record(step: int, scores: Sequence[Score], retained: Sequence[bool]) -> xr.Dataset:
    """Return the scores of one step, as the group ``score`` has them, and whether each task is retained."""
    directions = {True: 1.0, False: -1.0, None: 0.0}
    columns = {
        "score": [score.score for score in scores],
        "items": [float(score.items) for score in scores],
        "standard_error": [score.standard_error for score in scores],
        "direction": [directions[score.higher_is_better] for score in scores],
    }
    arrays = {name: np.array([column], dtype=np.float64) for name, column in columns.items()}
    return xr.Dataset(
        schema.label_arrays({**schema.SCORE, "direction": schema.SCORE_DIRECTION}, arrays),
        coords={
            "step": np.array([step], dtype=np.int64),
            "task": np.asarray([score.task for score in scores], dtype=str),
            "retained": ("task", np.asarray(retained, dtype=bool), schema.RETAINED.attributes),
        },
    )


def _reduction(tasks: Sequence[Task]) -> str:
    """Return how losses are reduced over a sample's tokens, ``"mixed"`` if tasks differ."""
    reductions = {
        task.loss if isinstance(task.loss, str) else "own" if callable(task.loss) else "sum" for task in tasks
    }
    return reductions.pop() if len(reductions) == 1 else "mixed"
