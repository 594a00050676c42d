"""A change that is added to a layer's output is a change of its weight."""

from __future__ import annotations

import warnings

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from probes import LowRankMatrix, watched_matrices
from probes.additions import added
from probes.blocks import trained_parameters


class Layers(nn.Module):
    """One layer of each kind, one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 6)
        self.linear = nn.Linear(6, 5)
        self.conv1d = Conv1D(4, 5)
        self.images = nn.Conv2d(4, 3, 2, stride=1, padding=1)
        self.norm = nn.LayerNorm(3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.conv1d(torch.tanh(self.linear(self.words(ids))))  # (sample, place, 4)
        images = hidden.mT.unflatten(2, (2, 3))
        return self.norm(self.images(images).flatten(2).mT)


NAMES = ("words", "linear", "conv1d", "images")
IDS = torch.arange(18).reshape(3, 6) % 11


def adapted(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(Layers(), LoraConfig(r=2, target_modules=list(NAMES), lora_alpha=3)).to(dtype)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "embedding_B" in name:
            nn.init.normal_(parameter)
    return model.eval()


def dense(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Layers().to(dtype).eval()


def changes_of(model: nn.Module, *, low_rank: bool) -> dict[str, torch.Tensor | LowRankMatrix]:
    generator = torch.Generator().manual_seed(1)
    changes: dict[str, torch.Tensor | LowRankMatrix] = {}
    for name, matrix in watched_matrices(model).items():
        out, in_ = matrix.shape
        left, right = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((out, 3), (3, in_)))
        product = LowRankMatrix(left, right, 0.1)
        changes[name] = product if low_rank else product.to_dense()
    return changes


def with_merged(model: nn.Module, changes: dict[str, torch.Tensor | LowRankMatrix]) -> torch.Tensor:
    """What the model gives with the changes in its weights, by the orientation of each layer's own weight."""
    for name, change in changes.items():
        matrix = change.to_dense() if isinstance(change, LowRankMatrix) else change
        layer = model.get_submodule(name if hasattr(model, "linear") else f"base_model.model.{name}")
        is_adapter = hasattr(layer, "get_base_layer")
        weight = layer.get_base_layer().weight if is_adapter else layer.weight
        turned = is_adapter and name in ("words", "conv1d")
        weight.data += (matrix.mT if turned else matrix).reshape(weight.shape).to(weight.dtype)
    return model(IDS)


@pytest.mark.parametrize("low_rank", [True, False])
@pytest.mark.parametrize("make", [adapted, dense])
def test_added_changes_are_changes_of_the_weights(make, low_rank: bool) -> None:
    model = make()
    before = model(IDS)
    changes = changes_of(model, low_rank=low_rank)
    assert set(changes) == set(NAMES)
    with added(model, changes), torch.no_grad():
        values = model(IDS)
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)
    torch.testing.assert_close(values, with_merged(make(), changes), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(values, before)


def test_a_change_too_small_for_the_weights_format_counts() -> None:
    small = {"linear": 1e-4 * torch.ones(5, 6)}
    exact = dense(torch.float32)
    with added(exact, small):
        expected = exact.linear(torch.ones(6))
    model = dense(torch.bfloat16)
    with added(model, small):
        values = model.linear(torch.ones(6, dtype=torch.bfloat16))
    assert values.dtype == torch.bfloat16
    torch.testing.assert_close(values.float(), expected, rtol=2e-2, atol=2e-2)


def test_vectors_are_changed_in_place_and_back() -> None:
    model = dense()
    kept = model.norm.weight.detach().clone()
    with added(model, {"norm.weight": torch.tensor([1.0, 2.0, 3.0])}):
        torch.testing.assert_close(model.norm.weight.detach(), kept + torch.tensor([1.0, 2.0, 3.0]))
    assert torch.equal(model.norm.weight, kept)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"nothing": torch.ones(1)}, "such as"),
        ({"linear": torch.ones(2, 2)}, "shape"),
        ({"norm.weight": torch.ones(3)}, "single precision"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_no_hook(changes, what: str) -> None:
    model = dense(torch.bfloat16)
    with pytest.raises(ValueError, match=what), added(model, changes):
        pass
    assert not any(module._forward_hooks for module in model.modules())


class Tied(nn.Module):
    """A language model's table of words, at both ends; and a stack of matrices, a token of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.words.weight
        self.experts = nn.Parameter(torch.randn(2, 4, 4))
        self.token = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.words(ids) + self.token.to(self.words.weight.dtype)
        return self.head(torch.tanh(hidden @ self.experts[0].to(hidden.dtype)) @ self.experts[1].to(hidden.dtype))


def test_all_trained_weights_can_be_changed() -> None:
    """Tied ones at both ends; those whose use no layer's output says in themselves, and back."""
    torch.manual_seed(0)
    model, ids = Tied().double(), torch.arange(6).reshape(2, 3)
    kept = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    changes = {name: torch.randn(matrix.shape, dtype=torch.float64) for name, matrix in watched_matrices(model).items()}
    assert [*changes] == ["experts[0]", "experts[1]", "token", "words"]
    changes["experts[1]"] = LowRankMatrix(torch.ones(4, 1), torch.arange(4.0)[None])
    with added(model, changes), torch.no_grad():
        values = model(ids)
        assert torch.equal(model.words.weight, kept["words.weight"])
    assert all(torch.equal(parameter, kept[name]) for name, parameter in model.named_parameters())
    with torch.no_grad():
        model.words.weight += changes["words"]
        model.token += changes["token"]
        model.experts[0] += changes["experts[0]"]
        model.experts[1] += changes["experts[1]"].to_dense()
        torch.testing.assert_close(values, model(ids), rtol=1e-12, atol=1e-12)


def test_tied_weights_in_half_precision_are_not_touched() -> None:
    model, ids = Tied(), torch.arange(6).reshape(2, 3)
    model.words.to(torch.bfloat16)
    change = {"words": 1e-4 * torch.ones(7, 4)}
    with added(model, change), torch.no_grad():
        assert model(ids).dtype == torch.bfloat16
    model.token.data = model.token.data.bfloat16()
    with pytest.raises(ValueError, match="single precision"), added(model, {"token": torch.ones(1, 4)}):
        pass


def test_dora_is_changed_in_its_own_parameters() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(3, 3)), LoraConfig(r=2, target_modules=["0"], use_dora=True)).eval()
    parameters = trained_parameters(model)
    changes = {name: torch.randn(parameter.shape) for name, parameter in parameters.items()}
    with added(model, changes):
        values = model(torch.eye(3))
    for name, parameter in parameters.items():
        parameter.data += changes[name]
    torch.testing.assert_close(values, model(torch.eye(3)))


