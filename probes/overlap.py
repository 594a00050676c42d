"""Whether probe samples are also trained on, told by their content."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from probes.losses import IGNORED

#: Says nothing about a sample that its other values do not say; padding is left out by it.
_MASK = "attention_mask"
#: Two samples may well have the same label.
_LABELS = frozenset({"labels", "label", "label_ids"})


def samples_of(dataset: Any) -> Iterator[Any]:
    """Yield the samples of a data set, map-style (by number) or iterable (a stream).

    >>> list(samples_of(torch.utils.data.TensorDataset(torch.tensor([3]))))
    [(tensor(3),)]
    """
    # By number where that is possible: many map-style data sets never raise IndexError, so that iterating never ends.
    if hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__"):
        return (dataset[index] for index in range(len(dataset)))
    return iter(dataset)


def content(sample: Any) -> dict[str, Any]:
    """Return what can be compared in a sample, by key; items of a tuple by position.

    Left out are padding masks, and labels that repeat ``input_ids``: which of them are masked (−100) is a choice of the
    loss, and does not make another sample.

    >>> content((1, "b"))
    {'0': 1, '1': 'b'}
    >>> content({"input_ids": [5, 6, 7], "labels": [-100, 6, 7]})
    {'input_ids': [5, 6, 7]}
    """
    if isinstance(sample, Mapping):
        values = {str(key): value for key, value in sample.items() if key != _MASK and value is not None}
        if "labels" in values and "input_ids" in values and _repeats(values["labels"], values["input_ids"]):
            del values["labels"]
        return values
    if isinstance(sample, tuple | list):
        return {str(position): value for position, value in enumerate(sample)}
    return {"0": sample}


def comparable(keys: Collection[str], others: Collection[str]) -> frozenset[str]:
    """Return the keys by which two samples can be compared: those both have; none if these are only labels.

    >>> sorted(comparable({"input_ids", "labels", "image"}, {"input_ids", "labels"}))
    ['input_ids', 'labels']
    >>> comparable({"input_ids", "labels"}, {"text", "labels"})
    frozenset()
    """
    common = frozenset(keys) & frozenset(others)
    return common if common - _LABELS else frozenset()


def content_hash(sample: Any, keys: Collection[str]) -> bytes:
    """Return a hash (BLAKE2b, 16 bytes) of a sample's values under ``keys``.

    Numbers are compared by value, whatever holds them (list, array, tensor; any width of integers and floats), without
    the places that ``attention_mask`` masks: padded and unpadded samples are the same.

    >>> padded = {"input_ids": torch.tensor([5, 6, 0]), "attention_mask": [1, 1, 0]}
    >>> content_hash(padded, ["input_ids"]) == content_hash({"input_ids": [5, 6]}, ["input_ids"])
    True
    """
    mask = sample.get(_MASK) if isinstance(sample, Mapping) else None
    kept = None if mask is None else _array(mask).astype(bool)
    values = content(sample)
    digest = hashlib.blake2b(digest_size=16)
    for key in sorted(keys):
        value = values.get(key)
        digest.update(key.encode() + b"\0")
        if isinstance(value, str | bytes):
            digest.update(value.encode() if isinstance(value, str) else value)
            continue
        array = _array(value)
        if kept is not None and kept.ndim == 1 and array.shape[:1] == kept.shape:
            array = array[kept]
        if array.dtype.kind in "biuf":
            array = array.astype(np.float64 if array.dtype.kind == "f" else np.int64)
        digest.update(f"{array.shape}{array.dtype.kind}".encode())
        digest.update(repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes())
    return digest.digest()


def _repeats(labels: Any, words: Any) -> bool:
    labels, words = _array(labels), _array(words)
    return labels.shape == words.shape and bool(((labels == words) | (labels == IGNORED)).all())


def _array(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.double() if value.is_floating_point() else value).numpy()
    try:
        return np.asarray(value)
    except ValueError:  # lists of unequal length
        return np.asarray(repr(value))


def overlapping(samples: Any, training: Any, leave_out: Collection[str] = ()) -> tuple[dict[int, int], int]:
    """Return which samples are also in the training set, reading it once and keeping nothing of it.

    Args:
        samples: The probe samples, map-style.
        training: The training set, map-style or a stream.
        leave_out: Keys that name a sample rather than being its content.

    Returns:
        Number of each probe sample found → number of the first training sample with the same content; and how many
        training samples were compared, 0 if the two have nothing in common by which to compare them.

    >>> overlapping([{"input_ids": [1]}, {"input_ids": [2]}], [{"input_ids": [3]}, {"input_ids": [2]}])
    ({1: 1}, 2)
    """
    probe_keys = set.intersection(*(set(content(sample)) for sample in samples_of(samples))) - set(leave_out)
    hashes: dict[frozenset[str], dict[bytes, list[int]]] = {}  # by the keys compared, which samples may differ in
    matches: dict[int, int] = {}
    compared = 0
    for number, sample in enumerate(samples_of(training)):
        keys = comparable(probe_keys, content(sample))
        if not keys:
            continue
        compared += 1
        if keys not in hashes:
            hashes[keys] = {}
            for index, probe in enumerate(samples_of(samples)):
                hashes[keys].setdefault(content_hash(probe, keys), []).append(index)
        for index in hashes[keys].get(content_hash(sample, keys), ()):
            matches.setdefault(index, number)
    return dict(sorted(matches.items())), compared
