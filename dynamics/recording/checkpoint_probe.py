"""Records of the Fisher after a training, at its checkpoints, which a function of the user's loads.

Timing is predictive, as during a training: the record of a checkpoint has gradients at the weights of the previous
checkpoint, and the change between the two. One model is loaded at a time, once for each checkpoint, and its trainable
parameters are set back for the measurement; those of the previous checkpoint are kept as copies on the host.
"""

from __future__ import annotations

import importlib
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from dynamics.checkpoints import Checkpoint
from dynamics.findings import Finding
from dynamics.recording.fisher import FisherProbe
from dynamics.spectra.increments import difference
from probes.blocks import trained_parameters
from probes.low_rank import LowRankMatrix
from probes.tasks import Task
from probes.undisturbed import bare
from probes.watched import Matrix, find

#: Called with a checkpoint's folder; returns ``model, tasks``, ``model, tasks, batch_size`` or those and ``momentum``.
Loader = Callable[[str], Any]


@dataclass
class Probed:
    """Records of probed checkpoints.

    Args:
        fisher: K and b, one record a checkpoint, ascending.
        score: Scores of the tasks that have their own, likewise.
        findings: Checkpoints that could not be probed, and why.
    """

    fisher: list[xr.Dataset] = field(default_factory=list)
    score: list[xr.Dataset] = field(default_factory=list)
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
) -> Probed:
    """Return K, b and scores at each checkpoint. A checkpoint that fails is left out, with a finding.

    Args:
        checkpoints: Checkpoints of one run, ascending.
        load: Called with the folder of each. It may return the same model object with other weights; what is not
            trained must be the same at all checkpoints. Parameters must require gradients: with PEFT,
            ``PeftModel.from_pretrained(base, folder, is_trainable=True)``.
        matrices: Whether a block is measured, by its name; by default everything that is trained.
        progress: Called with the number of probe samples measured, all checkpoints counted, and of all; the latter is
            an estimate while a checkpoint may have other tasks.

    Returns:
        Records as those of a training. The first checkpoint of each training has K alone, at its own weights.
    """
    probed, before = Probed(), None
    done, samples, left = 0, 0, len(checkpoints)

    def advance(measured: int, total: int) -> None:
        nonlocal samples
        samples = total
        progress(done + measured, done + total * left)

    progress(0, len(checkpoints))
    for checkpoint in checkpoints:
        samples = 0
        if before is not None and before.segment != checkpoint.segment:
            before = None
        try:
            before = _probe(probed, checkpoint, load, matrices, before, advance)
            done += samples
        except (Exception, SystemExit) as error:  # a user's function may raise anything
            probed.findings.append(
                Finding(
                    "OD411",
                    f"The checkpoint could not be probed ({_description(error)}).",
                    "Only its Fisher is missing; correct the probe function and analyse again.",
                    file=checkpoint.folder.name,
                    step=checkpoint.step,
                )
            )
        left -= 1
    progress(max(done, 1), max(done, 1))
    return probed


def _probe(
    probed: Probed,
    checkpoint: Checkpoint,
    load: Loader,
    matrices: Callable[[str], bool] | None,
    before: _State | None,
    progress: Callable[[int, int], None],
) -> _State:
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
    if before is None:
        probed.fisher.append(probe.record(state.step, state.step, None, progress=progress))
        return state
    _require_alike(before, state)
    now = _matrices(model)
    probe.start_from(before.trained)
    with probe.at_start():
        earlier = _matrices(model)
    changes = {name: _change(matrix, earlier[name]) for name, matrix in now.items()}
    probed.fisher.append(probe.record(state.step, before.step, changes, momentum, progress))
    return state


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
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