def test_hooks_are_gone_after_an_error() -> None:
    model = dense()

    def fail() -> None:
        with added(model, {"linear": torch.ones(5, 6)}):
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert not any(module._forward_hooks for module in model.modules())


class Twice(nn.Linear):
    """A layer that does more than its kind."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


class Scaled(nn.Embedding):
    """An embedding as Gemma has it."""

    def __init__(self) -> None:
        super().__init__(5, 4)
        self.register_buffer("embed_scale", torch.tensor(3.0))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * self.embed_scale


def with_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.Sequential(nn.utils.weight_norm(nn.Linear(2, 2)))


def for_some_tokens() -> nn.Module:
    """Activated LoRA, which changes what comes after certain tokens."""
    return get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], alora_invocation_tokens=[1]))


@pytest.mark.parametrize(
    "make", [lambda: nn.Sequential(Twice(2, 2)), lambda: nn.Sequential(Scaled()), with_weight_norm]
)
def test_a_layer_that_does_more_with_its_matrix_has_the_change_in_it(make) -> None:
    """What the change of its kind adds to the output would be another change than that of the matrix."""
    model = make()
    inputs = torch.arange(2)[None] if isinstance(model[0], nn.Embedding) else torch.eye(2)
    name, matrix = list(watched_matrices(model).items())[-1]
    change = torch.randn(matrix.shape)
    with added(model, {name: change}):
        values = model(inputs)
    matrix.data += change
    torch.testing.assert_close(values, model(inputs))


@pytest.mark.parametrize(
    "make", [lambda: get_peft_model(nn.Sequential(Scaled()), LoraConfig(r=2, target_modules=["0"])), for_some_tokens]
)
def test_an_adapter_that_does_more_with_its_matrix_is_refused(make) -> None:
    model = make()
    name, matrix = list(watched_matrices(model).items())[-1]
    with pytest.raises(ValueError, match="no layer's output says"), added(model, {name: torch.ones(matrix.shape)}):
        pass


def test_one_image_without_a_dimension_of_images() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 2, bias=False))
    image, change = torch.randn(2, 4, 5), LowRankMatrix(torch.randn(3, 1), torch.randn(1, 8))
    with added(model, {"0": change}):
        values = model(image)
    model[0].weight.data += change.to_dense().reshape(3, 2, 2, 2).float()
    torch.testing.assert_close(values, model(image))


def test_a_model_spread_by_a_device_map() -> None:
    """Its layers' forward functions are wrapped: they move the inputs, and call what was there."""
    model = dense()
    changes = changes_of(model, low_rank=True)
    with added(model, changes):
        expected = model(IDS)
    dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
    assert "forward" in vars(model.linear)
    with added(model, changes):
        torch.testing.assert_close(model(IDS), expected, rtol=0, atol=0)


def test_a_layer_whose_forward_function_was_replaced_has_the_change_in_it() -> None:
    model = dense()
    model.linear.forward = lambda hidden: 2 * nn.Linear.forward(model.linear, hidden)
    for hooked in (False, True):
        if hooked:
            dispatch_model(model, {"": "cpu"}, main_device="cpu", force_hooks=True)
        before = model.linear.weight.detach().clone()
        with added(model, {"linear": torch.ones(5, 6)}):
            assert torch.equal(model.linear.weight, before + 1)
        assert torch.equal(model.linear.weight, before)
