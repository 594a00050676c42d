r"""Gradients of each sample of a batch, from one forward and one backward pass.

For a module y = W x, ∇_W of sample i is Σ_t δ_it x_itᵀ, with x its inputs and δ the gradients of its outputs. Autograd
is therefore asked for gradients of outputs alone; those of parameters, summed over samples, are never formed. That
holds for linear layers, convolutions (inputs unfolded), embeddings, normalisations and biases. Which sample a row of an
output belongs to is found out by further backward passes (:mod:`probes.ownership`), of the whole batch or, where its
rows are expected to be in order, of two samples by themselves. Whatever else a parameter does (it is used by a
function, several samples share a row, its output is changed in place) is found out too, not assumed, and costs one
backward pass for each sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from probes.layer_rules import Call, follows, gradient_rows, has_rule, is_convolution, matrix_term, term
from probes.ownership import Split, samples_of_rows, split_by
from probes.sample_gradients import Materialised, SampleGradient, Term, at_least_single, compact, stacked

#: The module that takes the inputs, and the one that gives the outputs.
Chain: TypeAlias = tuple[nn.Module, nn.Module]

#: From fewer samples on, two by themselves take too large a part of a batch's time to stand for all.
FEWEST = 16


@dataclass
class ForwardCalls:
    """Calls of modules during a forward pass."""

    calls: dict[nn.Module, list[Call]] = field(default_factory=dict)
    strange: set[nn.Module] = field(default_factory=set)  # called with, or returning, something else than one tensor
    without_graph: set[nn.Module] = field(default_factory=set)


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[ForwardCalls]:
    """Record calls of modules; their hooks are gone afterwards."""
    forward = ForwardCalls()

    def keep(module: nn.Module, inputs: tuple, keywords: dict, output: object) -> None:
        if len(inputs) >= 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            plain = len(inputs) == 1 and not keywords
            call = Call(module, inputs[0].detach(), output, output._version, plain)
            forward.calls.setdefault(module, []).append(call)
        else:
            forward.strange.add(module)
        if not any(tensor.requires_grad for tensor in _tensors(output)):
            forward.without_graph.add(module)

    # First of all hooks, to see the output as the layer made it. Scripted modules take none.
    handles = [
        module.register_forward_hook(keep, prepend=True, with_kwargs=True)
        for module in modules
        if not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield forward
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list | Mapping):
        for value in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(value)


def owners(model: nn.Module, parameters: Sequence[nn.Parameter]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Map each parameter (by identity) to the modules that own it, with its name there; several for tied weights."""
    wanted = {id(parameter) for parameter in parameters}
    modules: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in dict.fromkeys(model.modules()):
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in wanted:
                modules.setdefault(id(parameter), []).append((module, name))
    return modules


@dataclass(frozen=True)
class SampleGradients:
    """Gradients of each sample of a batch.

    Args:
        parameters: By the parameter's identity.
        matrices: By chain, Σ δ xᵀ as (out, in), of an embedding (in, out); those that calls of layers say.
        one_by_one: Parameters, and chains, that took a backward pass for each sample.
        in_order: Whether rows were found to be of one sample each, one sample's after the other's, wherever their shape
            says so.
    """

    parameters: dict[int, SampleGradient]
    matrices: dict[Chain, Term]
    one_by_one: tuple[nn.Parameter | Chain, ...]
    in_order: bool


