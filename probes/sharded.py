"""A model that FSDP 2 splits over ranks, run by one of them alone: the others hand over their shards when it asks.

The rank that leads sees an ordinary model. Where a trained parameter is a shard, a whole one stands in for it: small
ones (factors of adapters, biases, norms) with their values, dense weights with memory that FSDP fills as it gathers
their layer, for forward and backward passes, and frees again. So one layer is whole at a time, whatever the leading
rank computes; what it computes, and how often, the others need not know. Shards are never written to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from probes.watched import ABSENT, class_names, find, is_sharded

#: Called with what the other ranks are to hand over, before this rank waits for it.
Ask: TypeAlias = Callable[[str], None]
#: What the words of a request begin with.
_LAYER, _PARAMETER = "layer", "parameter"


class ShardedModel:
    """The shards of a model, on a rank that leads or follows.

    Args:
        model: In its wrappers, with parameters under FSDP 2.

    Raises:
        ValueError: If it is split in another way as well, or this version of torch cannot be stopped in the middle.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._modules = [module for module in model.modules() if "FSDPModule" in class_names(module)]
        self._groups: list[Any] = _groups(self._modules)
        self._stand_ins: dict[int, nn.Parameter] = {}  # by the identity of the sharded parameter
        self._sharded: dict[int, tuple[int, int]] = {}  # identity of a stand-in → its group, and its number there
        self._other_values: dict[int, Tensor] = {}  # of stand-ins without memory, in place of the present ones
        self._present: dict[int, Tensor] = {}  # by the identity of the sharded parameter, whole
        self._ask: Ask | None = None
        self._require_whole_layers()

    @classmethod
    def of(cls, model: nn.Module) -> ShardedModel | None:
        """Return the shards of a model, ``None`` if FSDP 2 has split none of it.

        >>> ShardedModel.of(nn.Linear(2, 2)) is None
        True
        """
        return cls(model) if any("FSDPModule" in class_names(module) for module in model.modules()) else None

    def _require_whole_layers(self) -> None:
        inside = {id(part.sharded_param) for group in self._groups for part in group.fsdp_params}
        split = any(is_sharded(p) and id(p) not in inside for p in self._model.parameters())
        if split or any(part.is_dtensor for group in self._groups for part in group.fsdp_params):
            raise ValueError(
                "Expected parameters that FSDP 2 alone has split, got some under tensor or expert parallelism, or "
                "ZeRO-3, whose layers are never whole. Leave tasks out, and probe checkpoints: "
                "python -m dynamics.analyze RUN --probe module:function"
            )
        if any(hasattr(group.offload_policy, "pin_memory") for group in self._groups):
            raise ValueError(
                "Expected shards on the device that computes, got those of CPUOffloadPolicy. Leave it out, or leave "
                "tasks out and probe checkpoints."
            )
        if not all(hasattr(module, "reset_iter_state") for module in self._modules):
            raise ValueError(
                f"Expected a torch whose FSDP 2 can be reset after an error (2.13 can), got {torch.__version__}. "
                "Update it, or leave tasks out and probe checkpoints."
            )

    def stand_in(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return what stands in for a parameter while this rank leads; the parameter itself if nothing does."""
        return self._stand_ins.get(id(parameter), parameter)

    @contextmanager
    def led(self, ask: Ask, present: Mapping[int, Tensor] | None = None) -> Iterator[None]:
        """Make the model an ordinary one on this rank; the others must :meth:`hand_over` whatever is asked for.

        Args:
            ask: Asks them.
            present: Whole values of parameters as they are now, by identity. Those of other trained weights are
                gathered beside them, and all can be read until :meth:`forget`.
        """
        self._ask, self._present = ask, dict(present or {})
        with ExitStack() as stack:
            stack.callback(self._settle)
            for group in self._groups:
                group.lazy_init()
                group.reshard()
            for number, group in enumerate(self._groups):
                stack.enter_context(self._intercepted(number, group))
            self._take_stand_ins(stack)
            if present is not None:
                for key, stand_in in self._stand_ins.items():
                    if id(stand_in) in ABSENT and key not in self._present:
                        self._present[key] = self.value(stand_in).cpu()
            yield

    def hand_over(self, request: str) -> None:
        """Take part in one gathering that the leading rank asks for."""
        kind, *numbers = request.split()
        group = self._groups[int(numbers[0])]
        if kind == _PARAMETER:
            group.fsdp_params[int(numbers[1])].sharded_param.full_tensor()
            return
        group.lazy_init()
        group.reshard()  # what is whole already would not be gathered
        group.unshard()
        group.wait_for_unshard()
        group.reshard()

    def value(self, parameter: nn.Parameter) -> Tensor:
        """Return the value of a stand-in without memory."""
        if id(parameter) in self._other_values:
            return self._other_values[id(parameter)]
        return self._gathered(*self._sharded[id(parameter)]).to(parameter.dtype)

    @contextmanager
    def replaced(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
        """Give stand-ins without memory other values inside the ``with`` block, whenever their layer is gathered."""
        before = self._other_values
        self._other_values = before | {id(parameter): value for parameter, value in values}
        self._reshard()
        try:
            yield
        finally:
            self._other_values = before
            self._reshard()

    def forget(self) -> None:
        """Let go of the values that :meth:`led` was given."""
        self._present = {}

    def _reshard(self) -> None:
        for group in self._groups:
            group.reshard()

    def _gathered(self, number: int, position: int) -> Tensor:
        """Return the present value of a parameter, whole."""
        parameter = self._groups[number].fsdp_params[position].sharded_param
        if id(parameter) in self._present:
            return self._present[id(parameter)]
        assert self._ask is not None
        self._ask(f"{_PARAMETER} {number} {position}")
        return parameter.detach().full_tensor()

    def _settle(self) -> None:
        """Leave FSDP as it is between two steps of the training, be it after an error in a pass."""
        self._ask = None
        for module in self._modules:
            if module._get_fsdp_state()._is_root:  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                module.reset_iter_state()  # pyright: ignore[reportCallIssue]
        self._reshard()

    @contextmanager
    def _intercepted(self, number: int, group: Any) -> Iterator[None]:
        """Have the other ranks asked before a layer is gathered, and its trained weights filled after it."""
        kept = {name: getattr(group, name) for name in ("_all_gather_comm", "reduce_grads", "reshard_after_backward")}
        smaller_mesh = group.post_forward_mesh_info
        assert self._ask is not None
        group._all_gather_comm = _Asking(kept["_all_gather_comm"], self._ask, f"{_LAYER} {number}")
        if smaller_mesh is not None:
            group.post_forward_mesh_info = group.mesh_info
        group.reduce_grads, group.reshard_after_backward = False, True  # there are no gradients to reduce
        wait = group.wait_for_unshard

        def wait_and_fill() -> None:
            is_gathered = group._all_gather_result is not None
            wait()
            if is_gathered:
                self._fill(group)

        group.wait_for_unshard = wait_and_fill
        try:
            yield
        finally:
            del group.wait_for_unshard
            if group.post_forward_mesh_info is not None:  # a model's first pass decides that for its root
                group.post_forward_mesh_info = smaller_mesh
            for name, value in kept.items():
                setattr(group, name, value)

    @torch.no_grad()
    def _fill(self, group: Any) -> None:
        for part in group.fsdp_params:
            value = self._other_values.get(id(part._unsharded_param))
            if value is not None:
                part._unsharded_param.data.copy_(value)

    @torch.no_grad()
    def _take_stand_ins(self, stack: ExitStack) -> None:
        """Put stand-ins with their present values in the place of shards; FSDP leaves them there."""
        watched = find(self._model).watched
        dense = {id(p) for matrix in watched if matrix.is_dense for p in matrix.sources}
        factors = {id(p) for matrix in watched if not matrix.is_dense for p in matrix.sources}
        self._reshard()
        for number, group in enumerate(self._groups):
            for position, part in enumerate(group.fsdp_params):
                key, trained = id(part.sharded_param), part.sharded_param.requires_grad
                if not trained and key not in factors and key not in self._stand_ins:
                    continue
                if key not in self._stand_ins:
                    self._stand_in_for(number, part, has_memory=key not in dense)
                stand_in = self._stand_ins[key]
                stand_in.requires_grad = trained
                self._sharded[id(stand_in)] = number, position
                if id(stand_in) not in ABSENT:
                    stand_in.data.copy_(self._gathered(number, position))
                stack.enter_context(_in_place(part, stand_in))

    def _stand_in_for(self, number: int, part: Any, *, has_memory: bool) -> None:
        """Make what stands in for a shard from now on."""
        if not has_memory:
            if not hasattr(part, "_unsharded_param"):
                self._groups[number].unshard()
                self._groups[number].wait_for_unshard()
                self._groups[number].reshard()
            stand_in = part._unsharded_param
            ABSENT[id(stand_in)] = self
        else:
            sharded, dtype = part.sharded_param, part.param_dtype or part.orig_dtype
            stand_in = nn.Parameter(torch.empty(sharded.shape, dtype=dtype, device=sharded.device))
        self._stand_ins[id(part.sharded_param)] = stand_in


def reshard(model: nn.Module) -> None:
    """Put shards back where FSDP 2 keeps a layer whole after a pass without gradients; all ranks together.

    >>> reshard(nn.Linear(2, 2))
    """
    for module in model.modules():
        if "FSDPModule" in class_names(module):
            module.reshard()  # pyright: ignore[reportCallIssue]


class _Asking:
    """How a layer is gathered, with a question to the other ranks before it."""

    def __init__(self, comm: Any, ask: Ask, request: str) -> None:
        self._comm, self._ask, self._request = comm, ask, request

    def allocate(self, *size: Any, **options: Any) -> Tensor:
        return self._comm.allocate(*size, **options)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        self._ask(self._request)
        return self._comm(*arguments, **options)


@contextmanager
def _in_place(part: Any, stand_in: nn.Parameter) -> Iterator[None]:
    part._setattr_on_modules(stand_in)
    part._setattr_on_modules = lambda parameter: None
    try:
        yield
    finally:
        del part._setattr_on_modules
        part._setattr_on_modules(part.sharded_param)


def _groups(modules: Sequence[nn.Module]) -> list[Any]:
    """Return what FSDP gathers together, each once, in the model's order."""
    states = [module._get_fsdp_state() for module in modules]  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    groups = [group for state in states for group in getattr(state, "_fsdp_param_groups", ())]
    return list({id(group): group for group in groups}.values())
