"""Which files in a folder hold the weights of a whole model, and how they are read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import TensorInfo, Weights, read_weight_file
from dynamics.checkpoints.formats.distributed import METADATA, read_distributed
from dynamics.checkpoints.formats.shards import read_sharded
from dynamics.checkpoints.plain_files import read_json

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
    """Name of what holds a whole model in a folder, ``None`` if nothing does.

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
    """Reads the headers of a whole model.

    Args:
        path: As :func:`whole_model` named it.

    Raises:
        UnreadableFile: ``OD101`` or ``OD107``, with what is wrong with it.
    """
    if path.name == METADATA:
        return read_distributed(path.parent)
    return read_sharded(path) if path.suffix == ".json" else read_weight_file(path)


def lone_shards(names: Iterable[str]) -> list[str]:
    """Shards in a folder that has no index for them.

    >>> lone_shards(["model-00001-of-00002.safetensors", "config.json"])
    ['model-00001-of-00002.safetensors']
    """
    return [name for name in names if _SHARD.fullmatch(name) and name not in WHOLE]


def ties_embeddings(folder: Path) -> bool | None:
    """Whether ``config.json`` says that the output layer is the input embedding; ``None`` if it does not say."""
    try:
        content = read_json(folder / "config.json", "OD102")
    except UnreadableFile:
        return None  # a configuration is only asked for this; weights can be read without one
    inner = content.get("text_config")
    texts = [content, inner] if isinstance(inner, dict) else [content]
    said = [text["tie_word_embeddings"] for text in texts if isinstance(text.get("tie_word_embeddings"), bool)]
    return any(said) if said else None


def has_stacked_layers(tensors: Mapping[str, TensorInfo]) -> bool:
    """Return whether one tensor holds a weight of all layers, as Megatron's and NeMo's distributed checkpoints do.

    >>> has_stacked_layers({"module.decoder.layers.mlp.linear_fc1.weight": TensorInfo("BF16", (2, 8, 4))})
    True
    >>> has_stacked_layers({"model.layers.0.mlp.experts.up": TensorInfo("BF16", (2, 8, 4))})
    False
    """
    return any(len(info.shape) > 2 and _STACKED.search(key) for key, info in tensors.items())
