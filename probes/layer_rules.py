"""Which layers' gradients can be taken apart by sample, and how: from what went in and the gradient of what came out.

For a module y = W x, ∇_W of sample i is Σ_t δ_it x_itᵀ, with x its inputs and δ the gradients of its outputs. The same
holds for convolutions (inputs unfolded) and embeddings; normalisations and biases have vectors. A layer is recognised
by its class and its forward function, a normalisation by what it computes. Inputs and gradients are rows, one for each
application of the layer; :mod:`probes.ownership` finds out which rows belong to which sample."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from probes.sample_gradients import Materialised, Outer, Scatter
from probes.watched import class_names


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


def has_rule(call: Call, name: str) -> bool:
    """Return whether one call's part in the gradient of the module's parameter ``name`` can be taken apart by rows.

    Args:
        call: One of all calls of a module in a batch.
        name: ``"weight"``, ``"bias"``, or another.
    """
    module = call.module
    if not call.plain or "forward" in vars(module):  # a forward of its own may do anything with the parameter
        return False
    if call.output._version != call.version:  # changed in place since: its gradient is another tensor's
        return False
    if call.output.ndim < 2 or name not in ("weight", "bias"):
        return False
    if is_convolution(module):
        return call.output.ndim == _dimensions(module) + 2  # else one image without a dimension of images
    if _is_linear(module) or is_conv1d(module):
        return True
    return (name == "weight" and _is_embedding(module)) or _is_elementwise(call, name)


def follows(first: Call, last: Call) -> bool:
    """Return whether two calls are one, or the second takes just what the first gave, row by row."""
    if not (first.plain and last.plain) or any(call.output._version != call.version for call in (first, last)):
        return False
    if first is last:
        return _has_matrix(first.module)
    module = last.module
    by_place = (
        _is_linear(module)
        or (
            is_convolution(module)
            and all(size == 1 for size in (*module.kernel_size, *module.stride))  # pyright: ignore[reportGeneralTypeIssues, reportCallIssue]
            and last.output.shape[2:] == last.input.shape[2:]
        )
    )
    same = last.input.data_ptr() == first.output.data_ptr() and last.input.shape == first.output.shape
    return by_place and same and (_is_linear(first.module) or is_convolution(first.module))


def _has_matrix(module: nn.Module) -> bool:
    """Return whether the gradient of the module's weight, or of the weight it adapts, is Σ δ xᵀ."""
    base = adapted_layer(module)
    return isinstance(base, nn.Linear) or is_conv1d(base) or is_convolution(base) or _is_embedding(base)


def adapted_layer(module: nn.Module) -> nn.Module:
    """Return the layer that a PEFT layer adapts, else the module itself."""
    return module.get_base_layer() if "BaseTunerLayer" in class_names(module) else module  # pyright: ignore[reportCallIssue]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def is_conv1d(module: nn.Module) -> bool:
    """Return whether a module is GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def is_convolution(module: nn.Module) -> bool:
    """Return whether a module is a convolution whose inputs can be unfolded.

    Neither dilated, grouped, nor padded but by zeros.
    """
    plain = next((c for c in (nn.Conv1d, nn.Conv2d, nn.Conv3d) if isinstance(module, c)), None)
    return bool(
        plain is not None
        and type(module).forward is plain.forward
        and module.groups == 1  # pyright: ignore[reportAttributeAccessIssue]
        and module.padding_mode == "zeros"  # pyright: ignore[reportAttributeAccessIssue]
        and module.padding != "same"  # pyright: ignore[reportAttributeAccessIssue]
        and all(size == 1 for size in module.dilation)  # pyright: ignore[reportAttributeAccessIssue, reportGeneralTypeIssues]
    )


def _is_embedding(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Embedding)
        and type(module).forward is nn.Embedding.forward
        and module.max_norm is None
        and not module.scale_grad_by_freq
    )


def _is_elementwise(call: Call, name: str) -> bool:
    """Return whether a one-dimensional parameter only scales, or shifts, the last dimension of what comes out.

    Judged by its gradient for random gradients of the output, which autograd gives too: that a parameter is still
    constant, as at initialisation, or a non-linear gate at 0 or 1, says nothing about what it does.
    """
    parameter = getattr(call.module, name).detach()
    single = call.output.dtype in (torch.float32, torch.float64) and call.input.dtype == call.output.dtype
    if not single or parameter.ndim != 1 or call.output.shape[-1] != len(parameter):
        return False
    if call.input.shape != call.output.shape or set(dict(call.module.named_parameters())) - {"weight", "bias"}:
        return False
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(call.output.shape, generator=generator, dtype=call.output.dtype).to(call.output.device)
    leaf = parameter.clone().requires_grad_()
    with torch.enable_grad():
        output = _output_at(call, name, leaf)
        if not output.requires_grad or output.shape != call.output.shape:
            return False
        (expected,) = torch.autograd.grad(output, leaf, random)
    products = (random * _slope(call, name)).reshape(-1, len(parameter))
    error, size = (expected - products.sum(0)).abs(), products.abs().sum(0)
    return bool((error <= 2**12 * torch.finfo(size.dtype).eps * size).all())


@torch.no_grad()
def _slope(call: Call, name: str) -> Tensor:
    """Return ∂output/∂parameter, elementwise, of an output that is affine in the parameter."""
    parameter = getattr(call.module, name)
    return _output_at(call, name, torch.ones_like(parameter)) - _output_at(call, name, torch.zeros_like(parameter))


def _output_at(call: Call, name: str, value: Tensor) -> Tensor:
    """Return the call's output at another value of a parameter.

    The module, its hooks and its buffers are not touched.
    """
    twin = copy.copy(call.module)
    twin.__dict__["_parameters"] = {**call.module._parameters, name: value}
    twin.__dict__["_buffers"] = {key: b if b is None else b.clone() for key, b in call.module._buffers.items()}
    return twin.forward(call.input)


def gradient_rows(call: Call, gradient: Tensor) -> Float[Tensor, "row feature"]:
    """Return the gradient of a call's output, or any tensor of its shape, with one row for each application."""
    base = adapted_layer(call.module)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d) and gradient.ndim == _dimensions(base) + 2:
        gradient = gradient.flatten(2).mT
    return gradient.reshape(-1, gradient.shape[-1]) if gradient.ndim else gradient.reshape(1, 1)


