"""Slopes of the losses along an update are derivatives of the losses of a model that moves along it."""

from __future__ import annotations

import re
from collections.abc import Mapping

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from probes import LowRankMatrix, Task
from probes.additions import added
from probes.blocks import blocks_in_weight_space, find_blocks
from probes.update_slopes import losses_of, quadratic, update_slopes
from probes.watched import Matrix
from tests.families import FAMILIES
from tests.probes.test_additions import Layers
from tests.runs import VOCABULARY, llama, lora_llama
from tests.updates import adapted_model, dense_model, texts, trained


def scaled(changes: Mapping[str, Matrix], factor: float) -> dict[str, Matrix]:
    return {
        name: LowRankMatrix(change.left, change.right, factor) if isinstance(change, LowRankMatrix) else factor * change
        for name, change in changes.items()
    }


#: Steps of differences, and their relative errors: of models that compute in float64 throughout, and of those whose
#: norms round to float32.
EXACT, ROUNDED = (1e-4, 1e-6), (1e-2, 2e-3)


def assert_slopes_are_differences(
    model: nn.Module, task: Task, changes: Mapping[str, Matrix], accuracy: tuple[float, float] = EXACT
):
    """Central differences of the losses, whose error is of the order of the squared step."""
    step, error = accuracy
    slopes = update_slopes(model, task, changes)
    ends = []
    for sign in (1.0, -1.0):
        with added(model, scaled(changes, sign * step)):
            ends.append(losses_of(model, task))
    expected = (ends[0] - ends[1]) / (2 * step)
    total = torch.stack(list(slopes.slopes.values())).sum(0)
    assert set(slopes.slopes) == set(changes)
    torch.testing.assert_close(total, expected, rtol=error, atol=error * float(expected.abs().max()))
    torch.testing.assert_close(slopes.losses, losses_of(model, task))
    return slopes


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_slopes_are_differences_of_losses_along_the_update(adapted, reduction):
    """GPT-2 computes in float64 where it is in float64."""
    family = FAMILIES["gpt2"]
    model = family.model()
    model = (get_peft_model(model, family.lora()) if adapted else model).double().eval()  # pyright: ignore[reportArgumentType]
    task = Task("a", texts(5, seed=1), loss=reduction, group="image", batch_size=3)
    assert_slopes_are_differences(model, task, trained(model)[0])


@pytest.mark.parametrize("make", [adapted_model, dense_model])
def test_slopes_of_a_model_whose_norms_round(make):
    model = make()
    assert_slopes_are_differences(model, Task("a", texts(5, seed=1), group="image"), trained(model)[0], ROUNDED)


