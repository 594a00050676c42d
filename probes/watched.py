"""Which matrices of a live model are watched: adapters as factors, other trainable weights as they are.

Nothing is copied and nothing is left on the model: watched matrices refer to the model's own parameters, so that they
follow the training, whose optimizer changes them in place. Their names are those of the model as it was built, without
the wrappers around it. Wrappers are recognised by what they are, not by what they are called: a model may have a
submodule ``module`` itself."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from probes.low_rank import LowRankMatrix

Matrix: TypeAlias = Tensor | LowRankMatrix
#: From a parameter to a tensor of its shape: its value, its gradient, a copy of it from an earlier step.
Reading: TypeAlias = Callable[[nn.Parameter], Tensor]

#: Parameters whose memory is filled only while their layer computes, by identity, and what knows their values.
ABSENT: WeakValueDictionary[int, Holder] = WeakValueDictionary()

#: Variants of LoRA (PEFT's classes) that train or initialise it in their own way, and leave the update s B A.
_PLAIN_VARIANTS = ("ALora", "Monteclora", "Velora", "MiCA")


class Holder(Protocol):
    """What knows the values of parameters without memory (:mod:`probes.sharded`)."""

    def value(self, parameter: nn.Parameter, /) -> Tensor:
        """Return the value."""
        ...

    def replaced(self, values: Sequence[tuple[nn.Parameter, Tensor]], /) -> AbstractContextManager[None]:
        """Give parameters other values inside a ``with`` block."""
        ...


def whole(parameter: Tensor) -> Tensor:
    """Return a parameter's value; that of a DTensor is gathered, which all ranks must do together.

    Raises:
        ValueError: If DeepSpeed ZeRO-3 has split it.

    >>> whole(nn.Parameter(torch.ones(2)))
    tensor([1., 1.])
    """
    if hasattr(parameter, "ds_shape") and parameter.shape != shape_of(parameter):
        raise ValueError(
            f"Expected a parameter that can be read, got one of {tuple(shape_of(parameter))} that DeepSpeed ZeRO-3 has "
            "split over all ranks. Put the code into deepspeed.zero.GatheredParameters(model.parameters())."
        )
    holder = ABSENT.get(id(parameter))
    if holder is not None:
        return holder.value(parameter)  # pyright: ignore[reportArgumentType]
    tensor = parameter.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue]


def is_sharded(parameter: Tensor) -> bool:
    """Return whether this rank holds a piece of a parameter: of a DTensor, or of one that ZeRO-3 has split."""
    return hasattr(parameter, "full_tensor") or hasattr(parameter, "ds_id")


def shape_of(parameter: Tensor) -> torch.Size:
    """Return a parameter's shape, be it split by ZeRO-3, which leaves an empty tensor in its place.

    >>> shape_of(nn.Parameter(torch.ones(2, 3)))
    torch.Size([2, 3])
    """
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def without_values(parameter: Tensor) -> Tensor:
    """Return a tensor of a parameter's shape on the meta device: to view what has no values, as between FSDP 2's steps.

    >>> without_values(nn.Parameter(torch.ones(4, 2, 3)))[0].shape
    torch.Size([2, 3])
    """
    return torch.empty(shape_of(parameter), dtype=parameter.dtype, device="meta")


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def _part(index: int, tensor: Tensor) -> Tensor:
    return tensor[index]


def _expert_left(index: int, count: int, tensor: Tensor) -> Tensor:
    return tensor[:, index::count]


def _expert_right(index: int, count: int, tensor: Tensor) -> Tensor:
    return tensor.unflatten(0, (count, -1))[index]


@dataclass(frozen=True)
class AdapterProduct:
    """One adapter on one matrix: s · left · diag(diagonal) · right, parts of its parameters.

    Args:
        left, right: The parameters that hold the factors.
        scale: PEFT's scale, as it is now.
        left_view, right_view: From a tensor of the parameter's shape to the factor, ``(out, r)`` and ``(r, in)``.
        diagonal: AdaLoRA's E, or ``None``.
    """

    left: nn.Parameter
    right: nn.Parameter
    scale: Callable[[], float]
    left_view: Callable[[Tensor], Tensor] = _same
    right_view: Callable[[Tensor], Tensor] = _same
    diagonal: nn.Parameter | None = None

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """All of them, frozen ones included."""
        return (self.left, self.right) if self.diagonal is None else (self.left, self.right, self.diagonal)

    def matrix(self, reading: Reading, scale: float | None = None) -> LowRankMatrix:
        """Return the product, with its scale as it is now or as given."""
        column_scale = None if self.diagonal is None else reading(self.diagonal).flatten()
        left, right = self.left_view(reading(self.left)), self.right_view(reading(self.right))
        return LowRankMatrix(left, right, self.scale() if scale is None else scale, column_scale=column_scale)

    def derivative(self, reading: Reading, direction: Reading) -> list[LowRankMatrix]:
        """Return the first-order change of the product along ``direction``, as two (three) products that add up."""
        left, right = self.left_view(reading(self.left)), self.right_view(reading(self.right))
        left_change, right_change = self.left_view(direction(self.left)), self.right_view(direction(self.right))
        if self.diagonal is None:
            factors = [(left_change, right), (left, right_change)]
        else:
            diagonal, change = reading(self.diagonal).flatten(), direction(self.diagonal).flatten()
            factors = [(left_change * diagonal, right), (left * diagonal, right_change), (left * change, right)]
        scale = self.scale()
        return [LowRankMatrix(*pair, scale) for pair in factors]


@dataclass(frozen=True)
class Dense:
    """A weight that is trained as it is.

    Args:
        parameter: The parameter.
        view: From a tensor of its shape to the matrix ``(out, in)``.
    """

    parameter: nn.Parameter
    view: Callable[[Tensor], Tensor] = _same

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """The one parameter."""
        return (self.parameter,)


@dataclass(frozen=True)
class Watched:
    """One watched matrix.

    Args:
        name: Its name in the live base model, without wrappers' prefixes and ``.weight``.
        terms: The adapters that add up to it, or the weight itself.
        part_of: Name of the sum that this matrix is one adapter's part of, or ``""``.
    """

    name: str
    terms: tuple[AdapterProduct, ...] | Dense
    part_of: str = ""

    @property
    def is_dense(self) -> bool:
        """Whether it is a weight as it is, not a product of factors."""
        return isinstance(self.terms, Dense)

    @property
    def sources(self) -> tuple[nn.Parameter, ...]:
        """All parameters that it is made of."""
        if isinstance(self.terms, Dense):
            return self.terms.parameters
        return tuple(parameter for term in self.terms for parameter in term.parameters)

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """Those of its parameters that are trained."""
        return tuple(parameter for parameter in self.sources if parameter.requires_grad)

    def scales(self) -> tuple[float, ...]:
        """Return the scale of each adapter as it is now (AdaLoRA's changes); empty for a dense weight."""
        return () if isinstance(self.terms, Dense) else tuple(term.scale() for term in self.terms)

    def read(self, reading: Reading = whole, scales: Sequence[float] | None = None) -> Matrix:
        """Return the matrix as it is now.

        By reference, except for the sum of several adapters and for gathered parameters.

        Args:
            reading: From a parameter to the tensor to take for it, by default its value.
            scales: What :meth:`scales` gave when those tensors were taken, by default what it gives now.
        """
        if isinstance(self.terms, Dense):
            return self.terms.view(reading(self.terms.parameter))
        scales_now = self.scales() if scales is None else scales
        return _sum([term.matrix(reading, scale) for term, scale in zip(self.terms, scales_now, strict=True)])

    def gradient(self, gradients: Reading, reading: Reading = whole) -> Matrix:
        """Return the gradient of a dense weight; of a product the change of the matrix along its factors' gradients.

        That is s(∇_B A + B ∇_A): what a step of gradient descent on the factors does to the matrix, to first order and
        per unit of learning rate.

        Args:
            gradients: From a parameter to its gradient, zeros if it has none.
            reading: As in :meth:`read`.
        """
        if isinstance(self.terms, Dense):
            return self.terms.view(gradients(self.terms.parameter))
        return _sum(self.gradient_products(gradients, reading))

    def gradient_products(self, gradients: Reading, reading: Reading = whole) -> list[LowRankMatrix]:
        """Return products that add up to :meth:`gradient`, by reference; none for a dense weight."""
        terms = () if isinstance(self.terms, Dense) else self.terms
        return [product for term in terms for product in term.derivative(reading, gradients)]


def _sum(products: list[LowRankMatrix]) -> LowRankMatrix:
    if len(products) == 1:
        return products[0]
    left = torch.cat([product.left_factor for product in products], 1)
    right = torch.cat([product.right_factor for product in products])
    return LowRankMatrix(left, right, column_scale=torch.cat([product.scales() for product in products]))


@dataclass(frozen=True)
class WatchedModel:
    """What of a model is watched, and what is not.

    Args:
        watched: The watched matrices, in the model's order.
        skipped: Module → why its adapter is not a product of factors.
        uncovered: Trainable parameters that belong to no watched matrix (vectors, other adapters).
        covered_share: Share of the trainable numbers that belong to a watched matrix; 0 if there are none.
    """

    watched: tuple[Watched, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    uncovered: tuple[str, ...] = ()
    covered_share: float = 0.0


def watched_matrices(model: nn.Module, matrices: str | None = None) -> dict[str, Matrix]:
    """Return the matrices that training changes, by name, referring to the model's own parameters.

    Low-rank adapters (LoRA, rsLoRA, AdaLoRA; on linear, convolution, embedding and attention layers and on fused
    experts) come as :class:`LowRankMatrix` with PEFT's scale, all active adapters of a matrix together, and each as
    ``name@adapter`` if there are several. Every other trainable weight of two or more dimensions comes as it is: a
    convolution flattened to (out, in·kernel), a stack of experts as one matrix each, ``name[e]``.

    Args:
        model: Any module; wrapped by PEFT, DDP, ``torch.compile`` or with FSDP 2's parameters or not.
        matrices: Regular expression; only matrices whose name matches.

    Raises:
        ValueError: If the regular expression is invalid, and for models wrapped by FSDP 1.

    >>> list(watched_matrices(nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))))
    ['0']
    """
    return {watched.name: watched.read() for watched in find_watched(model, matrices)}


def find_watched(model: nn.Module, matrices: str | None = None) -> list[Watched]:
    """Return what :func:`watched_matrices` does, with the parameters, to be read again later."""
    return list(find(model, matrices).watched)


def find(model: nn.Module, matrices: str | None = None) -> WatchedModel:
    """Return what :func:`find_watched` does, with what is not watched, and why."""
    pattern = _compiled(matrices)
    base = base_model(model)
    adapted: dict[str, dict[str, dict[str, AdapterProduct]]] = {}
    skipped: dict[str, str] = {}
    claimed: set[int] = set()
    for path, module in base.named_modules():
        if not _is_lora(module):
            continue
        try:
            adapters = dict(_adapters(module))
        except _NotAProduct as reason:
            skipped[plain_path(base, path)] = str(reason)
            continue
        parameters = [p for parts in adapters.values() for product in parts.values() for p in product.parameters]
        if not any(parameter.requires_grad for parameter in parameters):
            continue
        if all(id(parameter) in claimed for parameter in parameters):
            continue  # the same factors on a tied weight
        claimed |= {id(parameter) for parameter in parameters}
        adapted[path] = adapters
    dense = {
        path: parameter
        for path, parameter in base.named_parameters()
        if parameter.requires_grad and _is_dense(base, path, parameter)
    }
    names = unique_names([*adapted, *dense], {path: _name(base, path) for path in (*adapted, *dense)})
    everything = [*_low_rank(adapted, names), *_weights(base, dense, names)]
    chosen = [watched for watched in _in_order(everything, base) if pattern is None or pattern.search(watched.name)]
    return WatchedModel(tuple(chosen), skipped, *_coverage(base, chosen))


def _compiled(matrices: str | None) -> re.Pattern[str] | None:
    try:
        return None if matrices is None else re.compile(matrices)
    except re.error as error:
        raise ValueError(f"Expected a regular expression for matrices, got {matrices!r} ({error}).") from error


def _is_lora(module: nn.Module) -> bool:
    return "LoraLayer" in class_names(module) and hasattr(module, "scaling")


class _NotAProduct(Exception):
    """An active adapter is not a product, so neither is the sum of the layer's adapters."""


def _adapters(module: nn.Module) -> Iterator[tuple[str, dict[str, AdapterProduct]]]:
    """Yield the active adapters of one layer, each as products by what to add to the matrix's name."""
    for adapter in module.active_adapters:  # pyright: ignore[reportGeneralTypeIssues]
        pair = _pair(module, adapter)
        if pair is None:
            continue
        if reason := _not_a_product(module, adapter, *pair):
            raise _NotAProduct(reason)
        yield adapter, _products(module, adapter, *pair)


def _pair(module: nn.Module, adapter: str) -> tuple[nn.Parameter, nn.Parameter] | None:
    for a, b in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
        factors_a, factors_b = getattr(module, a, {}), getattr(module, b, {})
        if adapter in factors_a and adapter in factors_b:
            return _parameter(factors_b[adapter]), _parameter(factors_a[adapter])
    return None


def _parameter(holder: nn.Module | nn.Parameter) -> nn.Parameter:
    return holder if isinstance(holder, nn.Parameter) else holder.weight  # pyright: ignore[reportReturnType]


def _not_a_product(module: nn.Module, adapter: str, left: nn.Parameter, right: nn.Parameter) -> str:
    variant = getattr(module, "lora_variant", {}).get(adapter)
    if variant is not None and not type(variant).__name__.startswith(_PLAIN_VARIANTS):
        return f"{type(variant).__name__}: its update is not the product of its two factors"
    if adapter in getattr(module, "lora_magnitude_vector", {}):
        return "DoRA: its update is not the product of its two factors"
    if left.is_meta or right.is_meta:
        return "its factors are on the meta device (offloaded), where they have no values"
    shape, other = tuple(shape_of(left)), tuple(shape_of(right))
    if len(shape) < 2 or len(other) < 2 or math.prod(shape[1:]) * getattr(module, "num_experts", 1) == 0:
        return f"its factors have shapes {shape} and {other}"
    if math.prod(shape[1:]) != other[0]:
        return f"its factors of shapes {shape} and {other} do not multiply (grouped convolution)"
    return ""


def _products(module: nn.Module, adapter: str, left: nn.Parameter, right: nn.Parameter) -> dict[str, AdapterProduct]:
    experts = getattr(module, "num_experts", 1) if "ParamWrapper" in class_names(module) else 1
    if experts > 1:
        scale = partial(_scale, module, adapter)
        return {
            f"[{index}]": AdapterProduct(
                left, right, scale, partial(_expert_left, index, experts), partial(_expert_right, index, experts)
            )
            for index in range(experts)
        }
    diagonals = getattr(module, "lora_E", {})
    if adapter in diagonals:
        scale = partial(_adalora_scale, module, adapter)
        return {"": AdapterProduct(left, right, scale, diagonal=diagonals[adapter])}
    return {"": AdapterProduct(left, right, partial(_scale, module, adapter), _flat, _flat)}


def _scale(module: nn.Module, adapter: str) -> float:
    return float(module.scaling[adapter])  # pyright: ignore[reportIndexIssue, reportArgumentType]


def _adalora_scale(module: nn.Module, adapter: str) -> float:
    # As PEFT's SVDLinear.forward has it.
    return _scale(module, adapter) / (float(module.ranknum[adapter]) + 1e-5)  # pyright: ignore[reportIndexIssue, reportArgumentType]


def _low_rank(
    adapted: Mapping[str, Mapping[str, Mapping[str, AdapterProduct]]], names: Mapping[str, str]
) -> Iterator[Watched]:
    for path, adapters in adapted.items():
        name = names[path]
        suffixes = dict.fromkeys(suffix for parts in adapters.values() for suffix in parts)
        for suffix in suffixes:
            parts = {adapter: products[suffix] for adapter, products in adapters.items() if suffix in products}
            whole_name = f"{name}{suffix}"
            yield Watched(whole_name, tuple(parts.values()))
            if len(parts) > 1:
                for adapter, product in parts.items():
                    yield Watched(f"{whole_name}@{adapter}", (product,), part_of=whole_name)


def _is_dense(base: nn.Module, path: str, parameter: nn.Parameter) -> bool:
    shape = shape_of(parameter)
    if len(shape) < 2 or shape.numel() == 0 or parameter.is_meta or not parameter.is_floating_point():
        return False
    # What belongs to an adapter of another kind is part of a formula, not a weight.
    words = [word for module, word in parents(base, path) if "BaseTunerLayer" in class_names(module)]
    return all(word in ("base_layer", "trainable_tokens_delta") for word in words)


def _weights(base: nn.Module, dense: Mapping[str, nn.Parameter], names: Mapping[str, str]) -> Iterator[Watched]:
    for path, parameter in dense.items():
        name = names[path]
        owner, shape = list(parents(base, path))[-1][0], shape_of(parameter)
        if len(shape) == 2:
            yield Watched(name, Dense(parameter))
        elif len(shape) > 3 or any("Conv" in name_of_class for name_of_class in class_names(owner)):
            yield Watched(name, Dense(parameter, _flat))
        elif shape[0] == 1:
            yield Watched(name, Dense(parameter, partial(_part, 0)))
        else:
            for index in range(shape[0]):
                yield Watched(f"{name}[{index}]", Dense(parameter, partial(_part, index)))


def _name(base: nn.Module, path: str) -> str:
    """Return the name of a matrix, from the path of its layer (an adapter) or of its parameter."""
    *_, (owner, word) = parents(base, path)
    layer = getattr(owner, word)
    name = plain_path(base, path)
    if isinstance(layer, nn.Module):
        parameter = getattr(layer, "parameter_name", "weight") if "ParamWrapper" in class_names(layer) else "weight"
        return name if parameter == "weight" else f"{name}.{parameter}"
    if "trainable_tokens_delta" in path.split("."):
        return name.rpartition(".")[0]  # the adapter's name
    return name.removesuffix(".weight")


def _in_order(everything: list[Watched], base: nn.Module) -> list[Watched]:
    """Return matrices in the order of the model's parameters."""
    positions = {id(parameter): position for position, parameter in enumerate(base.parameters())}
    return sorted(everything, key=lambda watched: min(positions[id(parameter)] for parameter in watched.sources))


def _coverage(base: nn.Module, chosen: list[Watched]) -> tuple[tuple[str, ...], float]:
    watched = {id(parameter) for matrix in chosen for parameter in matrix.parameters}
    trained = [(path, parameter) for path, parameter in base.named_parameters() if parameter.requires_grad]
    uncovered = tuple(plain_path(base, path) for path, parameter in trained if id(parameter) not in watched)
    total = sum(shape_of(parameter).numel() for _, parameter in trained)
    covered = sum(shape_of(parameter).numel() for _, parameter in trained if id(parameter) in watched)
    return uncovered, covered / total if total else 0.0


#: Child under which a wrapper keeps what it wraps, by the name of the wrapper's class.
_AROUND = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "DeepSpeedEngine": "module",
    "OptimizedModule": "_orig_mod",
}
_INSIDE = {**_AROUND, "CheckpointWrapper": "_checkpoint_wrapped_module"}


def class_names(module: nn.Module) -> set[str]:
    """Return the names of a module's classes, base classes included."""
    return {parent.__name__ for parent in type(module).__mro__}


def base_model(model: nn.Module) -> nn.Module:
    """Return the model inside DDP, DeepSpeed, ``torch.compile`` and PEFT, whose names are the live base model's.

    Raises:
        ValueError: For FSDP 1, which keeps flattened pieces of parameters instead of matrices.

    >>> inner = nn.Linear(2, 2)
    >>> base_model(nn.DataParallel(inner)) is inner
    True
    """
    while True:
        names = class_names(model)
        if "FullyShardedDataParallel" in names:
            raise ValueError(
                "Expected a model whose parameters are matrices, got one wrapped by FullyShardedDataParallel (FSDP 1), "
                "which flattens them. Use FSDP 2 (torch.distributed.fsdp.fully_shard; accelerate: fsdp_version: 2)."
            )
        if "PeftModel" in names or "PeftMixedModel" in names:
            model = model.base_model  # pyright: ignore[reportAssignmentType]
        elif "BaseTuner" in names:
            model = model.model  # pyright: ignore[reportAssignmentType]
        elif wrapper := names & _AROUND.keys():
            model = getattr(model, _AROUND[min(wrapper)])
        else:
            return model


def parents(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str]]:
    """Yield each module on the way to ``path``, with the next word of the path.

    >>> [word for _, word in parents(nn.Sequential(nn.Linear(1, 1)), "0.weight")]
    ['0', 'weight']
    """
    module: object = model
    for word in path.split("."):
        if not isinstance(module, nn.Module):
            return
        yield module, word
        module = getattr(module, word, None)


