"""Equal checkpoints are found by samples, and by nothing less than all of their bits."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dynamics.checkpoints.duplicates import duplicates, same_tensors
from dynamics.checkpoints.files import WeightFile, read_weight_file

Files = dict[str, WeightFile]
KEY_A, KEY_B = "m.q_proj.lora_A.weight", "m.q_proj.lora_B.weight"


def files(folder: Path, **adapters: dict[str, Tensor]) -> Files:
    """One checkpoint: adapter → weight file."""
    folder.mkdir()
    weights = {}
    for adapter, tensors in adapters.items():
        save_file(tensors, folder / f"{adapter}.safetensors")
        weights[adapter] = read_weight_file(folder / f"{adapter}.safetensors")
    return weights


def factors(left_entry: float = 0.0, *, row: int = 0) -> dict[str, Tensor]:
    """Factors of 200 rows; only the first 64 of a tensor are sampled."""
    left = torch.zeros(200, 4)
    left[row, 1] = left_entry
    return {KEY_A: torch.ones(4, 10), KEY_B: left}


def same_by_all_bits(one: Files, other: Files) -> bool:
    """The slow twin of ``same_tensors``: the bytes of the files."""
    return one.keys() == other.keys() and all(
        one[name].path.read_bytes() == other[name].path.read_bytes() for name in one
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> list[Files]:
    tensors = [
        {"default": factors(1.0)},
        {"default": factors(2.0)},
        {"default": factors(1.0)},
        {"default": factors(1.0, row=150)},  # differs beyond the sampled rows
        {"default": factors(1.0, row=151)},
        {"default": factors(1.0, row=150)},
        {"default": factors(float("nan"))},
        {"default": factors(float("nan"))},
        {"default": factors(-0.0)},
        {"default": factors(0.0)},
        {"default": factors(1.0), "style": factors(2.0)},
        {"other": factors(1.0)},
        {"default": {key: tensor.bfloat16() for key, tensor in factors(1.0).items()}},
        {"default": factors(1.0)},
    ]
    return [files(tmp_path / str(number), **adapters) for number, adapters in enumerate(tensors)]


def test_same_tensors_agrees_with_all_bits(checkpoints: list[Files]) -> None:
    for one, other in combinations(checkpoints, 2):
        assert same_tensors(one, other) == same_by_all_bits(one, other)


def test_each_later_copy_is_paired_with_the_first(checkpoints: list[Files]) -> None:
    assert duplicates(checkpoints) == [(0, 2), (3, 5), (6, 7), (0, 13)]


def test_a_checkpoint_without_files_has_no_copy(tmp_path: Path) -> None:
    assert duplicates([{}, {}, files(tmp_path / "a", default=factors())]) == []


def test_a_removed_file_equals_nothing(tmp_path: Path) -> None:
    one, other = (files(tmp_path / name, default=factors(1.0)) for name in ("a", "b"))
    other["default"].path.unlink()
    assert not same_tensors(one, other)
    assert duplicates([one, other]) == []
