"""Which experts tokens are sent to while a model trains: mixtures of experts, found by structure, and hooks on them.

A block is a mixture if beside modules that hold several experts stands one that returns a score for each: classes and
their names do not matter. Hooks exist from :meth:`Routing.arm` to :meth:`Routing.disarm` alone. They read, and leave
tensors, gradients and random states as they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probes.router_choices import Layout, MixturePass, Sums, learn, sums_of, tensors_in, token_count
from probes.watched import base_model, class_names, plain_path, shape_of

_EXPERTS = re.compile(r"expert", re.IGNORECASE)
_TOP_K = re.compile(r"(.*_)?(top_?k|experts_per_tok(en)?|selected_experts)", re.IGNORECASE)
_ROUTER = re.compile(r"rout|gate$|gating", re.IGNORECASE)
_MASKS = ("attention_mask", "decoder_attention_mask")
#: More experts than any model has.
_MOST = 65_536


@dataclass
class Mixture:
    """A block that may be a mixture of experts.

    Args:
        name: Path of the block in the model as it was built.
        block: The module.
        holders: Path below the block → module that holds experts.
        candidates: Path below the block → module that may be the router.
        experts: Number of experts that are held.
        is_named: Whether something in it speaks of experts.

    Attributes:
        layout: How its choices are read, once that is known.
        was_called: Whether a forward pass of training went through it.
    """

    name: str
    block: nn.Module
    holders: Mapping[str, nn.Module]
    candidates: Mapping[str, nn.Module]
    experts: int
    is_named: bool
    layout: Layout | None = None
    was_called: bool = False
    sums: Sums | None = None
    call: MixturePass | None = field(default=None, repr=False)

    def close(self) -> None:
        """Add up what passed through since the block was entered."""
        call, self.call = self.call, None
        if call is None or not (call.outputs or call.arguments or call.rows):
            return
        if self.layout is None:
            modules = list(self.candidates.values())
            ks = {number: _top_k([module, self.block], self.experts) for number, module in enumerate(modules)}
            words = [_ROUTER.search(path) is None for path in self.candidates]
            order = sorted(range(len(modules)), key=words.__getitem__)
            self.layout = learn(call, self.experts, ks, order, is_named=self.is_named or not all(words))
        if self.layout is not None:
            sums = sums_of(self.layout, call)
            self.sums = sums if self.sums is None else self.sums + sums

    def take(self) -> Sums | None:
        """Return what was added up, on the host, and begin anew; ``None`` if nothing was."""
        self.close()
        sums, self.sums = self.sums, None
        return None if sums is None else Sums(sums.assigned.cpu(), sums.others.cpu())


class Routing:
    """The mixtures of experts of a model in training.

    Counted are forward passes of the training: not those that gradient checkpointing repeats, nor those without
    gradients (evaluation, generation). Tokens that the attention mask leaves out do not count, where the mask is passed
    to the model and has as many entries as the router gets tokens.

    Args:
        model: In any wrapper.

    Attributes:
        mixtures: Blocks that may be mixtures of experts.

    Example: count what one training step sends to each expert::

        routing = Routing(model)
        routing.arm()
        model(**batch).loss.backward()
        routing.disarm()
        sums = routing.take()
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self.mixtures = find_mixtures(model)
        self._handles: list[Any] = []
        self._masks: tuple[Tensor | None, ...] = (None, None)
        self._inside: bool | None = None  # whether the forward pass of the whole model counts; None outside of one
        self._failure: Exception | None = None
        config = getattr(base_model(model), "config", None)
        self._has_decoder = bool(getattr(config, "is_encoder_decoder", False))

    def arm(self) -> None:
        """Begin to count."""
        self.disarm()
        self._failure = None
        for mixture in self.mixtures:
            mixture.call = mixture.sums = None
        self._handles = [
            self._model.register_forward_pre_hook(self._quiet(self._entered), with_kwargs=True),
            self._model.register_forward_hook(self._quiet(self._left), always_call=True),
        ]
        for mixture in self.mixtures:
            self._handles += self._hooks(mixture)

    def disarm(self) -> None:
        """Remove all hooks; what was counted stays until it is taken."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside, self._masks = [], None, (None, None)

    def take(self) -> dict[str, Sums]:
        """Return what each mixture's router did since :meth:`arm`, by the block's name.

        Blocks that a forward pass went through and that speak of no experts are not looked at again.

        Raises:
            RuntimeError: If something went wrong in a hook, which the training did not notice.
        """
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise RuntimeError(f"Routing was not counted ({type(failure).__name__}: {failure}).") from failure
        taken = {mixture.name: sums for mixture in self.mixtures if (sums := mixture.take()) is not None}
        self.mixtures = [
            mixture for mixture in self.mixtures if mixture.layout or mixture.is_named or not mixture.was_called
        ]
        return taken

    def unread(self) -> dict[str, str]:
        """Return the blocks with experts whose routing is not known, and why."""
        read = [mixture.name for mixture in self.mixtures if mixture.layout is not None]
        return {
            mixture.name: (
                "nothing that passes through it tells which experts were chosen"
                if mixture.was_called
                else "no forward pass was seen in it: it is compiled, or not in use"
            )
            for mixture in self.mixtures
            if mixture.layout is None and mixture.is_named
            if not any(name.startswith(f"{mixture.name}.".lstrip(".")) for name in read)
        }

    def held_in(self, name: str) -> list[str]:
        """Return the paths, below the block, of the modules that hold the experts of a mixture."""
        return next((list(mixture.holders) for mixture in self.mixtures if mixture.name == name), [])

    def is_soft(self, name: str) -> bool:
        """Return whether every expert of a mixture gets every token, with a weight."""
        return any(m.name == name and m.layout is not None and m.layout.way == "soft" for m in self.mixtures)

    def _hooks(self, mixture: Mixture) -> Iterator[Any]:
        """Register the hooks of one mixture and yield their handles."""
        layout = mixture.layout

        def opened(module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
            mixture.close()
            mixture.was_called = True
            tensors = tensors_in((*arguments, *options.values()))
            mixture.call = MixturePass(
                mask=self._mask_of(mixture.name), tokens=token_count(tensors[0]) if tensors else 0
            )

        def returned(number: int, module: nn.Module, arguments: Any, output: Any) -> None:
            mixture.was_called, call = True, mixture.call
            if call is None or number in call.outputs:  # called again, or from outside of the block's forward
                mixture.close()
                call = mixture.call = MixturePass(mask=self._mask_of(mixture.name))
            call.outputs[number] = tensors_in(output)

        def called(module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
            if mixture.call is not None:
                mixture.call.arguments = tensors_in((*arguments, *options.values()))

        def reached(number: int, module: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
            if mixture.call is not None and (tensors := tensors_in((*arguments, *options.values()))):
                rows = mixture.call.rows
                rows[number] = rows.get(number, 0) + token_count(tensors[0])

        yield mixture.block.register_forward_pre_hook(self._counted(opened), with_kwargs=True)
        yield mixture.block.register_forward_hook(self._counted(lambda *_: mixture.close()))
        for number, module in enumerate(mixture.candidates.values()):
            if layout is None or layout.router == number:
                yield module.register_forward_hook(self._counted(partial(returned, number)))
        for module in mixture.holders.values():
            if layout is None or layout.way == "arguments":
                yield module.register_forward_pre_hook(self._counted(called), with_kwargs=True)
            if isinstance(module, nn.ModuleList | nn.ModuleDict) and (layout is None or layout.way == "rows"):
                for number, child in enumerate(_listed(module)):
                    yield child.register_forward_pre_hook(self._counted(partial(reached, number)), with_kwargs=True)

    def _counted(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Return a hook that acts in forward passes of the training alone."""

        def acting(module: nn.Module, *values: Any) -> None:
            if _is_in_backward():
                return
            if torch.is_grad_enabled() if self._inside is None else self._inside:
                with torch.no_grad():
                    hook(module, *values)

        return self._quiet(acting)

    def _quiet(self, hook: Callable[..., None]) -> Callable[..., None]:
        """Return a hook that never raises, and returns nothing."""

        def quiet(*values: Any) -> None:
            if torch.compiler.is_compiling() or self._failure is not None:
                return
            try:
                hook(*values)
            except Exception as error:  # told by take
                self._failure = error

        return quiet

    def _entered(self, model: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any]) -> None:
        self._inside = torch.is_grad_enabled() and not _is_in_backward()
        named = dict(options)
        if arguments:
            with suppress(TypeError, ValueError):
                named |= inspect.signature(model.forward).bind(*arguments, **options).arguments
        self._masks = tuple(_as_mask(named.get(name)) for name in _MASKS)

    def _left(self, *_: Any) -> None:
        self._inside, self._masks = None, (None, None)

    def _mask_of(self, name: str) -> Tensor | None:
        """Return which tokens count in a part of the model."""
        return self._masks[self._has_decoder and "decoder" in name.split(".")]


