"""Adapters of parameters: one matrix for each expert, as PEFT merges it; what is ambiguous is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamics.checkpoints import open_trajectory
from tests.dynamics.checkpoints.formats.test_peft_truth import Linears, assert_same, lora, opened, saved_and_merged

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore")


class Experts(nn.Module):
    """Fused experts, (experts, out, in) as most models keep them, or (experts, in, out)."""

    def __init__(self, count: int, hidden: int, inner: int, transposed: bool) -> None:
        super().__init__()
        up, down = (count, 2 * inner, hidden), (count, hidden, inner)
        if transposed:
            self.is_transposed = True
            up, down = (count, hidden, 2 * inner), (count, inner, hidden)
        self.gate_up_proj = nn.Parameter(torch.randn(up))
        self.down_proj = nn.Parameter(torch.randn(down))

    def forward(self, x: Tensor) -> Tensor:
        return x


class Mixture(nn.Module):
    def __init__(self, count: int = 3, hidden: int = 8, inner: int = 6, transposed: bool = False) -> None:
        super().__init__()
        self.mlp = nn.Module()
        self.mlp.experts = Experts(count, hidden, inner, transposed)


@pytest.mark.parametrize("order", [("gate_up_proj", "down_proj"), ("down_proj", "gate_up_proj")])
@pytest.mark.parametrize("transposed", [False, True], ids=["out-in", "in-out"])
@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"experts.gate_up_proj": 2}, "use_rslora": True}])
def test_fused_experts(order: tuple[str, str], transposed: bool, patterns: dict[str, Any], tmp_path: Path) -> None:
    config = lora(target_modules=[], target_parameters=[f"mlp.experts.{name}" for name in order], **patterns)
    theirs = saved_and_merged(lambda: Mixture(transposed=transposed), config, tmp_path)

    expected = {
        f"{name}[{index}]": change.T if transposed else change
        for name, changes in theirs.items()
        for index, change in enumerate(changes)
    }
    assert_same(opened(tmp_path), expected)


def test_one_adapted_parameter_of_experts(tmp_path: Path) -> None:
    config = lora(target_modules=[], target_parameters=["experts.down_proj"])
    theirs = saved_and_merged(Mixture, config, tmp_path)["mlp.experts.down_proj"]

    assert_same(opened(tmp_path), {f"mlp.experts.down_proj[{i}]": change for i, change in enumerate(theirs)})


def test_adapted_parameter_of_a_linear_layer(tmp_path: Path) -> None:
    theirs = saved_and_merged(Linears, lora(target_modules=[], target_parameters=["q_proj.weight"]), tmp_path)

    assert_same(opened(tmp_path), {"q_proj": theirs["q_proj.weight"]})


def test_parameters_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Parameter(torch.randn(3, 6, 8))
            self.second = nn.Parameter(torch.randn(3, 8, 6))

        def forward(self, x: Tensor) -> Tensor:
            return x

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = Twins()
            self.q_proj = nn.Linear(3, 2)

    config = lora(target_modules=["q_proj"], target_parameters=["experts.first", "experts.second"])
    peft.get_peft_model(Holder(), config).save_pretrained(tmp_path)

    trajectory = open_trajectory(tmp_path)
    assert trajectory.matrices == ("q_proj",)
    (finding,) = [f for f in trajectory.findings if f.code == "OD105"]
    assert finding.matrix == "experts"
    assert "first, second cannot be distinguished" in finding.message
