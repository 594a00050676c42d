"""Gradients at the two moments at which they mean something: before and after clipping, as the optimizer will use them.

Before clipping is the end of a step's last backward pass, once data parallelism has reduced the gradients. A
parameter's own hook comes too early for that; the end of the backward pass is reached by callbacks of the autograd
engine, which DDP and FSDP use for the same purpose. Where one backward pass runs inside another (reentrant
checkpointing), it is the end of the outermost that counts. What is measured at the end of each backward pass replaces
what was measured before, so that under gradient accumulation the last one remains: the sum that the optimizer sees.

On the way to that end, each backward pass gives the gradient of one micro-batch: a hook on each parameter sees it
before it is added to the others, and before data parallelism reduces it. The mean of their squared norms beside the
squared norm of the whole says how noisy the gradient is (McCandlish et al. 2018), for one norm more a backward pass.

An optimizer that steps within the backward pass (LOMO, layer-wise GaLore) leaves no gradient at its end: that is not a
gradient of zero, and is told apart from a parameter that was never reached.

Under AMP with loss scaling the gradients before clipping are still scaled: divide their norms by the scaler's
``get_scale()``, and those after clipping, which unscales first, by :func:`loss_scale`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.variable import Variable
from torch.utils.hooks import RemovableHandle

#: Callbacks that the engine is asked for, one from within the other: DDP asks for its own during the backward
#: pass, and what is asked for later runs later.
_ROUNDS = 3

#: Stand for a squared norm: the parameter has no gradient; it had one, which was taken within the backward pass.
NONE, TAKEN = -1.0, -2.0


class GradientNorms:
    """Norms of parameters' gradients at the end of the backward passes of a step.

    Between :meth:`arm` and :meth:`disarm` there is a hook on each parameter; otherwise there is none.

    Args:
        parameters: The parameters, each once.

    >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> norms = GradientNorms([weight])
    >>> norms.arm()
    >>> (weight * weight).sum().backward()
    >>> norms.before_clipping().sqrt()
    tensor([10.], dtype=torch.float64)
    >>> norms.disarm()
    """

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        self._parameters = list(parameters)
        self._handles: list[RemovableHandle] = []
        self._backwards: set[int] = set()  # those at whose end we are called
        self._latest: Tensor | None = None
        self._micro: dict[int, list[Tensor]] = {}  # squared norms of the micro-batches' gradients, by index
        self._passes = 0  # outermost backward passes that have ended
        self._reached: set[int] = set()  # parameters, by id, that have had a gradient since we are armed
        self._taken: list[int] = []  # indices of those that had one and had lost it when the backward pass ended
        self._failure: Exception | None = None

    def arm(self) -> None:
        """Start measuring; forget what was measured before."""
        self.disarm()
        self._latest = self._failure = None
        self._micro, self._passes = {}, 0
        self._reached.clear()
        self._taken = []
        for index, parameter in enumerate(self._parameters):
            if parameter.requires_grad:
                self._handles.append(parameter.register_hook(partial(self._measure_micro, index)))
                self._handles.append(parameter.register_post_accumulate_grad_hook(self._ask))

    def disarm(self) -> None:
        """Remove the hooks; what was measured stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._backwards.clear()

    @torch.no_grad()
    def measure(self) -> None:
        """Measure what :meth:`before_clipping` returns now, and not at the end of the backward pass."""
        self._latest = squared_norms(self._parameters)

    def before_clipping(self) -> Float[Tensor, " parameter"] | None:
        """Return squared norms at the end of the last backward pass, ``None`` if there was none.

        See :func:`squared_norms`.

        Raises:
            Exception: What went wrong at that moment, which was no place to disturb the backward pass.
        """
        if self._failure is not None:
            raise self._failure
        return None if self._latest is None else self._reduced(self._latest)

    def of_micro_batches(self) -> tuple[int, Float[Tensor, " parameter"]]:
        """Return the number of backward passes so far, and Σ‖g‖² over their gradients on this rank.

        Their sum, or its mean over ranks that share a batch, is what :meth:`before_clipping` measures. −2 for a
        parameter that had more gradients than passes (reentrant checkpointing adds up parts), or none while it has one
        now, as where FSDP keeps shards.

        >>> weight = nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> norms = GradientNorms([weight])
        >>> norms.arm()
        >>> weight.sum().backward(), (2 * weight).sum().backward()
        (None, None)
        >>> passes, squares = norms.of_micro_batches()
        >>> passes, round(squares.item(), 9)
        (2, 10.0)
        """
        sums = []
        for index, parameter in enumerate(self._parameters):
            parts = self._micro.get(index, [])
            is_known = len(parts) <= self._passes and (bool(parts) or parameter.grad is None)
            missing = torch.full((), 0.0 if is_known else TAKEN, dtype=torch.float64, device=parameter.device)
            sums.append(torch.stack(parts).sum() if parts and is_known else missing)
        return self._passes, _stacked(sums)

    def after_clipping(self) -> Float[Tensor, " parameter"]:
        """Return squared norms of the gradients as they are now; see :func:`squared_norms`."""
        return self._reduced(squared_norms(self._parameters))

    def _reduced(self, local: Float[Tensor, " parameter"]) -> Float[Tensor, " parameter"]:
        """Return squared norms over all ranks; gradients that were taken are marked."""
        result = reduced(local, self._parameters)
        if not self._taken:
            return result
        taken = torch.zeros_like(result, dtype=torch.bool)
        taken[self._taken] = True
        return result.masked_fill(taken & (result == NONE), TAKEN)

    def _ask(self, *reached: Any) -> None:
        """Ask, once a backward pass, to be called at its end; called by each parameter that gets a gradient."""
        self._reached.update(id(parameter) for parameter in reached if isinstance(parameter, nn.Parameter))
        backward = torch._C._current_graph_task_id()
        if self._handles and backward not in self._backwards:
            # By its number: a pass that raises never ends, and must not keep the next one from asking.
            self._backwards.add(backward)
            _at_end_of_backward(lambda: self._end(backward))

    def _end(self, backward: int) -> None:
        """Measure, unless the pass that has ended ran inside another one (reentrant checkpointing)."""
        self._backwards.discard(backward)
        if not self._handles:  # disarmed in the meantime: inert
            return
        outer = torch._C._current_autograd_node()  # what called it, if anything did
        following = [] if outer is None else [node for node, _ in outer.next_functions if node is not None]
        for node in following:  # what runs next belongs to the outer pass: there we ask again
            node.register_prehook(self._ask)
        if not following:
            _at_end_of_backward(self._measure, _ROUNDS - 1)

    @torch.no_grad()
    def _measure_micro(self, index: int, gradient: Tensor) -> None:
        """Measure what a backward pass gives a parameter; the gradient stays as it is."""
        try:
            norm = torch.linalg.vector_norm(_entries(gradient), dtype=torch.float64)
        except Exception as error:
            self._failure = error
        else:
            self._micro.setdefault(index, []).append(norm.square())

    def _measure(self) -> None:
        if self._handles:
            self._passes += 1
            try:
                self._latest = squared_norms(self._parameters)
                self._taken = [
                    index
                    for index, parameter in enumerate(self._parameters)
                    if parameter.grad is None and id(parameter) in self._reached
                ]
            except Exception as error:
                self._failure = error