def _is_in_backward() -> bool:
    """Return whether a backward pass is running: what it calls is repeated."""
    return torch._C._current_graph_task_id() != -1


def _as_mask(mask: Any) -> Tensor | None:
    """Return which tokens an attention mask of batch and sequence leaves in."""
    return mask.detach() != 0 if isinstance(mask, Tensor) and mask.ndim == 2 else None


def find_mixtures(model: nn.Module) -> list[Mixture]:
    """Return the blocks of a model that may be mixtures of experts, in its order.

    Args:
        model: In any wrapper.
    """
    base = base_model(model)
    mixtures, speakers = [], []
    for path, block in base.named_modules():
        if _is_wrapper(block) or isinstance(block, nn.ModuleList | nn.ModuleDict):
            continue
        children = {name: _inner(child) for name, child in block.named_children()}
        held = {name: _experts_in(name, child) for name, child in children.items()}
        experts = max(held.values(), default=0)  # shared experts are fewer than those that are chosen
        holders = {name: child for name, child in children.items() if experts and held[name] == experts}
        others = {name: child for name, child in block.named_children() if name not in holders}
        listed = any(isinstance(child, nn.ModuleList | nn.ModuleDict) for child in holders.values())
        routers = {name: child for name, child in others.items() if _may_score(child, experts, exactly=listed)}
        is_named = any(_speaks_of_experts(module) for module in (block, *children.values())) or any(
            _EXPERTS.search(name) for name in children
        )
        if holders and (routers or is_named):
            name = plain_path(base, path) if path else ""
            mixtures.append(Mixture(name, block, holders, routers, experts, is_named))
        elif _speaks_of_experts(block) and not any(map(_speaks_of_experts, list(block.modules())[1:])):
            speakers.append(Mixture(plain_path(base, path) if path else "", block, {}, {}, 0, is_named=True))
    inside = {id(module) for mixture in mixtures if mixture.is_named for module in mixture.block.modules()}
    return [*mixtures, *(speaker for speaker in speakers if id(speaker.block) not in inside)]


