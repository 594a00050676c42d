"""Records of the Fisher after a training, at its checkpoints, which a function of the user's loads; and interventions.

Timing is predictive, as during a training: the record of a checkpoint has gradients at the weights of the previous
checkpoint, and the change between the two; an intervention adds parts of this change to these weights. One model is
loaded at a time, once for each checkpoint, and its trainable parameters are set back for the measurement; those of the
previous checkpoint are kept as copies on the host.
"""

from __future__ import annotations

import importlib
import math
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from dynamics.checkpoints import Checkpoint
from dynamics.findings import Finding
from dynamics.intervention.sensitivity import sensitivity
from dynamics.recording.fisher import FisherProbe, Increment, Interventions
from dynamics.recording.loss_probe import SCALES, LossProbe, outside, starts_at_zero, zero_start
from dynamics.spectra.increments import difference
from dynamics.text import first_line
from probes.blocks import trained_parameters
from probes.low_rank import LowRankMatrix
from probes.tasks import Task
from probes.undisturbed import bare, swapped
from probes.watched import Matrix, find

#: Called with a checkpoint's folder; returns ``model, tasks``, ``model, tasks, batch_size`` or those and ``momentum``.
Loader = Callable[[str], Any]


@dataclass
class Probed:
    """Records of probed checkpoints.

    Args:
        fisher: K and b, one record a checkpoint, ascending.
        score: Scores of the tasks that have their own, likewise.
        intervention: Effects of parts of the increments, likewise; no first checkpoint has any.
        sensitivity: Of the last checkpoint's adapters, where it has some and interventions are asked for.
        sharpness: Critical steps along the increments, likewise; no first checkpoint has any.
        loss: Losses of the probe samples, of the checkpoints of the newest training.
        findings: Checkpoints that could not be probed or intervened on, and why.
    """

    fisher: list[xr.Dataset] = field(default_factory=list)
    score: list[xr.Dataset] = field(default_factory=list)
    intervention: list[xr.Dataset] = field(default_factory=list)
    sensitivity: xr.Dataset | None = None
    sharpness: list[xr.Dataset] = field(default_factory=list)
    loss: list[xr.Dataset] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _State:
    """A probed checkpoint, from which the change of the next one is measured."""

    step: int
    segment: int
    trained: dict[str, Tensor]
    frozen: dict[str, float]


def load_function(text: str) -> Loader:
    """Return the function named by ``module:function``, from the working directory or an installed package.

    Raises:
        ValueError: If the text has another form, there is no such module or function, or importing it fails.

    >>> load_function("os.path:basename")("a/b")
    'b'
    """
    module, separator, name = text.partition(":")
    if not separator or not module or not name.isidentifier():
        raise ValueError(f"probe: expected module:function, such as my_probe:load, got {text!r}.")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # a script without a __main__ guard may exit
        raise ValueError(
            f"probe: the module {module!r} could not be imported ({_description(error)}). "
            "Put it into the working directory, or install it."
        ) from error
    if not callable(function):
        raise ValueError(f"probe: the module {module!r} has no function {name!r}.")
    return function


def probe_checkpoints(
    checkpoints: Sequence[Checkpoint],
    load: Loader,
    matrices: Callable[[str], bool] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    *,
    interventions: Interventions | None = None,
    export: Path | None = None,
    runs: Callable[[int, int], None] = lambda done, total: None,
) -> Probed:
    """Return K, b, scores and losses at each checkpoint. A checkpoint that fails is left out, with a finding.

    Args:
        checkpoints: Checkpoints of one run, ascending.
        load: Called with the folder of each. It may return the same model object with other weights; what is not
            trained must be the same at all checkpoints. Parameters must require gradients: with PEFT,
            ``PeftModel.from_pretrained(base, folder, is_trainable=True)``.
        matrices: Whether a block is measured, by its name; by default everything that is trained.
        progress: Called with the number of probe samples measured, all checkpoints counted, and of all; the latter is
            an estimate while a checkpoint may have other tasks.
        interventions: Versions of each increment that are run, and then the last checkpoint's singular directions;
            ``None``: none.
        export: Folder for those of the last increment, each in a folder of its own; ``None``: they are not written.
        runs: Called with the number of forward passes over samples that interventions made, and of all; an estimate,
            too.

    Returns:
        Records as those of a training. The first checkpoint of each training has K alone, at its own weights.
    """
    probed, before, origin = Probed(), None, None
    counter = _Counter(progress, len(checkpoints))
    arms = None
    if interventions is not None and checkpoints:
        arms = _Arms(interventions, export, checkpoints[-1], matrices, _Counter(runs, 2 * len(checkpoints) - 1))
    for checkpoint in checkpoints:
        if before is not None and before.segment != checkpoint.segment:
            before = origin = None
            probed.loss.clear()
        try:
            last = checkpoint is checkpoints[-1]
            before, model, tasks = _probe(probed, checkpoint, load, matrices, before, counter, arms)
            origin = origin or before
            _measure_losses(probed, model, tasks, before, origin, checkpoint, scales=SCALES if last else ())
            del model  # before the next is loaded
            counter.next()
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            counter.next(counts=False)
            probed.findings.append(
                Finding(
                    "OD411",
                    f"The checkpoint could not be probed ({_description(error)}).",
                    "Only its Fisher is missing; correct the probe function and analyse again.",
                    file=checkpoint.folder.name,
                    step=checkpoint.step,
                )
            )
    counter.end()
    if arms is not None:
        arms.counter.end()
        probed.findings += arms.findings(probed)
    return probed


