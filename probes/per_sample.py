r"""Gradients of each sample of a batch, from one forward and one backward pass.

For a module y = W x, ∇_W of sample i is Σ_t δ_it x_itᵀ, with x its inputs and δ the gradients of its outputs. Autograd
is therefore asked for gradients of outputs alone; those of parameters, summed over samples, are never formed. That
holds for linear layers, convolutions (inputs unfolded), embeddings, normalisations and biases. Whatever else a
parameter does (it is used by a function, several samples share a row, its output is changed in place) is found out, not
assumed, and costs one backward pass for each sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from probes.layer_rules import Call, follows, has_rule, is_convolution, matrix_term, term
from probes.sample_gradients import Materialised, Outer, SampleGradient, Scatter, at_least_single

#: The module that takes the inputs, and the one that gives the outputs.
Chain: TypeAlias = tuple[nn.Module, nn.Module]

#: Weights of samples by which it is told whose gradient a row holds: neighbours differ by more than a half.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass
class Recording:
    """Calls of modules during a forward pass."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    strange: set[nn.Module] = field(default_factory=set)  # called with, or returning, something else than one tensor
    without_graph: set[nn.Module] = field(default_factory=set)


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[Recording]:
    """Records calls of modules; their hooks are gone afterwards."""
    found = Recording()

    def keep(module: nn.Module, inputs: tuple, keywords: dict, output: object) -> None:
        if len(inputs) >= 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            plain = len(inputs) == 1 and not keywords
            call = Call(module, inputs[0].detach(), output, output._version, plain)
            found.calls.setdefault(module, []).append(call)
        else:
            found.strange.add(module)
        if not any(each.requires_grad for each in _tensors(output)):
            found.without_graph.add(module)

    # First of all hooks, to see the output as the layer made it.
    handles = [module.register_forward_hook(keep, prepend=True, with_kwargs=True) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list | Mapping):
        for each in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(each)


