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

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from probes.sample_gradients import Materialised, Outer, SampleGradient, Scatter
from probes.unwrapping import class_names

#: Weights of samples by which it is told whose gradient a row holds: neighbours differ by more than a half.
_GOLDEN = (5**0.5 - 1) / 2


@dataclass
class _Call:
    """One call of a module: what went in, what came out, and the state that it came out in."""

    module: nn.Module
    input: Tensor
    output: Tensor
    version: int


@dataclass
class Recording:
    """Calls of modules during a forward pass."""

    calls: dict[nn.Module, list[_Call]] = field(default_factory=dict)
    strange: set[nn.Module] = field(default_factory=set)  # called with, or returning, something else than one tensor


@contextmanager
def recording(modules: Sequence[nn.Module]) -> Iterator[Recording]:
    """Records calls of modules; their hooks are gone afterwards."""
    found = Recording()

    def keep(module: nn.Module, inputs: tuple, output: object) -> None:
        if len(inputs) >= 1 and isinstance(inputs[0], Tensor) and isinstance(output, Tensor):
            call = _Call(module, inputs[0].detach(), output, output._version)
            found.calls.setdefault(module, []).append(call)
        else:
            found.strange.add(module)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


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
    outputs_of: Sequence[nn.Module] = (),
    trusted: bool = False,
) -> tuple[dict[int, SampleGradient], list[nn.Parameter], dict[nn.Module, Outer | Scatter]]:
    """Gradient of each sample's loss with respect to each parameter.

    Args:
        losses: With their graph.
        parameters: Whose gradients are wanted.
        own: As :func:`owners` gives them.
        recorded: The forward pass that gave the losses.
        trusted: Whether the first dimension of whatever goes through the model counts samples, unless its shape leaves
            that open: true of text, not of images, of which a sample may have none or several. Otherwise it is
            found out, by a second backward pass.
        outputs_of: Modules whose gradient as a whole matrix, Σ δ xᵀ of their own input and output, is wanted too.

    Returns:
        Gradients by the parameter's identity; parameters that took a pass for each sample; and by module the whole
        matrices, of those modules where the inputs and outputs say it.
    """
    samples = len(losses)
    ways = {id(p): _ways(p, own.get(id(p), ()), recorded, samples) for p in parameters}
    uses = _uses(losses, parameters)
    for parameter in parameters:
        way = ways[id(parameter)]
        if way is not None and uses.get(id(parameter), 0) > len(way):
            ways[id(parameter)] = None  # something besides the modules uses it
    wholes = {module: recorded.calls.get(module, []) for module in outputs_of}
    calls = {id(call): call for way in ways.values() for call, _ in way or ()}
    calls |= {id(call): call for each in wholes.values() for call in each}
    deltas = _deltas(losses, list(calls.values()))
    shared = _not_of_one_sample(losses, list(calls.values()), deltas, trusted=trusted)
    one_by_one = [p for p in parameters if (w := ways[id(p)]) is None or any(id(c) in shared for c, _ in w)]
    slow = {id(p) for p in one_by_one}
    found: dict[int, SampleGradient] = {}
    for parameter in parameters:
        if id(parameter) not in slow:
            terms = [_term(call, name, deltas[id(call)], samples) for call, name in ways[id(parameter)] or ()]
            found[id(parameter)] = SampleGradient(tuple(parameter.shape), samples, terms)
    found |= _one_by_one(losses, [p for p in one_by_one if uses.get(id(p), 0)])
    for parameter in one_by_one:
        found.setdefault(id(parameter), SampleGradient(tuple(parameter.shape), samples, []))
    matrices = {
        module: _joined([_matrix_term(call, deltas[id(call)], samples) for call in each])
        for module, each in wholes.items()
        if each and not any(id(call) in shared for call in each)
    }
    return found, [p for p in one_by_one if uses.get(id(p), 0)], matrices


