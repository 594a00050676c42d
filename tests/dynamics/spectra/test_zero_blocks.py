"""A part of a sharded matrix is told from the whole, and no trained one is taken for a part."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynamics.checkpoints import open_trajectory
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from dynamics.spectra.zero_blocks import ZeroBlock, of_dense, of_factors, zero_block
from probes.low_rank import LowRankMatrix
from tests.runs import random_factors, write_run
from tests.whole_models import model_tensors, write_dense_run


@pytest.mark.parametrize("world", [2, 3, 4, 8, 16])
@pytest.mark.parametrize("size", [64, 96, 100])
def test_the_part_of_any_process_of_any_number(world: int, size: int) -> None:
    for part in torch.arange(size).chunk(world):
        is_zero = torch.ones(size, dtype=torch.bool)
        is_zero[part] = False
        assert zero_block(is_zero) == size - len(part)
        assert zero_block(~is_zero) == (len(part) if len(part) >= size / 16 else 0)


def test_scattered_zeros_are_no_part() -> None:
    generator = torch.Generator().manual_seed(0)
    for share in (0.01, 0.1, 0.5, 0.9, 0.99):
        for _ in range(50):
            assert zero_block(torch.rand(512, generator=generator) < share, 1 / 2) == 0


def factors(out: int = 64, in_: int = 48, rank: int = 8) -> LowRankMatrix:
    generator = torch.Generator().manual_seed(0)
    return LowRankMatrix(torch.randn(out, rank, generator=generator), torch.randn(rank, in_, generator=generator))


@pytest.mark.parametrize(
    ("tensor", "axis", "zero", "size"),
    [("lora_B", "rows", 56, 64), ("lora_A", "columns", 36, 48), ("lora_A", "rows", 7, 8), ("lora_B", "columns", 6, 8)],
)
def test_blocks_in_either_factor(tensor: str, axis: str, zero: int, size: int) -> None:
    matrix = factors()
    part = matrix.left_factor if tensor == "lora_B" else matrix.right_factor
    (part if axis == "rows" else part.mT)[size - zero :] = 0
    assert of_factors(matrix) == ZeroBlock(tensor, axis, zero, size)


def test_what_training_leaves_is_no_part() -> None:
    assert of_factors(factors()) is None
    start = factors()
    start.left_factor.zero_()
    assert of_factors(start) is None  # B = 0
    padded = factors()
    padded.left_factor[:, 4:] = 0
    padded.right_factor[4:] = 0
    assert of_factors(padded) is None  # a smaller rank
    added = LowRankMatrix(padded.left_factor, factors().right_factor, column_scale=torch.ones(8))
    assert of_factors(added) is None  # a sum of adapters, of which one has B = 0


def test_dense_weights_and_their_updates() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(40, 30, generator=generator)
    now = start + 0.1 * torch.randn(40, 30, generator=generator)
    assert of_dense(now, start, is_update=False) is None
    shard = now.clone()
    shard[10:] = 0
    assert of_dense(shard, start, is_update=False) == ZeroBlock("weight", "rows", 30, 40)
    kept = now.clone()
    kept[:, 15:] = start[:, 15:]
    assert of_dense(kept, start, is_update=False) == ZeroBlock("update", "columns", 15, 30)
    assert of_dense(torch.zeros(40, 30), start, is_update=False) == ZeroBlock("weight", "rows", 40, 40)
    vocabulary = torch.randn(640, 30, generator=generator)
    vocabulary[600:] = 0  # tokens that never occur
    assert of_dense(vocabulary, None, is_update=True) is None


def test_a_run_of_parts_is_warned_of(tmp_path: Path) -> None:
    steps = {step: random_factors(out=32, seed=step) for step in (10, 20)}
    for matrices in steps.values():
        for left, _ in matrices.values():
            left[4:] = 0
    _, findings, _ = trajectory_spectra(open_trajectory(write_run(tmp_path, steps)))
    (warning,) = findings
    assert (warning.code, warning.severity, warning.step) == ("OD139", "warning", 20)
    assert "Only 4 of 32 rows of lora_B are not zero (12.5%) in 4 of 4 matrices" in warning.message
    assert "full state dict" in warning.remedy
    assert warning.evidence["steps"] == [10, 20]


def test_whole_models_and_adapters_are_not_warned_of(tmp_path: Path) -> None:
    assert trajectory_spectra(open_trajectory(write_run(tmp_path / "adapters")))[1] == []
    dense = write_dense_run(tmp_path / "dense", {10: model_tensors(1), 20: model_tensors(2)})
    assert trajectory_spectra(open_trajectory(dense))[1] == []
