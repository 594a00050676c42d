"""Adapter files that PEFT did not write (kohya, LyCORIS, diffusers, cloneofsimo, xlabs, MLX) → their matrices.

The scale is alpha / r with the module's own alpha; where the file has none it is 1, which is how the libraries that
write such files load them. Names are those of the file: kohya's ``lora_unet_blocks_0_attn_to_q`` cannot be told apart
into a path. Formulas: ``get_weight`` of LyCORIS' modules, ``merge_to`` of kohya's, ``fuse`` of MLX-LM's.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from dynamics.checkpoints.files import Loader, TensorInfo, WeightFile, Weights
from dynamics.checkpoints.formats.diffusers import read_components
from dynamics.checkpoints.formats.factorisations import Factors
from dynamics.checkpoints.formats.foreign_forms import DENSE, Form, as_matrix, form_of
from dynamics.checkpoints.formats.foreign_keys import parse_foreign
from dynamics.checkpoints.formats.peft import Adapter
from dynamics.checkpoints.formats.variants import Refusal, Remark
from dynamics.checkpoints.matrices import FLOATS, Product, coarser
from dynamics.checkpoints.names import matrix_names, name_fault, natural_order, shown
from dynamics.checkpoints.trajectory import MatrixShape
from probes.low_rank import LowRankMatrix

_SAVE = "Save the adapter again."
_NO_ALPHA = "The file gives no alpha: the scale is 1, as libraries load such a file."
_DERIVED = (
    "The factors analysed are formed of those that are stored (Tucker, LoHa, LoKr), in float64: the same matrix, of "
    "the rank that these have together; the rounding of their storage is not predicted."
)

#: Changes of parameters that are no matrices, by the last word of their keys (ComfyUI, LyCORIS).
_CHANGES = {
    "diff": "changes of norms and other vectors",
    "diff_b": "changes of biases",
    "b_norm": "changes of biases",
    "w_norm": "changes of norms and other vectors",
    "diff_m": "changes of modulation tables",
}

#: The scale of a module, as it is or by its rank; ``None`` where its own alpha counts.
Scale = float | Callable[[int], float | Refusal | None] | None
Keys = Mapping[str, str]
Tensors = Mapping[str, TensorInfo]


def read_foreign(file: Weights, scale: Scale = None, *, is_transposed: bool = False) -> Adapter:
    """Sorts the keys of a foreign adapter file into matrices, refusals and the rest.

    Args:
        file: The weight file's header.
        scale: The scale of every module (MLX, torchtune); by default it is what diffusers' metadata say, or alpha / r,
            module by module.
        is_transposed: Whether A is stored as (in, rank) and B as (rank, out), whatever they are called (MLX).

    Raises:
        UnreadableFile: ``OD102`` if diffusers' metadata are there and cannot be used.
    """
    metadata = file.metadata if isinstance(file, WeightFile) else {}
    components = read_components(metadata) if scale is None else None
    modules: dict[str, dict[str, str]] = defaultdict(dict)
    beside: dict[str, list[str]] = defaultdict(list)
    doubled: set[str] = set()
    for key, info in file.tensors.items():
        if (parsed := parse_foreign(key, is_transposed=is_transposed)) is None or _is_vector(parsed[1], info):
            beside[_kind(key)].append(key)
        elif parsed[1] in modules[parsed[0]]:
            doubled.add(parsed[0])
        else:
            modules[parsed[0]][parsed[1]] = key
    names = matrix_names(modules)
    products: dict[str, Product] = {}
    refused: dict[str, Refusal] = {}
    derived = False
    for stem in sorted(modules, key=lambda stem: natural_order(names[stem])):
        name = names[stem]
        form = _form(modules[stem], file.tensors)
        if fault := name_fault(name):
            refused[shown(name)] = Refusal("OD104", fault, "Save the adapter again with plain names.")
        elif stem in doubled:
            refused[name] = Refusal("OD104", "One of its parts occurs twice.", _SAVE)
        elif isinstance(form, Refusal):
            refused[name] = form
        else:
            factor = scale if components is None else partial(components.scale_of, stem)
            built = _product(modules[stem], form, file.tensors, factor)
            (refused if isinstance(built, Refusal) else products)[name] = built  # type: ignore[assignment]
            derived |= form.is_derived
    remarks = [Remark("OD121", _DERIVED)] if derived else []
    told = scale is not None or components is not None
    if products and not told and not any("alpha" in keys for keys in modules.values()):
        remarks.append(Remark("OD121", _NO_ALPHA))
    ranks = {name: product.shape.rank for name, product in products.items()}
    ranks |= dict.fromkeys(refused, 0)
    other = {kind: tuple(keys) for kind, keys in beside.items()}
    return Adapter(products, refused, other, None, ranks, tuple(remarks))


def _is_vector(part: str, info: TensorInfo) -> bool:
    return part == "diff" and len(info.shape) < 2


def _kind(key: str) -> str:
    """What a tensor is that belongs to no product."""
    leaf = key.rpartition(".")[2]
    return _CHANGES.get(leaf, "saved weights")


def _form(keys: Keys, tensors: Tensors) -> Form | Refusal:
    """How a module's update is written, by the parts that are there."""
    parts = set(keys) - {"alpha"}
    if "dora" in parts:
        reason = "It has a DoRA magnitude: the update rescales the base weight, in a way that differs by library."
        return Refusal("OD105", reason, "Only DoRA as PEFT writes it is analysed, with its base (--base).")
    odd = [part for part in sorted(parts) if tensors[keys[part]].dtype not in FLOATS]
    if odd:
        stored = f"Its {odd[0]} is stored as {tensors[keys[odd[0]]].dtype}"
        reason = f"{stored}: packed or quantised factors are not analysed."
        return Refusal("OD103", reason, "Save the adapter in float32, float16 or bfloat16.")
    if (form := form_of(parts)) is not None:
        return form
    held = ", ".join(sorted(parts)) or "alpha alone"
    if len(parts & {"down", "up", "mlx_a", "mlx_b"}) == 1:
        return Refusal("OD104", f"It has only {held}, one factor of two.", _SAVE)
    return Refusal("OD103", f"It has {held}: no factorisation that is analysed.", _SAVE)


