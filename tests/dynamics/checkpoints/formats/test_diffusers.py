"""diffusers: the scale in a file's metadata, and files that need no configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dynamics.checkpoints import NotARun, open_trajectory
from probes.low_rank import LowRankMatrix
from tests.dynamics.checkpoints.test_folders import assert_updates
from tests.runs import adapter_config

A, B = torch.randn(4, 10), torch.randn(6, 4)


def with_metadata(folder: Path, content: Any) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    tensors = {"transformer.h.0.to_q.lora_A.weight": A, "transformer.h.0.to_q.lora_B.weight": B}
    save_file(tensors, folder / "lora.safetensors", metadata={"lora_adapter_metadata": text})
    return folder


@pytest.mark.parametrize(
    ("content", "scale"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, 2.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.use_rslora": True}, 4.0),
        ({"transformer.r": 4, "transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_q": 2}}, 0.5),
        ({"text_encoder.r": 4, "text_encoder.lora_alpha": 8}, 1.0),
    ],
)
def test_the_scale_that_diffusers_wrote(content: dict[str, Any], scale: float, tmp_path: Path) -> None:
    trajectory = open_trajectory(with_metadata(tmp_path, content))
    assert "no alpha" not in str(trajectory.findings)
    with trajectory.checkpoints[0].open() as matrices:
        matrix = matrices["transformer.h.0.to_q"]
        assert isinstance(matrix, LowRankMatrix)
        assert matrix.scale == scale


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("{", "OD102", "is not valid JSON"),
        ("[]", "OD102", "is not a JSON object"),
        ({"transformer.r": "four"}, "OD102", "Its r is 'four'"),
        ({"transformer.r": 4, "transformer.use_dora": True}, "OD105", "It is DoRA"),
    ],
)
def test_metadata_that_cannot_be_used(content: Any, code: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(NotARun) as raised:
        open_trajectory(with_metadata(tmp_path, content))
    (error,) = [finding for finding in raised.value.findings if finding.severity == "error"]
    assert error.code == code
    assert said in error.message


@pytest.mark.parametrize("has_config", [False, True])
def test_an_adapter_of_diffusers_needs_no_configuration(has_config: bool, tmp_path: Path) -> None:
    save_file({"unet.q.lora_A.weight": A, "unet.q.lora_B.weight": B}, tmp_path / "pytorch_lora_weights.safetensors")
    if has_config:
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(rank=8)))
    assert_updates(open_trajectory(tmp_path).checkpoints[0], {"unet.q": (B, A)}, scale=1.0)
