"""Equal samples are found whatever holds their numbers; different ones are not taken for equal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from probes.overlap import content_hash, overlapping


class NeverEnds(Dataset):
    """A map-style data set that answers to any number, as many do."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"input_ids": [index]}


def probes(*words: list[int]) -> list[dict[str, Any]]:
    return [{"input_ids": word, "labels": word} for word in words]


@pytest.mark.parametrize(
    "equal",
    [
        {"input_ids": (1, 2)},
        {"input_ids": np.array([1, 2], dtype=np.int32)},
        {"input_ids": torch.tensor([1, 2], dtype=torch.int16)},
        {"input_ids": [1, 2, 0], "attention_mask": [1, 1, 0]},
        {"input_ids": torch.tensor([0, 0, 1, 2]), "attention_mask": torch.tensor([0, 0, 1, 1])},
        {"input_ids": [1, 2], "other": "ignored"},
    ],
    ids=["tuple", "array", "tensor", "padded", "padded at the left", "more keys"],
)
def test_equal(equal: dict[str, Any]) -> None:
    assert content_hash(equal, ["input_ids"]) == content_hash({"input_ids": [1, 2]}, ["input_ids"])


@pytest.mark.parametrize(
    ("one", "other"),
    [([1, 2], [2, 1]), ([1, 2], [[1, 2]]), ([1, 2], [1, 2, 0]), ([1], [1.0]), ("a", "b"), (["a"], ["b"]), ("1", 1)],
    ids=str,
)
def test_different(one: Any, other: Any) -> None:
    assert content_hash({"x": one}, ["x"]) != content_hash({"x": other}, ["x"])


def test_half_and_single_precision_of_the_same_numbers() -> None:
    numbers = torch.tensor([0.5, 3.0])
    assert content_hash({"x": numbers.bfloat16()}, ["x"]) == content_hash({"x": numbers.tolist()}, ["x"])


def test_lists_of_unequal_length() -> None:
    assert content_hash({"x": [[1], [1, 2]]}, ["x"]) == content_hash({"x": [[1], [1, 2]]}, ["x"])
    assert content_hash({"x": [[1], [1, 2]]}, ["x"]) != content_hash({"x": [[1], [1, 3]]}, ["x"])


def test_found_in_a_stream_that_is_read_once() -> None:
    def stream() -> Iterator[dict[str, Any]]:
        yield from probes([9], [2, 2], [1], [2, 2])

    assert overlapping(probes([1], [5], [2, 2]), stream()) == ({0: 2, 2: 1}, 4)


def test_a_data_set_that_never_ends() -> None:
    assert overlapping([{"input_ids": [2]}, {"input_ids": [3]}], NeverEnds()) == ({0: 2}, 3)


def test_tuples_are_compared_by_place() -> None:
    training = TensorDataset(torch.eye(3), torch.arange(3))
    assert overlapping(TensorDataset(torch.eye(3)[1:], torch.tensor([1, 0])), training) == ({0: 1}, 3)


def test_labels_that_are_masked_differently() -> None:
    probe, training = {"input_ids": [1, 2, 3], "labels": [-100, -100, 3]}, {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    assert overlapping([probe], [training]) == ({0: 0}, 1)


def test_one_prompt_with_two_answers() -> None:
    probe, training = {"input_ids": [1, 2], "labels": [7, 8]}, {"input_ids": [1, 2], "labels": [7, 9]}
    assert overlapping([probe], [training, probe]) == ({0: 1}, 2)


def test_nothing_to_compare_by() -> None:
    assert overlapping([{"text": "a", "label": 1}], [{"input_ids": [1], "label": 1}]) == ({}, 0)


def test_keys_that_name_a_sample_are_not_its_content() -> None:
    probe, training = [{"x": [1], "id": "probe"}], [{"x": [1], "id": "training"}]
    assert overlapping(probe, training) == ({}, 1)
    assert overlapping(probe, training, leave_out=["id"]) == ({0: 0}, 1)
