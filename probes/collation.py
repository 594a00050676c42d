"""From samples to a batch: sequences padded at the end, everything else stacked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from probes.losses import IGNORED

#: Names that data sets give to what models call ``labels``.
_LABELS = ("label", "label_ids")

_REMEDY = (
    "Pass collate=, which makes a dict of tensors from a list of samples, or make a task of the samples that have it "
    "and one of the others."
)


def tensors(sample: Any, leave_out: Collection[str] = ()) -> dict[str, Tensor]:
    """Return the values of a sample that a model can take, as tensors.

    Text is left out, for no model takes it, and so is ``None``, which stands for a value that the sample lacks: data
    sets that join several sources have it where a column comes from another source.

    Args:
        sample: A dict of tensors, arrays, lists of numbers, numbers, text and ``None``. ``label`` becomes ``labels``.
        leave_out: Keys that are not for the model.

    Raises:
        ValueError: If the sample is no dict, or a value is neither numbers nor text.

    >>> tensors({"input_ids": [5, 6], "label": 1, "question": "Where?", "image": None})
    {'input_ids': tensor([5, 6]), 'labels': tensor(1)}
    """
    if not isinstance(sample, Mapping):
        raise ValueError(
            f"expected samples that are dicts, as models take them, got {type(sample).__name__}. "
            "Pass collate=, which makes a dict of tensors from a list of samples."
        )
    numeric = {
        "labels" if key in _LABELS and sample.get("labels") is None else str(key): _tensor(key, value)
        for key, value in sample.items()
        if key not in leave_out and value is not None and not isinstance(value, str)
    }
    if not numeric:
        raise ValueError(f"expected a sample with numbers for the model, got one with {_listed(sample)} only.")
    return numeric


def longest(samples: Iterable[Mapping[str, Tensor]]) -> dict[str, int]:
    """Return the length of the longest sequence under each key; a sequence is a vector of integers.

    >>> longest([{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([1, 2, 3])}])
    {'input_ids': 3}
    """
    lengths: dict[str, int] = {}
    for sample in samples:
        for key, value in sample.items():
            if _is_sequence(value):
                lengths[key] = max(lengths.get(key, 0), len(value))
    return lengths


def kind(sample: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...] | None]]:
    """Return what must agree for samples to fit into one batch.

    Keys, formats, and shapes but for the length of sequences.

    >>> kind({"input_ids": torch.tensor([1, 2]), "label": torch.tensor(0)})
    {'input_ids': (torch.int64, None), 'label': (torch.int64, ())}
    """
    return {key: (value.dtype, None if _is_sequence(value) else tuple(value.shape)) for key, value in sample.items()}


def pad_and_stack(
    samples: Sequence[Mapping[str, Tensor]], lengths: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """Return one batch of samples: sequences padded at the end, all other values stacked as they are.

    ``labels`` are padded with −100, everything else with 0. Where ``input_ids`` need padding and there is no
    ``attention_mask``, one is made.

    Args:
        samples: At least one; all with the same keys.
        lengths: To which length to pad the sequences under each key; by default the longest among these samples.

    Raises:
        ValueError: If keys or shapes differ, naming the sample.

    >>> pad_and_stack([{"input_ids": torch.tensor([7, 8])}, {"input_ids": torch.tensor([9])}])
    {'input_ids': tensor([[7, 8],
            [9, 0]]), 'attention_mask': tensor([[1, 1],
            [1, 0]])}
    """
    lengths = longest(samples) if lengths is None else lengths
    require_same_keys(samples)
    batch = {key: _stacked(key, [sample[key] for sample in samples], lengths.get(key)) for key in samples[0]}
    if "input_ids" in batch and "attention_mask" not in batch:
        words = [sample["input_ids"] for sample in samples]
        if any(_is_sequence(word) and len(word) < batch["input_ids"].shape[1] for word in words):
            ones = [torch.ones_like(word, dtype=torch.int64) for word in words]
            batch["attention_mask"] = _stacked("attention_mask", ones, lengths["input_ids"])
    return batch


def require_same_keys(samples: Iterable[Mapping[str, Any]]) -> None:
    """Raise ``ValueError`` naming the first sample whose keys differ from those of the first one.

    >>> require_same_keys([{"a": 1}, {}])
    Traceback (most recent call last):
    ValueError: expected the same keys in all samples, but sample 1 of the batch lacks 'a'. Pass collate=, which makes \
a dict of tensors from a list of samples, or make a task of the samples that have it and one of the others.
    """
    first: set[str] | None = None
    for index, sample in enumerate(samples):
        first = set(sample) if first is None else first
        if missing := sorted(first - set(sample)):
            raise ValueError(
                f"expected the same keys in all samples, but sample {index} of the batch lacks {_listed(missing)}. "
                f"{_REMEDY}"
            )
        if extra := sorted(set(sample) - first):
            raise ValueError(
                f"expected the same keys in all samples, but sample {index} of the batch alone has {_listed(extra)}. "
                f"{_REMEDY}"
            )


def _tensor(key: Any, value: Any) -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"expected numbers under {key!r}, got {type(value).__name__} ({error}). Remove {key!r} from the samples, "
            "or pass collate=, which makes a dict of tensors from a list of samples."
        ) from error


def _is_sequence(value: Tensor) -> bool:
    return value.ndim == 1 and not value.is_floating_point()


def _stacked(key: str, values: Sequence[Tensor], length: int | None) -> Tensor:
    if length is not None and all(_is_sequence(value) for value in values):
        filler = IGNORED if key == "labels" else 0
        values = [torch.nn.functional.pad(value, (0, length - len(value)), value=filler) for value in values]
    shapes = [tuple(value.shape) for value in values]
    if len(set(shapes)) > 1:
        other = next(index for index, shape in enumerate(shapes) if shape != shapes[0])
        raise ValueError(
            f"expected values of one shape under {key!r}, got {shapes[0]} and, in sample {other} of the batch, "
            f"{shapes[other]}. Pass collate=, which makes a dict of tensors from a list of samples."
        )
    return torch.stack(list(values))


def _listed(keys: Iterable[Any]) -> str:
    return ", ".join(repr(key) for key in keys)
