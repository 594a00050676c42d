"""Whole models: which files of a folder hold one, which of its tensors are matrices, and what they are called.

**Matrices.** A weight of two dimensions is a matrix as it is stored: (out, in) for ``nn.Linear``, (in, out) for GPT-2's
Conv1D, (vocabulary, width) for an embedding; the orientation does not change singular values. A convolution's kernel is
flattened to (out, in·kernel), the matrix that acts on unfolded patches (im2col), whose spectrum is not that of the
convolution operator. Each expert of a stack is one matrix, ``…experts.gate_up_proj[e]``. Projections that a model keeps
in one weight (``qkv_proj``, ``c_attn``) stay one matrix. Tied weights are found in ``ties``.

**Quantised weights** come as integers or 8-bit floats beside scales, zero points, codebooks and indices of their own. A
name alone does not decide: ``scale`` may be a trained parameter. A tensor belongs to a quantised weight if it lies in
the module of one, or is called like a weight beside it (``q_proj.weight`` and ``q_proj.weight_scale``).

**Shards.** ``model.safetensors.index.json`` beside ``model-00001-of-00002.safetensors``, …. Anybody can write an index:
it may name only files beside it, and what it says of them must be what they hold.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Loader, TensorInfo, WeightFile, Weights, read_json, read_text, read_weight_file
from dynamics.checkpoints.formats.distributed import METADATA, read_distributed
from dynamics.checkpoints.matrices import FLOATS, FileContent, Refusal, StoredMatrix, weight
from dynamics.checkpoints.names import name_fault, natural_order, shown, without_wrappers
from dynamics.text import first_line, some

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
#: What to do about a base whose weights are quantised.
UNPACKED = (
    "Pass the 16-bit original of the base: save it dequantised (model.dequantize()), or take the unquantised model."
)


def read_dense(weights: Weights) -> FileContent:
    """Return the matrices of a whole model, what is refused, and the other tensors."""
    return sort_tensors(weights, dense_names(weights.tensors))


def sort_tensors(weights: Weights, names: Mapping[str, str]) -> FileContent:
    """Sort some tensors of a file into matrices, refusals and the rest.

    Args:
        weights: The file.
        names: Key of each tensor to its name.
    """
    matrices: dict[str, StoredMatrix | Refusal] = {}
    beside: dict[str, list[str]] = defaultdict(list)
    scales = companions({key: weights.tensors[key] for key in names})
    for key, name in sorted(names.items(), key=lambda item: natural_order(item[1])):
        info = weights.tensors[key]
        if kind := "scale of a quantised weight" if key in scales else _no_matrix(key, info):
            beside[kind].append(key)
        elif refusal := _refusal(name, key, info):
            packed = packed_name(name) if is_packed(key, info) else name
            matrices[shown(name if isinstance(matrices.get(packed), StoredMatrix) else packed)] = refusal
        else:
            matrices |= {f"{name}{suffix}": matrix for suffix, matrix in _matrices(weights.path, key, info)}
    return FileContent(matrices, {kind: tuple(keys) for kind, keys in beside.items()})


def dense_names(keys: Iterable[str]) -> dict[str, str]:
    """Return the name of the matrix for each key: without wrappers around the whole model, and without ``.weight``.

    Two keys never get one name: where they would, both stay as they are.

    >>> dense_names(["_orig_mod.h.0.attn.weight", "_orig_mod.h.0.experts.up"])
    {'_orig_mod.h.0.attn.weight': 'h.0.attn', '_orig_mod.h.0.experts.up': 'h.0.experts.up'}
    >>> dense_names(["q.weight", "q"])
    {'q.weight': 'q.weight', 'q': 'q'}
    """
    plain = without_wrappers(keys)
    names = {key: name.removesuffix(".weight") for key, name in plain.items()}
    counts = Counter(names.values())
    return {key: name if counts[name] == 1 else key for key, name in names.items()}


def _no_matrix(key: str, info: TensorInfo) -> str:
    """Return what kind of tensor it is if it is no matrix; ``""`` if it is one."""
    leaf = key.rpartition(".")[2]
    if leaf == "bias" or leaf.endswith("_bias"):
        return "bias" if info.dtype in FLOATS and len(info.shape) < 4 else "buffer"  # GPT-2's mask is called bias
    if len(info.shape) < 2 or leaf in _MAGNITUDES:
        return "vector or scalar"
    return "buffer" if leaf in _BUFFERS or not (info.dtype in FLOATS or is_packed(key, info)) else ""


def _refusal(name: str, key: str, info: TensorInfo) -> Refusal | None:
    if fault := name_fault(name):
        return Refusal("OD104", fault, _RENAME)
    if info.dtype not in FLOATS:
        reason = f"Weights stored as {info.dtype} (packed) are quantised, and not analysed."
        return Refusal("OD103", reason, _PLAIN)
    if len(info.shape) == 3 and info.shape[0] > _MOST_EXPERTS and not _is_kernel(key):
        reason = f"A tensor of shape {list(info.shape)} is a stack of more than {_MOST_EXPERTS} matrices."
        return Refusal("OD104", reason, "It is left out.")
    if info.count == 0:
        reason = f"A tensor of shape {list(info.shape)} was not gathered before saving, or is pruned away."
        return Refusal("OD104", reason, "Gather sharded parameters (ZeRO-3, FSDP) before saving.")
    return None


def _matrices(file: Path, key: str, info: TensorInfo) -> Iterator[tuple[str, StoredMatrix]]:
    """Yield the matrices of one tensor, each with what is added to its name."""
    first, rest = info.shape[0], info.shape[1:]
    if len(info.shape) != 3 or _is_kernel(key):
        yield "", weight(file, key, (first, info.count // first), info.dtype, _flat)
    elif first == 1:
        yield "", weight(file, key, (rest[0], rest[1]), info.dtype, partial(_part, 0))
    else:
        for index in range(first):
            yield f"[{index}]", weight(file, key, (rest[0], rest[1]), info.dtype, partial(_part, index))


def _is_kernel(key: str) -> bool:
    """Return whether a tensor of three dimensions is a convolution's kernel, not a stack; the file does not say."""
    return key.rpartition(".")[2] in _KERNELS and not any(word in key.lower() for word in _EXPERTS)


