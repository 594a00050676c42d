"""The blocks of a model's Fisher: which parameters each is made of, and how large it is."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from probes.blocks import find_blocks, trained_parameters
from probes.low_rank import LowRankMatrix
from probes.watched import watched_matrices


def adapted(rank: int = 2, **changes: object) -> nn.Module:
    """A model of two linear layers, 6 → 5 → 4, with LoRA on both and a trained bias beside the second."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    model = get_peft_model(inner, LoraConfig(r=rank, target_modules=["0", "2"], **changes))  # type: ignore[arg-type]
    inner.get_submodule("2").base_layer.bias.requires_grad_(True)  # type: ignore[union-attr]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize(
    ("space", "dimensions"),
    [
        ("tangent", {"0": 2 * (5 + 6 - 2), "2": 2 * (4 + 5 - 2), "2.bias": 4}),
        ("factor", {"0": 2 * (5 + 6), "2": 2 * (4 + 5), "2.bias": 4}),
        ("weight", {"0": 5 * 6, "2": 4 * 5, "2.bias": 4}),
    ],
)
def test_dimensions_of_the_spaces(space: str, dimensions: dict[str, int]) -> None:
    blocks = find_blocks(adapted(), space)
    assert {block.name: block.dimension for block in blocks.chosen} == dimensions
    assert (blocks.uncovered, blocks.covered_share) == ((), 1.0)


def test_blocks_of_matrices_are_the_watched_matrices() -> None:
    model = adapted()
    watched = watched_matrices(model)
    assert all(isinstance(matrix, LowRankMatrix) for matrix in watched.values())
    assert [block.name for block in find_blocks(model, "tangent").chosen if block.products] == list(watched)


def test_chosen_blocks_leave_the_others_uncovered() -> None:
    blocks = find_blocks(adapted(), "tangent", ["0"])
    trained = trained_parameters(adapted())
    assert [block.name for block in blocks.chosen] == ["0"]
    assert set(blocks.uncovered) == {name for name in trained if not name.startswith("0.")}
    assert blocks.covered_share == pytest.approx(2 * (5 + 6) / (2 * (5 + 6) + 2 * (4 + 5) + 4))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "Expected names of blocks, got none. Leave blocks out to measure all."),
        (["1"], "Expected names of blocks, such as ['0', '2', '2.bias'], got ['1']."),
    ],
)
def test_names_that_are_no_blocks(names: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        find_blocks(adapted(), "tangent", names)


def test_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="Expected a model with trainable parameters, got one in which none requires"):
        find_blocks(adapted().requires_grad_(False), "tangent")


def test_names_of_trained_parameters_have_no_wrappers() -> None:
    names = list(trained_parameters(nn.DataParallel(adapted())))
    assert not [name for name in names if name.startswith(("module.", "base_model."))]
    assert "2.bias" in names