def _at_end_of_backward(function: Callable[[], None], rounds: int = 1) -> None:
    """Call a function once the running backward pass is over, after whatever else waits for that."""
    # torch.distributed itself uses this; there is no public name for it.
    queue = Variable._execution_engine.queue_callback  # pyright: ignore[reportAttributeAccessIssue]
    queue(function if rounds == 1 else lambda: _at_end_of_backward(function, rounds - 1))


@torch.no_grad()
def squared_norms(parameters: Sequence[nn.Parameter]) -> Float[Tensor, " parameter"]:
    """Return ‖∂L/∂p‖² of each parameter in float64, on the device, without waiting for it.

    −1 where there is no gradient.

    :class:`GradientNorms` puts −2 where there was one that was taken within the backward pass. Of a DTensor, the norm
    of what this rank holds: see :func:`reduced`.

    >>> squared_norms([nn.Parameter(torch.ones(1))])
    tensor([-1.], dtype=torch.float64)
    """
    return _stacked(
        [
            torch.full((), NONE, dtype=torch.float64, device=parameter.device)
            if parameter.grad is None
            else torch.linalg.vector_norm(_entries(parameter.grad), dtype=torch.float64).square()
            for parameter in parameters
        ]
    )


def _stacked(numbers: Sequence[Tensor]) -> Float[Tensor, " parameter"]:
    """Return numbers as a vector: on their device, or on the host if they are on several."""
    devices = {number.device for number in numbers}
    home = next(iter(devices)) if len(devices) == 1 else torch.device("cpu")
    return torch.stack([number.to(home) for number in numbers]) if numbers else torch.zeros(0, dtype=torch.float64)