def _flat(tensor: Tensor) -> Tensor:
    return tensor.flatten(1)


def _part(index: int, tensor: Tensor) -> Tensor:
    return tensor[index]


# --- quantised weights ------------------------------------------------------------------------------------------------

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
    """Return whether a tensor is a quantised weight: numbers that are no floats of 16 bits or more.

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
    """Return the name of the matrix that a quantised weight holds.

    >>> packed_name("layers.0.q_proj.qweight"), packed_name("mlp.experts.gate_up_proj_blocks")
    ('layers.0.q_proj', 'mlp.experts.gate_up_proj')
    """
    module, _, leaf = key.rpartition(".")
    if module and leaf in _PACKED:
        return module.removesuffix(".weight") if leaf == "_data" else module
    match = _PACKED_ENDING.fullmatch(key)
    return match["parameter"] if match else key


def companions(tensors: Mapping[str, TensorInfo]) -> frozenset[str]:
    """Return the keys of tensors that only serve to unpack another one: scales, zero points, codebooks and the like.

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


# --- shards -----------------------------------------------------------------------------------------------------------

_SUFFIXES = (".safetensors", ".bin")
#: The largest models have some hundred shards.
_MOST_SHARDS = 10_000
_AGAIN = "Save or copy the checkpoint again."


@dataclass(frozen=True)
class ShardedWeights:
    """The shards of one index as one set of tensors, not yet opened.

    Args:
        path: The index.
        parts: The shards.
        tensors: Key to dtype and shape, shard by shard.
        shard_of: Key to the position in ``parts`` of the shard that holds it.
        tied: Key to the first key that has the same tensor in the same memory (``.bin``).
    """

    path: Path
    parts: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorInfo]
    shard_of: Mapping[str, int]
    tied: Mapping[str, str] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Size of all shards together."""
        return sum(part.bytes for part in self.parts)

    @property
    def header_sha256(self) -> str:
        """Hash of the shards' hashes."""
        return hashlib.sha256("".join(part.header_sha256 for part in self.parts).encode()).hexdigest()

    @contextmanager
    def open(self) -> Iterator[Loader]:
        """Map each shard when the first of its tensors is asked for.

        Raises:
            UnreadableFile: By the loader, if a shard has gone or changed since its header was read.
        """
        with ExitStack() as stack:
            loaders: dict[int, Loader] = {}
            opening = Lock()  # matrices are read by several threads

            def load(key: str) -> Tensor:
                shard = self.shard_of[key]
                with opening:
                    if shard not in loaders:
                        loaders[shard] = stack.enter_context(self.parts[shard].open())
                return loaders[shard](key)

            try:
                yield load
            finally:
                loaders.clear()


