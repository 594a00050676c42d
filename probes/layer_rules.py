"""Which layers' gradients can be taken apart by sample, and how: from what went in and the gradient of what came out.

For a module y = W x, ∇_W of sample i is Σ_t δ_it x_itᵀ, with x its inputs and δ the gradients of its outputs. The same
holds for convolutions (inputs unfolded) and embeddings; normalisations and biases have vectors. A layer is known by its
class and its forward function, a normalisation by what it computes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from probes.sample_gradients import Materialised, Outer, Scatter
from probes.unwrapping import class_names


@dataclass
class Call:
    """One call of a module.

    Args:
        module: That was called.
        input: What went in, first of all.
        output: What came out, in its graph.
        version: The output's, then.
        plain: Whether the input was all that it was given.
    """

    module: nn.Module
    input: Tensor
    output: Tensor
    version: int
    plain: bool


def has_rule(call: Call, name: str, samples: int) -> bool:
    """Whether one call's part in the gradient of the module's parameter ``name`` can be taken apart by sample.

    Args:
        call: One of all calls of a module in a batch.
        name: ``"weight"``, ``"bias"``, or another.
        samples: How many the batch holds.
    """
    module = call.module
    if not call.plain or "forward" in vars(module):  # a forward of its own may do anything with the parameter
        return False
    if call.output._version != call.version:  # changed in place since: its gradient is another tensor's
        return False
    if call.input.shape[0] % samples or call.output.shape[0] % samples or call.output.ndim < 2:
        return False
    if is_convolution(module) and name in ("weight", "bias"):
        return call.input.shape[0] == samples
    if name in ("weight", "bias") and (_is_linear(module) or _is_conv1d(module)):
        return True
    if name == "weight" and _is_embedding(module):
        return True
    return name in ("weight", "bias") and _is_elementwise(call, name)


def follows(first: Call, last: Call) -> bool:
    """Whether two calls are one, or the second takes just what the first gave, place by place."""
    if not (first.plain and last.plain) or any(call.output._version != call.version for call in (first, last)):
        return False
    if first is last:
        return True
    module = last.module
    by_place = (
        _is_linear(module)
        or (
            is_convolution(module)
            and all(each == 1 for each in (*module.kernel_size, *module.stride))  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
            and last.output.shape[2:] == last.input.shape[2:]
        )
    )
    same = last.input.data_ptr() == first.output.data_ptr() and last.input.shape == first.output.shape
    return by_place and same and (_is_linear(first.module) or is_convolution(first.module))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def _is_conv1d(module: nn.Module) -> bool:
    """GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_convolution(module: nn.Module) -> bool:
    """Whether it is a convolution whose inputs can be unfolded: neither dilated, grouped, nor padded but by zeros."""
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


def _is_elementwise(call: Call, name: str) -> bool:
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
def _slope(call: Call, name: str) -> tuple[Tensor, Tensor]:
    """∂output/∂parameter, elementwise, and the output at a parameter of zeros."""
    parameter = getattr(call.module, name)
    at_one, at_zero = (
        functional_call(call.module, {name: torch.full_like(parameter, value)}, (call.input,)) for value in (1.0, 0.0)
    )
    return at_one - at_zero, at_zero


def _by_sample(tensor: Tensor, samples: int) -> Float[Tensor, "sample token feature"]:
    return tensor.reshape(samples, -1, tensor.shape[-1])


def term(call: Call, name: str, delta: Tensor, samples: int) -> Outer | Scatter | Materialised:
    """What one call adds to the gradient of one of its module's parameters, in the parameter's own shape."""
    module = call.module
    if name == "bias" and is_convolution(module):
        return Materialised(delta.flatten(2).sum(2))
    if name == "bias" and (_is_linear(module) or _is_conv1d(module)):
        return Materialised(_by_sample(delta, samples).sum(1))
    if _is_linear(module) or is_convolution(module) or _is_embedding(module):
        return matrix_term(call, delta, samples)
    if _is_conv1d(module):
        return Outer(_by_sample(call.input, samples).to(delta.dtype), _by_sample(delta, samples))
    slope, _ = _slope(call, name)
    return Materialised(_by_sample(delta * slope, samples).sum(1))


def matrix_term(call: Call, delta: Tensor, samples: int) -> Outer | Scatter:
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