def _entries(gradient: Tensor) -> Tensor:
    """Return the numbers of a gradient on this rank."""
    gradient = gradient.detach()
    if hasattr(gradient, "to_local"):
        return gradient.to_local()  # pyright: ignore[reportAttributeAccessIssue]
    if gradient.layout != torch.strided:  # entries that are there twice count together
        gradient = gradient.coalesce().values() if gradient.is_sparse else gradient.to_dense()
    return torch.view_as_real(gradient.resolve_conj()) if gradient.is_complex() else gradient


def reduced(local: Float[Tensor, " parameter"], parameters: Sequence[nn.Parameter]) -> Float[Tensor, " parameter"]:
    """Return squared norms over all ranks that hold a piece of a parameter; all of them must call this together."""
    groups: dict[Any, list[int]] = {}
    for index, parameter in enumerate(parameters):
        for dimension in _sharded_dimensions(parameter):
            groups.setdefault((parameter.device_mesh, dimension), []).append(index)  # pyright: ignore[reportAttributeAccessIssue]
    result = local.clone() if groups else local
    for (mesh, dimension), members in groups.items():
        part = result[members]
        missing = part < 0
        # The second row counts ranks with a gradient, so that −1 stays −1 and is not summed.
        sums = torch.stack([part.masked_fill(missing, 0.0), (~missing).double()])
        dist.all_reduce(sums, group=mesh.get_group(dimension))
        result[members] = sums[0].masked_fill(sums[1] == 0, NONE)
    return result


def _sharded_dimensions(parameter: nn.Parameter) -> list[int]:
    """Return the dimensions of the device mesh over which a DTensor is split; none for a plain tensor."""
    placements = getattr(parameter, "placements", ())
    return [dimension for dimension, placement in enumerate(placements) if placement.is_shard()]


def norms_of(
    squared: Float[Tensor, " parameter"], parameters: Sequence[nn.Parameter], matrices: Sequence[Sequence[nn.Parameter]]
) -> list[float]:
    """Return the norm over the parameters of each matrix.

    0 where none has a gradient, infinite where one is not finite.

    NaN where the gradient of one was taken within the backward pass: what it was is not known.

    Args:
        squared: Of each parameter, −1 where it has no gradient, −2 where that was taken.
        parameters: The parameters.
        matrices: Those of each matrix.

    >>> a, b, c = (nn.Parameter(torch.ones(1)) for _ in range(3))
    >>> norms_of(torch.tensor([9.0, 16.0, -1.0], dtype=torch.float64), [a, b, c], [[a], [a, b], [c]])
    [3.0, 5.0, 0.0]
    """
    position = {id(parameter): index for index, parameter in enumerate(parameters)}
    numbers = squared.tolist()  # the one moment at which the host waits for the device
    return [_norm([numbers[position[id(parameter)]] for parameter in members]) for members in matrices]


def _norm(squared: Sequence[float]) -> float:
    if TAKEN in squared:
        return math.nan
    total = sum(number for number in squared if number != NONE)
    return math.sqrt(total) if math.isfinite(total) else math.inf


def loss_scale(scaler: Any, optimizer: Any) -> float:
    """Return by how much the gradients in ``.grad`` exceed the loss's own now: AMP's scale, 1 once they are unscaled.

    Args:
        scaler: A ``torch.amp.GradScaler`` or ``None``.
        optimizer: The optimizer, Accelerate's wrapper or not.
    """
    if scaler is None or not scaler.is_enabled():
        return 1.0
    optimizer = getattr(optimizer, "optimizer", optimizer)
    # The scaler keeps which optimizers' gradients it has unscaled in this step, and says so nowhere else.
    states = getattr(scaler, "_per_optimizer_states", {})
    stage = states[id(optimizer)]["stage"] if id(optimizer) in states else None
    return float(scaler.get_scale()) if getattr(stage, "name", "READY") == "READY" else 1.0