def read_sharded(index: Path) -> ShardedWeights:
    """Read an index and the headers of its shards.

    Raises:
        UnreadableFile: If the index is invalid, names a file that is not beside it, or does not agree with the shards;
            if a shard is missing or unreadable; if two shards hold the same tensor.
    """
    shard_names = _weight_map(index)
    shards = sorted(set(shard_names.values()), key=natural_order)
    if len(shards) > _MOST_SHARDS:
        raise UnreadableFile("OD101", f"It names {len(shards)} shards; expected at most {_MOST_SHARDS}.", _AGAIN)
    missing = [shown(shard) for shard in shards if not (index.parent / shard).exists()]
    if missing:
        count = "a shard that is" if len(missing) == 1 else f"{len(missing)} shards that are"
        remedy = "Copy all shards of the checkpoint beside the index."
        raise UnreadableFile("OD101", f"It names {count} not there: {some(missing)}.", remedy)
    parts = tuple(_shard(index.parent / shard) for shard in shards)
    tensors = {key: info for part in parts for key, info in part.tensors.items()}
    tied = {key: first for part in parts for key, first in part.tied.items()}
    return ShardedWeights(index, parts, tensors, _shard_of_each(shard_names, shards, parts), tied)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(read_text(index, "OD101"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile("OD101", f"It is not a valid JSON index: {first_line(error)}.", _AGAIN) from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(shard, str) for shard in names.values()):
        raise UnreadableFile("OD101", "It has no weight_map of tensors to files.", _AGAIN)
    for shard in dict.fromkeys(names.values()):
        # A plain name on every system: neither a separator nor a drive, and nothing that means a folder.
        if not shard.endswith(_SUFFIXES) or any(sign in shard for sign in "/\\:\0") or shard.startswith("."):
            problem = f"It names {shown(shard)!r}, which is not the name of a weight file beside it."
            raise UnreadableFile("OD101", problem, "Nothing outside the checkpoint's folder is read. Check the index.")
    return names


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        ((twice, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"{shown(twice)!r} occurs twice")
    return entries


def _shard(path: Path) -> WeightFile:
    try:
        return read_weight_file(path)
    except UnreadableFile as error:
        raise UnreadableFile(error.code, f"Its shard {shown(path.name)}: {error.problem}", error.remedy) from error


def _shard_of_each(shard_names: Mapping[str, str], shards: list[str], parts: tuple[WeightFile, ...]) -> dict[str, int]:
    shard_of: dict[str, int] = {}
    for position, part in enumerate(parts):
        for key in part.tensors:
            if key in shard_of:
                both = f"{shown(shards[shard_of[key]])} and {shown(shards[position])}"
                raise UnreadableFile("OD101", f"The tensor {shown(key)!r} is in two shards, {both}.", _AGAIN)
            shard_of[key] = position
    for key, shard in shard_names.items():
        if key not in shard_of or shards[shard_of[key]] != shard:
            problem = f"It places the tensor {shown(key)!r} in {shown(shard)}, which does not hold it."
            raise UnreadableFile("OD101", problem, _AGAIN)
    return shard_of


# --- files of a folder ------------------------------------------------------------------------------------------------

_NAMES = ("model", "pytorch_model", "diffusion_pytorch_model")
#: In the order of preference of transformers, then of diffusers; last what accelerate gathers under FSDP.
WHOLE = (
    *(f"{name}.{end}" for end in ("safetensors", "safetensors.index.json", "bin", "bin.index.json") for name in _NAMES),
    "pytorch_model_fsdp.bin",
)
#: The folder into which the Trainer and accelerate save the model under FSDP.
_DISTRIBUTED = re.compile(r"pytorch_model(_fsdp)?_[0-9]+")
_SHARD = re.compile(r".+[-_][0-9]+[-_]of[-_][0-9]+\.(safetensors|bin)", re.DOTALL)
_STACKED = re.compile(r"(^|\.)layers\.(?![0-9])")
_INDEX_FILE = re.compile(r"(?!adapter_model\.).+\.(safetensors|bin)\.index\.json", re.DOTALL)


def whole_model(folder: Path, names: Collection[str]) -> str | None:
    """Return the name of what holds a whole model in a folder, ``None`` if nothing does.

    Args:
        folder: The folder.
        names: Names of what is in it.
    """
    for name in WHOLE:
        if name in names:
            return name
    if index := next(filter(_INDEX_FILE.fullmatch, sorted(names)), None):
        return index
    if METADATA in names and any(name.endswith(".distcp") for name in names):
        return METADATA
    for name in sorted(names):
        if _DISTRIBUTED.fullmatch(name) and (folder / name / METADATA).exists():
            return f"{name}/{METADATA}"
    return None


def is_distributed(name: str) -> bool:
    """Return whether a folder is called as those into which a model is saved under FSDP.

    >>> is_distributed("pytorch_model_fsdp_0"), is_distributed("optimizer_0")
    (True, False)
    """
    return _DISTRIBUTED.fullmatch(name) is not None


def read_whole_model(path: Path) -> Weights:
    """Read the headers of the weights that a file names or holds.

    Args:
        path: As :func:`whole_model` named it.

    Raises:
        UnreadableFile: ``OD101`` or ``OD107``, with what is wrong with it.
    """
    if path.name == METADATA:
        return read_distributed(path.parent)
    return read_sharded(path) if path.suffix == ".json" else read_weight_file(path)


def lone_shards(names: Iterable[str]) -> list[str]:
    """Return the shards in a folder, which has no index for them.

    >>> lone_shards(["model-00001-of-00002.safetensors", "config.json"])
    ['model-00001-of-00002.safetensors']
    """
    return [name for name in names if _SHARD.fullmatch(name) and name not in WHOLE]


def ties_embeddings(*folders: Path) -> bool | None:
    """Return whether the output layer is the input embedding, by the first ``config.json`` that says so or denies it.

    Args:
        folders: Where it may lie. ``None`` is returned if none says.
    """
    for folder in folders:
        try:
            content = read_json(folder / "config.json", "OD102")
        except UnreadableFile:
            continue  # a configuration is only asked for this; weights can be read without one
        inner = content.get("text_config")
        texts = [content, inner] if isinstance(inner, dict) else [content]
        ties = [text["tie_word_embeddings"] for text in texts if isinstance(text.get("tie_word_embeddings"), bool)]
        if ties:
            return any(ties)
    return None


def has_stacked_layers(tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether one tensor holds a weight of all layers, as Megatron's and NeMo's distributed checkpoints do.

    >>> has_stacked_layers({"module.decoder.layers.mlp.linear_fc1.weight": TensorInfo("BF16", (2, 8, 4))})
    True
    >>> has_stacked_layers({"model.layers.0.mlp.experts.up": TensorInfo("BF16", (2, 8, 4))})
    False
    """
    return any(len(info.shape) > 2 and _STACKED.search(key) for key, info in tensors.items())