class _Counter:
    """Progress over checkpoints, in a unit of which each has the same number as far as that is not known.

    Args:
        progress: Called with what is done and what there is.
        left: Checkpoints to come.
    """

    def __init__(self, progress: Callable[[int, int], None], left: int) -> None:
        self._progress, self._left = progress, left
        self._done = self._present = 0
        progress(0, left)

    def __call__(self, done: int, total: int) -> None:
        self._present = total
        self._progress(self._done + done, self._done + total * self._left)

    def next(self, *, counts: bool = True) -> None:
        """Go on to the next checkpoint; the present one may not count."""
        self._done += self._present if counts else 0
        self._left, self._present = max(1, self._left - 1), 0

    def end(self) -> None:
        """Have done all."""
        self._progress(max(self._done, 1), max(self._done, 1))


@dataclass
class _Arms:
    """Interventions on the increments of a run. One that fails costs no other, and nothing else.

    Args:
        choice: Versions of each increment.
        export: Folder for those of the last increment.
        last: The checkpoint at which it ends.
        matrices: Whether a block is measured.
        counter: Progress: the increments, and the last checkpoint's directions.
        exported: Whether they are written.
    """

    choice: Interventions
    export: Path | None
    last: Checkpoint
    matrices: Callable[[str], bool] | None
    counter: _Counter
    exported: bool = False

    def run(
        self, probed: Probed, probe: FisherProbe, increment: Increment, checkpoint: Checkpoint, from_step: int
    ) -> None:
        """Add effects and critical step of an increment that ends at a checkpoint; write the last one's versions."""
        with self._forgiven(probed, checkpoint, f"the increment since step {from_step}"):
            effects = probe.intervene(increment, self.choice, checkpoint.step, from_step, self.counter)
            probed.intervention.append(effects)
            self.counter.next()
            if self.export is not None and checkpoint is self.last:
                with self._forgiven(probed, checkpoint, "the last increment, to export its parts,"):
                    probe.export(increment, self.choice, self.export)
                    self.exported = True
            with self._forgiven(probed, checkpoint, f"the length of the increment since step {from_step}"):
                earlier = probed.sharpness[-1] if probed.sharpness else None
                length = probe.sharpness(increment, checkpoint.step, from_step, earlier, progress=self.counter)
                probed.sharpness.append(length)
                self.counter.next()

    def rank_directions(self, probed: Probed, model: nn.Module, tasks: Sequence[Task], checkpoint: Checkpoint) -> None:
        """Add what the singular directions of the last checkpoint's adapters do to the loss."""
        names = [matrix.name for matrix in find(model).watched if not matrix.is_dense]
        names = [name for name in names if self.matrices is None or self.matrices(name)]
        if checkpoint is self.last and names:  # weights trained as they are have no such directions
            pattern = None if self.matrices is None else "|".join(f"^{re.escape(name)}$" for name in names)
            with self._forgiven(probed, checkpoint, "the directions of the last adapter"):
                probed.sensitivity = sensitivity(
                    model, tasks, matrices=pattern, step=checkpoint.step, progress=self.counter
                )
                self.counter.next()

    @contextmanager
    def _forgiven(self, probed: Probed, checkpoint: Checkpoint, what: str) -> Iterator[None]:
        """Turn an error inside into a finding."""
        try:
            yield
        except (Exception, SystemExit) as error:  # a user's loss or score may raise anything
            self.counter.next(counts=False)
            probed.findings.append(
                Finding(
                    "OD415",
                    f"The intervention on {what} failed ({type(error).__name__}: "
                    f"{first_line(error, 300).rstrip('.')}).",
                    "Its Fisher and the other checkpoints are measured. Correct what the message names and analyse "
                    "again.",
                    file=checkpoint.folder.name,
                    step=checkpoint.step,
                )
            )

    def findings(self, probed: Probed) -> list[Finding]:
        """Return what else is missing: a run without an increment, or without the last one."""
        missing = any(finding.code == "OD415" for finding in probed.findings)
        if not probed.intervention and not missing:
            return [
                Finding(
                    "OD415",
                    "There is no increment to intervene on: none of the checkpoints that could be probed follows "
                    "another one of the same training.",
                    "Keep at least two checkpoints, or intervene during training: DynamicsCallback(…, intervene=500).",
                )
            ]
        if self.export is None or self.exported or missing:
            return []
        return [
            Finding(
                "OD415",
                f"No part is exported: the last checkpoint, step {self.last.step}, could not be probed, or begins "
                "another training.",
                "Correct what the other findings name, or leave that checkpoint out, and analyse again.",
            )
        ]