def plain_path(model: nn.Module, path: str) -> str:
    """Return a path inside the base model without the words that wrappers put there.

    Left out are ``_orig_mod`` (``torch.compile`` of a submodule), checkpoint wrappers, PEFT's ``base_layer``, and
    ``modules_to_save.<adapter>``.
    """
    words: list[str] = []
    skip = 0
    for module, word in parents(model, path):
        if skip:
            skip -= 1
            continue
        names = class_names(module)
        if any(word == child for wrapper, child in _INSIDE.items() if wrapper in names):
            continue
        if word == "base_layer" and "BaseTunerLayer" in names:
            continue
        if word == "modules_to_save" and "AuxiliaryTrainingWrapper" in names:
            skip = 1  # the adapter's name
            continue
        if word == "token_adapter" and "AuxiliaryTrainingWrapper" in names:
            continue
        words.append(word)
    return ".".join(words)


def unique_names(paths: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """Return the name of each path; two paths whose names coincide keep their paths.

    >>> unique_names(["a.x", "b.x", "c"], {"a.x": "x", "b.x": "x", "c": "c"})
    {'a.x': 'a.x', 'b.x': 'b.x', 'c': 'c'}
    """
    paths = list(paths)
    taken = Counter(names[path] for path in paths)
    return {path: names[path] if taken[names[path]] == 1 else path for path in paths}