def _product(keys: Keys, form: Form, tensors: Tensors, scale: Scale) -> Product | Refusal:
    parts = [part for part in keys if part != "alpha"]
    stored = {part: tensors[keys[part]].shape for part in parts}
    if any(len(shape) < 2 or math.prod(shape) == 0 for shape in stored.values()):
        shapes = ", ".join(f"{part} {list(shape)}" for part, shape in stored.items())
        return Refusal("OD104", f"Its factors have shapes {shapes}: no matrices.", _SAVE)
    try:
        out, in_, rank, divisor = form.shape(stored)
    except (ValueError, IndexError):
        shapes = ", ".join(f"{part} {list(shape)}" for part, shape in stored.items())
        return Refusal("OD104", f"Its factors do not multiply: {shapes}.", _SAVE)
    known = scale(divisor) if callable(scale) else scale
    if isinstance(known, Refusal):
        return known
    alpha = keys.get("alpha") if known is None and divisor else None
    if alpha is not None and tensors[alpha].count != 1:
        return Refusal("OD104", f"Its alpha has shape {list(tensors[alpha].shape)}, not one number.", _SAVE)
    dtype = coarser(*(tensors[keys[part]].dtype for part in parts))
    if form is DENSE:
        return Product(MatrixShape(out, in_, 0, dtype), partial(_load_dense, keys["diff"]))
    own = {part: keys[part] for part in parts}
    build = partial(_load, own, form.factors, alpha, divisor, 1.0 if known is None else known)
    return Product(MatrixShape(out, in_, rank, dtype), build)


def _load_dense(key: str, load: Loader) -> Tensor:
    return as_matrix(load(key))


def _load(
    keys: Keys,
    factors: Callable[[Mapping[str, Tensor]], Factors],
    alpha: str | None,
    divisor: int,
    scale: float,
    load: Loader,
) -> LowRankMatrix:
    left, right = factors({part: load(key) for part, key in keys.items()})
    if alpha is not None:
        scale = float(load(alpha).double().flatten()[0]) / divisor
    return LowRankMatrix(left, right, scale)
