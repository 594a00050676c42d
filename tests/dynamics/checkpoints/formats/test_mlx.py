"""MLX-LM and MLX-VLM: transposed factors, and the scale of their own configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dynamics.checkpoints import NotARun, open_trajectory
from probes.low_rank import LowRankMatrix
from tests.dynamics.checkpoints.test_folders import assert_updates

MLX = {"fine_tune_type": "lora", "num_layers": 8, "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0}}


def write_mlx(folder: Path, config: dict[str, Any], **tensors: Tensor) -> Path:
    factors = {"model.layers.0.q.lora_a": torch.randn(10, 4), "model.layers.0.q.lora_b": torch.randn(4, 6), **tensors}
    save_file(factors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_mlx_stores_transposed_factors(tmp_path: Path) -> None:
    """y = x Wᵀ + scale · (x a) b."""
    a, b = torch.randn(10, 4), torch.randn(4, 6)
    write_mlx(tmp_path, MLX, **{"model.layers.0.q.lora_a": a, "model.layers.0.q.lora_b": b})
    with open_trajectory(tmp_path).checkpoints[0].open() as matrices:
        matrix = matrices["model.layers.0.q"]
        assert isinstance(matrix, LowRankMatrix)
        torch.testing.assert_close(matrix.to_dense(), 20.0 * (a.double() @ b.double()).T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        ({"fine_tune_type": "dora"}, "OD105", "MLX-LM's fine_tune_type 'dora'"),
        ({"fine_tune_type": "full"}, "OD103", "MLX-LM's fine_tune_type 'full'"),
        ({"lora_parameters": {"rank": 4}}, "OD102", "Its lora_parameters.scale is None; expected a number."),
        ({"lora_parameters": {"scale": "20"}}, "OD102", "Its lora_parameters.scale is '20'; expected a number."),
        ({"lora_parameters": []}, "OD102", "Its lora_parameters.scale is None; expected a number."),
    ],
)
def test_mlx_configurations_that_are_refused(change: dict[str, Any], code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(NotARun) as raised:
        open_trajectory(write_mlx(tmp_path, {**MLX, **change}))
    (error,) = raised.value.findings
    assert error.code == code
    assert said in error.message


def test_mlx_experts_are_refused_by_name(tmp_path: Path) -> None:
    experts = {"moe.w.lora_a": torch.randn(8, 10), "moe.w.lora_b": torch.randn(2, 6, 4)}
    trajectory = open_trajectory(write_mlx(tmp_path, MLX, **experts))
    (error,) = [finding for finding in trajectory.findings if finding.severity == "error"]
    assert (error.code, error.matrix) == ("OD104", "moe.w")
    assert trajectory.matrices == ("model.layers.0.q",)


@pytest.mark.parametrize("keys", [(".A", ".B"), (".lora_A.default.weight", ".lora_B.default.weight")])
@pytest.mark.parametrize("size", [16, 24])
def test_mlx_vlm(keys: tuple[str, str], size: int, tmp_path: Path) -> None:
    """y + alpha (x A) B: also where the matrix is square, so that shapes do not tell what is transposed."""
    name, right = "language_model.layers.0.q_proj", torch.randn(4, 24)
    left = torch.randn(size, 4)
    save_file({f"{name}{keys[0]}": left, f"{name}{keys[1]}": right}, tmp_path / "adapters.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"rank": 4, "alpha": 0.1, "dropout": 0.0}))
    trajectory = open_trajectory(tmp_path)
    assert_updates(trajectory.checkpoints[0], {name: (right.mT, left.mT)}, scale=0.1)
