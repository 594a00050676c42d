"""The weights of a whole model → its matrices: what is a matrix, what it is called, what is listed beside.

A weight of two dimensions is a matrix as it is stored: (out, in) for ``nn.Linear``, (in, out) for GPT-2's Conv1D,
(vocabulary, width) for an embedding; singular values do not care. A convolution's kernel is flattened to
(out, in·kernel), the matrix that acts on unfolded patches (im2col), whose spectrum is not that of the convolution
operator. A stack of experts is one matrix each, ``…experts.gate_up_proj[e]``. Projections that a model keeps in one
weight (``qkv_proj``, ``c_attn``) stay one matrix under that name. A tied weight occurs once, under its first name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor

from dynamics.checkpoints.names import name_fault, natural_order, shown, without_wrappers
from dynamics.checkpoints.products import FLOATS, Product, weight
from dynamics.checkpoints.variants import Refusal
from dynamics.checkpoints.weight_files import TensorInfo, Weights

#: Names that modules give the kernel of a convolution; a stack of experts is called after what it does.
_KERNELS = ("weight", "weight_v", "original1")
_EXPERTS = ("expert", "moe")
_MOST_EXPERTS = 4096
#: Input embeddings that an output layer is tied to, by the end of their names.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "shared.weight", "embed_in.weight")
_HEADS = ("lm_head.weight", "embed_out.weight")
_RENAME = "Save the model again with plain names."
_PLAIN = "Save the weights in float32, float16 or bfloat16."


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


def read_dense(weights: Weights, *, tied_embeddings: bool = False) -> DenseWeights:
    """Sorts the tensors of a whole model into matrices, refusals and the rest.

    Args:
        weights: Their header.
        tied_embeddings: Whether the model's configuration says that its output layer is its input embedding.
    """
    tied = {**weights.tied, **(_tied_head(weights.tensors) if tied_embeddings else {})}
    kept = {key: info for key, info in weights.tensors.items() if key not in tied}
    return sort_tensors({name: (key, kept[key]) for key, name in dense_names(kept).items()}, tied)


def sort_tensors(named: Mapping[str, tuple[str, TensorInfo]], tied: Iterable[str] = ()) -> DenseWeights:
    """Sorts named tensors into matrices, refusals and the rest.

    Args:
        named: Name to key and header.
        tied: Keys of further tensors that are the same as one of these.
    """
    products: dict[str, Product] = {}
    refused: dict[str, Refusal] = {}
    beside: dict[str, list[str]] = defaultdict(list)
    for name in sorted(named, key=natural_order):
        key, info = named[name]
        if kind := _no_matrix(key, info):
            beside[kind].append(key)
        elif fault := _fault(name, key, info):
            refused[shown(name)] = fault
        else:
            products |= {f"{name}{suffix}": product for suffix, product in _matrices(key, info)}
    if tied := list(tied):
        beside["tied weight"] += tied
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


def _tied_head(tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """An output layer saved beside the input embedding that it is tied to."""
    embeddings = [key for key in tensors if key.endswith(_EMBEDDINGS)]
    heads = [key for key in tensors if key.endswith(_HEADS)]
    if len(embeddings) != 1:
        return {}
    return {head: embeddings[0] for head in heads if tensors[head].shape == tensors[embeddings[0]].shape}


def _no_matrix(key: str, info: TensorInfo) -> str:
    """What kind of tensor it is if it is no matrix; empty if it is one."""
    leaf = key.rpartition(".")[2]
    if len(info.shape) < 2:
        return "bias" if leaf == "bias" else "vector or scalar"
    if leaf == "bias" or (info.dtype not in FLOATS and leaf not in _KERNELS):
        return "buffer"  # GPT-2's attention mask is called bias
    return ""


def _fault(name: str, key: str, info: TensorInfo) -> Refusal | None:
    if fault := name_fault(name):
        return Refusal("OD104", fault, _RENAME)
    if info.dtype not in FLOATS:
        reason = f"It is stored as {info.dtype}: packed or quantised weights are not analysed."
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


def turned(product: Product) -> Product:
    """The transpose of a dense matrix, as a view."""
    shape = product.shape
    flipped = type(shape)(shape.in_, shape.out, shape.rank, shape.dtype, shape.holds)
    return Product(flipped, partial(_load_turned, product.build))


def _load_turned(build: Callable, load: Callable[[str], Tensor]) -> Tensor:
    return build(load).mT
