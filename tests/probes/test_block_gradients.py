"""The gradient of a block beside the dense gradient it is a part of."""

import re

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from probes.block_gradients import along, factors, gradient_as_matrix, in_tangent_space, part_of, viewed
from probes.blocks import find_blocks
from probes.low_rank import LowRankMatrix
from probes.sample_gradients import Materialised, SampleGradient

SAMPLES = 3
GENERATOR = torch.Generator().manual_seed(0)


def of(values):
    return SampleGradient(tuple(values.shape[1:]), len(values), [Materialised(values)])


def block_and_gradients(space):
    """A LoRA block, its ∇W by sample, and the gradients of B and A that follow: s ∇W Aᵀ and s Bᵀ ∇W."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 4, bias=False)).double()
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["0"], "init_lora_weights": False}
    (block,) = find_blocks(get_peft_model(net, LoraConfig(**options)).double(), space).chosen
    a, b = block.products[0].right, block.products[0].left
    dense = torch.randn(SAMPLES, 4, 5, generator=GENERATOR, dtype=torch.float64)
    gradients = {id(a): of(3 * b.detach().mT @ dense), id(b): of(3 * dense @ a.detach().mT)}
    return block, dense, gradients


def test_a_view_takes_its_part_of_each_sample():
    parameter = nn.Parameter(torch.zeros(6, 2))
    values = torch.randn(SAMPLES, 6, 2, generator=GENERATOR)
    rows = viewed(of(values), lambda tensor: tensor[2:4], parameter)
    assert rows.shape == (2, 2)
    assert torch.equal(rows.dense(parameter), values[:, 2:4])
    assert torch.equal(part_of(values[0], lambda tensor: tensor[2:4]), values[0, 2:4])


def test_a_change_is_turned_the_way_its_gradient_lies():
    gradient = of(torch.zeros(SAMPLES, 5, 4))
    change = LowRankMatrix(torch.randn(4, 1, generator=GENERATOR), torch.randn(1, 5, generator=GENERATOR))
    assert torch.equal(along(change, gradient).to_dense(), change.to_dense().mT)
    assert torch.equal(along(change.to_dense(), gradient), change.to_dense().mT)
    assert along(change, of(torch.zeros(SAMPLES, 4, 5))) is change


def test_tangent_space_from_the_factors_and_from_the_matrix_are_alike():
    block, dense, gradients = block_and_gradients("tangent")
    solved = in_tangent_space(block, block.tangent, None, torch.float64, gradients)
    direct = in_tangent_space(block, block.tangent, Materialised(3 * dense), torch.bfloat16, gradients)
    for gradient in (solved, direct):
        values = gradient.dense(next(iter(factors(block)))).flatten(1)
        products = values @ values.mT
        left, right = (torch.linalg.qr(factor.detach())[0] for factor in (factors(block)[1], factors(block)[0].mT))
        outside = dense - left @ (left.mT @ dense)
        tangent = dense - (outside - (outside @ right) @ right.mT)
        torch.testing.assert_close(products, tangent.flatten(1) @ tangent.flatten(1).mT)


def test_a_layer_that_computes_in_another_way_is_refused_in_weight_space():
    block, _, gradients = block_and_gradients("weight")
    with pytest.raises(ValueError, match=re.escape("Choose space='tangent'.")):
        gradient_as_matrix(block, block.layer, None, gradients, SAMPLES)
