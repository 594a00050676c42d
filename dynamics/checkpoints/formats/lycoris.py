r"""Adapter files that PEFT did not write (kohya, LyCORIS, diffusers, cloneofsimo, xlabs) → their matrices.

The scale is alpha / r with the module's own alpha; without one it is 1, as the libraries that write such files load
them. Names are those of the file: kohya's ``lora_unet_blocks_0_attn_to_q`` cannot be split into a path. The parts of a
module get one name each, whatever a library calls them: ``down`` and ``up`` are LoRA's A and B. Formulas:
``get_weight`` of LyCORIS' modules, ``merge_to`` of kohya's, ``fuse`` of MLX-LM's.

Factorisations other than B A are kept as products of thin factors; the matrix is not formed.

* **Tucker** (LoCon with a middle factor): \(W_{i,(jwh)} = \sum_m U_{im} \sum_n T_{mnwh} V_{nj}\) has rank r: the middle
  factor is multiplied into the right one.
* **LoHa** (Hyeon-Woo et al. 2022): \((B_1 A_1) \circ (B_2 A_2)\) is the product of row-wise and column-wise Khatri–Rao
  products, of rank at most \(r_1 r_2\).
* **LoKr** (LyCORIS): \(C \otimes D = (L_C \otimes L_D)(R_C \otimes R_D)\) where \(C = L_C R_C\), \(D = L_D R_D\); a
  factor that is stored whole is a product with an identity on its shorter side. The rank is at most that of a full
  matrix.

Kernels are flattened to (out, in·kernel) as everywhere. All in float64: products of two stored numbers of float32 or
coarser are exact there.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from dynamics.checkpoints.files import TensorInfo, WeightFile, Weights
from dynamics.checkpoints.formats.diffusers import read_components
from dynamics.checkpoints.formats.peft_config import AdapterFile
from dynamics.checkpoints.matrices import (
    FLOATS,
    FileContent,
    Refusal,
    Remark,
    StoredMatrix,
    TensorRef,
    coarser,
)
from dynamics.checkpoints.names import matrix_names, name_fault, natural_order, shown
from dynamics.checkpoints.trajectory import MatrixShape
from probes.low_rank import LowRankMatrix

_SAVE = "Save the adapter again."
_NO_ALPHA = "The file has no alpha: the scale is 1, as libraries load such a file."
_DERIVED = (
    "The analysed factors are computed in float64 from the stored ones (Tucker, LoHa, LoKr): the same matrix, of "
    "the rank that they have together; the rounding of the stored numbers is not predicted."
)

#: Changes of parameters that are no matrices, by the last word of their keys (ComfyUI, LyCORIS).
_CHANGES = {
    "diff": "changes of norms and other vectors",
    "diff_b": "changes of biases",
    "b_norm": "changes of biases",
    "w_norm": "changes of norms and other vectors",
    "diff_m": "changes of modulation tables",
}

#: The scale of a module, as a number or by its rank; ``None`` if the module's own alpha counts.
Scale = float | Callable[[int], float | Refusal | None] | None
Keys = Mapping[str, str]
Tensors = Mapping[str, TensorInfo]
Factors = tuple[Tensor, Tensor]


def read_lycoris(file: AdapterFile, scale: Scale = None, *, is_transposed: bool = False) -> FileContent:
    """Return the matrices of an adapter file, what is refused, and the other tensors.

    Args:
        file: The file.
        scale: The scale of every module (MLX, torchtune); by default that of diffusers' metadata, or alpha / r,
            module by module.
        is_transposed: Whether A is stored as (in, rank) and B as (rank, out), whatever they are called (MLX).

    Raises:
        UnreadableFile: ``OD102`` if diffusers' metadata are there and cannot be used.
    """
    weights = file.weights
    metadata = weights.metadata if isinstance(weights, WeightFile) else {}
    components = read_components(metadata) if scale is None else None
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    beside: dict[str, list[str]] = defaultdict(list)
    doubled: set[str] = set()
    for key, info in weights.tensors.items():
        if (parsed := parse_foreign(key, is_transposed=is_transposed)) is None or _is_vector(parsed[1], info):
            beside[_kind(key)].append(key)
        elif parsed[1] in modules[parsed[0]]:
            doubled.add(parsed[0])
        else:
            modules[parsed[0]][parsed[1]] = key
    names = matrix_names(modules)
    matrices: dict[str, StoredMatrix | Refusal] = {}
    is_derived = False
    for stem in sorted(modules, key=lambda stem: natural_order(names[stem])):
        name = names[stem]
        form = _form(modules[stem], weights.tensors)
        if fault := name_fault(name):
            matrices[shown(name)] = Refusal("OD104", fault, "Save the adapter again with plain names.")
        elif stem in doubled:
            matrices[name] = Refusal("OD104", "One of its parts occurs twice.", _SAVE)
        elif isinstance(form, Refusal):
            matrices[name] = form
        else:
            factor = scale if components is None else partial(components.scale_of, stem)
            matrices[name] = _matrix(weights, modules[stem], form, factor)
            is_derived |= form.is_derived
    content = FileContent(matrices, {kind: tuple(keys) for kind, keys in beside.items()})
    remarks = [Remark("OD121", _DERIVED)] if is_derived else []
    has_scale = scale is not None or components is not None
    if content.readable and not has_scale and not any("alpha" in keys for keys in modules.values()):
        remarks.append(Remark("OD121", _NO_ALPHA))
    ranks = {name: matrix.shape.rank for name, matrix in content.readable.items()}
    return replace(content, ranks=ranks | dict.fromkeys(content.refused, 0), remarks=tuple(remarks))


def _is_vector(part: str, info: TensorInfo) -> bool:
    return part == "diff" and len(info.shape) < 2


def _kind(key: str) -> str:
    """Return what a tensor is that belongs to no product."""
    return _CHANGES.get(key.rpartition(".")[2], "saved weights")


def _form(keys: Keys, tensors: Tensors) -> Factorisation | Refusal:
    """Return how a module's update is written, by the parts that are there."""
    parts = set(keys) - {"alpha"}
    if "dora" in parts:
        reason = "It has a DoRA magnitude: the update rescales the base weight, in a way that differs by library."
        return Refusal("OD105", reason, "Only DoRA as PEFT writes it is analysed, with its base (--base).")
    packed = [part for part in sorted(parts) if tensors[keys[part]].dtype not in FLOATS]
    if packed:
        dtype = tensors[keys[packed[0]]].dtype
        reason = f"Its {packed[0]} is stored as {dtype}: packed or quantised factors are not analysed."
        return Refusal("OD103", reason, "Save the adapter in float32, float16 or bfloat16.")
    if (form := form_of(parts)) is not None:
        return form
    listing = ", ".join(sorted(parts)) or "alpha alone"
    if len(parts & {"down", "up", "mlx_a", "mlx_b"}) == 1:
        return Refusal("OD104", f"It has only {listing}, one factor of two.", _SAVE)
    return Refusal("OD103", f"It has {listing}: no factorisation that is analysed.", _SAVE)