def _probe(
    probed: Probed,
    checkpoint: Checkpoint,
    load: Loader,
    matrices: Callable[[str], bool] | None,
    before: _State | None,
    progress: Callable[[int, int], None],
    arms: _Arms | None,
) -> tuple[_State, nn.Module, list[Task]]:
    model, tasks, batch_size, momentum = _loaded(load(str(checkpoint.folder)))
    if not trained_parameters(model):
        raise ValueError(
            "expected a model with trainable parameters, got one in which none requires a gradient; "
            "with PEFT, load it with is_trainable=True"
        )
    state = _State(checkpoint.step, checkpoint.segment, _trained(model), _frozen(model))
    blocks = None if matrices is None else [name for name in _block_names(model) if matrices(name)]
    probe = FisherProbe(model, tasks, blocks=blocks, batch_size=batch_size)
    if not probed.findings:
        probed.findings += probe.findings()
    if (scores := probe.scores(state.step)) is not None:
        probed.score.append(scores)
    if arms is not None:
        arms.rank_directions(probed, model, tasks, checkpoint)
    if before is None:
        probed.fisher.append(probe.record(probe.measure(None, progress), state.step, state.step))
        return state, model, tasks
    _require_alike(before, state)
    now = _matrices(model)
    probe.start_from(before.trained)
    with probe.at_start():
        earlier = _matrices(model)
    changes = {name: _change(matrix, earlier[name]) for name, matrix in now.items()}
    increment = probe.measure(changes, progress)
    probed.fisher.append(probe.record(increment, state.step, before.step, momentum))
    if arms is not None:
        arms.run(probed, probe, increment, checkpoint, before.step)
    return state, model, tasks


def _measure_losses(
    probed: Probed,
    model: nn.Module,
    tasks: Sequence[Task],
    state: _State,
    origin: _State,
    checkpoint: Checkpoint,
    scales: Sequence[float],
) -> None:
    """Add the losses at a checkpoint and at the start of its training: the zero of adapters, or its first checkpoint.

    Args:
        state: The checkpoint.
        origin: The first one of its training.
        scales: Shares of the change at which losses are measured, too.
    """
    zero = starts_at_zero(model) and all(shape.holds == "update" for shape in checkpoint.shapes.values())
    trained = trained_parameters(model)
    others = {name: origin.trained[name] for name in outside(model)}

    def start() -> tuple[list[tuple[nn.Parameter, Tensor]], dict[str, Matrix]]:
        now = _matrices(model)
        if zero:
            return zero_start(model), now
        values = [(trained[name], value) for name, value in origin.trained.items() if name not in others]
        with swapped([parameter for parameter, _ in values], [value for _, value in values]):
            earlier = _matrices(model)
        return values, {name: _change(matrix, earlier[name]) for name, matrix in now.items()}

    first = not zero and state is origin
    try:
        probed.loss.append(
            LossProbe(model, tasks, others).record(
                state.step,
                start,
                predicts=not first,
                scales=() if first else scales,
                start_step=0 if zero else origin.step,
            )
        )
    except (Exception, SystemExit) as error:  # a user's loss may raise anything
        probed.findings.append(
            Finding(
                "OD416",
                f"The losses of the probe samples could not be measured ({_description(error)}).",
                "Its Fisher is measured. Correct what the message names and analyse again.",
                file=checkpoint.folder.name,
                step=checkpoint.step,
            )
        )


