"""Weights in several files: ``model.safetensors.index.json`` beside ``model-00001-of-00002.safetensors``, ….

The index is a text that anybody can write: it may name nothing but files that lie beside it, and what it says of
them must be what they hold.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Loader, TensorInfo, WeightFile, read_weight_file
from dynamics.checkpoints.names import natural_order, shown
from dynamics.checkpoints.plain_files import read_text
from dynamics.text import first_line, some

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
        places: Key to the position in ``parts`` of the shard that holds it.
    """

    path: Path
    parts: tuple[WeightFile, ...]
    tensors: Mapping[str, TensorInfo]
    places: Mapping[str, int]
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
        """Maps each shard when the first of its tensors is asked for.

        Raises:
            UnreadableFile: By the loader, if a shard has gone or changed since its header was read.
        """
        with ExitStack() as stack:
            loaders: dict[int, Loader] = {}
            opening = Lock()  # matrices are read by several threads

            def load(key: str) -> Tensor:
                place = self.places[key]
                with opening:
                    if place not in loaders:
                        loaders[place] = stack.enter_context(self.parts[place].open())
                return loaders[place](key)

            try:
                yield load
            finally:
                loaders.clear()


def read_sharded(index: Path) -> ShardedWeights:
    """Reads an index and the headers of its shards.

    Raises:
        UnreadableFile: If the index is not one, names a file that is not beside it, or does not say what the shards
            hold; if a shard is missing or unreadable; if two shards hold the same tensor.
    """
    listed = _weight_map(index)
    shards = sorted(set(listed.values()), key=natural_order)
    if len(shards) > _MOST_SHARDS:
        raise UnreadableFile("OD101", f"It names {len(shards)} shards; expected at most {_MOST_SHARDS}.", _AGAIN)
    missing = [shown(shard) for shard in shards if not (index.parent / shard).exists()]
    if missing:
        what = "a shard that is" if len(missing) == 1 else f"{len(missing)} shards that are"
        remedy = "Copy all shards of the checkpoint beside the index."
        raise UnreadableFile("OD101", f"It names {what} not there: {some(missing)}.", remedy)
    parts = tuple(_shard(index.parent / shard) for shard in shards)
    tensors = {key: info for part in parts for key, info in part.tensors.items()}
    tied = {key: first for part in parts for key, first in part.tied.items()}
    return ShardedWeights(index, parts, tensors, _places(listed, shards, parts), tied)


def _weight_map(index: Path) -> dict[str, str]:
    try:
        content = json.loads(read_text(index, "OD101"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UnreadableFile("OD101", f"It is not a valid JSON index: {first_line(error)}.", _AGAIN) from error
    listed = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(listed, dict) or not listed or not all(isinstance(shard, str) for shard in listed.values()):
        raise UnreadableFile("OD101", "It has no weight_map of tensors to files.", _AGAIN)
    for shard in dict.fromkeys(listed.values()):
        # A plain name on every system: neither a separator nor a drive, and nothing that means a folder.
        if not shard.endswith(_SUFFIXES) or any(sign in shard for sign in "/\\:\0") or shard.startswith("."):
            problem = f"It names {shown(shard)!r}, which is not the name of a weight file beside it."
            raise UnreadableFile("OD101", problem, "Nothing outside the checkpoint's folder is read. Check the index.")
    return listed


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


def _places(listed: Mapping[str, str], shards: list[str], parts: tuple[WeightFile, ...]) -> dict[str, int]:
    places: dict[str, int] = {}
    for place, part in enumerate(parts):
        for key in part.tensors:
            if key in places:
                both = f"{shown(shards[places[key]])} and {shown(shards[place])}"
                raise UnreadableFile("OD101", f"The tensor {shown(key)!r} is in two shards, {both}.", _AGAIN)
            places[key] = place
    for key, shard in listed.items():
        if key not in places or shards[places[key]] != shard:
            problem = f"It places the tensor {shown(key)!r} in {shown(shard)}, which does not hold it."
            raise UnreadableFile("OD101", problem, _AGAIN)
    return places