def sample_gradients(
    losses: Float[Tensor, " sample"],
    parameters: Sequence[nn.Parameter],
    owners_of: Mapping[int, Sequence[tuple[nn.Module, str]]],
    recorded: ForwardCalls,
    *,
    chains: Sequence[Chain] = (),
    trusted: bool = False,
    alone: Callable[[Sequence[int]], tuple[Tensor, ForwardCalls]] | None = None,
) -> SampleGradients:
    """Return the gradient of each sample's loss with respect to each parameter.

    Args:
        losses: With their graph.
        parameters: Whose gradients are wanted.
        owners_of: As :func:`owners` gives them.
        recorded: The forward pass that gave the losses.
        trusted: Whether rows are known to be of one sample each, one sample's after the other's, unless their shape
            leaves that open. Otherwise it is found out.
        chains: Pairs of modules of which a whole matrix Σ δ xᵀ is wanted too, of the first one's inputs and the
            second one's outputs: a layer itself, twice, or LoRA's A and B.
        alone: From the numbers of some samples to their losses, and the forward pass that gave these, without the
            others. If given, two samples of a batch of ``FEWEST`` or more may stand for all: their rows are found to be
            their own exactly, and the same within the batch to half the digits. Else all are looked at.

    Raises:
        ValueError: If a layer ran inside an operation that hides its graph.
    """
    samples, uses = len(losses), _uses(losses, parameters)
    _require_seen(parameters, owners_of, recorded, uses)
    ways = {id(p): _ways(p, owners_of.get(id(p), ()), recorded) for p in parameters}
    steps = {chain: pairs for chain in chains if (pairs := _steps(chain, recorded))}
    calls = {id(call): call for way in ways.values() for call, _ in way or ()}
    calls |= {id(last): last for pairs in steps.values() for _, last in pairs}
    rows = _gradient_rows(losses, list(calls.values()))
    calls = {key: call for key, call in calls.items() if key in rows}  # the losses depend on no other
    doubtful = [call for call in calls.values() if samples > 1 and not (trusted and not _is_open(call, samples))]
    if doubtful and alone and samples >= FEWEST and not any(_is_open(call, samples) for call in doubtful):
        doubtful = [] if _two_are_in_order(losses, doubtful, rows, recorded, alone) else doubtful
    placed = samples_of_rows(losses, doubtful, rows) if doubtful else {}
    placed = {key: None for key in calls if key not in {id(call) for call in doubtful}} | placed

    gradients: dict[int, SampleGradient] = {}
    slow: list[nn.Parameter] = []
    beyond: set[nn.Module] = set()
    for parameter in parameters:
        way, used = ways[id(parameter)], uses.counts.get(id(parameter), 0)
        reached = [(call, name) for call, name in way or () if id(call) in rows]
        # More uses than calls that got a gradient: something besides the modules uses it, or hides what they do.
        if used and (way is None or used > len(reached)):
            beyond |= {module for module, _ in owners_of.get(id(parameter), ())}
            slow.append(parameter)
        elif any(id(call) not in placed for call, _ in reached):
            slow.append(parameter)
        else:
            gradients[id(parameter)] = _taken_apart(parameter, reached, rows, placed, samples)
    matrices: dict[Chain, Term] = {}
    shared: dict[Chain, list[tuple[Call, Call]]] = {}
    for chain, pairs in steps.items():
        reached = [(first, last) for first, last in pairs if id(last) in rows]
        if not reached or beyond & set(chain):
            continue
        if all(id(last) in placed for _, last in reached):
            last_calls = [last for _, last in reached]
            split = _split(last_calls, rows, placed, samples)
            matrices[chain] = matrix_term([first for first, _ in reached], [rows[id(c)] for c in last_calls], split)
        else:
            shared[chain] = reached
    by_parameter, by_chain = _one_by_one(losses, slow, shared)
    in_order = all(placed.get(key, ...) is None or _is_open(call, samples) for key, call in calls.items())
    return SampleGradients(gradients | by_parameter, matrices | by_chain, (*slow, *shared), in_order)


def _taken_apart(
    parameter: nn.Parameter,
    way: Sequence[tuple[Call, str]],
    rows: Mapping[int, Tensor],
    placed: Mapping[int, Tensor | None],
    samples: int,
) -> SampleGradient:
    """Return the sum of what calls of one or several modules, by the parameter's name there, add to its gradient."""
    terms = []
    for module, name in dict.fromkeys((call.module, name) for call, name in way):
        calls = [call for call, other in way if call.module is module and other == name]
        terms.append(term(calls, name, [rows[id(call)] for call in calls], _split(calls, rows, placed, samples)))
    return SampleGradient(tuple(parameter.shape), samples, terms)


