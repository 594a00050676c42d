r"""Optimizer steps of which only the part in the leading informative directions, or only the rest, is kept.

With G ``(N, d)`` the gradients of probe samples with respect to all trained parameters, K = GGᵀ and K u_j = eig_j u_j,
the directions are v_j = Gᵀu_j/√eig_j, rows of V ``(k, d)``. A step δ = θ' − θ, whatever the optimizer made of its
gradients (momentum, preconditioning, weight decay), becomes

.. math:: \Pi δ = V^\top V δ \quad\text{(on)} \qquad\text{or}\qquad δ - \Pi δ \quad\text{(off)}

The space is that of the parameters as they are trained: LoRA's factors themselves. V is held explicitly.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from dynamics.intervention.parts import direction_weights
from probes.blocks import trained_parameters
from probes.gram import GLOBAL, gradient_gram
from probes.scores import device_of
from probes.tasks import Task, require_names
from probes.undisturbed import bare
from probes.watched import class_names, is_sharded
from probes.weighted_gradients import weighted_parameter_gradients

#: What of a step is kept: all of it, its part in the directions, or the rest.
KEPT = ("full", "on", "off")
#: Largest deviation of VVᵀ from the identity in units of the first eigenvalue: half precision reaches 0.02, another
#: loss than the one behind K far more.
CONSISTENT = 0.05
#: A direction whose length or angles in V are off by more has an eigenvalue of rounding.
RESOLVED = 0.5


@dataclass(frozen=True)
class LeadingDirections:
    """Orthonormal directions of all trained parameters together.

    Args:
        parameters: The parameters.
        rows: Of each parameter, its numbers in each direction, ``(k, numbers)``, in single precision at least.
    """

    parameters: tuple[nn.Parameter, ...]
    rows: tuple[Float[Tensor, "k _"], ...]

    def __len__(self) -> int:
        """Return k."""
        return len(self.rows[0])

    def coordinates(self, changes: Iterable[Tensor]) -> Float[Tensor, " k"]:
        """Return Vδ in float64, of the changes of all parameters.

        >>> directions = LeadingDirections((nn.Parameter(torch.zeros(2)),), (torch.tensor([[0.6, 0.8]]),))
        >>> directions.coordinates([torch.tensor([1.0, 0.0])])
        tensor([0.6000], dtype=torch.float64)
        """
        home = self.rows[0].device
        parts = [
            (rows @ change.flatten().to(rows.dtype)).double().to(home)
            for rows, change in zip(self.rows, changes, strict=True)
        ]
        return torch.stack(parts).sum(0)

    def combination(self, coordinates: Float[Tensor, " k"], number: int) -> Tensor:
        """Return Σ_j c_j v_j of one parameter, in its shape."""
        rows = self.rows[number]
        return (coordinates.to(rows) @ rows).view_as(self.parameters[number])


class StepProjection:
    """Keep only, or remove, the part of each optimizer step in the leading informative directions.

    Call :meth:`begin` before and :meth:`end` after the optimizer's step; forward and backward passes may lie between.

    Args:
        tasks: Held-out probe samples.
        keep: ``"on"``: the part in the directions; ``"off"``: the rest; ``"full"``: all, the part is only measured.
        k: Number of directions.
        refresh: Estimate directions again after so many steps.

    Raises:
        ValueError: If one of these is invalid.
    """

    def __init__(self, tasks: Sequence[Task], keep: str, *, k: int = 16, refresh: int = 50) -> None:
        if keep not in KEPT:
            raise ValueError(
                f"Expected 'on' (keep only the part in the leading directions), 'off' (remove it) or 'full' (only "
                f"measure it), got {keep!r}."
            )
        require_names(tasks)
        self._tasks, samples = tuple(tasks), sum(map(len, tasks))
        if not 1 <= k <= samples:
            raise ValueError(
                f"Expected k between 1 and the number of probe samples, {samples}, got {k}. There are no more "
                "directions than samples."
            )
        if refresh < 1:
            raise ValueError(f"Expected to estimate directions again after at least 1 step, got refresh={refresh}.")
        self.keep, self.k, self.refresh = keep, k, refresh
        self.directions: LeadingDirections | None = None
        self.captured_share = float("nan")
        self._before: list[Tensor] = []
        self._steps = 0

    def forget(self) -> None:
        """Start afresh: the next step estimates directions."""
        self.directions, self._before, self._steps = None, [], 0

    def begin(self, model: nn.Module, step: int | None = None, *, shared: bool = False) -> None:
        """Keep the weights as they are before a step, and estimate directions there if it is time.

        It is time at the first step, at every ``refresh``-th, and where the set of trained parameters has changed.

        Args:
            model: The model in training, in its wrappers.
            step: Number of optimizer steps so far; by default those seen here.
            shared: Whether all ranks train this model together, and get the first one's directions. DDP is noticed.

        Raises:
            ValueError: If the parameters cannot be projected, or a probe sample's loss or gradient is not finite.
        """
        step = self._steps if step is None else step
        trained = {id(parameter) for parameter in bare(model).parameters() if parameter.requires_grad}
        before = () if self.directions is None else self.directions.parameters
        if trained != {id(parameter) for parameter in before} or step % self.refresh == 0:
            require_projectable(model)
            self.directions = None  # its memory is free before the next
            self.directions = estimated_directions(model, self._tasks, self.k)
            if shared or "DistributedDataParallel" in class_names(model):
                self.directions = _of_first_rank(self.directions)
        assert self.directions is not None
        self._before = [parameter.detach().clone() for parameter in self.directions.parameters]
        self._steps = step + 1

    @torch.no_grad()
    def end(self) -> float:
        """Replace the step that was taken since :meth:`begin` by what is kept of it.

        Parameters are changed in place; gradients and the optimizer's state are not touched.

        Returns:
            ‖Πδ‖²/‖δ‖² of the step as the optimizer took it, also kept as ``captured_share``; NaN if it took none.
        """
        directions, before, self._before = self.directions, self._before, []
        assert directions is not None
        parameters = directions.parameters
        pairs = list(zip(parameters, before, strict=True))
        norms = [torch.linalg.vector_norm(p - old, dtype=torch.float64).to(parameters[0].device) for p, old in pairs]
        size = float(torch.stack(norms).square().sum())
        self.captured_share = float("nan")
        if size == 0:
            return self.captured_share
        coordinates = directions.coordinates(p - old for p, old in pairs)
        self.captured_share = float(coordinates.square().sum()) / size
        for number, (parameter, old) in enumerate(pairs if self.keep != "full" else ()):
            part = directions.combination(coordinates, number)
            if self.keep == "on":
                parameter.copy_(old + part)
            else:
                parameter.sub_(part)
        return self.captured_share


def require_projectable(model: nn.Module) -> None:
    """Refuse a model whose steps cannot be projected.

    Raises:
        ValueError: If nothing is trained, parameters are split over ranks, or are in half precision.

    >>> require_projectable(nn.Linear(2, 2).bfloat16())
    Traceback (most recent call last):
    ValueError: Expected trained parameters in single precision, got torch.bfloat16: a projected step is smaller than \