def _loaded(returned: Any) -> tuple[nn.Module, list[Task], int, float]:
    parts: tuple[Any, ...] = tuple(returned) if isinstance(returned, tuple | list) else (returned,)
    if not 2 <= len(parts) <= 4 or not isinstance(parts[0], nn.Module):
        kinds = ", ".join(type(part).__name__ for part in parts)
        raise ValueError(f"expected model, tasks[, batch_size[, momentum]] from the function, got {kinds}")
    model, tasks = parts[0], parts[1]
    batch_size = parts[2] if len(parts) > 2 else 0
    momentum = parts[3] if len(parts) > 3 else math.nan
    tasks = [tasks] if isinstance(tasks, Task) else list(tasks)
    wrong = [type(task).__name__ for task in tasks if not isinstance(task, Task)]
    if wrong or not tasks:
        raise ValueError(f"expected probes.Task as tasks, got {', '.join(wrong) or 'none'}")
    if type(batch_size) is not int or batch_size < 0:
        raise ValueError(f"expected the optimizer's batch size as a whole number, got {batch_size!r}")
    if not isinstance(momentum, int | float) or momentum < 0 or momentum >= 1:
        raise ValueError(f"expected the optimizer's momentum as a number from 0 to below 1, got {momentum!r}")
    return model, tasks, batch_size, float(momentum)


def _trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().to("cpu", copy=True) for name, p in trained_parameters(model).items()}


def _frozen(model: nn.Module) -> dict[str, float]:
    """Return the sum of each parameter that is not trained, by which a change is noticed."""
    return {
        name: float(parameter.detach().sum(dtype=torch.float64))
        for name, parameter in bare(model).named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point()
    }


def _require_alike(before: _State, state: _State) -> None:
    if before.trained.keys() != state.trained.keys():
        apart = sorted(before.trained.keys() ^ state.trained.keys())[:3]
        raise ValueError(f"expected the same trained parameters as at step {before.step}, got a difference in {apart}")
    changed = [name for name in state.frozen if state.frozen[name] != before.frozen.get(name)]
    if changed:
        raise ValueError(
            f"expected frozen parameters as at step {before.step}, got other numbers in {changed[:3]}; "
            "do not merge adapters into the model"
        )


def _matrices(model: nn.Module) -> dict[str, Matrix]:
    """Return copies of all watched matrices as they are now."""
    return {matrix.name: _copied(matrix.read()) for matrix in find(model).watched if not matrix.part_of}


def _copied(matrix: Matrix) -> Matrix:
    if isinstance(matrix, Tensor):
        return matrix.detach().to(torch.float64, copy=True)
    left, right = (factor.detach().clone() for factor in (matrix.left_factor, matrix.right_factor))
    return LowRankMatrix(left, right, matrix.scale, column_scale=matrix.column_scale)


def _change(now: Matrix, before: Matrix) -> Matrix:
    if isinstance(now, LowRankMatrix) and isinstance(before, LowRankMatrix):
        return difference(now, before)
    dense_now, dense_before = (matrix if isinstance(matrix, Tensor) else matrix.to_dense() for matrix in (now, before))
    return dense_now - dense_before


def _block_names(model: nn.Module) -> list[str]:
    watched = find(model).watched
    of_matrices = {id(parameter) for matrix in watched for parameter in matrix.parameters}
    others = [name for name, parameter in trained_parameters(model).items() if id(parameter) not in of_matrices]
    return [*(matrix.name for matrix in watched if not matrix.part_of), *others]


def _description(error: BaseException) -> str:
    """Return type, message and line of an error in the user's file, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if "site-packages" not in frame.filename and "importlib" not in frame.filename]
    where = f", {users[-1].filename.rpartition('/')[2]} line {users[-1].lineno}" if users and len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300].rstrip('.')}{where}"