def _ways(
    parameter: nn.Parameter, own: Sequence[tuple[nn.Module, str]], recorded: Recording, samples: int
) -> list[tuple[_Call, str]] | None:
    """The calls that a parameter's gradient is the sum of; ``None`` if no rule says it."""
    found = []
    for module, name in own:
        if module in recorded.strange:
            return None
        for call in recorded.calls.get(module, ()):
            if not _has_rule(call, name, samples):
                return None
            found.append((call, name))
    return found if own else None


def _has_rule(call: _Call, name: str, samples: int) -> bool:
    module = call.module
    if call.output._version != call.version:  # changed in place since: its gradient is another tensor's
        return False
    if call.input.shape[0] % samples or call.output.shape[0] % samples or call.output.ndim < 2:
        return False
    if _is_convolution(module) and name in ("weight", "bias"):
        return call.input.shape[0] == samples
    if name in ("weight", "bias") and (_is_linear(module) or _is_conv1d(module)):
        return True
    if name == "weight" and _is_embedding(module):
        return True
    return name in ("weight", "bias") and _is_elementwise(call, name)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _is_convolution(module: nn.Module) -> bool:
    plain = next((c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c)), None)
    return bool(
        plain is not None
        and type(module).forward is plain.forward
        and module.groups == 1  # pyright: ignore[reportAttributeAccessIssue]
        and module.padding_mode == "zeros"  # pyright: ignore[reportAttributeAccessIssue]
        and module.padding != "same"  # pyright: ignore[reportAttributeAccessIssue]
        and all(each == 1 for each in module.dilation)  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
    )


def _is_embedding(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )


def _is_elementwise(call: _Call, name: str) -> bool:
    """Whether a one-dimensional parameter only scales, or shifts, the last dimension of what comes out."""
    parameter = getattr(call.module, name)
    single = call.output.dtype in (torch.float32, torch.float64) and call.input.dtype == call.output.dtype
    if not single or parameter.ndim != 1 or call.output.shape[-1] != len(parameter):
        return False
    if call.input.shape != call.output.shape or set(dict(call.module.named_parameters())) - {"weight", "bias"}:
        return False
    slope, at_zero = _slope(call, name)
    error = (at_zero + slope * parameter.detach() - call.output.detach()).abs().max()
    return bool(error <= 1e-4 * call.output.detach().abs().max())


@torch.no_grad()
def _slope(call: _Call, name: str) -> tuple[Tensor, Tensor]:
    """∂output/∂parameter, elementwise, and the output at a parameter of zeros."""
    parameter = getattr(call.module, name)
    at_one, at_zero = (
        functional_call(call.module, {name: torch.full_like(parameter, value)}, (call.input,)) for value in (1.0, 0.0)
    )
    return at_one - at_zero, at_zero


def _uses(losses: Tensor, parameters: Sequence[nn.Parameter]) -> dict[int, int]:
    """How many operations of the graph take each parameter."""
    wanted = {id(parameter) for parameter in parameters}
    counts: dict[int, int] = {}
    stack, seen = [losses.grad_fn], {losses.grad_fn}
    while stack:
        node = stack.pop()
        for following, _ in node.next_functions if node is not None else ():
            if following is None:
                continue
            variable = getattr(following, "variable", None)
            if variable is not None and id(variable) in wanted:
                counts[id(variable)] = counts.get(id(variable), 0) + 1
            if following not in seen:
                seen.add(following)
                stack.append(following)
    return counts


def _deltas(losses: Tensor, calls: Sequence[_Call]) -> dict[int, Tensor]:
    """Gradient of the sum of losses with respect to each call's output; zeros where it does not matter."""
    counting = [call for call in calls if call.output.requires_grad]
    gradients = (
        torch.autograd.grad(losses.sum(), [call.output for call in counting], retain_graph=True, allow_unused=True)
        if counting
        else ()
    )
    found = {id(call): torch.zeros_like(call.output) for call in calls if not call.output.requires_grad}
    for call, gradient in zip(counting, gradients, strict=True):
        found[id(call)] = torch.zeros_like(call.output) if gradient is None else gradient.detach()
    return found


