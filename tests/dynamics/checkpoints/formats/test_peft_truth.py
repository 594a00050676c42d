"""Our ΔW against PEFT itself: the difference that merging makes to the base weight, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamics.checkpoints import open_trajectory

peft = pytest.importorskip("peft")
transformers_utils = pytest.importorskip("transformers.pytorch_utils")

pytestmark = pytest.mark.filterwarnings("ignore")


class Linears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(10, 12)
        self.v_proj = nn.Linear(12, 6, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(self.q_proj(x))


class Layers(nn.Module):
    """Two layers under the path that patterns are written for."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList([Linears(), Linears()])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 6, 3)
        self.two = nn.Conv2d(4, 6, 3, padding=1)
        self.point = nn.Conv2d(6, 8, 1)
        self.three = nn.Conv3d(2, 4, (1, 2, 3))


class Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn = transformers_utils.Conv1D(12, 5)


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(8, 2)


def randomised(model: nn.Module) -> None:
    """Every adapter parameter gets values, also those that start at zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=parameter.dtype))


def saved_and_merged(make: Callable[[], nn.Module], config: Any, folder: Path, safe: bool = True) -> dict[str, Tensor]:
    """Saves a random adapter with PEFT and returns what merging it changes, by parameter name."""
    torch.manual_seed(0)
    base = make().double()
    before = {name: parameter.detach().clone() for name, parameter in base.named_parameters()}
    adapted = peft.get_peft_model(base, config)
    adapted.double()
    randomised(adapted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted.save_pretrained(folder, safe_serialization=safe)
        merged = adapted.merge_and_unload()
    after = dict(merged.named_parameters())
    return {name: after[name].detach() - weight for name, weight in before.items()}


def opened(folder: Path) -> dict[str, Tensor]:
    trajectory = open_trajectory(folder)
    assert not [finding for finding in trajectory.findings if finding.severity == "error"]
    with trajectory.checkpoints[0].open() as matrices:
        return {name: matrix.to_dense() for name, matrix in matrices.items()}


def assert_same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-12, atol=1e-13)


def lora(**changes: Any) -> Any:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "v_proj"], **changes})


LINEAR = {
    "alpha over r": {},
    "rsLoRA": {"use_rslora": True},
    "bias of B": {"lora_bias": True},
    "bias all": {"bias": "all"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "patterns": {
        "rank_pattern": {"layers.0.q_proj": 2, r"model.layers.\d.v_proj": 3},
        "alpha_pattern": {"layers.1.v_proj": 5, "q_proj": 1000, "ayers.0.v_proj": 3},
    },
    "patterns, rsLoRA": {
        "use_rslora": True,
        "rank_pattern": {"proj": 2, r".*q_proj": 6, "no.such": 7},
        "alpha_pattern": {"q_proj": 3},
    },
    "saved module": {"target_modules": ["q_proj"], "modules_to_save": ["v_proj"]},
}


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
@pytest.mark.parametrize("changes", LINEAR.values(), ids=LINEAR.keys())
def test_linear(changes: dict[str, Any], safe: bool, tmp_path: Path) -> None:
    theirs = saved_and_merged(Layers, lora(**changes), tmp_path, safe)

    low_rank = {name: change for name, change in theirs.items() if name.endswith("_proj.weight")}
    if "modules_to_save" in changes:
        low_rank = {name: change for name, change in low_rank.items() if "q_proj" in name}
    assert_same(opened(tmp_path), stripped(low_rank))


def test_overlapping_patterns_as_peft_loads_them(tmp_path: Path) -> None:
    # PEFT sorts the patterns when it saves, so that it loads another scale than it trained with.
    config = lora(alpha_pattern={"v_proj": 5, "layers.1.v_proj": 1000})
    trained = saved_and_merged(Layers, config, tmp_path)["model.layers.1.v_proj.weight"]

    torch.manual_seed(0)
    reloaded = peft.PeftModel.from_pretrained(Layers().double(), str(tmp_path)).double()
    layer = reloaded.base_model.model.model.layers[1].v_proj
    expected = layer.get_delta_weight("default")
    findings = open_trajectory(tmp_path).findings

    torch.testing.assert_close(opened(tmp_path)["model.layers.1.v_proj"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(expected, trained * 200, rtol=1e-6, atol=1e-6)
    assert any(f.code == "OD119" and "alpha_pattern" in f.message and "1000 or 5" in f.message for f in findings)


def test_overlapping_rank_patterns_are_told_by_the_factors(tmp_path: Path) -> None:
    config = lora(rank_pattern={"v_proj": 2, "layers.1.v_proj": 3})
    theirs = saved_and_merged(Layers, config, tmp_path)

    assert_same(opened(tmp_path), stripped({n: change for n, change in theirs.items() if n.endswith("proj.weight")}))


def test_conv1d_of_gpt2_is_given_as_b_a(tmp_path: Path) -> None:
    theirs = saved_and_merged(Conv1D, lora(target_modules=["c_attn"], fan_in_fan_out=True), tmp_path)

    assert_same(opened(tmp_path), {"c_attn": theirs["c_attn.weight"].T})


def test_embedding_is_given_as_b_a(tmp_path: Path) -> None:
    theirs = saved_and_merged(Embedded, lora(target_modules=["embed"]), tmp_path)

    assert_same(opened(tmp_path), {"embed": theirs["embed.weight"].T})


def test_convolutions_are_given_as_acting_on_patches(tmp_path: Path) -> None:
    theirs = saved_and_merged(Convolutions, lora(target_modules=["one", "two", "point", "three"]), tmp_path)

    weights = {name: change.flatten(1) for name, change in theirs.items() if name.endswith("weight")}
    assert_same(opened(tmp_path), stripped(weights))


def test_grouped_convolution_is_refused_by_name(tmp_path: Path) -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Conv2d(8, 8, 3, groups=4)
            self.q_proj = nn.Linear(3, 2)

    adapted = peft.get_peft_model(Grouped(), lora(target_modules=["deep", "q_proj"]))
    adapted.save_pretrained(tmp_path)

    trajectory = open_trajectory(tmp_path)
    assert trajectory.matrices == ("q_proj",)
    (finding,) = [f for f in trajectory.findings if f.code == "OD103"]
    assert finding.matrix == "deep"
    assert "grouped convolution" in finding.message


def test_several_adapters_and_their_sum(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Linears().double()
    weight = base.q_proj.weight.detach().clone()
    adapted = peft.get_peft_model(base, lora(), adapter_name="default")
    adapted.add_adapter("second", lora(r=2, use_rslora=True))
    adapted.double()
    randomised(adapted)
    single = {name: adapted.base_model.model.q_proj.get_delta_weight(name) for name in ("default", "second")}
    adapted.save_pretrained(tmp_path)
    adapted.base_model.set_adapter(["default", "second"])
    summed = adapted.merge_and_unload().q_proj.weight.detach() - weight

    ours = opened(tmp_path)
    torch.testing.assert_close(ours["q_proj"], summed, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours["q_proj@default"], single["default"], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(ours["q_proj@second"], single["second"], rtol=1e-12, atol=1e-13)
    assert list(ours) == [f"{n}{a}" for n in ("q_proj", "v_proj") for a in ("", "@default", "@second")]


@pytest.mark.parametrize("pruned", [False, True])
def test_adalora(pruned: bool, tmp_path: Path) -> None:
    config = peft.AdaLoraConfig(init_r=4, lora_alpha=12, total_step=10, target_modules=["q_proj", "v_proj"])
    if pruned:
        config.rank_pattern = {
            "q_proj.lora_E.default": [True, False, True, True],
            "v_proj.lora_E.default": [False, False, True, False],
        }
    torch.manual_seed(0)
    adapted = peft.get_peft_model(Linears().double(), config).double()
    randomised(adapted)
    if pruned:  # PEFT zeroes what it prunes before it saves
        for name, mask in config.rank_pattern.items():
            layer = adapted.base_model.model.get_submodule(name.split(".")[0])
            layer.lora_E["default"].data[~torch.tensor(mask)] = 0
    expected = {
        name: adapted.base_model.model.get_submodule(name).get_delta_weight("default").detach()
        for name in ("q_proj", "v_proj")
    }
    adapted.save_pretrained(tmp_path)

    assert_same(opened(tmp_path), expected)


def test_multihead_attention(tmp_path: Path) -> None:
    theirs = saved_and_merged(Attention, lora(target_modules=["attn"]), tmp_path)

    expected = {"attn.in_proj_weight": theirs["attn.in_proj_weight"], "attn.out_proj": theirs["attn.out_proj.weight"]}
    assert_same(opened(tmp_path), expected)


def stripped(changes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removesuffix(".weight"): change for name, change in changes.items()}
