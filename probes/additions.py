"""A model with other weights for a moment, without touching them: changes are added to what its layers give.

A change of a weight in half precision would be rounded away in it. So the weights stay as they are, and each layer's
output gets what the change adds to it, computed in single precision at least.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from probes.blocks import trained_parameters
from probes.layer_rules import adapted_layer, is_conv1d, is_convolution
from probes.low_rank import LowRankMatrix
from probes.sample_gradients import at_least_single
from probes.undisturbed import swapped
from probes.watched import Dense, Matrix, Watched, base_model, class_names, find

#: Layers that are known by their own forward functions: a class derived from one may do more.
_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def added(model: nn.Module, changes: Mapping[str, Matrix]) -> Iterator[None]:
    """Add changes to the matrices of a model inside the ``with`` block.

    Args:
        model: With adapters, dense trainable weights, or both.
        changes: Matrix → its change, ``(out, in)`` as ``probes.watched_matrices`` has the matrix; vectors (biases,
            norms) by the parameter's name.

    Raises:
        ValueError: If a change has no matrix, another shape, or its matrix belongs to a layer whose output does not say
            how it is used (fused experts, a weight used by a function, a layer with a forward function of its own); or
            if a vector is in half precision.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> with added(nn.Sequential(layer), {"0": torch.tensor([[1.0, -1.0]])}):
    ...     layer(torch.tensor([[3.0, 1.0]])).item()
    6.0
    """
    matrices = {watched.name: watched for watched in find(model).watched if not watched.part_of}
    vectors = {name: p for name, p in trained_parameters(model).items() if p.ndim < 2}
    if unknown := [name for name in changes if name not in matrices and name not in vectors]:
        raise ValueError(f"Expected changes of matrices, such as {sorted(matrices)[:3]}, got {unknown[:3]}.")
    with ExitStack() as stack:
        for name, change in changes.items():
            if name in matrices:
                module, addition = _addition(model, matrices[name], change)
                stack.callback(module.register_forward_hook(partial(_with_addition, addition)).remove)
        moved = {name: vectors[name] for name in changes if name in vectors and name not in matrices}
        stack.enter_context(swapped([*moved.values()], [_moved(name, p, changes[name]) for name, p in moved.items()]))
        yield


def _moved(name: str, parameter: nn.Parameter, change: Matrix) -> Tensor:
    if parameter.dtype.itemsize < 4:
        raise ValueError(
            f"Expected vectors in single precision, got {name!r} in {parameter.dtype}, where a change rounds away. "
            "Train it in float32, or leave it out."
        )
    assert isinstance(change, Tensor)
    return (parameter.detach().double() + change.to(parameter.device, torch.float64)).to(parameter.dtype)


def _with_addition(addition: Callable[[Tensor], Tensor], _: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
    if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        raise ValueError("Expected a layer that takes and returns one tensor.")
    with torch.autocast(output.device.type, enabled=False):
        # To its device, too: with a device_map, inputs may come from another.
        return (at_least_single(output) + addition(inputs[0]).to(at_least_single(output))).to(output.dtype)


def _addition(model: nn.Module, watched: Watched, change: Matrix) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return the layer that uses a matrix, and what a change of it adds to the layer's output."""
    shape = tuple(watched.read().shape)
    if tuple(change.shape) != shape:
        raise ValueError(f"Expected a change of shape {shape} for {watched.name!r}, got {tuple(change.shape)}.")
    owners = [
        module for module in base_model(model).modules() if _uses(module, watched) and not _has_own_forward(module)
    ]
    # Of nested wrappers the outermost adapter layer gives the output that counts.
    layers = [module for module in owners if "BaseTunerLayer" in class_names(module)] or owners
    layer = adapted_layer(layers[0]) if layers else None
    if len(layers) != 1 or layer is None or "[" in watched.name or not _is_multiplied(layers[0], layer, watched):
        raise ValueError(
            f"Expected a matrix that one layer uses, got {watched.name!r}, whose use no layer's output says. "
            "Choose other blocks."
        )
    left, right = (change.left, change.right) if isinstance(change, LowRankMatrix) else (change, None)
    if isinstance(layer, nn.Embedding):
        # An adapter's matrix is (dimension, words), a trained table (words, dimension).
        if not watched.is_dense:
            left, right = (left.mT, None) if right is None else (right.mT, left.mT)
        return layers[0], partial(_embedded, left, None if right is None else right.mT)
    if is_convolution(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        kernel = (left if right is None else right).unflatten(1, weight.shape[1:])
        return layers[0], partial(_convolved, layer, kernel, None if right is None else left)
    if is_conv1d(layer) and watched.is_dense:
        left, right = (left.mT, None) if right is None else (right.mT, left.mT)
    elif not (isinstance(layer, nn.Linear) or is_conv1d(layer)):
        raise ValueError(
            f"Expected a linear layer, a convolution or an embedding, got {watched.name!r} of a "
            f"{type(layer).__name__}. Choose other blocks."
        )
    return layers[0], partial(_multiplied, left, right)


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether a module has another forward function than its class; that of a device_map only calls it."""
    inner = vars(module).get("_old_forward") if hasattr(module, "_hf_hook") else vars(module).get("forward")
    return inner is not None and getattr(inner, "__func__", inner) is not type(module).forward


def _uses(module: nn.Module, watched: Watched) -> bool:
    if isinstance(watched.terms, Dense):
        return any(parameter is watched.terms.parameter for parameter in module._parameters.values())
    factors = [product.left for product in watched.terms]
    return "BaseTunerLayer" in class_names(module) and any(
        parameter is factor for parameter in module.parameters() for factor in factors
    )


def _is_multiplied(module: nn.Module, layer: nn.Module, watched: Watched) -> bool:
    """Return whether the layer's output is what its kind gives for the matrix, times nothing and on all places."""
    own = next((kind.forward for kind in _KINDS if isinstance(layer, kind)), None)
    plain = own is None or type(layer).forward is own
    if isinstance(watched.terms, Dense):
        return plain and getattr(layer, "weight", None) is watched.terms.parameter
    # PEFT scales what it adds to a scaled embedding, and adds to some tokens only in a variant.
    return (plain or not isinstance(layer, nn.Embedding)) and not getattr(module, "lora_variant", {})


def _multiplied(left: Tensor, right: Tensor | None, inputs: Tensor) -> Tensor:
    rows = at_least_single(inputs)
    first = left if right is None else right
    products = nn.functional.linear(rows, first.to(rows.device, rows.dtype))
    return products if right is None else nn.functional.linear(products, left.to(rows.device, rows.dtype))


def _embedded(table: Tensor, left: Tensor | None, inputs: Tensor) -> Tensor:
    rows = nn.functional.embedding(inputs, at_least_single(table).to(inputs.device))
    return rows if left is None else nn.functional.linear(rows, left.to(rows.device, rows.dtype))


def _convolved(layer: nn.Module, kernel: Tensor, left: Tensor | None, inputs: Tensor) -> Tensor:
    images = at_least_single(inputs)
    convolve = {3: nn.functional.conv1d, 4: nn.functional.conv2d, 5: nn.functional.conv3d}[kernel.ndim]
    weight = kernel.to(images.device, images.dtype)
    channels = convolve(images, weight, None, layer.stride, layer.padding)  # pyright: ignore[reportArgumentType, reportCallIssue]
    if left is None:
        return channels
    # Of one image without a dimension of images, too.
    last = channels.movedim(1 - kernel.ndim, -1)
    return nn.functional.linear(last, left.to(images.device, images.dtype)).movedim(-1, 1 - kernel.ndim)
