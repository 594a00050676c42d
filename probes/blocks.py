"""The blocks of a model's Fisher: each watched matrix, and each other trainable parameter, with what it is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from probes.sample_gradients import SampleGradient
from probes.spaces import TangentSpace, tangent_space
from probes.undisturbed import bare
from probes.watched import (
    AdapterProduct,
    Dense,
    Watched,
    base_model,
    class_names,
    find,
    is_sharded,
    plain_path,
    unique_names,
    without_values,
)


@dataclass
class Block:
    """What one block keeps of each batch until K is formed.

    Args:
        name: Of the block.
        products: Adapters of a low-rank matrix; empty otherwise.
        parameters: Trainable parameters, each with the view of its gradient that is the block's.
        dimension: d.
        tangent: The space, of a low-rank matrix in tangent space.
        layer: The layer that a low-rank matrix adapts, in weight space.
        parts: By batch and parameter (or one for all), gradients.
    """

    name: str
    products: tuple[AdapterProduct, ...] = ()
    parameters: tuple[tuple[nn.Parameter, Callable[[Tensor], Tensor] | None], ...] = ()
    dimension: int = 0
    tangent: TangentSpace | None = None
    layer: nn.Module | None = None
    parts: list[list[SampleGradient]] = field(default_factory=list)


@dataclass(frozen=True)
class Blocks:
    """The chosen blocks.

    Args:
        chosen: In the model's order, matrices first.
        uncovered: Names of trainable parameters that belong to none.
        covered_share: Share of the trainable numbers that belong to one.
    """

    chosen: tuple[Block, ...]
    uncovered: tuple[str, ...]
    covered_share: float


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return trainable parameters by name.

    In the base model without its wrappers, beside it (soft prompts) as they are.

    >>> list(trained_parameters(nn.Linear(2, 2)))
    ['weight', 'bias']
    """
    base, whole = base_model(model), bare(model)
    inside = {path: parameter for path, parameter in base.named_parameters() if parameter.requires_grad}
    inner = {id(parameter) for parameter in inside.values()}
    outer = {path: p for path, p in whole.named_parameters() if p.requires_grad and id(p) not in inner}
    names = {path: plain_path(base, path) for path in inside}
    unique = unique_names(names, names)
    return {unique[path]: parameter for path, parameter in inside.items()} | outer


def find_blocks(model: nn.Module, space: str, names: Sequence[str] | None = None) -> Blocks:
    """Return the blocks of a model in a space.

    Args:
        model: With trainable parameters.
        space: ``"tangent"``, ``"factor"`` or ``"weight"``.
        names: Of the blocks to choose; by default all.

    Raises:
        ValueError: If nothing is trainable, parameters are sharded, a name is no block's, or a matrix has no gradient
            in weight space.

    >>> [block.name for block in find_blocks(nn.Sequential(nn.Linear(2, 2)), "tangent").chosen]
    ['0', '0.bias']
    """
    trained = trained_parameters(model)
    if not trained:
        raise ValueError("Expected a model with trainable parameters, got one in which none requires a gradient.")
    if any(is_sharded(parameter) for parameter in trained.values()):
        raise ValueError(
            "Expected parameters that are whole on each rank, got shards of FSDP 2 or ZeRO-3. Gather the model first."
        )
    watched = find(model).watched
    taken = {id(parameter) for matrix in watched for parameter in matrix.parameters}
    matrices = [matrix for matrix in watched if not matrix.part_of and matrix.parameters]
    others = {name: parameter for name, parameter in trained.items() if id(parameter) not in taken}
    if names is not None:
        if not names:
            raise ValueError("Expected names of blocks, got none. Leave blocks out to measure all.")
        available = {*(matrix.name for matrix in matrices), *others}
        if unknown := [name for name in names if name not in available]:
            raise ValueError(f"Expected names of blocks, such as {sorted(available)[:3]}, got {unknown[:3]}.")
        matrices = [matrix for matrix in matrices if matrix.name in set(names)]
        others = {name: parameter for name, parameter in others.items() if name in set(names)}
    adapted = _adapted_layers(base_model(model)) if space == "weight" else {}
    blocks = [_block(matrix, space, adapted) for matrix in matrices]
    blocks += [Block(name, parameters=((p, None),), dimension=p.numel()) for name, p in others.items()]
    covered = {id(parameter) for block in blocks for parameter, _ in block.parameters}
    uncovered = tuple(name for name, parameter in trained.items() if id(parameter) not in covered)
    total = sum(parameter.numel() for parameter in trained.values())
    share = sum(parameter.numel() for parameter in trained.values() if id(parameter) in covered) / total
    return Blocks(tuple(blocks), uncovered, share)


def blocks_in_weight_space(model: nn.Module) -> list[str]:
    """Return the names of the blocks that have a gradient in weight space, of all that is trained.

    >>> blocks_in_weight_space(nn.Sequential(nn.Linear(2, 2)))
    ['0', '0.bias']
    """
    adapted = _adapted_layers(base_model(model))
    matrices = [matrix for matrix in find(model).watched if not matrix.part_of and matrix.parameters]
    taken = {id(parameter) for matrix in matrices for parameter in matrix.parameters}
    names = [matrix.name for matrix in matrices if matrix.is_dense or _layer(matrix, adapted) is not None]
    return names + [name for name, parameter in trained_parameters(model).items() if id(parameter) not in taken]


def _layer(watched: Watched, adapted: Mapping[int, nn.Module]) -> nn.Module | None:
    """Return the layer whose weight a low-rank matrix changes, ``None`` if there is not one alone."""
    assert not isinstance(watched.terms, Dense)
    return None if "[" in watched.name else adapted.get(id(watched.terms[0].left))


def _block(watched: Watched, space: str, adapted: Mapping[int, nn.Module]) -> Block:
    if isinstance(watched.terms, Dense):
        parameter, view = watched.terms.parameter, watched.terms.view
        return Block(watched.name, parameters=((parameter, view),), dimension=view(without_values(parameter)).numel())
    products = watched.terms
    parameters = tuple(
        {id(p): (p, None) for product in products for p in product.parameters if p.requires_grad}.values()
    )
    if space == "tangent":
        tangent = tangent_space(products)
        return Block(watched.name, products, parameters, tangent.dimension, tangent)
    if space == "factor":
        views = tuple(
            (p, view)
            for product in products
            for p, view in (
                (product.left, product.left_view),
                (product.right, product.right_view),
                (product.diagonal, None),
            )
            if p is not None and p.requires_grad
        )
        size = sum((view(without_values(p)) if view else p).numel() for p, view in views)
        return Block(watched.name, products, views, size)
    layer = _layer(watched, adapted)
    if layer is None:
        raise ValueError(
            f"Expected matrices of layers in weight space, got {watched.name!r}: its gradient does not follow from "
            "the inputs and outputs of a layer. Choose space='tangent', or other blocks."
        )
    out, in_ = products[0].matrix(without_values).shape
    return Block(watched.name, products, parameters, out * in_, layer=layer)


def _adapted_layers(base: nn.Module) -> dict[int, nn.Module]:
    """Map each adapter parameter (by identity) to the one layer that it adapts; none if there are several.

    Nor if a variant of LoRA does more in between than multiply, such as aLoRA, which leaves tokens out.
    """
    layers: dict[int, list[nn.Module]] = {}
    for module in base.modules():
        if "BaseTunerLayer" in class_names(module):
            for parameter in module.parameters():
                layers.setdefault(id(parameter), []).append(module)
    return {
        key: modules[0]
        for key, modules in layers.items()
        if len(modules) == 1 and not getattr(modules[0], "lora_variant", {})
    }