def _matrix(weights: Weights, keys: Keys, form: Factorisation, scale: Scale) -> StoredMatrix | Refusal:
    tensors = weights.tensors
    sources = {part: TensorRef(weights.path, key) for part, key in keys.items() if part != "alpha"}
    shapes = {part: tensors[keys[part]].shape for part in sources}
    listing = ", ".join(f"{part} {list(shape)}" for part, shape in shapes.items())
    if any(len(shape) < 2 or math.prod(shape) == 0 for shape in shapes.values()):
        return Refusal("OD104", f"Its factors have shapes {listing}: no matrices.", _SAVE)
    try:
        out, in_, rank, divisor = form.shape(shapes)
    except (ValueError, IndexError):
        return Refusal("OD104", f"Its factors do not multiply: {listing}.", _SAVE)
    factor = scale(divisor) if callable(scale) else scale
    if isinstance(factor, Refusal):
        return factor
    shape = MatrixShape(out, in_, rank, coarser(*(tensors[keys[part]].dtype for part in sources)))
    if factor is None and divisor and "alpha" in keys:
        if tensors[keys["alpha"]].count != 1:
            return Refusal("OD104", f"Its alpha has shape {list(tensors[keys['alpha']].shape)}, not one number.", _SAVE)
        sources["alpha"] = TensorRef(weights.path, keys["alpha"])
    if form is DENSE:
        return StoredMatrix(shape, {"tensor": sources["diff"]}, as_matrix)
    return StoredMatrix(shape, sources, partial(_low_rank, form, divisor, 1.0 if factor is None else factor))


