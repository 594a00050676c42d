"""A model with other weights for a moment: changes are added to what its layers give.

A change of a weight in half precision would be rounded away in it. So the weights stay as they are, and each layer's
output gets what the change adds to it, computed in single precision at least. Only weights in single precision whose
use no output says are changed in place, and back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
from probes.watched import Dense, Matrix, Watched, base_model, class_names, find, whole

#: Layers that are known by their own forward functions: a class derived from one may do more.
_KINDS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def added(model: nn.Module, changes: Mapping[str, Matrix]) -> Iterator[None]:
    """Add changes to the matrices of a model inside the ``with`` block.

    Trained weights whose use no layer's output says (biases, norms, tokens of their own, experts) have the change in
    themselves meanwhile, and their own values afterwards.

    Args:
        model: With adapters, dense trainable weights, or both.
        changes: Matrix → its change, ``(out, in)`` as ``probes.watched_matrices`` has the matrix; other trained
            parameters (biases, norms) by their names.

    Raises:
        ValueError: If a change has no matrix or another shape; if no layer's output says how its matrix is used (fused
            experts, a weight used by a function, a layer with a forward function of its own), and it is an adapter's or
            a weight in half precision.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(layer.weight)
    >>> with added(nn.Sequential(layer), {"0": torch.tensor([[1.0, -1.0]])}):
    ...     layer(torch.tensor([[3.0, 1.0]])).item()
    6.0
    """
    matrices = {watched.name: watched for watched in find(model).watched if not watched.part_of}
    watched_ids = {id(parameter) for watched in matrices.values() for parameter in watched.sources}
    others = {name: p for name, p in trained_parameters(model).items() if id(p) not in watched_ids}
    if unknown := [name for name in changes if name not in matrices and name not in others]:
        raise ValueError(f"Expected changes of matrices, such as {sorted(matrices)[:3]}, got {unknown[:3]}.")
    users = _users(base_model(model))
    moved: dict[int, tuple[nn.Parameter, Tensor]] = {}
    with ExitStack() as stack:
        for name, change in changes.items():
            watched = matrices.get(name) or Watched(name, Dense(others[name]))
            shape = watched.read(lambda parameter: parameter.detach()).shape
            if change.shape != shape:
                raise ValueError(f"Expected a change of shape {tuple(shape)} for {name!r}, got {tuple(change.shape)}.")
            layers = _layers(users, watched)
            for module, layer in layers:
                hook = partial(_with_addition, _addition(layer, watched, change))
                stack.callback(module.register_forward_hook(hook).remove)
            if not layers:
                _move(moved, watched, change)
        stack.enter_context(swapped([p for p, _ in moved.values()], [value for _, value in moved.values()]))
        yield


def _move(moved: dict[int, tuple[nn.Parameter, Tensor]], watched: Watched, change: Matrix) -> None:
    """Add a change to the value that its parameter is to have."""
    if not isinstance(watched.terms, Dense):
        raise ValueError(
            f"Expected a matrix that one layer uses, got {watched.name!r}, whose use no layer's output says. "
            "Choose other blocks."
        )
    parameter, view = watched.terms.parameter, watched.terms.view
    if parameter.dtype.itemsize < 4:
        raise ValueError(
            f"Expected single precision of a weight that is changed in place, as biases and norms are, got "
            f"{watched.name!r} in {parameter.dtype}, where a change rounds away. Train it in float32, or leave it out."
        )
    _, value = moved.setdefault(
        id(parameter), (parameter, whole(parameter).clone(memory_format=torch.contiguous_format))
    )
    view(value).add_((change.to_dense() if isinstance(change, LowRankMatrix) else change).to(value))


def _with_addition(addition: Callable[[Tensor], Tensor], _: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor:
    if not inputs or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        raise ValueError("Expected a layer that takes and returns one tensor.")
    with torch.autocast(output.device.type, enabled=False):
        # To its device, too: with a device_map, inputs may come from another.
        return (at_least_single(output) + addition(inputs[0]).to(at_least_single(output))).to(output.dtype)


def _layers(users: Mapping[int, Sequence[nn.Module]], watched: Watched) -> list[tuple[nn.Module, nn.Module]]:
    """Return the modules to whose outputs a change of a matrix can be added, each with the layer in it.

    None where not all say in their outputs how they use it. A trained weight may be tied: each of its layers gets the
    same change.
    """
    if "[" in watched.name or (isinstance(watched.terms, Dense) and watched.terms.parameter.ndim < 2):
        return []
    parameter = watched.terms.parameter if isinstance(watched.terms, Dense) else watched.terms[0].left
    layers = [
        (module, adapted_layer(module))
        for module in users.get(id(parameter), ())
        if ("BaseTunerLayer" in class_names(module)) != watched.is_dense
    ]
    single = watched.is_dense or len(layers) == 1
    return layers if single and all(_is_multiplied(module, layer, watched) for module, layer in layers) else []


def _addition(layer: nn.Module, watched: Watched, change: Matrix) -> Callable[[Tensor], Tensor]:
    """Return what a change of a layer's matrix adds to its output."""
    left, right = (change.left, change.right) if isinstance(change, LowRankMatrix) else (change, None)
    if isinstance(layer, nn.Embedding):
        # An adapter's matrix is (dimension, words), a trained table (words, dimension).
        if not watched.is_dense:
            left, right = (left.mT, None) if right is None else (right.mT, left.mT)
        return partial(_embedded, left, None if right is None else right.mT)
    if is_convolution(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        kernel = (left if right is None else right).unflatten(1, weight.shape[1:])
        return partial(_convolved, layer, kernel, None if right is None else left)
    if is_conv1d(layer) and watched.is_dense:
        left, right = (left.mT, None) if right is None else (right.mT, left.mT)
    return partial(_multiplied, left, right)


def _has_own_forward(module: nn.Module) -> bool:
    """Return whether a module has another forward function than its class; that of a device_map only calls it."""
    inner = vars(module).get("_old_forward") if hasattr(module, "_hf_hook") else vars(module).get("forward")
    return inner is not None and getattr(inner, "__func__", inner) is not type(module).forward


def _users(model: nn.Module) -> dict[int, list[nn.Module]]:
    """Return, by a parameter's identity, the modules that hold it and the adapter layers that it is in."""
    users: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        is_adapter = "BaseTunerLayer" in class_names(module)
        for parameter in {
            id(p): p for p in (module.parameters() if is_adapter else module._parameters.values())
        }.values():
            if parameter is not None:
                users.setdefault(id(parameter), []).append(module)
    return users


def _is_multiplied(module: nn.Module, layer: nn.Module, watched: Watched) -> bool:
    """Return whether the layer's output is what its kind gives for the matrix, times nothing and on all places."""
    kind = next((kind for kind in _KINDS if isinstance(layer, kind)), None)
    is_known = is_conv1d(layer) or isinstance(layer, nn.Linear | nn.Embedding) or is_convolution(layer)
    if not is_known or _has_own_forward(module):
        return False
    plain = kind is None or type(layer).forward is kind.forward
    if isinstance(watched.terms, Dense):
        return plain and module is layer and getattr(layer, "weight", None) is watched.terms.parameter
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
