"""Batches as models take them: sequences padded, everything else stacked, nothing lost without a word."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch

from probes.collation import longest, pad_and_stack, tensors


def samples() -> list[dict[str, Any]]:
    return [
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7], "attention_mask": [1, 1, 1], "pixels": np.ones((2, 2))},
        {"input_ids": [8], "labels": [8], "attention_mask": [1], "pixels": np.zeros((2, 2))},
    ]


def test_padding() -> None:
    batch = pad_and_stack([tensors(sample) for sample in samples()])
    assert {key: value.tolist() for key, value in batch.items() if key != "pixels"} == {
        "input_ids": [[5, 6, 7], [8, 0, 0]],
        "labels": [[5, 6, 7], [8, -100, -100]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert batch["pixels"].shape == (2, 2, 2)


def test_padding_to_a_given_length() -> None:
    batch = pad_and_stack([tensors(sample) for sample in samples()], {"input_ids": 4, "labels": 5, "attention_mask": 4})
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7, -100, -100], [8, -100, -100, -100, -100]]


def test_a_mask_is_made_only_where_there_is_padding() -> None:
    words = [{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3, 4])}]
    assert list(pad_and_stack(words)) == ["input_ids"]
    assert pad_and_stack(words, {"input_ids": 3})["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize("value", [[1, 2], (1, 2), np.array([1, 2], dtype=np.int32), torch.tensor([1, 2])])
def test_whatever_holds_numbers(value: Any) -> None:
    assert tensors({"x": value})["x"].tolist() == [1, 2]


def test_what_models_do_not_take() -> None:
    sample = {"input_ids": [1], "question": "Where?", "image": 17, "label_ids": 2}
    assert list(tensors(sample, ["image"])) == ["input_ids", "labels"]
    assert list(tensors({"label": 1, "labels": [1, 2]})) == ["label", "labels"]
    assert list(tensors({"input_ids": [1], "pixels": None, "label": 1, "labels": None})) == ["input_ids", "labels"]


def test_lengths_are_those_of_vectors_of_integers() -> None:
    sample = {"words": torch.ones(4, dtype=torch.long), "sound": torch.ones(9), "number": torch.tensor(1)}
    assert longest([sample, {"words": torch.ones(6, dtype=torch.bool)}]) == {"words": 6}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ((torch.ones(1),), "expected samples that are dicts, as models take them, got tuple. Pass collate=, "),
        ({"text": "a"}, "expected a sample with numbers for the model, got one with 'text' only."),
        ({"words": ["a", "b"]}, "expected numbers under 'words', got list ("),
        ({"image": None}, "expected a sample with numbers for the model, got one with 'image' only."),
        ({"messages": [{"role": "user"}]}, "expected numbers under 'messages', got list ("),
    ],
    ids=["tuple", "text", "list of text", "nothing", "list of dicts"],
)
def test_samples_that_no_model_takes(sample: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        tensors(sample)


REMEDY = (
    "Pass collate=, which makes a dict of tensors from a list of samples, or make a task of the samples that have it "
    "and one of the others."
)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ({}, f"expected the same keys in all samples, but sample 1 of the batch lacks 'sound'. {REMEDY}"),
        (
            {"sound": torch.ones(2), "more": torch.ones(1)},
            f"expected the same keys in all samples, but sample 1 of the batch alone has 'more'. {REMEDY}",
        ),
        (
            {"sound": torch.ones(3)},
            "expected values of one shape under 'sound', got (2,) and, in sample 1 of the batch, (3,). Pass collate=, "
            "which makes a dict of tensors from a list of samples.",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_samples_that_do_not_fit_together(second: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        pad_and_stack([{"sound": torch.ones(2)}, second])