def _low_rank(
    form: Factorisation, divisor: int, scale: float, alpha: Tensor | None = None, **parts: Tensor
) -> LowRankMatrix:
    left, right = form.factors(parts)
    if alpha is not None:
        scale = float(alpha.double().flatten()[0]) / divisor
    return LowRankMatrix(left, right, scale)


# --- keys -------------------------------------------------------------------------------------------------------------

_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")
_HADA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")

#: End of the key → part. The longest one that fits counts.
_ENDS: Mapping[str, str] = {
    # kohya, LyCORIS, and what diffusers takes from them
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".alpha": "alpha", ".scalar": "scalar", ".diff": "diff", ".dora_scale": "dora",
    **{f".lokr_{part}": f"lokr_{part}" for part in _LOKR},
    **{f".hada_{part}": f"hada_{part}" for part in _HADA},
    # diffusers, old and new, ai-toolkit
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_magnitude_vector": "dora", ".lora_magnitude_vector.weight": "dora",
    # cloneofsimo
    ":down": "down", ":up": "up",
    # MLX
    ".lora_a": "mlx_a", ".lora_b": "mlx_b", ".m": "dora", ".A": "mlx_a", ".B": "mlx_b",
    # torchtune
    ".lora_a.weight": "down", ".lora_b.weight": "up", ".magnitude": "dora",
}  # fmt: skip
_LONGEST_FIRST = sorted(_ENDS, key=len, reverse=True)
#: xlabs: two adapters on one processor, whose numbers belong to the module's name.
_XLABS = re.compile(r"(.+_lora\d)\.(down|up)\.weight", re.DOTALL)


#: Parts as (in, rank) and (rank, out).
_TRANSPOSED = {"down": "mlx_a", "up": "mlx_b"}


def parse_foreign(key: str, *, is_transposed: bool = False) -> tuple[str, str] | None:
    """Return module and part of a key; ``None`` if it is no part of an adapter.

    Args:
        key: The key.
        is_transposed: Whether the file stores A as (in, rank) and B as (rank, out).

    >>> parse_foreign("lora_unet_blocks_0_q.lora_down.weight")
    ('lora_unet_blocks_0_q', 'down')
    >>> parse_foreign("double_blocks.0.processor.qkv_lora2.up.weight")
    ('double_blocks.0.processor.qkv_lora2', 'up')
    >>> parse_foreign("unet:12:down")
    ('unet:12', 'down')
    >>> parse_foreign("norm.weight") is None
    True
    """
    if match := _XLABS.fullmatch(key):
        return match[1], match[2]
    end = next((end for end in _LONGEST_FIRST if key.endswith(end) and key != end), None)
    if end is None:
        return None
    part = _ENDS[end]
    return key.removesuffix(end), _TRANSPOSED.get(part, part) if is_transposed else part


# --- forms ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Factorisation:
    """One way of writing an update: how the factors are built of its parts.

    Args:
        shape: From the stored shapes of the parts to out, in, rank of the factors, and the r that alpha is divided by
            (0: alpha does not count). Raises ``ValueError`` if they do not fit.
        factors: From the stored tensors of the parts to the factors.
        is_derived: Whether the factors are other numbers than those stored.
    """

    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, int, int, int]]
    factors: Callable[[Mapping[str, Tensor]], Factors]
    is_derived: bool = False


def form_of(parts: Collection[str]) -> Factorisation | None:
    """Return the form that has these parts; ``None`` if it is unknown.

    >>> form_of({"down", "up"}) is None, form_of({"down"}) is None
    (False, True)
    """
    if _is_lokr(parts):
        return Factorisation(_lokr_shape, _lokr_factors, is_derived=True)
    return _FORMS.get(frozenset(parts))