def _split(
    calls: Sequence[Call], rows: Mapping[int, Tensor], placed: Mapping[int, Tensor | None], samples: int
) -> Split:
    return split_by(samples, [placed[id(call)] for call in calls], [len(rows[id(call)]) for call in calls])


def _steps(chain: Chain, recorded: ForwardCalls) -> list[tuple[Call, Call]]:
    """Return calls of the first and of the second module that follow each other; none if any does not."""
    first, last = (recorded.calls.get(module, []) for module in chain)
    if len(first) != len(last) or not all(follows(*step) for step in zip(first, last, strict=True)):
        return []
    return list(zip(first, last, strict=True))


def _ways(
    parameter: nn.Parameter, owners_of: Sequence[tuple[nn.Module, str]], recorded: ForwardCalls
) -> list[tuple[Call, str]] | None:
    """Return the calls that a parameter's gradient is the sum of; ``None`` if no rule covers it."""
    ways = []
    for module, name in owners_of:
        if module in recorded.strange:
            return None
        for call in recorded.calls.get(module, ()):
            if not has_rule(call, name):
                return None
            ways.append((call, name))
    return ways if owners_of else None


@dataclass(frozen=True)
class _Uses:
    """How often the graph uses each parameter, and its custom operations.

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
    nodes = set(stack)
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions:
            if following is None:
                continue
            takers.setdefault(following, []).append(node)
            if following not in nodes:
                nodes.add(following)
                stack.append(following)

    wanted = {id(parameter) for parameter in parameters}
    leaves = {id(getattr(node, "variable", None)): node for node in takers}
    custom = sorted({node.name() for node in nodes if isinstance(node, BackwardCFunction)})
    return _Uses({key: _count(node, takers) for key, node in leaves.items() if key in wanted}, tuple(custom))


def _count(node: Node, takers: Mapping[Node, Sequence[Node]]) -> int:
    """Return the number of operations that take a node's output; one cast may serve several: autocast keeps it."""
    return sum(_count(taker, takers) if taker.name() == "ToCopyBackward0" else 1 for taker in takers[node])


def _require_seen(
    parameters: Sequence[nn.Parameter],
    owners_of: Mapping[int, Sequence[tuple[nn.Module, str]]],
    recorded: ForwardCalls,
    uses: _Uses,
) -> None:
    """Refuse what would come out as zero: layers that ran without a graph, inside an operation that makes its own."""
    if not uses.custom:
        return
    unused = [p for p in parameters if not uses.counts.get(id(p))]
    modules = [module for p in unused for module, _ in owners_of.get(id(p), ())]
    hidden = next((module for module in modules if module in recorded.without_graph), None)
    if hidden is not None:
        raise ValueError(
            f"Expected a graph from every layer to the losses, got {type(hidden).__name__} inside one of "
            f"{', '.join(uses.custom)}, which hide it. Checkpoint activations with use_reentrant=False, or not at all."
        )


def _gradient_rows(losses: Tensor, calls: Sequence[Call]) -> dict[int, Float[Tensor, "row feature"]]:
    """Gradient of the sum of losses with respect to each call's output, by the call's identity; none where there is no
    path.

    In single precision at least: half precision would round the sums over tokens and samples that follow.
    """
    counting = [call for call in calls if call.output.requires_grad]
    if not counting:
        return {}
    outputs = [call.output for call in counting]
    gradients = torch.autograd.grad(losses.sum(), outputs, retain_graph=True, allow_unused=True)
    return {
        id(call): gradient_rows(call, at_least_single(gradient.detach()))
        for call, gradient in zip(counting, gradients, strict=True)
        if gradient is not None
    }


