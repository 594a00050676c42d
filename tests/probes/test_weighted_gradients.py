"""Weighted sums of per-sample gradients are those of one gradient a sample, in the space of K."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from probes import LowRankMatrix, Task, gradient_gram
from probes.blocks import Block, trained_parameters
from probes.sample_gradients import Materialised, SampleGradient
from probes.weighted_gradients import _add, weighted_gradients, weighted_parameter_gradients
from tests.families import FAMILIES
from tests.runs import VOCABULARY, llama, lora_llama

SAMPLES = 6
WEIGHTS = torch.tensor([[1.0, -2.0, 0.5, 0.0, 3.0, -1.0], [0.0, 0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)


def texts(count: int = SAMPLES, **options) -> list[Task]:
    """Two tasks of random text, of several lengths."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number in range(count):
        ids = torch.randint(VOCABULARY, (4 + number % 3,), generator=generator)
        samples.append({"input_ids": ids, "labels": ids})
    return [Task("a", samples[: count // 2], batch_size=2, **options), Task("b", samples[count // 2 :], loss="mean")]


def one_by_one(model: nn.Module, tasks: list[Task], weights: Tensor) -> dict[nn.Parameter, Tensor]:
    """The gradient of the weighted loss, sample after sample."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    total = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in parameters]
    numbers = iter(weights.tolist())
    for task in tasks:
        for batch in task.batches():
            for loss in task.losses(model, batch):
                parts = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
                weight = next(numbers)
                for whole, part in zip(total, parts, strict=True):
                    whole += 0 if part is None else weight * part.double()
    return dict(zip(parameters, total, strict=True))


def test_in_factor_space_they_are_gradients_of_the_weighted_loss() -> None:
    model = lora_llama(lora_dropout=0.0, init_lora_weights=False).double().eval()
    names = {name.removeprefix("base_model.model."): p for name, p in model.named_parameters() if p.requires_grad}
    tasks = texts()
    for change, weights in zip(weighted_gradients(model, tasks, WEIGHTS, space="factor"), WEIGHTS, strict=True):
        expected = one_by_one(model, tasks, weights)
        assert len(change) == len(names)
        for name, value in change.items():
            torch.testing.assert_close(value, expected[names[name]], rtol=1e-10, atol=1e-12)


def test_dense_weights_and_vectors() -> None:
    model = llama().double().eval()
    tasks = texts()
    (change, _) = weighted_gradients(model, tasks, WEIGHTS)
    expected = one_by_one(model, tasks, WEIGHTS[0])
    for name, parameter in model.named_parameters():
        value = change[name] if parameter.ndim < 2 else change[name.removesuffix(".weight")]
        torch.testing.assert_close(value, expected[parameter], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_in_tangent_space_products_with_them_are_rows_of_k(dtype: torch.dtype) -> None:
    """⟨Gᵀw, Gᵀv⟩ = wᵀKv, and ⟨Gᵀw, δ⟩ = wᵀb: all that a projection needs, from the changes as they are returned."""
    model = lora_llama(lora_dropout=0.0, init_lora_weights=False).to(dtype).eval()
    tasks = texts()
    one, other = weighted_gradients(model, tasks, WEIGHTS)
    gram = gradient_gram(model, tasks, update=one)
    k, b = gram.gram["global"], gram.update_product["global"]
    exact = {"rtol": 1e-10, "atol": 0.0} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 0.0}
    torch.testing.assert_close(b, k @ WEIGHTS[0], **exact)
    assert gram.update_norm_squared["global"] == pytest.approx(float(WEIGHTS[0] @ k @ WEIGHTS[0]), rel=exact["rtol"])
    assert abs(gram.share_outside_space["global"]) < 1e-6
    for name, change in other.items():
        assert isinstance(change, LowRankMatrix)
        assert change.rank == 6
        assert change.left_factor.dtype == dtype
        own = gram.gram[name]
        torch.testing.assert_close(change.to_dense().square().sum(), own[3, 3], **exact)


def test_a_matrix_at_zero_has_one_side_alone() -> None:
    """While B is zero, as LoRA begins, a step reaches X A only: rank r."""
    model = lora_llama(lora_dropout=0.0).double().eval()
    change = weighted_gradients(model, texts(), WEIGHTS)[0]["model.layers.0.self_attn.q_proj"]
    assert isinstance(change, LowRankMatrix)
    assert change.rank == 3
    right = model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj").lora_A["default"].weight
    outside = change.to_dense() - change.to_dense() @ torch.linalg.pinv(right) @ right
    assert outside.norm() < 1e-10 * change.to_dense().norm()


@pytest.mark.parametrize("family", ["gpt2", "llava", "mixtral"])
def test_families(family: str) -> None:
    from peft import get_peft_model

    made = FAMILIES[family]
    model, batch = made.model_and_batch()
    model = get_peft_model(model, made.lora()).eval()
    size = len(batch["input_ids"])
    samples = [{name: value[number] for name, value in batch.items()} for number in range(size)]
    tasks, weights = [Task("it", samples)], torch.tensor([[1.0, -0.5]], dtype=torch.float64)
    change = weighted_gradients(model, tasks, weights)[0]
    gram = gradient_gram(model, tasks, update=change)
    torch.testing.assert_close(gram.update_product["global"], gram.gram["global"] @ weights[0], rtol=1e-4, atol=1e-6)


def test_samples_without_weight_do_not_count_be_they_broken_or_not() -> None:
    model = lora_llama(lora_dropout=0.0, init_lora_weights=False).double().eval()
    tasks = texts()
    (expected,) = weighted_gradients(model, tasks, WEIGHTS[:1], space="factor")
    ids = tasks[1].samples[0]["input_ids"]
    broken = [{"input_ids": ids, "labels": torch.full_like(ids, -100)}, *tasks[1].samples[1:]]
    again = [tasks[0], Task("b", broken, loss="mean")]
    (change,) = weighted_gradients(model, again, WEIGHTS[:1], space="factor")
    for name, value in change.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-10, atol=1e-14)


def test_the_model_is_left_as_it_was() -> None:
    model = lora_llama(lora_dropout=0.3, init_lora_weights=False).train()
    state = torch.get_rng_state()
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    weighted_gradients(model, texts(), WEIGHTS)
    assert model.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("weights", "options", "what"),
    [
        (torch.ones(2, 5), {}, "one for each sample"),
        (torch.zeros(1, 6), {}, "weight other than 0"),
        (torch.ones(1, 6), {"space": "weight"}, "'tangent' or 'factor'"),
    ],
)
def test_what_does_not_fit_is_refused(weights: Tensor, options: dict, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        weighted_gradients(lora_llama(), texts(), weights, **options)


@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_by_parameter_they_are_gradients_of_the_weighted_loss(family: str) -> None:
    """Also of factors that hold those of several experts, and of what is trained beside adapters."""
    from peft import get_peft_model

    made = FAMILIES[family]
    model, batch = made.model_and_batch()
    model = get_peft_model(model, made.lora()).eval()
    norm = next(parameter for name, parameter in model.named_parameters() if "norm" in name or "ln_" in name)
    norm.requires_grad_()
    size = len(batch["input_ids"])
    samples = [{name: value[number] for name, value in batch.items()} for number in range(size)]
    tasks, weights = [Task("it", samples)], torch.tensor([[1.0, -0.5], [0.0, 2.0]], dtype=torch.float64)
    sums = weighted_parameter_gradients(model, tasks, weights)
    trained = trained_parameters(model)
    assert list(sums) == list(trained)
    assert any(parameter is norm for parameter in trained.values())
    for part, row in enumerate(weights):
        expected = one_by_one(model, tasks, row)
        for name, parameter in trained.items():
            close = {"rtol": 1e-3, "atol": 1e-5 * float(expected[parameter].abs().max())}
            torch.testing.assert_close(sums[name][part].double(), expected[parameter], **close)


def test_sums_are_on_the_device_of_the_gradients() -> None:
    """Weights come from the host; a block's gradients are where its layer is."""
    parameter = nn.Parameter(torch.ones(2, device="meta"))
    gradient = SampleGradient((2,), 3, [Materialised(torch.ones(3, 2, device="meta"))])
    sums: dict[str, list[Tensor]] = {}
    _add(sums, Block("x", parameters=((parameter, None),), parts=[[gradient]]), torch.ones(1, 3))
    assert sums["x"][0].device.type == "meta"