def _require(condition: bool) -> None:
    if not condition:
        raise ValueError


def _size(shape: tuple[int, ...]) -> int:
    """Return the number of columns of a tensor flattened to a matrix."""
    return math.prod(shape[1:])


def _plain_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    down, up = parts["down"], parts["up"]
    _require(up[1] == down[0] and all(size == 1 for size in up[2:]))
    return up[0], _size(down), down[0], down[0]


def _plain(parts: Mapping[str, Tensor]) -> Factors:
    return parts["up"].flatten(1), parts["down"].flatten(1)


def _tucker_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    down, up, mid = parts["down"], parts["up"], parts["mid"]
    _require(up[1] == mid[0] and down[0] == mid[1] and all(size == 1 for size in (*up[2:], *down[2:])))
    return up[0], down[1] * math.prod(mid[2:]), mid[0], down[0]


def _tucker(parts: Mapping[str, Tensor]) -> Factors:
    return tucker(parts["up"].flatten(1), parts["mid"], parts["down"].flatten(1))


def _mlx_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    a, b = parts["mlx_a"], parts["mlx_b"]
    _require(len(a) == len(b) == 2 and a[1] == b[0])  # three dimensions: a mixture's experts, whose layout changed
    return b[1], a[0], b[0], 0


def _mlx(parts: Mapping[str, Tensor]) -> Factors:
    return parts["mlx_b"].mT, parts["mlx_a"].mT