its rounding. Load the model in float32 and train with autocast (bf16=True), or train adapters in float32.
    """
    modules = {name for module in model.modules() for name in class_names(module)}
    trained = [parameter for parameter in bare(model).parameters() if parameter.requires_grad]
    split = "FullyShardedDataParallel" in modules or "DeepSpeedEngine" in modules
    if split or any(is_sharded(p) for p in model.parameters()):
        raise ValueError(
            "Expected parameters that are whole on each rank, got those of FSDP or DeepSpeed, which are split. "
            "Train with DistributedDataParallel, or in one process."
        )
    if not trained:
        raise ValueError("Expected a model with trainable parameters, got one in which none requires a gradient.")
    if half := next((parameter.dtype for parameter in trained if parameter.dtype.itemsize < 4), None):
        raise ValueError(
            f"Expected trained parameters in single precision, got {half}: a projected step is smaller than its "
            "rounding. Load the model in float32 and train with autocast (bf16=True), or train adapters in float32."
        )


def estimated_directions(model: nn.Module, tasks: Sequence[Task], k: int) -> LeadingDirections:
    """Return the k leading eigenvectors of the empirical Fisher of all trained parameters, in the model as it is.

    The model is in evaluation mode meanwhile; modes, random states and gradients are as before afterwards.

    Args:
        model: With trained parameters.
        tasks: Probe samples.
        k: Number of directions; fewer are returned where the samples' gradients span no more.

    Raises:
        ValueError: If a sample's loss or gradient is not finite, all gradients are zero, or gradients of one batch
            differ from pass to pass.
    """
    gram = gradient_gram(model, tasks, space="factor", blocks=[GLOBAL])
    values, weights = direction_weights(np.asarray(gram.gram[GLOBAL]), k)
    if not len(values):
        raise ValueError("Expected probe samples with gradients, got only gradients of zero: no direction leads.")
    trained = trained_parameters(model)
    sums = weighted_parameter_gradients(model, tasks, torch.from_numpy(weights).to(device_of(model)))
    rows = [sums.pop(name).flatten(1) for name in trained]
    return LeadingDirections(tuple(trained.values()), _orthonormal(rows, torch.from_numpy(values)))


@torch.no_grad()
def _orthonormal(rows: Sequence[Tensor], values: Float[Tensor, " k"]) -> tuple[Tensor, ...]:
    """Return rows of V made orthonormal in the order of eigenvalues, without those that rounding made."""
    product = torch.stack([(part @ part.mT).to("cpu", torch.float64) for part in rows]).sum(0)
    deviation = (product - torch.eye(len(product), dtype=product.dtype)).abs()
    scaled = float((deviation * torch.outer(values, values).sqrt()).max() / values[0])
    if not scaled <= CONSISTENT:
        raise ValueError(
            f"Expected the same gradients of the probe samples in two passes, got directions that deviate by "
            f"{scaled:.2g} of the first eigenvalue. Give tasks a loss that depends on nothing but the model and the "
            "batch."
        )
    resolved = [j for j in range(len(values)) if float(deviation[: j + 1, : j + 1].max()) <= RESOLVED]
    kept = len(resolved)
    inverse = torch.linalg.inv(torch.linalg.cholesky(product[:kept, :kept]))
    for part in rows:  # in place: V may be large
        part[:kept] = inverse.to(part) @ part[:kept]
    return tuple(part[:kept] for part in rows)


def _of_first_rank(directions: LeadingDirections) -> LeadingDirections:
    """Return the first rank's directions: those of two devices may differ by rounding, and models would drift apart."""
    count = torch.tensor(len(directions), device=directions.rows[0].device)
    dist.broadcast(count, src=0)
    rows = []
    for part in directions.rows:
        row = part if len(part) == int(count) else part.new_empty(int(count), part.shape[1])
        dist.broadcast(row, src=0)
        rows.append(row)
    return LeadingDirections(directions.parameters, tuple(rows))