def owners(model: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Parameter (by identity) → the modules whose own it is, each with its name there; several for tied weights."""
    wanted = {id(parameter) for parameter in parameters}
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in dict.fromkeys(model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                found.setdefault(id(parameter), []).append((module, name))
    return found


def sample_gradients(
    losses: Float[Tensor, " sample"],
    parameters: Sequence[nn.Parameter],
    own: Mapping[int, Sequence[tuple[nn.Module, str]]],
    recorded: Recording,
    *,
    chains: Sequence[Chain] = (),
    trusted: bool = False,
) -> tuple[dict[int, SampleGradient], list[nn.Parameter], dict[Chain, Outer | Scatter]]:
    """Gradient of each sample's loss with respect to each parameter.

    Args:
        losses: With their graph.
        parameters: Whose gradients are wanted.
        own: As :func:`owners` gives them.
        recorded: The forward pass that gave the losses.
        trusted: Whether the first dimension of whatever goes through the model counts samples, unless its shape leaves
            that open: true of text, not of images, of which a sample may have none or several. Otherwise it is
            found out, by a second backward pass.
        chains: Pairs of modules of which a whole matrix Σ δ xᵀ is wanted too, of the first one's inputs and the
            second one's outputs: a layer itself, twice, or LoRA's A and B.

    Returns:
        Gradients by the parameter's identity; parameters that took a pass for each sample; and by chain the whole
        matrices, where inputs and outputs say them.
    """
    samples = len(losses)
    ways = {id(p): _ways(p, own.get(id(p), ()), recorded, samples) for p in parameters}
    found_uses = _uses(losses, parameters)
    _require_seen(parameters, own, recorded, found_uses)
    uses = found_uses.counts
    for parameter in parameters:
        way = ways[id(parameter)]
        if way is not None and uses.get(id(parameter), 0) > sum(call.output.requires_grad for call, _ in way):
            ways[id(parameter)] = None  # something besides the modules uses it
    wholes = {chain: steps for chain in chains if (steps := _steps(chain, recorded))}
    calls = {id(call): call for way in ways.values() for call, _ in way or ()}
    calls |= {id(last): last for steps in wholes.values() for _, last in steps}
    deltas = _deltas(losses, list(calls.values()))
    shared = _not_of_one_sample(losses, list(calls.values()), deltas, trusted=trusted)
    one_by_one = [p for p in parameters if (w := ways[id(p)]) is None or any(id(c) in shared for c, _ in w)]
    slow = {id(p) for p in one_by_one}
    found: dict[int, SampleGradient] = {}
    for parameter in parameters:
        if id(parameter) not in slow:
            terms = [term(call, name, deltas[id(call)], samples) for call, name in ways[id(parameter)] or ()]
            found[id(parameter)] = SampleGradient(tuple(parameter.shape), samples, terms)
    found |= _one_by_one(losses, [p for p in one_by_one if uses.get(id(p), 0)])
    for parameter in one_by_one:
        found.setdefault(id(parameter), SampleGradient(tuple(parameter.shape), samples, []))
    matrices = {
        chain: _joined([matrix_term(first, deltas[id(last)], samples) for first, last in steps])
        for chain, steps in wholes.items()
        if not any(id(last) in shared for _, last in steps)
    }
    return found, [p for p in one_by_one if uses.get(id(p), 0)], matrices


def _steps(chain: Chain, recorded: Recording) -> list[tuple[Call, Call]]:
    """Calls of the first and of the second module that follow each other; none if any does not."""
    first, last = (recorded.calls.get(module, []) for module in chain)
    if len(first) != len(last) or not all(follows(*step) for step in zip(first, last, strict=True)):
        return []
    return list(zip(first, last, strict=True))


def _ways(
    parameter: nn.Parameter, own: Sequence[tuple[nn.Module, str]], recorded: Recording, samples: int
) -> list[tuple[Call, str]] | None:
    """The calls that a parameter's gradient is the sum of; ``None`` if no rule says it."""
    found = []
    for module, name in own:
        if module in recorded.strange:
            return None
        for call in recorded.calls.get(module, ()):
            if not has_rule(call, name, samples):
                return None
            found.append((call, name))
    return found if own else None


@dataclass(frozen=True)
class _Uses:
    """What the graph says.

    Args:
        counts: By a parameter's identity, how many operations take it.
        custom: Kinds of the graph's operations that are written in Python, and may hide what they compute.
    """

    counts: Mapping[int, int]
    custom: tuple[str, ...]


def _uses(losses: Tensor, parameters: Sequence[nn.Parameter]) -> _Uses:
    takers: dict[Node, list[Node]] = {}
    start = losses.grad_fn
    stack = [start] if start is not None else []
    seen = set(stack)
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            takers.setdefault(following, []).append(node)
            if following not in seen:
                seen.add(following)
                stack.append(following)

    wanted = {id(parameter) for parameter in parameters}
    leaves = {id(getattr(node, "variable", None)): node for node in takers}
    custom = sorted({node.name() for node in seen if isinstance(node, BackwardCFunction)})
    return _Uses({key: _count(node, takers) for key, node in leaves.items() if key in wanted}, tuple(custom))


def _count(node: Node, takers: Mapping[Node, Sequence[Node]]) -> int:
    """Operations that take what a node gives; one cast may serve several: autocast keeps it."""
    return sum(_count(each, takers) if each.name() == "ToCopyBackward0" else 1 for each in takers[node])


def _require_seen(
    parameters: Sequence[nn.Parameter],
    own: Mapping[int, Sequence[tuple[nn.Module, str]]],
    recorded: Recording,
    uses: _Uses,
) -> None:
    """Refuses what would come out as zero: layers that ran without a graph, inside an operation that makes its own."""
    if not uses.custom:
        return
    unused = [p for p in parameters if not uses.counts.get(id(p))]
    modules = [module for p in unused for module, _ in own.get(id(p), ())]
    hidden = next((module for module in modules if module in recorded.without_graph), None)
    if hidden is not None:
        raise ValueError(
            f"Expected a graph from every layer to the losses, got {type(hidden).__name__} inside one of "
            f"{', '.join(uses.custom)}, which hide it. Checkpoint activations with use_reentrant=False, or not at all."
        )


def _deltas(losses: Tensor, calls: Sequence[Call]) -> dict[int, Tensor]:
    """Gradient of the sum of losses with respect to each call's output; zeros where it does not matter.

    In single precision at least: half precision would round the sums over tokens and samples that follow.
    """
    counting = [call for call in calls if call.output.requires_grad]
    gradients = (
        torch.autograd.grad(losses.sum(), [call.output for call in counting], retain_graph=True, allow_unused=True)
        if counting
        else ()
    )
    found = {id(call): torch.zeros_like(call.output) for call in calls if not call.output.requires_grad}
    for call, gradient in zip(counting, gradients, strict=True):
        found[id(call)] = torch.zeros_like(call.output) if gradient is None else gradient.detach()
    return {key: at_least_single(delta) for key, delta in found.items()}


def _not_of_one_sample(
    losses: Tensor, calls: Sequence[Call], deltas: Mapping[int, Tensor], *, trusted: bool
) -> set[int]:
    """Calls whose rows are not of one sample each, in the samples' order.

    Where that is open, a second backward pass tells: of losses with a weight each, a row's gradient must be that of
    before times its own sample's weight.
    """
    samples = len(losses)
    open_ = [c for c in calls if c.output.requires_grad and (not trusted or _is_open(c, samples))]
    if samples == 1 or not open_:
        return set()
    weights = 1 + 2 * (torch.arange(samples, dtype=losses.dtype, device=losses.device) * _GOLDEN % 1)
    outputs = [call.output for call in open_]
    weighted = torch.autograd.grad((losses * weights).sum(), outputs, retain_graph=True, allow_unused=True)
    shared = set()
    for call, gradient in zip(open_, weighted, strict=True):
        delta = deltas[id(call)]
        expected = (delta.reshape(samples, -1) * weights[:, None].to(delta.dtype)).reshape(delta.shape)
        apart = expected if gradient is None else gradient - expected
        # Far below what one sample's share in another's row would be, far above rounding, also inside the model.
        if apart.abs().max() > (1e-3 if torch.finfo(call.output.dtype).bits > 16 else 0.05) * delta.abs().max():
            shared.add(id(call))
    return shared


def _is_open(call: Call, samples: int) -> bool:
    """Whether a shape leaves open which of its dimensions counts samples."""
    shape = call.output.shape
    return shape[0] != samples or len(shape) == 2 or samples in shape[1:-1] or is_convolution(call.module)


def _joined(terms: Sequence[Outer | Scatter]) -> Outer | Scatter:
    first, *others = terms
    for other in others:
        first = first.beside(other)  # pyright: ignore[reportArgumentType]
    return first


def _one_by_one(losses: Tensor, parameters: Sequence[nn.Parameter]) -> dict[int, SampleGradient]:
    """A backward pass for each sample: slow, and right whatever the parameters do."""
    if not parameters:
        return {}
    rows: list[list[Tensor]] = [[] for _ in parameters]
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for row, parameter, gradient in zip(rows, parameters, gradients, strict=True):
            row.append(at_least_single(torch.zeros_like(parameter) if gradient is None else gradient.detach()))
    return {
        id(parameter): SampleGradient(tuple(parameter.shape), len(losses), [Materialised(torch.stack(row))])
        for parameter, row in zip(parameters, rows, strict=True)
    }
