"""Tied weights: one matrix under two names, recognised by the tensors.

A model saved by its state dictionary (FSDP, DeepSpeed's ``zero_to_fp32``) holds tied weights twice, a model saved by
transformers once, and ``config.json`` says so, says nothing, or is wrong. Two names are one matrix if they hold the
same numbers, bit by bit, wherever both occur: in each checkpoint of the run and in the base. If they differ anywhere,
training untied them, and they are two matrices.
"""

from __future__ import annotations

import io
import zipfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Loader, Weights
from dynamics.checkpoints.formats.distributed import DistributedWeights
from dynamics.checkpoints.matrices import StoredMatrix
from dynamics.checkpoints.names import natural_order
from dynamics.checkpoints.trajectory import MatrixShape

#: Ends of the names of input embeddings, those shared by several layers first, and of the output layers tied to them.
_EMBEDDINGS = ("shared", "embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings", "token_embedding")
_HEADS = ("lm_head", "embed_out", "proj_out", "output_layer", "predictions.decoder", "lm_head.decoder")
#: How many numbers of each tensor are hashed to rule out most pairs, and how many are compared at once.
_SAMPLE = 1024
_BLOCK = 2**24

Tied = Mapping[str, str]


def tied_matrices(weights: Weights, matrices: Mapping[str, StoredMatrix]) -> Tied:
    """Return the name of each dense matrix that repeats another → the other's name.

    Args:
        weights: Their file.
        matrices: The matrices; one that is not the view of a single tensor is tied to none.
    """
    names: dict[str, list[str]] = defaultdict(list)
    for name, matrix in matrices.items():
        if matrix.key:
            names[matrix.key].append(name)
    try:
        pairs = equal_keys(weights, sorted(names, key=lambda key: _rank(names[key][0])))
    except UnreadableFile:  # reported where its matrices are read
        return {}
    # Equal tensors have equal shapes, so that stacks have as many matrices.
    return {name: first for key, other in pairs.items() for name, first in zip(names[key], names[other], strict=True)}


def equal_keys(weights: Weights, keys: Iterable[str]) -> dict[str, str]:
    """Return each repeated key → the first key with the same numbers; constant tensors are no evidence of a tie.

    Args:
        weights: The file.
        keys: Keys of tensors in it, in order of preference.

    Raises:
        UnreadableFile: If the file has gone or changed.
    """
    groups: dict[object, list[str]] = defaultdict(list)
    for key in keys:
        groups[weights.tensors[key]].append(key)
    equal: dict[str, str] = {}
    with weights.open() as load:
        for members in groups.values():
            alike: dict[object, list[str]] = defaultdict(list)
            for key in members if len(members) > 1 else ():
                alike[_fingerprint(weights, key, load)].append(key)
            for first, key in _pairs(alike.values(), equal):
                if weights.tied.get(key, key) == weights.tied.get(first, first) or _same(load(first), load(key)):
                    equal[key] = first
    return equal


def _pairs(groups: Iterable[Sequence[str]], equal: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for members in groups:
        for position, first in enumerate(members):
            if first not in equal:
                yield from ((first, key) for key in members[position + 1 :] if key not in equal)


def _fingerprint(weights: Weights, key: str, load: Loader) -> object:
    """Return a value that equal tensors share, without reading them whole."""
    if isinstance(weights, DistributedWeights):
        sums = [_checksum(chunk.file, chunk.start, chunk.length) for chunk in weights.chunks[key]]
        if all(sums):
            return tuple((chunk.offsets, checksum) for chunk, checksum in zip(weights.chunks[key], sums, strict=True))
    numbers = load(key).flatten()
    middle = max(0, len(numbers) // 2 - _SAMPLE // 2)
    return _bits(numbers[middle : middle + _SAMPLE]).numpy().tobytes()


def _checksum(path: Path, start: int, length: int) -> int:
    """Return the checksum that ``torch.save`` stored at the end of one record; 0 if it stored none."""
    try:
        with path.open("rb") as file, zipfile.ZipFile(_Record(file, start, length)) as archive:
            return next((entry.CRC for entry in archive.infolist() if "/data/" in entry.filename), 0)
    except (OSError, zipfile.BadZipFile, ValueError):
        return 0  # reported where the matrix is read


class _Record(io.RawIOBase):
    """A part of a file, readable as a file."""

    def __init__(self, file: io.BufferedReader, start: int, length: int) -> None:
        self._file, self._start, self._length, self._position = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = max(0, offset + (0, self._position, self._length)[whence])
        return self._position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content


def _same(one: Tensor, other: Tensor) -> bool:
    flat, flat_other = one.flatten(), other.flatten()
    blocks = range(0, len(flat), _BLOCK)
    if not all(torch.equal(_bits(flat[i : i + _BLOCK]), _bits(flat_other[i : i + _BLOCK])) for i in blocks):
        return False
    return any(bool((flat[i : i + _BLOCK] != flat[0]).any()) for i in blocks)


def _bits(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)  # NaN equals itself


def _rank(name: str) -> tuple[object, ...]:
    """Return the sort key of preferred names: an embedding before the layers tied to it, an output layer last."""
    kind = next((i for i, end in enumerate(_EMBEDDINGS) if _ends(name, end)), len(_EMBEDDINGS))
    return (any(_ends(name, end) for end in _HEADS), kind, natural_order(name))


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def tied_everywhere(states: Sequence[tuple[Collection[str], Tied]]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the pairs of names that are one matrix, and the pairs that are equal in some states and differ in others.

    Args:
        states: For each checkpoint and the base: the names of its matrices, and the names that repeat another.

    >>> tied_everywhere([({"embed", "head"}, {"head": "embed"}), ({"embed"}, {})])
    ({'head': 'embed'}, {})
    >>> tied_everywhere([({"embed", "head"}, {"head": "embed"}), ({"embed", "head"}, {})])
    ({}, {'head': 'embed'})
    """
    pairs = {name: first for _, tied in states for name, first in tied.items()}
    always: dict[str, str] = {}
    untied: dict[str, str] = {}
    for name, first in pairs.items():
        both = [tied for names, tied in states if name in names and first in names]
        if both:
            is_tied = all(tied.get(name, name) == tied.get(first, first) for tied in both)
            (always if is_tied else untied)[name] = first
    return {name: always.get(first, first) for name, first in always.items()}, untied


def embedding_of(head: str, shape: MatrixShape, matrices: Mapping[str, StoredMatrix]) -> str | None:
    """Return the name of the input embedding that a missing output layer is tied to, or ``None``.

    Args:
        head: Name of the missing matrix; it is an output layer only if its name says so.
        shape: Its shape in other checkpoints.
        matrices: The saved matrices.
    """
    if not any(_ends(head, end) for end in _HEADS):
        return None
    fitting = [
        name
        for name, matrix in matrices.items()
        if any(_ends(name, end) for end in _EMBEDDINGS)
        and (matrix.shape.out, matrix.shape.in_) == (shape.out, shape.in_)
    ]
    return min(fitting, key=_rank, default=None)