def _not_of_one_sample(
    losses: Tensor, calls: Sequence[_Call], deltas: Mapping[int, Tensor], *, trusted: bool
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
        if apart.abs().max() > (1e-3 if torch.finfo(delta.dtype).bits > 16 else 0.05) * delta.abs().max():
            shared.add(id(call))
    return shared


def _is_open(call: _Call, samples: int) -> bool:
    """Whether a shape leaves open which of its dimensions counts samples."""
    shape = call.output.shape
    return shape[0] != samples or len(shape) == 2 or samples in shape[1:-1] or _is_convolution(call.module)


def _by_sample(tensor: Tensor, samples: int) -> Float[Tensor, "sample token feature"]:
    return tensor.reshape(samples, -1, tensor.shape[-1])


def _term(call: _Call, name: str, delta: Tensor, samples: int) -> Outer | Scatter | Materialised:
    """What one call adds to the gradient of one of its module's parameters, in the parameter's own shape."""
    module = call.module
    if name == "bias" and _is_convolution(module):
        return Materialised(delta.flatten(2).sum(2))
    if name == "bias" and (_is_linear(module) or _is_conv1d(module)):
        return Materialised(_by_sample(delta, samples).sum(1))
    if _is_linear(module) or _is_convolution(module) or _is_embedding(module):
        return _matrix_term(call, delta, samples)
    if _is_conv1d(module):
        return Outer(_by_sample(call.input, samples).to(delta.dtype), _by_sample(delta, samples))
    slope, _ = _slope(call, name)
    return Materialised(_by_sample(delta * slope, samples).sum(1))


def _matrix_term(call: _Call, delta: Tensor, samples: int) -> Outer | Scatter:
    """Σ δ xᵀ as (out, in): by the kind of the module, or of the base layer that it adapts."""
    module = call.module
    base = module.get_base_layer() if "BaseTunerLayer" in class_names(module) else module  # pyright: ignore[reportCallIssue]
    if isinstance(base, nn.Embedding):
        values, ids = _by_sample(delta, samples), call.input.reshape(samples, -1)
        if base.padding_idx is not None:
            values = values * (ids != base.padding_idx)[..., None]
        return Scatter(ids, values, base.num_embeddings)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return Outer(delta.flatten(2).mT, _unfolded(call.input, base).to(delta.dtype))
    return Outer(_by_sample(delta, samples), _by_sample(call.input, samples).to(delta.dtype))


def _unfolded(inputs: Tensor, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Float[Tensor, "sample place feature"]:
    """What each place of the output sees of the input: channels, then the kernel's dimensions, as in the weight."""
    paddings = [0] * len(module.kernel_size) if isinstance(module.padding, str) else list(module.padding)  # "valid"
    sides = [side for padding in reversed(paddings) for side in (padding, padding)]
    patches = nn.functional.pad(inputs, sides)
    dimensions = len(module.kernel_size)
    for dimension, (size, stride) in enumerate(zip(module.kernel_size, module.stride, strict=True)):
        patches = patches.unfold(2 + dimension, size, stride)
    # (sample, channel, places…, kernel…) → (sample, place, channel · kernel)
    places = list(range(2, 2 + dimensions))
    order = [0, *places, 1, *range(2 + dimensions, 2 + 2 * dimensions)]
    return patches.permute(order).flatten(1, dimensions).flatten(2)


def _joined(terms: Sequence[Outer | Scatter]) -> Outer | Scatter:
    first = terms[0]
    for term in terms[1:]:
        first = first.beside(term)  # pyright: ignore[reportArgumentType]
    return first


def _one_by_one(losses: Tensor, parameters: Sequence[nn.Parameter]) -> dict[int, SampleGradient]:
    """A backward pass for each sample: slow, and right whatever the parameters do."""
    if not parameters:
        return {}
    rows: list[list[Tensor]] = [[] for _ in parameters]
    for loss in losses:
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        for row, parameter, gradient in zip(rows, parameters, gradients, strict=True):
            row.append(torch.zeros_like(parameter) if gradient is None else gradient.detach())
    return {
        id(parameter): SampleGradient(tuple(parameter.shape), len(losses), [Materialised(torch.stack(row))])
        for parameter, row in zip(parameters, rows, strict=True)
    }
