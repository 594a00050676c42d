"""What is a weight matrix: not the scales, zero points and biases beside it, nor its packed numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dynamics.checkpoints import open_trajectory
from tests.whole_models import write_dense_run

Q = "model.layers.0.self_attn.q_proj"
EXPERTS = "model.layers.0.mlp.experts"
HALF = torch.float16


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


#: Name of the format -> tensors of one quantised matrix, as its library writes them, and the matrix's name.
FORMATS: dict[str, tuple[dict[str, torch.Tensor], str]] = {
    "fp8": ({f"{Q}.weight": torch.randn(8, 8).to(torch.float8_e4m3fn), f"{Q}.weight_scale_inv": torch.rand(2, 2)}, Q),
    "fp8 by row": (
        {
            f"{Q}.weight": torch.randn(8, 8).to(torch.float8_e4m3fn),
            f"{Q}.weight_scale": torch.rand(8, 1),
            f"{Q}.input_scale": torch.rand(1, 1),
        },
        Q,
    ),
    "GPTQ": (
        {
            f"{Q}.qweight": integers(2, 8),
            f"{Q}.scales": torch.rand(2, 8, dtype=HALF),
            f"{Q}.qzeros": integers(2, 2),
            f"{Q}.g_idx": integers(8),
        },
        Q,
    ),
    "bitsandbytes int8": ({f"{Q}.weight": integers(8, 8, dtype=torch.int8), f"{Q}.SCB": torch.rand(8, 1)}, Q),
    "bitsandbytes nf4": (
        {
            f"{Q}.weight": integers(32, 1, dtype=torch.uint8),
            f"{Q}.weight.absmax": torch.rand(2, 2),
            f"{Q}.weight.quant_map": torch.rand(4, 4),
            f"{Q}.weight.quant_state.bitsandbytes__nf4": integers(90, dtype=torch.uint8),
        },
        Q,
    ),
    "compressed-tensors": (
        {
            f"{Q}.weight_packed": integers(8, 2),
            f"{Q}.weight_scale": torch.rand(8, 2, dtype=torch.bfloat16),
            f"{Q}.weight_zero_point": integers(2, 2),
            f"{Q}.weight_shape": torch.tensor([8, 16]),
        },
        Q,
    ),
    "MXFP4": (
        {
            f"{EXPERTS}.gate_up_proj_blocks": integers(2, 8, 2, 4, dtype=torch.uint8),
            f"{EXPERTS}.gate_up_proj_scales": integers(2, 8, 2, dtype=torch.uint8),
            f"{EXPERTS}.gate_up_proj_bias": torch.rand(2, 8),
        },
        f"{EXPERTS}.gate_up_proj",
    ),
    "quanto": ({f"{Q}.weight._data": integers(8, 8, dtype=torch.int8), f"{Q}.weight._scale": torch.rand(8, 1)}, Q),
    "HQQ": (
        {
            f"{Q}.W_q": integers(4, 8, dtype=torch.uint8),
            f"{Q}.scale": torch.rand(4, 1),
            f"{Q}.zero": torch.rand(4, 1),
        },
        Q,
    ),
    "AQLM": (
        {
            f"{Q}.codes": integers(8, 2, 1, dtype=torch.int8),
            f"{Q}.codebooks": torch.rand(1, 4, 1, 8),
            f"{Q}.scales": torch.rand(8, 1, 1, 1),
        },
        Q,
    ),
}


@pytest.mark.parametrize(("tensors", "name"), FORMATS.values(), ids=FORMATS.keys())
def test_packed_weights_are_refused_by_name_and_what_unpacks_them_is_beside(
    tensors: dict[str, torch.Tensor], name: str, tmp_path: Path
) -> None:
    steps = {step: {**tensors, "lm_head.weight": torch.full((4, 3), float(step))} for step in (10, 20)}
    trajectory = open_trajectory(write_dense_run(tmp_path, steps))
    assert trajectory.matrices == ("lm_head",)
    errors = [finding for finding in trajectory.findings if finding.code == "OD103"]
    assert [error.matrix for error in errors] == [name, name]
    assert "(packed) are quantised, and not analysed" in errors[0].message
    assert "dequantise" in errors[0].remedy


def test_a_trained_parameter_called_scale_is_a_matrix(tmp_path: Path) -> None:
    tensors = {
        "block.scale": torch.randn(3, 4),
        "attn.logit_scale": torch.randn(2, 5),
        "attn.q.weight": torch.ones(2, 2),
    }
    trajectory = open_trajectory(write_dense_run(tmp_path, {10: tensors, 20: tensors}))
    assert set(trajectory.matrices) == {"block.scale", "attn.logit_scale", "attn.q"}


def test_biases_of_experts_and_buffers_are_beside(tmp_path: Path) -> None:
    others = {
        f"{EXPERTS}.down_proj_bias": torch.rand(3, 4),
        "attn.rotary_emb.cos_cached": torch.rand(1, 1, 6, 4),
        "attn.relative_position_index": torch.ones(4, 4, dtype=torch.int64),
        "conv.weight_g": torch.rand(6, 1, 1),
    }
    tensors = {f"{EXPERTS}.down_proj": torch.rand(3, 4, 5), **others}
    trajectory = open_trajectory(write_dense_run(tmp_path, {10: tensors, 20: tensors}))
    assert trajectory.matrices == tuple(f"{EXPERTS}.down_proj[{index}]" for index in range(3))
    (note,) = [finding for finding in trajectory.findings if finding.code == "OD109"]
    assert note.evidence["counts"] == {"bias": 1, "buffer": 2, "vector or scalar": 1}
