"""Products that are made of several: sums of adapters, AdaLoRA. Nothing that is stored is rounded on the way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynamics.checkpoints import open_trajectory
from probes import LowRankMatrix
from tests.reference import exact_columns_difference
from tests.runs import adapter_config, write_adapter

KEY = "base_model.model.q"


def gaussian(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def write_two(folder: Path, step: float, dtypes: tuple[torch.dtype, torch.dtype]) -> dict[str, tuple[Tensor, Tensor]]:
    """Adapters of scales 7/3 and 9/√2 on one matrix, the state at ``step`` of a straight line."""
    written = {}
    configs = {"": adapter_config(rank=3, alpha=7), "style": adapter_config(rank=2, alpha=9, use_rslora=True)}
    for (name, config), dtype, seed in zip(configs.items(), dtypes, (1, 11), strict=True):
        rank = config["r"]
        left = (gaussian(7, rank, seed=seed) * (1 + step)).to(dtype)
        right = (gaussian(rank, 6, seed=seed + 1) + step * gaussian(rank, 6, seed=seed + 2)).to(dtype)
        write_adapter(folder / name, {"q": (left, right)}, config)
        written[name] = (left, right)
    return written


def read(folder: Path) -> LowRankMatrix:
    with open_trajectory(folder).checkpoints[0].open() as matrices:
        return matrices["q"]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sum_stacks_the_factors_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    parts = write_two(tmp_path, 0.0, (dtype, dtype))
    matrix = read(tmp_path)
    assert matrix.left_factor.dtype == matrix.right_factor.dtype == dtype
    assert torch.equal(matrix.left_factor, torch.cat([left for left, _ in parts.values()], dim=1))
    assert torch.equal(matrix.right_factor, torch.cat([right for _, right in parts.values()]))
    assert matrix.scales().tolist() == [7 / 3] * 3 + [9 / math.sqrt(2)] * 2


def test_sum_of_two_dtypes_is_held_in_the_finer(tmp_path: Path) -> None:
    (_, right), (_, coarse) = write_two(tmp_path, 0.0, (torch.float32, torch.bfloat16)).values()
    matrix = read(tmp_path)
    assert matrix.right_factor.dtype == torch.float32
    assert torch.equal(matrix.right_factor, torch.cat([right, coarse.float()]))


def test_increment_of_a_sum_keeps_its_digits(tmp_path: Path) -> None:
    first = write_two(tmp_path / "a", 0.0, (torch.float64, torch.float64))
    second = write_two(tmp_path / "b", 1e-8, (torch.float64, torch.float64))
    before, now = read(tmp_path / "a"), read(tmp_path / "b")

    expected = torch.zeros(7, 6, dtype=torch.float64)
    for (name, old), scale in zip(first.items(), (7 / 3, 9 / math.sqrt(2)), strict=True):
        expected += exact_columns_difference(LowRankMatrix(*second[name], scale), LowRankMatrix(*old, scale))

    difference = exact_columns_difference(now, before)
    assert (difference - expected).norm() <= 1e-15 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adalora_keeps_its_factors_as_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    left, right = gaussian(7, 3, seed=1, dtype=dtype), gaussian(3, 6, seed=2, dtype=dtype)
    diagonal = torch.tensor([[0.5], [0.0], [-1.5]]).to(dtype)
    tensors = {f"{KEY}.lora_A": right, f"{KEY}.lora_B": left, f"{KEY}.lora_E": diagonal}
    config = {"peft_type": "ADALORA", "init_r": 3, "lora_alpha": 6}
    write_adapter(tmp_path, tensors=tensors, config=config)

    matrix = read(tmp_path)

    assert torch.equal(matrix.left_factor, left)
    assert torch.equal(matrix.right_factor, right)
    assert matrix.left_factor.dtype == matrix.right_factor.dtype == dtype
    assert matrix.scale == 6 / (3 + 1e-5)
    assert matrix.column_scale is not None
    assert matrix.column_scale.tolist() == [0.5, 0.0, -1.5]
    expected = left.double() @ torch.diag(diagonal[:, 0].double()) @ right.double() * matrix.scale
    torch.testing.assert_close(matrix.to_dense(), expected, rtol=1e-14, atol=1e-14)


def test_sum_with_adalora(tmp_path: Path) -> None:
    diagonal = torch.tensor([[2.0], [-4.0]])
    tensors = {
        f"{KEY}.lora_A": torch.eye(2, 6),
        f"{KEY}.lora_B": torch.eye(7, 2),
        f"{KEY}.lora_E": diagonal,
    }
    write_adapter(tmp_path, tensors=tensors, config={"peft_type": "ADALORA", "init_r": 2, "lora_alpha": 4})
    write_adapter(tmp_path / "style", {"q": (torch.ones(7, 1), torch.ones(1, 6))}, adapter_config(rank=1, alpha=3))
    scale = 4 / (2 + 1e-5)
    assert read(tmp_path).scales().tolist() == [scale * 2.0, scale * -4.0, 3.0]
