"""Which tensors of a model are quantised weights, and which only belong to them.

Quantised weights come as integers or 8-bit floats beside scales, zero points, codebooks and indices of their own.
A name alone does not decide: ``scale`` may be a trained parameter. A tensor belongs to a quantised weight if it lies in
the module of one, or is called like a weight beside it (``q_proj.weight`` and ``q_proj.weight_scale``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from dynamics.checkpoints.files import TensorInfo
from dynamics.checkpoints.matrices import FLOATS

#: What the weight of a module is called once it is quantised: by bitsandbytes, fp8 and torchao (``weight``), GPTQ and
#: AWQ, compressed-tensors, quanto, HQQ, AQLM, QuIP#, ExLlamaV2, VPTQ.
_PACKED = frozenset(
    ("weight", "qweight", "weight_packed", "packed_weight", "_data", "_weight_qdata", "W_q", "codes", "Qidxs",
     "q_weight", "indices")
)  # fmt: skip
#: Endings of a parameter that is quantised by itself: MXFP4 of gpt-oss (``gate_up_proj_blocks``).
_PACKED_ENDING = re.compile(r"(?P<parameter>.+)_(blocks|packed|qdata|quantized)")
#: What is called like this beside a weight is its scale, zero point or order of columns.
_COMPANION = re.compile(
    r"(?P<weight>.*?)[._]?("
    r"scales?(_inv|_inverse|_[0-9]|_max)?|global_scale|zero_points?|qzeros|zeros?|g_idx|absmax|nested_absmax|scb|amax|"
    r"quant_map|nested_quant_map|quant_state.*|weight_format|input_scale|output_scale|input_global_scale|"
    r"input_zero_point|output_zero_point|k_scale|v_scale|q_scale)",
    re.IGNORECASE,
)
#: Integers that are no weights: 64-bit ones and booleans everywhere, others by the end of their name.
_INDICES = ("I64", "U64", "BOOL", "C64")
_INDEX = re.compile(r"(.*_)?(index|idx|ids|mask|bias|positions?|perm)")


def is_packed(key: str, info: TensorInfo) -> bool:
    """Whether a tensor is a quantised weight: numbers that are no floats of 16 bits or more.

    >>> is_packed("q_proj.qweight", TensorInfo("I32", (32, 256)))
    True
    >>> is_packed("attn.relative_position_index", TensorInfo("I64", (49, 49)))
    False
    """
    leaf = key.rpartition(".")[2]
    if info.dtype in FLOATS or info.dtype in _INDICES or _COMPANION.fullmatch(leaf):
        return False
    return len(info.shape) >= 2 and (leaf in _PACKED or not _INDEX.fullmatch(leaf))


def packed_name(key: str) -> str:
    """Name of the matrix that a quantised weight holds.

    >>> packed_name("layers.0.q_proj.qweight"), packed_name("mlp.experts.gate_up_proj_blocks")
    ('layers.0.q_proj', 'mlp.experts.gate_up_proj')
    """
    module, _, leaf = key.rpartition(".")
    if module and leaf in _PACKED:
        return module.removesuffix(".weight") if leaf == "_data" else module
    match = _PACKED_ENDING.fullmatch(key)
    return match["parameter"] if match else key


def companions(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Keys of scales, zero points, codebooks and the like: what only serves to unpack another tensor.

    >>> shape = TensorInfo("F32", (2, 2))
    >>> sorted(companions({"q.weight": shape, "q.weight_scale_inv": shape, "norm.scale": shape}))
    ['q.weight_scale_inv']
    """
    packed = {packed_name(key) for key, info in tensors.items() if is_packed(key, info)}
    return frozenset(key for key in tensors if _is_companion(key, tensors, packed))


def _is_companion(key: str, tensors: Mapping[str, TensorInfo], packed: Iterable[str]) -> bool:
    if is_packed(key, tensors[key]):
        return False
    module, _, leaf = key.rpartition(".")
    if (module in packed or module.removesuffix(".weight") in packed) and leaf not in ("weight", "bias"):
        return True
    match = _COMPANION.fullmatch(leaf)
    if match is None:
        return False
    # `weight_scale` beside `weight`, `scales` beside `qweight`, `gate_up_proj_scales` beside `gate_up_proj_blocks`,
    # and `weight.absmax`, whose module is the weight's own key.
    stem = f"{module}.{match['weight']}" if match["weight"] else module
    return any(name in tensors or name in packed for name in (stem, f"{stem}.weight", module, f"{module}.weight"))