def _input_rows(call: Call) -> Tensor:
    """Return the inputs, one row for each application: ``(row, feature)``, or of an embedding ``(row,)``."""
    base = adapted_layer(call.module)
    if isinstance(base, nn.Embedding):
        return call.input.reshape(-1)
    if isinstance(base, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return _unfolded(call.input, base).flatten(0, 1)
    return call.input.reshape(-1, call.input.shape[-1])


def term(
    calls: Sequence[Call],
    name: str,
    rows: Sequence[Float[Tensor, "row feature"]],
    by_sample: Callable[[Sequence[Tensor]], Tensor],
) -> Outer | Scatter | Materialised:
    """Return what calls of one module add to the gradient of one of its parameters, in the parameter's own shape.

    Args:
        calls: Of the module.
        name: Of the parameter.
        rows: Gradients of each call's output, as :func:`gradient_rows` gives them.
        by_sample: Takes rows of all calls apart: ``(sample, token, …)``.
    """
    module = calls[0].module
    if is_convolution(module) or _is_linear(module) or is_conv1d(module):
        if name == "bias":
            return Materialised(by_sample(rows).sum(1))
        matrix = matrix_term(calls, rows, by_sample)
        return Outer(matrix.right, matrix.left) if is_conv1d(module) and isinstance(matrix, Outer) else matrix
    if _is_embedding(module):
        return matrix_term(calls, rows, by_sample)
    slopes = [gradient_rows(call, _slope(call, name)) for call in calls]
    return Materialised(by_sample([row * slope for row, slope in zip(rows, slopes, strict=True)]).sum(1))


def matrix_term(
    calls: Sequence[Call],
    rows: Sequence[Float[Tensor, "row feature"]],
    by_sample: Callable[[Sequence[Tensor]], Tensor],
) -> Outer | Scatter:
    """Return Σ δ xᵀ as (out, in), of an embedding as (in, out).

    By the kind of the module, or of the layer that it adapts.

    Args:
        calls: Whose inputs x are.
        rows: δ, perhaps of the outputs of other calls that follow these.
        by_sample: As for :func:`term`.
    """
    base, inputs = adapted_layer(calls[0].module), by_sample([_input_rows(call) for call in calls])
    values = by_sample(rows)
    if isinstance(base, nn.Embedding):
        if base.padding_idx is not None:
            values = values * (inputs != base.padding_idx)[..., None]
        return Scatter(inputs, values, base.num_embeddings)
    return Outer(values, inputs.to(values.dtype))


def _dimensions(module: nn.Module) -> int:
    """Return the number of dimensions of the images that a convolution takes."""
    return len(module.kernel_size)  # pyright: ignore[reportArgumentType]


def _unfolded(inputs: Tensor, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Float[Tensor, "sample place feature"]:
    """Return what each position of the output sees of the input.

    Channels, then the kernel's dimensions, as in the weight.
    """
    paddings = [0] * len(module.kernel_size) if isinstance(module.padding, str) else list(module.padding)  # "valid"
    sides = [side for padding in reversed(paddings) for side in (padding, padding)]
    patches = nn.functional.pad(inputs, sides)
    dimensions = len(module.kernel_size)
    for dimension, (size, stride) in enumerate(zip(module.kernel_size, module.stride, strict=True)):
        patches = patches.unfold(2 + dimension, size, stride)
    # (sample, channel, places…, kernel…) → (sample, place, channel · kernel)
    positions = list(range(2, 2 + dimensions))
    order = [0, *positions, 1, *range(2 + dimensions, 2 + 2 * dimensions)]
    return patches.permute(order).flatten(1, dimensions).flatten(2)