def _loha_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    b1, a1, b2, a2 = (parts[f"hada_{part}"] for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    _require(b1[1] == a1[0] and b2[1] == a2[0] and b1[0] == b2[0] and _size(a1) == _size(a2))
    _require(len(b1) == len(b2) == 2)
    return b1[0], _size(a1), a1[0] * a2[0], a1[0]


def _loha(parts: Mapping[str, Tensor]) -> Factors:
    b1, a1, b2, a2 = (parts[f"hada_{part}"].flatten(1) for part in ("w1_a", "w1_b", "w2_a", "w2_b"))
    return hadamard((b1, a1), (b2, a2))


def _is_lokr(parts: Collection[str]) -> bool:
    """Return whether the parts are LoKr's sides: each whole, a product, or (the second) a Tucker decomposition."""
    first = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    second = ({"lokr_w2"}, {"lokr_w2_a", "lokr_w2_b"}, {"lokr_w2_a", "lokr_w2_b", "lokr_t2"})
    return any(set(parts) == left | right for left in first for right in second)


def _lokr_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    (m, n, rank1, divisor1), (p, q, rank2, divisor2) = (_side_shape(parts, side) for side in ("w1", "w2"))
    return m * p, n * q, rank1 * rank2, divisor2 or divisor1


def _side_shape(parts: Mapping[str, tuple[int, ...]], side: str) -> tuple[int, int, int, int]:
    """Return rows, columns and rank of one side, and the r that alpha is divided by."""
    if f"lokr_{side}" in parts:
        shape = parts[f"lokr_{side}"]
        _require(side == "w2" or len(shape) == 2)
        return shape[0], _size(shape), min(shape[0], _size(shape)), 0
    a, b = parts[f"lokr_{side}_a"], parts[f"lokr_{side}_b"]
    if side == "w2" and "lokr_t2" in parts:
        middle = parts["lokr_t2"]
        _require(len(a) == len(b) == 2 and a[0] == middle[0] and b[0] == middle[1])
        return a[1], b[1] * math.prod(middle[2:]), a[0], b[0]
    _require(len(a) == 2 and a[1] == b[0] and (side == "w2" or len(b) == 2))
    return a[0], _size(b), b[0], b[0]


def _lokr_factors(parts: Mapping[str, Tensor]) -> Factors:
    return kronecker(_side(parts, "w1"), _side(parts, "w2"))


def _side(parts: Mapping[str, Tensor], side: str) -> Factors:
    if f"lokr_{side}" in parts:
        return as_product(parts[f"lokr_{side}"].flatten(1))
    a, b = parts[f"lokr_{side}_a"], parts[f"lokr_{side}_b"]
    if side == "w2" and "lokr_t2" in parts:
        return tucker(a.mT, parts["lokr_t2"], b)
    return a, b.flatten(1)


def as_matrix(tensor: Tensor) -> Tensor:
    """Return the change of a weight as the matrix ``(out, in)`` that dense weights are read as."""
    return tensor[0] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor.flatten(1)


def _dense_shape(parts: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int, int]:
    shape = parts["diff"]
    if len(shape) == 3 and shape[0] == 1:
        return shape[1], shape[2], 0, 0
    return shape[0], _size(shape), 0, 0


def _no_factors(parts: Mapping[str, Tensor]) -> Factors:
    raise AssertionError("a dense change is read as it is")


#: The change of a weight, stored whole (ComfyUI's and LyCORIS' ``diff``): no factors, and alpha does not count.
DENSE = Factorisation(_dense_shape, _no_factors)

#: Parts → form. LoKr's parts come in several combinations.
_FORMS: Mapping[frozenset[str], Factorisation] = {
    frozenset({"diff"}): DENSE,
    frozenset({"down", "up"}): Factorisation(_plain_shape, _plain),
    frozenset({"down", "mid", "up"}): Factorisation(_tucker_shape, _tucker, is_derived=True),
    frozenset({"mlx_a", "mlx_b"}): Factorisation(_mlx_shape, _mlx),
    frozenset(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b")): Factorisation(
        _loha_shape, _loha, is_derived=True
    ),
}


# --- factors ----------------------------------------------------------------------------------------------------------


def tucker(
    up: Float[Tensor, "out r *one"], middle: Float[Tensor, "r s *kernel"], down: Float[Tensor, "s in *one"]
) -> Factors:
    """Return the factors of a Tucker decomposition: ``(out, r)`` and ``(r, in·kernel)``.

    >>> left, right = tucker(torch.ones(5, 2, 1, 1), torch.ones(2, 3, 3, 3), torch.ones(3, 4, 1, 1))
    >>> left.shape, right.shape
    (torch.Size([5, 2]), torch.Size([2, 36]))
    """
    right = torch.einsum("mn...,nj->mj...", middle.double(), down.double().flatten(1))
    return up.double().flatten(1), right.flatten(1)


def hadamard(left: Factors, right: Factors) -> Factors:
    """Return the factors of the entrywise product of two products: ``(out, r₁r₂)`` and ``(r₁r₂, in)``.

    >>> ones = torch.ones(3, 2), torch.ones(2, 4)
    >>> columns, rows = hadamard(ones, ones)
    >>> torch.equal(columns @ rows, torch.full((3, 4), 4.0, dtype=torch.float64))
    True
    """
    (b1, a1), (b2, a2) = ([factor.double() for factor in factors] for factors in (left, right))
    columns = (b1[:, :, None] * b2[:, None, :]).flatten(1)
    rows = (a1[:, None, :] * a2[None, :, :]).flatten(0, 1)
    return columns, rows


def kronecker(left: Factors, right: Factors) -> Factors:
    """Return the factors of the Kronecker product of two products.

    >>> c, d = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
    >>> columns, rows = kronecker(as_product(c), as_product(d))
    >>> columns.shape, torch.equal(columns @ rows, torch.kron(c, d).double())
    (torch.Size([8, 4]), True)
    """
    columns, rows = ([factor.double().contiguous() for factor in pair] for pair in zip(left, right, strict=True))
    return torch.kron(*columns), torch.kron(*rows)  # torch.kron refuses some strides


def as_product(matrix: Float[Tensor, "out in"]) -> Factors:
    """Return a whole matrix as a product with the identity on its shorter side.

    >>> [tuple(factor.shape) for factor in as_product(torch.ones(5, 3))]
    [(5, 3), (3, 3)]
    """
    identity = torch.eye(min(matrix.shape), dtype=matrix.dtype)
    return (matrix, identity) if matrix.shape[0] >= matrix.shape[1] else (identity, matrix)
