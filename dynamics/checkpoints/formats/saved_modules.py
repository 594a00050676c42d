"""Modules that are trained whole beside an adapter: dense matrices, where there is a base.

``modules_to_save`` in the adapter's own file, and files beside it, such as LLaVA's ``non_lora_trainables.bin``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dynamics.checkpoints.files import TensorInfo, WeightFile, Weights
from dynamics.checkpoints.formats.distributed import DistributedWeights
from dynamics.checkpoints.formats.foreign import is_adapter
from dynamics.checkpoints.formats.shards import ShardedWeights
from dynamics.checkpoints.formats.transformers import sort_tensors
from dynamics.checkpoints.matrices import Product
from dynamics.checkpoints.names import matrix_names, parse_key

#: Kinds of tensors beside the factors that are weights of the model.
SAVED = ("modules_to_save", "saved weights")
#: Kind of the trained rows of an embedding.
TOKENS = "trainable tokens"
_EMA = re.compile(r"(^|[-_.])ema([-_.]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class SavedModules:
    """Saved modules as matrices.

    Args:
        products: Name of the matrix to how it is read.
        keys: Keys of the tensors that they are read from.
    """

    products: Mapping[str, Product]
    keys: frozenset[str]


def saved_modules(
    beside: Mapping[str, Sequence[str]], tensors: Mapping[str, TensorInfo], taken: Collection[str]
) -> SavedModules:
    """Of the tensors beside an adapter's factors, those that are trained weights of two or more dimensions.

    PEFT writes ``classifier.weight`` or ``classifier.modules_to_save.weight``, in whole states
    ``classifier.modules_to_save.default.weight``; what it calls ``original_module`` is the frozen original. A name that
    two tensors would get is left to neither.

    Args:
        beside: Kind of tensor to keys, as in ``Adapter.beside``.
        tensors: Header of the file.
        taken: Names of the adapter's own matrices: a weight saved beneath its adapter is the frozen one.
    """
    keys = [key for kind in SAVED for key in beside.get(kind, ()) if "original_module" not in key.split(".")]
    adapters = {part.adapter for key in tensors if (part := parse_key(key)) is not None and part.adapter}
    wrappers = [*(f".modules_to_save.{adapter}" for adapter in sorted(adapters)), ".modules_to_save"]
    stems = {key: _without(key.removesuffix(".weight"), wrappers) for key in keys}
    named = matrix_names(stems.values())
    names = {key: named[stem] for key, stem in stems.items()}
    # With save_embedding_layers PEFT writes a saved module a second time, under the module's plain name.
    saved = {names[key] for key, stem in stems.items() if stem != key.removesuffix(".weight")}
    twice = {key: name for key, name in names.items() if name in saved and stems[key] == key.removesuffix(".weight")}
    names = {key: name for key, name in names.items() if key not in twice}
    counted = Counter(names.values())
    free = {key: name for key, name in names.items() if counted[name] == 1 and name not in taken}
    sorted_ = {key: sort_tensors({name: (key, tensors[key])}).products for key, name in free.items()}
    products = {name: product for own in sorted_.values() for name, product in own.items()}
    read = {*(key for key, own in sorted_.items() if own), *(key for key, name in twice.items() if name in products)}
    return SavedModules(products, frozenset(read))


def _without(stem: str, wrappers: Sequence[str]) -> str:
    """A stem without what PEFT puts into the name of a saved module; the adapter's name where whole states have it."""
    words = f"{stem}."
    wrapper = next((wrapper for wrapper in wrappers if f"{wrapper}." in words), None)
    return stem if wrapper is None else words.replace(f"{wrapper}.", ".", 1)[:-1]


def of_trained(weights: Weights) -> Weights:
    """Return the weights without what an adapter leaves frozen, where a file holds the whole model with its adapter.

    DeepSpeed's ``zero_to_fp32.py`` and FSDP's full state write such files: ``q_proj.base_layer.weight`` beside
    ``q_proj.lora_A.default.weight``, for every adapted module. Of the other tensors only ``modules_to_save`` are
    trained.
    """
    stems = {part.stem for key in weights.tensors if (part := parse_key(key)) is not None and part.part == "A"}
    if not stems or not all(f"{stem}.base_layer.weight" in weights.tensors for stem in stems):
        return weights
    assert isinstance(weights, WeightFile | ShardedWeights | DistributedWeights)
    trained = {
        key: info
        for key, info in weights.tensors.items()
        if ".lora_" in key or ".modules_to_save." in key or ".token_adapter.trainable_tokens" in key
    }
    return replace(weights, tensors=trained)


def beside_kind(path: Path, tensors: Collection[str], analysed: Collection[str]) -> str | None:
    """What a file beside the analysed weights is, if it is a copy of them or another form; ``None`` if it was trained.

    Args:
        path: The file.
        tensors: Its keys.
        analysed: Names of the matrices that are analysed.
    """
    if is_adapter(tensors):
        return "an adapter (a further one, or the same in another format)"
    if _EMA.search(path.name):
        return "an average of weights (EMA)"
    stems = {stem.removesuffix(".weight") for stem in matrix_names(tensors)}
    names = set(matrix_names(stems).values())
    plain = {name.partition("@")[0] for name in analysed}
    return "a whole model (merged, in another format, or a further one)" if names & plain else None
