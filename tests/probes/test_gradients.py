"""Gradient norms equal those of gradients that are cloned by hand, however the training computes them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from probes.gradients import GradientNorms, loss_scale, norms_of, squared_norms

TINY = LlamaConfig(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def tiny_lora(dtype: torch.dtype = torch.float64, checkpointing: bool | None = None) -> PeftModel:
    """A Llama with LoRA in training mode; ``checkpointing`` is ``use_reentrant``, ``None`` for none at all."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(LlamaForCausalLM(TINY), config).to(dtype).train()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    return model


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def tokens(count: int) -> list[Tensor]:
    return list(torch.randint(0, 32, (count, 2, 6), generator=torch.Generator().manual_seed(1)))


def cloned(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad.detach().clone() for parameter in parameters]  # pyright: ignore[reportOptionalMemberAccess]


def norms_by_hand(values: Sequence[Tensor]) -> list[float]:
    return [math.sqrt(sum(number * number for number in value.double().flatten().tolist())) for value in values]


def norms(squared: Tensor | None) -> list[float]:
    assert squared is not None
    return squared.sqrt().tolist()


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["", "checkpointed", "reentrant"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "bf16"])
@pytest.mark.parametrize("clip", [math.inf, 1e3, 1e-3], ids=["", "clipping", "binding"])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_brute_force(micro_batches: int, clip: float, autocast: bool, checkpointing: bool | None) -> None:
    model = tiny_lora(torch.float32 if autocast else torch.float64, checkpointing)
    parameters = trained(model)
    recorded = GradientNorms(parameters)

    recorded.arm()
    for batch in tokens(micro_batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=batch, labels=batch).loss / micro_batches
        loss.backward()
    before = cloned(parameters)
    total = nn.utils.clip_grad_norm_(parameters, clip)
    after = cloned(parameters)
    recorded.disarm()

    tolerance = 1e-6 if autocast else 1e-12
    assert (clip < total) == (clip == 1e-3)
    assert norms(recorded.before_clipping()) == pytest.approx(norms_by_hand(before), rel=tolerance, abs=0)
    assert norms(recorded.after_clipping()) == pytest.approx(norms_by_hand(after), rel=tolerance, abs=0)
    assert min(norms_by_hand(before)) > 0


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_scaled_loss(micro_batches: int) -> None:
    model = tiny_lora(torch.float32)
    parameters = trained(model)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    recorded = GradientNorms(parameters)

    recorded.arm()
    for batch in tokens(micro_batches):
        with torch.autocast("cpu", torch.float16):
            loss = model(input_ids=batch, labels=batch).loss / micro_batches
        scaler.scale(loss).backward()
    scale = loss_scale(scaler, optimizer)
    before = [gradient / 1024 for gradient in cloned(parameters)]
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(parameters, 1e-3)
    recorded.disarm()

    assert scale == 1024
    assert loss_scale(scaler, optimizer) == 1
    assert [norm / scale for norm in norms(recorded.before_clipping())] == pytest.approx(
        norms_by_hand(before), rel=1e-6
    )
    assert norms(recorded.after_clipping()) == pytest.approx(norms_by_hand(cloned(parameters)), rel=1e-6)


def test_scale_of_the_next_step() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1)
    scaler.scale(weight.sum()).backward()
    scaler.step(optimizer)
    stepped = loss_scale(scaler, optimizer)
    scaler.update()
    assert (stepped, loss_scale(scaler, optimizer)) == (1, 16)


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu", enabled=False)])
def test_no_scale(scaler: torch.amp.GradScaler | None) -> None:
    assert loss_scale(scaler, torch.optim.SGD([nn.Parameter(torch.ones(1))])) == 1


def test_what_the_optimizer_sees_is_a_sum() -> None:
    weight = nn.Parameter(torch.tensor([2.0]))
    recorded = GradientNorms([weight])
    recorded.arm()
    (3 * weight).sum().backward()
    (weight * weight).sum().backward()
    assert norms(recorded.before_clipping()) == [7.0]


def test_measured_when_asked_instead_of_when_the_backward_pass_ends() -> None:
    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    measured = GradientNorms([weight])
    measured.arm()
    (weight * weight).sum().backward()
    assert norms(measured.before_clipping()) == [10.0]
    assert weight.grad is not None
    weight.grad /= 2  # as a loop does that averages over processes
    measured.measure()
    assert norms(measured.before_clipping()) == [5.0]


def test_used_twice() -> None:
    weight = nn.Parameter(torch.tensor([2.0, 1.0]))
    recorded = GradientNorms([weight])
    recorded.arm()
    (3 * weight[0] + weight[0] + 3 * weight[1]).backward()
    assert norms(recorded.before_clipping()) == [5.0]


def test_unused_and_frozen() -> None:
    used, unused, frozen = (nn.Parameter(torch.ones(4), requires_grad=trains) for trains in (True, True, False))
    recorded = GradientNorms([used, unused, frozen])
    recorded.arm()
    (used * frozen).sum().backward()
    squared = recorded.before_clipping()
    assert squared is not None
    assert squared.tolist() == [4.0, -1.0, -1.0]
    assert norms_of(squared, [used, unused, frozen], [[used, unused], [unused, frozen]]) == [2.0, 0.0]


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_not_finite(value: float) -> None:
    broken, sound = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    recorded = GradientNorms([broken, sound])
    recorded.arm()
    ((broken * torch.tensor([1.0, value])).sum() + sound.sum()).backward()
    squared = recorded.before_clipping()
    assert squared is not None
    assert norms_of(squared, [broken, sound], [[broken], [sound], [broken, sound]]) == [math.inf, 1.0, math.inf]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.complex64])
def test_formats(dtype: torch.dtype) -> None:
    weight = nn.Parameter(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype))
    recorded = GradientNorms([weight])
    recorded.arm()
    (weight * weight).abs().sum().backward()
    by_hand = math.sqrt(sum(abs(number) ** 2 for number in weight.grad.flatten().tolist()))  # pyright: ignore
    assert norms(recorded.before_clipping()) == pytest.approx([by_hand], rel=1e-12)


def test_squares_beyond_the_format() -> None:
    weight = nn.Parameter(torch.ones(4))
    weight.grad = torch.full((4,), 1e30)  # its square does not fit into float32
    assert norms(squared_norms([weight])) == pytest.approx([2e30], rel=1e-6)


def test_sparse_embedding() -> None:
    embedding = nn.Embedding(10, 3, sparse=True)
    recorded = GradientNorms(list(embedding.parameters()))
    recorded.arm()
    embedding(torch.tensor([4, 4, 7])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert norms(recorded.before_clipping()) == pytest.approx([math.sqrt(3 * 4 + 3 * 1)], rel=1e-12)
    assert gradient.is_sparse
    assert not gradient.is_coalesced()


def test_no_parameters() -> None:
    recorded = GradientNorms([])
    recorded.arm()
    nn.Linear(2, 1)(torch.ones(2)).backward()
    assert recorded.before_clipping() is None
    assert recorded.after_clipping().shape == (0,)
