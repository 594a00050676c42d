"""torchtune and mistral-finetune: the scale of their own configurations."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynamics.checkpoints import NotARun, open_trajectory
from tests.dynamics.checkpoints.test_folders import assert_updates

A, B = torch.randn(4, 16), torch.randn(24, 4)


def test_mistral_finetune(tmp_path: Path) -> None:
    for step in (100, 200):
        folder = tmp_path / "checkpoints" / f"checkpoint_{step:06d}" / "consolidated"
        folder.mkdir(parents=True)
        name = "layers.0.attention.wq"
        save_file({f"{name}.lora_A.weight": step * A, f"{name}.lora_B.weight": B}, folder / "lora.safetensors")
        (folder / "params.json").write_text(json.dumps({"lora": {"enable": True, "rank": 4, "scaling": 2.0}}))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (100, 200)
    assert_updates(trajectory.checkpoints[1], {"layers.0.attention.wq": (B, 200 * A)})


def test_torchtune_s_own_files(tmp_path: Path) -> None:
    for epoch in (0, 1):
        tensors = {"layers.0.attn.q_proj.lora_a.weight": (epoch + 1) * A, "layers.0.attn.q_proj.lora_b.weight": B}
        torch.save(tensors, tmp_path / f"adapter_{epoch}.pt")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 12, "peft_type": "LORA"}))
    trajectory = open_trajectory(tmp_path)
    assert trajectory.steps == (0, 1)
    assert_updates(trajectory.checkpoints[1], {"layers.0.attn.q_proj": (B, 2 * A)}, scale=3.0)


@pytest.mark.parametrize(
    ("config", "message"),
    [(None, "there is no adapter_config.json beside it"), ({"r": 8, "lora_alpha": 8}, "gives it rank 8")],
)
def test_torchtune_without_its_scale(config: dict[str, int] | None, message: str, tmp_path: Path) -> None:
    torch.save({"q.lora_a.weight": A, "q.lora_b.weight": B}, tmp_path / "adapter_0.pt")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(NotARun) as raised:
        open_trajectory(tmp_path)
    assert message in raised.value.findings[-1].message
