"""The weights of a whole model → its matrices: what is a matrix, what it is called, what is listed beside.

A weight of two dimensions is a matrix as it is stored: (out, in) for ``nn.Linear``, (in, out) for GPT-2's Conv1D,
(vocabulary, width) for an embedding; singular values do not care. A convolution's kernel is flattened to
(out, in·kernel), the matrix that acts on unfolded patches (im2col), whose spectrum is not that of the convolution
operator. A stack of experts is one matrix each, ``…experts.gate_up_proj[e]``. Projections that a model keeps in one
weight (``qkv_proj``, ``c_attn``) stay one matrix under that name. Which of them are tied is told in ``ties``.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from dynamics.checkpoints.files import TensorInfo, Weights
from dynamics.checkpoints.formats.packed import companions, is_packed, packed_name
from dynamics.checkpoints.formats.variants import Refusal
from dynamics.checkpoints.matrices import FLOATS, Product, weight
from dynamics.checkpoints.names import name_fault, natural_order, shown, without_wrappers

#: Names that modules give the kernel of a convolution; a stack of experts is called after what it does.
_KERNELS = ("weight", "weight_v", "original1")
_EXPERTS = ("expert", "moe")
#: The lengths that weight normalisation keeps beside the directions.
_MAGNITUDES = ("weight_g", "original0")
_MOST_EXPERTS = 4096
#: Buffers of floats that some models save: tables that are computed, not trained.
_BUFFERS = ("cos_cached", "sin_cached", "attn_mask", "causal_mask", "masked_bias")
_RENAME = "Save the model again with plain names."
_PLAIN = "Save the weights in float32, float16 or bfloat16: dequantise them first (model.dequantize())."


@dataclass(frozen=True)
class DenseWeights:
    """What the weights of a whole model hold.

    Args:
        products: Name of the matrix to how it is read, in the model's order.
        refused: Name of the matrix to the reason why it is not analysed.
        beside: Kind of other tensors to their keys.
    """

    products: Mapping[str, Product] = field(default_factory=dict)
    refused: Mapping[str, Refusal] = field(default_factory=dict)
    beside: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_dense(weights: Weights) -> DenseWeights:
    """Sorts the tensors of a whole model into matrices, refusals and the rest."""
    return sort_tensors({name: (key, weights.tensors[key]) for key, name in dense_names(weights.tensors).items()})


def sort_tensors(named: Mapping[str, tuple[str, TensorInfo]]) -> DenseWeights:
    """Sorts named tensors into matrices, refusals and the rest.

    Args:
        named: Name to key and header.
    """
    products: dict[str, Product] = {}
    refused: dict[str, Refusal] = {}
    beside: dict[str, list[str]] = defaultdict(list)
    scales = companions(dict(named.values()))
    for name in sorted(named, key=natural_order):
        key, info = named[name]
        if kind := "scale of a quantised weight" if key in scales else _no_matrix(key, info):
            beside[kind].append(key)
        elif fault := _fault(name, key, info):
            refused[shown(packed_name(name) if is_packed(key, info) else name)] = fault
        else:
            products |= {f"{name}{suffix}": product for suffix, product in _matrices(key, info)}
    return DenseWeights(products, refused, {kind: tuple(keys) for kind, keys in beside.items()})


def dense_names(keys: Iterable[str]) -> dict[str, str]:
    """Name of the matrix for each key: without what wraps the whole model, and without ``.weight``.

    Two keys never get one name: where they would, both stay as they are.

    >>> dense_names(["_orig_mod.h.0.attn.weight", "_orig_mod.h.0.experts.up"])
    {'_orig_mod.h.0.attn.weight': 'h.0.attn', '_orig_mod.h.0.experts.up': 'h.0.experts.up'}
    >>> dense_names(["q.weight", "q"])
    {'q.weight': 'q.weight', 'q': 'q'}
    """
    plain = without_wrappers(keys)
    names = {key: name.removesuffix(".weight") for key, name in plain.items()}
    taken = Counter(names.values())
    return {key: name if taken[name] == 1 else key for key, name in names.items()}


def _no_matrix(key: str, info: TensorInfo) -> str:
    """What kind of tensor it is if it is no matrix; empty if it is one."""
    leaf = key.rpartition(".")[2]
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias" if info.dtype in FLOATS and len(info.shape) < 4 else "buffer"  # GPT-2's mask is called bias
    if len(info.shape) < 2 or leaf in _MAGNITUDES:
        return "vector or scalar"
    return "buffer" if leaf in _BUFFERS or not (info.dtype in FLOATS or is_packed(key, info)) else ""


def _fault(name: str, key: str, info: TensorInfo) -> Refusal | None:
    if fault := name_fault(name):
        return Refusal("OD104", fault, _RENAME)
    if info.dtype not in FLOATS:
        reason = f"It is stored as {info.dtype} (packed): quantised weights are not analysed."
        return Refusal("OD103", reason, _PLAIN)
    if len(info.shape) == 3 and info.shape[0] > _MOST_EXPERTS and not _is_kernel(key):
        reason = f"It has shape {list(info.shape)}: a stack of more than {_MOST_EXPERTS} matrices."
        return Refusal("OD104", reason, "It is left out.")
    if info.count == 0:
        reason = f"It has shape {list(info.shape)}: not gathered before saving, or pruned away."
        return Refusal("OD104", reason, "Gather sharded parameters (ZeRO-3, FSDP) before saving.")
    return None


def _matrices(key: str, info: TensorInfo) -> Iterator[tuple[str, Product]]:
    """The matrices of one tensor, each with what is added to its name."""
    first, rest = info.shape[0], info.shape[1:]
    if len(info.shape) != 3 or _is_kernel(key):
        yield "", weight(key, (first, info.count // first), info.dtype, _flat)
    elif first == 1:
        yield "", weight(key, (rest[0], rest[1]), info.dtype, partial(_part, 0))
    else:
        for index in range(first):
            yield f"[{index}]", weight(key, (rest[0], rest[1]), info.dtype, partial(_part, index))


def _is_kernel(key: str) -> bool:
    """Whether a tensor of three dimensions is the kernel of a convolution, not a stack; the file does not say it."""
    return key.rpartition(".")[2] in _KERNELS and not any(word in key.lower() for word in _EXPERTS)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def _part(index: int, tensor: Tensor) -> Tensor:
    return tensor[index]
