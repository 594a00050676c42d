"""Matrices from stored tensors: views, sums of adapters, AdaLoRA. Nothing that is stored is rounded on the way."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dynamics.checkpoints import MatrixShape, UnreadableMatrix, open_trajectory
from dynamics.checkpoints.files import read_weight_file
from dynamics.checkpoints.matrices import (
    StoredMatrix,
    TensorRef,
    low_rank,
    open_matrices,
    oriented,
    rows,
    since,
    stack_blocks,
    total,
    turned,
    weight,
)
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


# --- stored matrices -------------------------------------------------------------------------------

RUN, BASE = Path("here"), Path("base")
STORED = {
    TensorRef(RUN, "w"): torch.arange(12.0).reshape(4, 3),
    TensorRef(RUN, "b"): torch.ones(4, 2),
    TensorRef(RUN, "a"): torch.full((2, 3), 2.0),
    TensorRef(BASE, "w"): -torch.arange(12.0).reshape(4, 3),
}


def dense(file: Path = RUN) -> StoredMatrix:
    return weight(file, "w", (4, 3), "F32", lambda tensor: tensor)


def product(file: Path = RUN, scale: float = 2.0) -> StoredMatrix:
    sources = {"left": TensorRef(file, "b"), "right": TensorRef(file, "a")}
    return StoredMatrix(MatrixShape(4, 3, 2, "F32"), sources, lambda left, right: LowRankMatrix(left, right, scale))


def test_one_key_of_two_files_is_two_tensors() -> None:
    assert torch.equal(dense(BASE).load(STORED.__getitem__), -dense(RUN).load(STORED.__getitem__))


def test_the_files_that_a_matrix_of_matrices_reads() -> None:
    matrix = stack_blocks([dense(), turned(turned(dense(BASE)))])
    assert (matrix.reads(RUN), matrix.reads(BASE), dense().reads(BASE)) == (True, True, False)


def test_only_a_weight_as_stored_has_the_key_of_its_tensor() -> None:
    assert dense().key == "w"
    assert [turned(dense()).key, rows(dense(), 0, 2).key, stack_blocks([dense()]).key, product().key] == [""] * 4


def test_views_of_dense_weights() -> None:
    stored = STORED[TensorRef(RUN, "w")]
    for matrix, expected in (
        (turned(dense()), stored.T),
        (rows(dense(), 1, 3), stored[1:3]),
        (stack_blocks([dense(), dense(BASE)]), torch.cat([stored, -stored])),
    ):
        assert torch.equal(matrix.load(STORED.__getitem__), expected)
        assert (matrix.shape.out, matrix.shape.in_) == tuple(expected.shape)


def test_the_start_subtracted_from_itself_is_zero() -> None:
    matrix = since(product(), product())
    assert (matrix.shape.rank, matrix.shape.holds) == (4, "update")
    assert not matrix.load(STORED.__getitem__).to_dense().any()


def test_a_sum_takes_adapters_of_any_name() -> None:
    matrix = total({"self": product(scale=1.0), "left": product(scale=3.0)}).load(STORED.__getitem__)
    assert matrix.to_dense().unique().tolist() == [16.0]


@pytest.mark.parametrize(
    ("size", "is_transposed", "expected"),
    [((4, 3), False, (4, 3)), ((4, 3), True, (4, 3)), ((3, 4), False, (3, 4)), ((4, 4), False, None)],
)
def test_the_orientation_of_the_run(
    size: tuple[int, int], is_transposed: bool, expected: tuple[int, int] | None
) -> None:
    matrix = oriented(dense(), MatrixShape(*size, 2, "F32"), is_transposed)
    assert (None if matrix is None else (matrix.shape.out, matrix.shape.in_)) == expected


def test_a_square_base_weight_is_turned_if_the_base_stores_in_out() -> None:
    square = weight(RUN, "s", (3, 3), "F32", lambda tensor: tensor)
    stored = torch.arange(9.0).reshape(3, 3)
    for is_transposed in (False, True):
        matrix = oriented(square, MatrixShape(3, 3, 2, "F32"), is_transposed)
        assert matrix is not None
        assert torch.equal(matrix.load(lambda tensor: stored), stored.T if is_transposed else stored)


def test_a_matrix_whose_file_is_not_opened_is_unreadable(tmp_path: Path) -> None:
    save_file({"b": torch.ones(4, 2), "a": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    file = read_weight_file(tmp_path / "x.safetensors")
    matrix = low_rank(file, "a", "b", 2.0)
    with open_matrices({"q": matrix}, [file]) as matrices:
        assert matrices["q"].to_dense().unique().tolist() == [4.0]
    with open_matrices({"q": matrix, "r": dense()}, [file]) as matrices, pytest.raises(UnreadableMatrix):
        _ = matrices["r"]