def _is_open(call: Call, samples: int) -> bool:
    """Return whether a shape leaves open which of its dimensions counts samples."""
    shape = call.output.shape
    return shape[0] != samples or len(shape) == 2 or samples in shape[1:-1] or is_convolution(call.module)


def _two_are_in_order(
    losses: Tensor,
    calls: Sequence[Call],
    rows: Mapping[int, Tensor],
    recorded: ForwardCalls,
    alone: Callable[[Sequence[int]], tuple[Tensor, ForwardCalls]],
) -> bool:
    """Return whether two samples by themselves have rows of their own, with the gradients that they have in the batch.

    The first is exact, whatever share of a row is another sample's. The second, up to half of the digits, is about what
    only a larger batch, or other samples, would show.
    """
    finite = losses.detach().isfinite().nonzero().flatten().tolist()
    if len(finite) < 2:
        return False
    chosen = [finite[0], finite[len(finite) // 2]]
    few, seen = alone(chosen)
    twins: dict[int, Call] = {}
    for module in {call.module: None for call in calls}:
        given, own = recorded.calls[module], seen.calls.get(module, [])
        if len(given) != len(own):
            return False
        twins |= {id(call): twin for call, twin in zip(given, own, strict=True)}
    own_calls = [twins[id(call)] for call in calls]
    own_rows = _gradient_rows(few, own_calls)
    if len(own_rows) < len(own_calls):
        return False
    placed = samples_of_rows(few, own_calls, own_rows)
    if any(placed.get(id(call), ...) is not None for call in own_calls):
        return False
    allowed = max(torch.finfo(call.output.dtype).eps for call in calls) ** 0.5
    for call in calls:
        within = rows[id(call)].unflatten(0, (len(losses), -1))[chosen].flatten(1)
        found = own_rows[id(twins[id(call)])].flatten()
        if found.numel() != within.numel():
            return False
        apart = (within - found.view_as(within)).norm(dim=1)
        if not bool((apart <= allowed * within.norm(dim=1)).all()):
            return False
    return True


def _one_by_one(
    losses: Tensor, parameters: Sequence[nn.Parameter], chains: Mapping[Chain, Sequence[tuple[Call, Call]]]
) -> tuple[dict[int, SampleGradient], dict[Chain, Term]]:
    """Run a backward pass for each sample.

    Slow, and right whatever the parameters do and whichever samples share a row.
    """
    outputs = [last.output for steps in chains.values() for _, last in steps]
    if not parameters and not outputs:
        return {}, {}
    rows: list[list[Tensor]] = [[] for _ in parameters]
    parts: dict[Chain, list[SampleGradient]] = {chain: [] for chain in chains}
    for loss in losses:
        gradients = torch.autograd.grad(loss, [*parameters, *outputs], retain_graph=True, allow_unused=True)
        for row, parameter, gradient in zip(rows, parameters, gradients, strict=False):
            row.append(at_least_single(_dense(gradient, parameter)))
        of_outputs = iter(gradients[len(parameters) :])
        for chain, steps in chains.items():
            deltas = [
                gradient_rows(last, at_least_single(_dense(delta, last.output)))
                for (_, last), delta in zip(steps, of_outputs, strict=False)
            ]
            product = matrix_term([first for first, _ in steps], deltas, Split(1))
            parts[chain].append(compact(SampleGradient(product.shape, 1, [product])))
    return {
        id(parameter): SampleGradient(tuple(parameter.shape), len(losses), [Materialised(torch.stack(row))])
        for parameter, row in zip(parameters, rows, strict=True)
    }, {chain: stacked(samples).terms[0] for chain, samples in parts.items()}


def _dense(gradient: Tensor | None, like: Tensor) -> Tensor:
    if gradient is None:
        return torch.zeros_like(like)
    return gradient.detach().to_dense() if gradient.is_sparse else gradient.detach()
