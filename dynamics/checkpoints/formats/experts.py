"""Adapters of parameters (``target_parameters``): which of them is which, and one matrix per expert.

PEFT wraps the module that holds the parameters once for each of them, so the file says
``experts.lora_A`` for one and ``experts.base_layer.lora_A`` for another. The order is the one in
which the module registers its parameters, the last one outermost; it is not in the file. It follows
from two conditions: ranks divide the rows into the same number of experts, and of a pair
``gate_up_proj``, ``down_proj`` the first is between the hidden and twice the intermediate size, the
second between the intermediate and the hidden size. If no order or several orders fit, the
parameters are refused, never guessed and never merged.

The matrix of an expert is B A, as everywhere. Whether its rows are the outputs depends on the version
of PEFT that trained it (early ones read every parameter as (experts, in, out)); its singular values do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

from dynamics.checkpoints.files import TensorInfo, Weights
from dynamics.checkpoints.formats.peft_config import AdapterConfig
from dynamics.checkpoints.matrices import Refusal, StoredMatrix, expert, low_rank

_REMEDY = "Adapt one parameter of the module at a time, or keep the base model's order of parameters."


@dataclass(frozen=True)
class Level:
    """One wrapper around a module: the keys of its factors (``experts.base_layer…`` is one level deeper)."""

    depth: int
    a: str
    b: str


def targeted(config: AdapterConfig, module: str) -> list[str]:
    """Return the names of the parameters of a module that the configuration adapts.

    >>> config = AdapterConfig("LORA", 8, 16.0, target_parameters=("experts.down_proj", "experts.gate_up_proj"))
    >>> targeted(config, "model.layers.0.mlp.experts")
    ['down_proj', 'gate_up_proj']
    """
    names = []
    for target in config.target_parameters:
        owner, _, parameter = target.rpartition(".")
        if owner and (module == owner or module.endswith(f".{owner}")):
            names.append(parameter)
    return sorted(set(names))


def expert_matrices(
    module: str, name: str, levels: Sequence[Level], config: AdapterConfig, file: Weights
) -> dict[str, StoredMatrix | Refusal]:
    """Return the matrices of the parameters of one module, by name, or one refusal under the module's name.

    Args:
        module: Name of the module inside the model, by which ranks and alphas are looked up.
        name: Name of the module as matrices are named.
        levels: Its wrappers.
        config: The adapter's configuration.
        file: The file that holds the factors.
    """
    tensors, candidates = file.tensors, targeted(config, module)
    for level in levels:
        shape_a, shape_b = tensors[level.a].shape, tensors[level.b].shape
        if len(shape_a) != 2 or len(shape_b) != 2 or shape_a[0] != shape_b[1]:
            reason = f"lora_A {list(shape_a)} and lora_B {list(shape_b)} do not multiply."
            return {name: Refusal("OD104", reason, "Save the adapter again.")}
    if len(candidates) < len(levels):
        reason = (
            f"{len(levels)} of its parameters have factors, but target_parameters names {len(candidates)} "
            f"({', '.join(candidates) or 'none'}): which factors belong to which parameter is unknown."
        )
        return {name: Refusal("OD105", reason, _REMEDY)}
    fitting = {
        order: counts
        for order in permutations(candidates, len(levels))
        if (counts := _expert_counts(module, order, levels, config, tensors)) and _geometry(order, levels, tensors)
    }
    if len(fitting) != 1:
        why = "more than one order fits the shapes" if fitting else "no order fits the shapes and ranks"
        reason = f"Its parameters {', '.join(candidates)} cannot be distinguished: {why}."
        return {name: Refusal("OD105", reason, _REMEDY)}
    ((order, count),) = fitting.items()
    matrices: dict[str, StoredMatrix | Refusal] = {}
    for parameter, level in zip(order, levels, strict=True):
        scale = config.scale_of(f"{module}.{parameter}")
        full = name if parameter == "weight" else f"{name}.{parameter}"
        if count == 1:
            matrices[full] = low_rank(file, level.a, level.b, scale)
        else:
            for index in range(count):
                matrices[f"{full}[{index}]"] = expert(file, level.a, level.b, index, count, scale)
    return matrices


def _expert_counts(
    module: str, order: Sequence[str], levels: Sequence[Level], config: AdapterConfig, tensors: Mapping[str, TensorInfo]
) -> int:
    """Return the number of experts if every parameter gives the same number, else 0."""
    counts = set()
    for parameter, level in zip(order, levels, strict=True):
        rows, rank = tensors[level.a].shape[0], config.rank_of(f"{module}.{parameter}")
        counts.add(rows // rank if rows % rank == 0 else 0)
    return counts.pop() if len(counts) == 1 else 0


def _geometry(order: Sequence[str], levels: Sequence[Level], tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether the shapes are possible ones for ``gate_up_proj`` and ``down_proj``, if both are there.

    Either may be stored as (in, out) or (out, in), so each pair of sizes is taken without order.
    """
    sizes = {
        parameter: (tensors[level.a].shape[1], tensors[level.b].shape[0])
        for parameter, level in zip(order, levels, strict=True)
    }
    if not {"gate_up_proj", "down_proj"} <= set(sizes):
        return True
    up, down = sizes["gate_up_proj"], sizes["down_proj"]
    return any(up[1 - i] % 2 == 0 and sorted(down) == sorted((up[i], up[1 - i] // 2)) for i in (0, 1))