def _is_wrapper(module: nn.Module) -> bool:
    return bool(class_names(module) & {"BaseTunerLayer", "AuxiliaryTrainingWrapper"})


def _inner(module: nn.Module) -> nn.Module:
    """Return the module inside PEFT's wrappers."""
    while _is_wrapper(module):
        saved = getattr(module, "modules_to_save", None)
        active = getattr(module, "active_adapters", None) or getattr(module, "active_adapter", None) or ()
        active = (active,) if isinstance(active, str) else active
        module = next(
            (saved[name] for name in active if saved is not None and name in saved),
            getattr(module, "base_layer", None) or getattr(module, "original_module", None),
        )  # pyright: ignore[reportAssignmentType]
    return module


def _experts_in(name: str, module: nn.Module) -> int:
    """Return how many experts a module holds, 0 if it holds none."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        children = _listed(module)
        kinds = {(type(child), *(tuple(shape_of(parameter)) for parameter in child.parameters())) for child in children}
        return len(children) if len(kinds) == 1 else 0
    stacks = [
        shape_of(parameter)[0]
        for parameter in module.parameters(recurse=False)
        if len(shape_of(parameter)) == 3 and not any("Conv" in word for word in class_names(module))
    ]
    if stacks:
        return min(stacks)
    return _number_of_experts(module) if _EXPERTS.search(name) and any(True for _ in module.parameters()) else 0


def _listed(module: nn.ModuleList | nn.ModuleDict) -> list[nn.Module]:
    """Return the modules of a list that hold parameters."""
    return [_inner(child) for child in module.children() if any(True for _ in child.parameters())]


def _number_of_experts(module: nn.Module) -> int:
    """Return the number of experts that a module says it has."""
    counts = [
        value
        for name, value in vars(module).items()
        if _EXPERTS.search(name) and not _TOP_K.fullmatch(name) and type(value) is int and 1 < value < _MOST
    ]
    return min(counts, default=0)


def _speaks_of_experts(module: nn.Module) -> bool:
    return _number_of_experts(module) > 1


def _may_score(module: nn.Module, experts: int, *, exactly: bool) -> bool:
    """Return whether a module may return a score for each expert: one of its weights has a row for each."""
    rows = [shape_of(parameter)[0] for parameter in module.parameters() if len(shape_of(parameter)) == 2]
    return any(row == experts if exactly else experts <= row for row in rows)


def _top_k(modules: Sequence[nn.Module], experts: int) -> int:
    """Return how many experts a token is sent to, as the first of the modules says, 0 if none does."""
    for module in modules:
        inner = _inner(module)
        for holder in (vars(inner), getattr(getattr(inner, "config", None), "__dict__", {})):
            values = [v for n, v in holder.items() if _TOP_K.fullmatch(n) and type(v) is int and 0 < v <= experts]
            if values:
                return values[0]
    return 0