def test_at_the_start_of_an_adapter_they_hold_what_a_itself_changed():
    """B = 0 there: gradients of the factors know nothing of A's change, gradients of the weight do."""
    model = lora_llama(target_modules=["q_proj", "down_proj"], lora_dropout=0.0).double().eval()
    factors = {name: p for name, p in model.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for block in find_blocks(model, "weight").chosen:
        shape = block.products[0].matrix(lambda p: p.detach()).shape
        left, right = (torch.randn(s, generator=generator).double() for s in ((shape[0], 2), (2, shape[1])))
        changes[block.name] = LowRankMatrix(left, right, 0.01)
    assert not any(value.any() for name, value in factors.items() if "lora_B" in name)
    assert_slopes_are_differences(model, Task("a", texts(4, seed=1), group="image"), changes, ROUNDED)


def squares(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return (model(batch["ids"]) - 0.3).square().flatten(1).sum(1)


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_of_each_kind(adapted):
    torch.manual_seed(0)
    model = Layers().double().eval()
    if adapted:
        names = ["words", "linear", "conv1d", "images"]
        config = LoraConfig(r=2, target_modules=names, init_lora_weights=False)
        model = get_peft_model(model, config).double().eval()  # pyright: ignore[reportArgumentType]
    task = Task("x", [{"ids": row} for row in torch.arange(18).reshape(3, 6) % 11], loss=squares)
    generator = torch.Generator().manual_seed(1)
    changes = {}
    for block in find_blocks(model, "weight").chosen:
        shape = block.products[0].matrix(lambda p: p.detach()).shape if block.products else _shape(block)
        change = torch.randn(shape, generator=generator).double()
        changes[block.name] = LowRankMatrix(change[:, :2], torch.eye(2, shape[1]).double()) if adapted else change
    assert_slopes_are_differences(model, task, changes)


def _shape(block):
    parameter, view = block.parameters[0]
    return (parameter if view is None else view(parameter)).shape


def test_the_slow_twin_is_one_backward_pass_a_sample():
    model = dense_model()
    task = Task("a", texts(4, seed=1), group="image")
    changes, moved, _ = trained(model)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    batch = next(iter(task.batches()))
    rows = []
    for number in range(4):
        loss = task.losses(model, {name: value[number : number + 1] for name, value in batch.items()}).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        rows.append(sum(float((g * moved[name]).sum()) for name, g in zip(parameters, gradients, strict=True)))
    total = torch.stack(list(update_slopes(model, task, changes).slopes.values())).sum(0)
    torch.testing.assert_close(total, torch.tensor(rows, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_bf16_weights_give_the_slopes_of_float32_up_to_their_rounding():
    model = adapted_model(torch.float32)
    changes = trained(model)[0]
    task = Task("a", texts(8, seed=1), group="image")
    exact, rounded = (
        torch.stack(list(update_slopes(model.to(dtype), task, changes).slopes.values())).sum(0)
        for dtype in (torch.float32, torch.bfloat16)
    )
    assert float((rounded - exact).abs().max()) < 0.1 * float(exact.abs().max())


def tokens_of(model: nn.Module, sample: Mapping[str, object]) -> tuple[Tensor, Tensor]:
    ids = torch.as_tensor(sample["input_ids"])[None]
    return model(input_ids=ids).logits[0, :-1].log_softmax(-1), ids


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_the_quadratic_is_that_of_the_fisher(reduction):
    """Twin: Σ over tokens of E_p[(dlog p/dλ)²], from differences of all log-probabilities; draws vary around it."""
    model = llama().double().eval()
    ids = torch.randint(1, VOCABULARY, (24, 9), generator=torch.Generator().manual_seed(3))
    task = Task("a", [{"input_ids": row, "labels": row} for row in ids], loss=reduction)
    names = [name for name in blocks_in_weight_space(model) if "proj" in name]
    generator = torch.Generator().manual_seed(2)
    changes = {
        name: 0.05 * torch.randn(model.get_submodule(name).weight.shape, generator=generator).double()  # pyright: ignore[reportArgumentType, reportCallIssue]
        for name in names
    }
    expected = torch.zeros(len(ids), dtype=torch.float64)
    with torch.no_grad():
        middle = torch.stack([tokens_of(model, sample)[0] for sample in task.samples]).exp()
        ends = []
        for sign in (1e-4, -1e-4):
            with added(model, scaled(changes, sign)):
                ends.append(torch.stack([tokens_of(model, sample)[0] for sample in task.samples]))
        per_token = (middle * ((ends[0] - ends[1]) / 2e-4).square()).sum(-1)
        expected = per_token.mean(1) if reduction == "mean" else per_token.sum(1)
    draws = torch.stack([quadratic(model, task, changes, seed=seed) for seed in range(40)])
    means = draws.mean(1)  # over samples, of each draw
    error = float(means.std()) / len(means) ** 0.5
    assert abs(float(means.mean() - expected.mean())) < 4 * error
    assert error < 0.1 * float(expected.mean())


def test_the_sampled_labels_are_those_of_the_seed():
    model = adapted_model()
    task = Task("a", texts(6, seed=1), group="image")
    changes = trained(model)[0]
    one, two, other = (quadratic(model, task, changes, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_models_of_images_and_text(name):
    """Where rows of a layer are not in the order of samples, too."""
    family = FAMILIES[name]
    model, batch = family.model_and_batch()
    model = get_peft_model(model, family.lora()).double().eval()  # pyright: ignore[reportArgumentType]
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    task = Task("a", [0, 1], collate=lambda _: batch)
    generator = torch.Generator().manual_seed(1)
    changes = {}
    for block in find_blocks(model, "weight", blocks_in_weight_space(model)).chosen:
        out, in_ = block.products[0].matrix(lambda p: p.detach()).shape
        left, right = (torch.randn(s, generator=generator).double() for s in ((out, 1), (1, in_)))
        changes[block.name] = LowRankMatrix(left, right, 0.01)
    assert_slopes_are_differences(model, task, changes, ROUNDED)


def test_nothing_is_left_on_the_model():
    model = adapted_model().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    changes = trained(model)[0]
    torch.set_rng_state(state)
    update_slopes(model, Task("a", texts(3), group="image"), changes)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_change_of_no_block_is_refused():
    with pytest.raises(
        ValueError, match=re.escape("Expected changes of blocks, such as ['bias', 'weight'], got ['b']")
    ):
        update_slopes(
            nn.Linear(1, 1), Task("x", [{"x": [1.0]}], loss=lambda m, b: m(b["x"])[:, 0]), {"b": torch.ones(1)}
        )


def test_a_task_with_a_loss_of_its_own_has_no_quadratic():
    task = Task("x", [{"x": [1.0]}], loss=lambda model, batch: model(batch["x"])[:, 0])
    with pytest.raises(ValueError, match="Expected integer 'labels' and the model's own loss"):
        quadratic(nn.Linear(1, 1), task, {"weight": torch.ones(1, 1)})


def test_a_sample_that_is_not_finite_costs_itself_alone():
    def ratio(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        return model(batch["x"])[:, 0] / batch["x"][:, 0]

    task = Task("x", [{"x": [1.0]}, {"x": [0.0]}, {"x": [2.0]}], loss=ratio)
    layer = nn.Linear(1, 1)
    slopes = update_slopes(layer, task, {"weight": torch.ones(1, 1)})
    assert torch.isfinite(slopes.slopes["weight"]).tolist() == [True, False, True]
    assert torch.isfinite(slopes.losses).tolist() == [True, False, True]
