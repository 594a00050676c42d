"""The Fisher of a training that is over: probe samples at its checkpoints, by a function of the user's that loads them.

Timing is predictive, as during a training: the record of a checkpoint has gradients at the weights of the checkpoint
before, and the change between the two. A model is loaded once for each checkpoint, one at a time, and its trainable
parameters are set back for the moment; copies of those of the checkpoint before are kept on the host.
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
    """What the probe samples told.

    Args:
        fisher: K and b, one record a checkpoint, ascending.
        score: Scores of the tasks that have their own, likewise.
        findings: What went wrong.
    """

    fisher: list[xr.Dataset] = field(default_factory=list)
    score: list[xr.Dataset] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


@dataclass(frozen=True)
class _State:
    """A checkpoint that was probed: what the next one's change is counted from."""

    step: int
    segment: int
    trained: dict[str, Tensor]
    frozen: dict[str, float]


def load_function(text: str) -> Loader:
    """The function that ``module:function`` names; the module is imported, from the working directory or as installed.

    Raises:
        ValueError: If the text is not of that form, there is no such module or function, or importing it fails.

    >>> load_function("os.path:basename")("a/b")
    'b'
    """
    module, separator, name = text.partition(":")
    if not separator or not module or not name.isidentifier():
        raise ValueError(f"probe: expected module:function, such as my_probe:load, got {text!r}.")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except (Exception, SystemExit) as error:  # a script without a __main__ guard may exit
        raise ValueError(
            f"probe: the module {module!r} could not be imported ({_said(error)}). "
            "It must lie in the working directory, or be installed."
        ) from error
    if not callable(found):
        raise ValueError(f"probe: the module {module!r} has no function {name!r}.")
    return found


def probe_checkpoints(
    checkpoints: Sequence[Checkpoint],
    load: Loader,
    matrices: Callable[[str], bool] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Probed:
    """Measures K, b and scores at each checkpoint. A checkpoint that fails costs itself, and is named.

    Args:
        checkpoints: Of one run, ascending.
        load: Called with the folder of each. The same model object may come again with other weights; what is not
            trained must be the same at all checkpoints. Parameters must require gradients: with PEFT,
            ``PeftModel.from_pretrained(base, folder, is_trainable=True)``.
        matrices: Which blocks are measured, by name; by default everything that is trained.
        progress: Called with the checkpoints done, and their number.

    Returns:
        Records as those of a training. The first checkpoint of each training has K alone, at its own weights.
    """
    found, before = Probed(), None
    for place, checkpoint in enumerate(checkpoints):
        progress(place, len(checkpoints))
        if before is not None and before.segment != checkpoint.segment:
            before = None
        try:
            before = _probe(found, checkpoint, load, matrices, before)
        except (Exception, SystemExit) as error:  # anything may come from a function of the user's
            found.findings.append(
                Finding(
                    "OD411",
                    f"The checkpoint could not be probed ({_said(error)}).",
                    "Its Fisher is missing; the rest is there.",
                    file=checkpoint.folder.name,
                    step=checkpoint.step,
                )
            )
    progress(len(checkpoints), len(checkpoints))
    return found


def _probe(
    found: Probed,
    checkpoint: Checkpoint,
    load: Loader,
    matrices: Callable[[str], bool] | None,
    before: _State | None,
) -> _State:
    model, tasks, batch_size, momentum = _loaded(load(str(checkpoint.folder)))
    if not trained_parameters(model):
        raise ValueError(
            "expected a model with trainable parameters, got one in which none requires a gradient; "
            "with PEFT, load it with is_trainable=True"
        )
    here = _State(checkpoint.step, checkpoint.segment, _trained(model), _frozen(model))
    blocks = None if matrices is None else [name for name in _block_names(model) if matrices(name)]
    probe = FisherProbe(model, tasks, blocks=blocks, batch_size=batch_size)
    if (scores := probe.scores(here.step)) is not None:
        found.score.append(scores)
    if before is None:
        found.fisher.append(probe.record(here.step, here.step, None))
        return here
    _require_alike(before, here)
    now = _matrices(model)
    probe.start_from(before.trained)
    with probe.at_start():
        earlier = _matrices(model)
    changes = {name: _change(matrix, earlier[name]) for name, matrix in now.items()}
    found.fisher.append(probe.record(here.step, before.step, changes, momentum))
    return here


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
    """A number for each parameter that is not trained, by which another is noticed."""
    return {
        name: float(parameter.detach().sum(dtype=torch.float64))
        for name, parameter in bare(model).named_parameters()
        if not parameter.requires_grad and parameter.is_floating_point()
    }


def _require_alike(before: _State, here: _State) -> None:
    if before.trained.keys() != here.trained.keys():
        apart = sorted(before.trained.keys() ^ here.trained.keys())[:3]
        raise ValueError(f"expected what was trained at step {before.step} too, got other parameters: {apart}")
    changed = [name for name in here.frozen if here.frozen[name] != before.frozen.get(name)]
    if changed:
        raise ValueError(
            f"expected what is not trained to be as at step {before.step}, got other numbers in {changed[:3]}; "
            "do not merge adapters into the model"
        )


def _matrices(model: nn.Module) -> dict[str, Matrix]:
    """Every watched matrix as it is now, in tensors of its own."""
    return {each.name: _copied(each.read()) for each in find(model).watched if not each.part_of}


def _copied(matrix: Matrix) -> Matrix:
    if isinstance(matrix, Tensor):
        return matrix.detach().to(torch.float64, copy=True)
    left, right = (factor.detach().clone() for factor in (matrix.left_factor, matrix.right_factor))
    return LowRankMatrix(left, right, matrix.scale, column_scale=matrix.column_scale)


def _change(now: Matrix, before: Matrix) -> Matrix:
    if isinstance(now, LowRankMatrix) and isinstance(before, LowRankMatrix):
        return difference(now, before)
    dense = [each if isinstance(each, Tensor) else each.to_dense() for each in (now, before)]
    return dense[0] - dense[1]


def _block_names(model: nn.Module) -> list[str]:
    watched = find(model).watched
    of_matrices = {id(parameter) for each in watched for parameter in each.parameters}
    others = [name for name, parameter in trained_parameters(model).items() if id(parameter) not in of_matrices]
    return [*(each.name for each in watched if not each.part_of), *others]


def _said(error: BaseException) -> str:
    """Type, message and place of an error, in one line: where in the user's file it was."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename and "importlib" not in frame.filename]
    where = f", {own[-1].filename.rpartition('/')[2]} line {own[-1].lineno}" if own and len(frames) > 1 else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}{where}"
