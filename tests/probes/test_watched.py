"""Which matrices are watched, as which, and under which names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, VeraConfig, get_peft_model
from torch import Tensor, nn

from probes.low_rank import LowRankMatrix
from probes.watched import WatchedModel, find, find_watched, watched_matrices
from tests.families import FAMILIES


class Network(nn.Module):
    """An embedding and three linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.first = nn.Linear(4, 5)
        self.second = nn.Linear(5, 6, bias=False)
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.second(self.first(self.words(ids)).tanh()))


def lora(*targets: str, **changes: Any) -> LoraConfig:
    """A LoRA in which B is not zero."""
    return LoraConfig(target_modules=list(targets), r=2, lora_alpha=3, init_lora_weights=False, **changes)


def adapted(config: Any, model: nn.Module | None = None) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(Network() if model is None else model, config)


def names(found: WatchedModel) -> list[str]:
    return [watched.name for watched in found.watched]


def pefts(model: PeftModel, layer: str, adapter: str = "default") -> Tensor:
    """PEFT's own update of one layer, as it stores its weight."""
    return model.base_model.model.get_submodule(layer).get_delta_weight(adapter).detach()


def close(matrix: Any, expected: Tensor) -> None:
    assert isinstance(matrix, LowRankMatrix)
    torch.testing.assert_close(matrix.to_dense(), expected.to(torch.float64), rtol=1e-6, atol=1e-7)


# Adapters


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"second": 3}, "alpha_pattern": {"first": 7}},
        {"lora_bias": True},
        {"lora_dropout": 0.5},
        {"init_lora_weights": "gaussian"},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_scales_are_pefts(changes: dict[str, Any]) -> None:
    config = lora("first", "second")
    for key, value in changes.items():
        setattr(config, key, value)
    model = adapted(config)

    matrices = watched_matrices(model)

    assert list(matrices) == ["first", "second"]
    close(matrices["first"], pefts(model, "first"))
    close(matrices["second"], pefts(model, "second"))


def test_a_scale_that_changes_is_read_as_it_is_now() -> None:
    model = adapted(lora("first"))
    (watched,) = find_watched(model)
    before, scales = pefts(model, "first"), watched.scales()

    model.base_model.model.first.set_scale("default", 5.0)

    close(watched.read(), pefts(model, "first"))
    close(watched.read(scales=scales), before)
    assert (scales, watched.scales()) == ((1.5,), (7.5,))


def test_adalora_keeps_its_diagonal_beside_the_factors() -> None:
    config = AdaLoraConfig(target_modules=["first"], init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1)
    model = adapted(config)
    layer = model.base_model.model.first
    nn.init.normal_(layer.lora_E["default"])

    (watched,) = find_watched(model)

    close(watched.read(), pefts(model, "first"))
    assert len(watched.parameters) == 3


def test_gradient_of_adalora() -> None:
    config = AdaLoraConfig(target_modules=["first"], init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1)
    model = adapted(config)
    layer = model.base_model.model.first
    nn.init.normal_(layer.lora_E["default"])
    a, e, b = layer.lora_A["default"], layer.lora_E["default"], layer.lora_B["default"]
    model(torch.arange(7)).square().sum().backward()

    (watched,) = find_watched(model)
    gradient = watched.gradient(lambda parameter: parameter.grad)

    scale = layer.scaling["default"] / (float(layer.ranknum["default"]) + 1e-5)
    expected = scale * (b.grad @ (a * e) + b @ (a.grad * e) + b @ (a * e.grad))
    close(gradient, expected.detach())
    assert gradient.rank == 9


def test_convolution_embedding_and_attention() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Conv2d(3, 4, 2)
            self.sound = nn.Conv1d(2, 4, 3)
            self.video = nn.Conv3d(1, 4, 2)
            self.words = nn.Embedding(7, 4)
            self.attention = nn.MultiheadAttention(4, 2)

    model = adapted(lora("image", "sound", "video", "words", "attention"), Layers())

    matrices = watched_matrices(model)

    assert list(matrices) == ["image", "sound", "video", "words", "attention.out_proj", "attention"]
    for name in ("image", "sound", "video"):
        close(matrices[name], pefts(model, name).flatten(1))
    close(matrices["words"], pefts(model, "words").T)
    close(matrices["attention"], pefts(model, "attention"))
    close(matrices["attention.out_proj"], pefts(model, "attention.base_layer.out_proj"))


def test_grouped_convolutions_are_skipped_with_the_reason() -> None:
    model = adapted(lora("0"), nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)))

    found = find(model)

    assert found.watched == ()
    assert found.skipped == {
        "0": "its factors of shapes (4, 1, 1, 1) and (2, 4, 3, 3) do not multiply (grouped convolution)"
    }


def test_several_active_adapters_are_each_and_their_sum() -> None:
    model = adapted(lora("first", "second"))
    model.add_adapter("other", LoraConfig(target_modules=["first"], r=3, lora_alpha=4, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])

    found = find(model)
    matrices = {watched.name: watched.read() for watched in found.watched}

    assert list(matrices) == ["first", "first@default", "first@other", "second"]
    assert [watched.part_of for watched in found.watched] == ["", "first", "first", ""]
    default, other = pefts(model, "first"), pefts(model, "first", "other")
    close(matrices["first"], default + other)
    close(matrices["first@default"], default)
    close(matrices["first@other"], other)
    assert found.covered_share == 1.0


def test_gradient_of_a_sum_is_the_sum_of_gradients() -> None:
    model = adapted(lora("first"))
    model.add_adapter("other", LoraConfig(target_modules=["first"], r=3, lora_alpha=4, init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    model(torch.arange(7)).square().sum().backward()

    gradients = {watched.name: watched.gradient(lambda p: p.grad).to_dense() for watched in find(model).watched}

    torch.testing.assert_close(gradients["first"], gradients["first@default"] + gradients["first@other"])


def test_inactive_adapters_are_not_watched() -> None:
    model = adapted(lora("first"))
    model.add_adapter("other", lora("second"))

    assert names(find(model)) == ["first"]

    model.set_adapter("other")
    assert names(find(model)) == ["second"]


def test_frozen_adapters_are_not_watched_and_half_frozen_ones_are() -> None:
    model = adapted(lora("first", "second"))
    first, second = model.base_model.model.first, model.base_model.model.second
    first.requires_grad_(False)
    second.lora_A.requires_grad_(False)  # as LoRA-FA has it

    (watched,) = find_watched(model)

    assert watched.name == "second"
    assert watched.parameters == (second.lora_B["default"].weight,)
    assert watched.sources == (second.lora_B["default"].weight, second.lora_A["default"].weight)
    close(watched.read(), pefts(model, "second"))


def test_dora_is_skipped_with_the_reason() -> None:
    found = find(adapted(lora("first", use_dora=True)))

    assert found.watched == ()
    assert re.match("Dora.*: its update is not the product of its two factors", found.skipped["first"])
    assert all(name.startswith("first.lora_") for name in found.uncovered)
    assert found.covered_share == 0.0


def test_a_sum_of_which_a_part_is_not_known_is_skipped() -> None:
    model = adapted(lora("first", "second"))
    model.add_adapter("other", lora("first", use_dora=True))
    model.base_model.set_adapter(["default", "other"])

    found = find(model)

    assert names(found) == ["second"]
    assert list(found.skipped) == ["first"]


@pytest.mark.parametrize(
    "config", [IA3Config(target_modules=["first"], feedforward_modules=[]), VeraConfig(r=2, target_modules=["first"])]
)
def test_parts_of_other_adapters_are_no_matrices(config: Any) -> None:
    found = find(adapted(config))

    assert found.watched == ()
    assert found.uncovered != ()


def test_adapters_of_transformers_own_making() -> None:
    model = FAMILIES["llama"].model()
    model.add_adapter(FAMILIES["llama"].lora(target_modules=["q_proj"]))

    assert list(watched_matrices(model)) == [f"model.layers.{layer}.self_attn.q_proj" for layer in range(2)]


def test_modules_to_save_are_watched_whole() -> None:
    model = adapted(lora("first", modules_to_save=["head"]))

    found = find(model)

    assert names(found) == ["first", "head"]
    assert found.uncovered == ("head.bias",)
    head = model.base_model.model.head.modules_to_save["default"].weight
    assert found.watched[1].read().data_ptr() == head.data_ptr()
    assert found.covered_share == pytest.approx(1 - 3 / (2 * (4 + 5) + 6 * 3 + 3))


def test_trainable_tokens_are_a_matrix_of_those_tokens() -> None:
    model = adapted(lora("first", trainable_token_indices={"words": [1, 5]}))

    matrices = watched_matrices(model)

    assert list(matrices) == ["words.trainable_tokens_delta", "first"]
    assert matrices["words.trainable_tokens_delta"].shape == (2, 4)
    assert find(model).covered_share == 1.0


def test_a_tied_weight_is_found_once() -> None:
    model = Network()
    model.head = nn.Linear(4, 7, bias=False)
    model.head.weight = model.words.weight

    assert list(watched_matrices(model)) == ["words", "first", "second"]


def test_adapters_of_tied_layers_are_found_once() -> None:
    layer = nn.Linear(4, 4)
    shared_layer = adapted(lora("0", "1"), nn.Sequential(layer, layer))
    shared_factors = adapted(lora("0", "1"), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))
    first, second = shared_factors.base_model.model
    second.lora_A, second.lora_B = first.lora_A, first.lora_B

    assert names(find(shared_layer)) == ["0"]
    assert names(find(shared_factors)) == ["0"]


# Without adapters


def test_whole_weights_without_adapters() -> None:
    model = Network()
    model.second.requires_grad_(False)

    found = find(model)

    assert names(found) == ["words", "first", "head"]
    assert all(watched.is_dense for watched in found.watched)
    assert found.uncovered == ("first.bias", "head.bias")
    assert found.covered_share == pytest.approx((28 + 20 + 18) / (28 + 20 + 18 + 5 + 3))
    assert found.skipped == {}


def test_tensors_of_other_dimensions_as_matrices() -> None:
    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image = nn.Conv2d(3, 4, 2)
            self.sound = nn.Conv1d(2, 4, 3)
            self.experts = nn.Parameter(torch.randn(2, 3, 5))
            self.positions = nn.Parameter(torch.randn(1, 6, 4))
            self.attention = nn.MultiheadAttention(4, 2)
            self.nothing = nn.Parameter(torch.empty(0, 3))

    model = Layers()

    matrices = watched_matrices(model)

    assert {name: tuple(matrix.shape) for name, matrix in matrices.items()} == {
        "experts[0]": (3, 5),
        "experts[1]": (3, 5),
        "positions": (6, 4),
        "image": (4, 12),
        "sound": (4, 6),
        "attention.in_proj_weight": (12, 4),
        "attention.out_proj": (4, 4),
    }
    assert torch.equal(matrices["experts[1]"], model.experts[1])
    assert torch.equal(matrices["image"], model.image.weight.flatten(1))


def test_gradient_of_a_whole_weight_is_its_own() -> None:
    model = Network()
    model(torch.arange(7)).square().sum().backward()

    gradients = {watched.name: watched.gradient(lambda p: p.grad) for watched in find(model).watched}

    assert torch.equal(gradients["second"], model.second.weight.grad)


@pytest.mark.parametrize("build", [nn.Identity, lambda: Network().requires_grad_(False), lambda: nn.LayerNorm(3)])
def test_nothing_to_watch(build: Callable[[], nn.Module]) -> None:
    found = find(build())

    assert (found.watched, found.covered_share) == ((), 0.0)


# Choosing


def test_a_pattern_chooses_by_the_name() -> None:
    assert list(watched_matrices(Network(), "irst|head$")) == ["first", "head"]
    assert find(Network(), "^second$").covered_share == pytest.approx(30 / 104)


def test_a_pattern_that_is_none() -> None:
    with pytest.raises(ValueError, match=re.escape("Expected a regular expression for matrices, got '*_proj' (")):
        find(Network(), "*_proj")


# A guest


@pytest.mark.parametrize("family", ["llama", "mixtral", "vit"])
def test_nothing_is_left_on_the_model(family: str) -> None:
    model = get_peft_model(FAMILIES[family].model(), FAMILIES[family].lora())

    def everything() -> dict[str, Any]:
        """Each module's attributes by identity; dicts (hooks, parameters) by their content."""
        return {
            f"{path}.{key}": [(name, id(part)) for name, part in value.items()]
            if isinstance(value, dict)
            else id(value)
            for path, module in model.named_modules()
            for key, value in vars(module).items()
        }

    before = everything()
    for watched in find_watched(model):
        watched.read()

    assert everything() == before


def test_values_are_read_by_reference() -> None:
    model = adapted(lora("first", modules_to_save=["head"]))
    layer = model.base_model.model.first

    matrices = watched_matrices(model)

    first = matrices["first"]
    assert isinstance(first, LowRankMatrix)
    assert first.left_factor.data_ptr() == layer.lora_B["default"].weight.data_ptr()
    assert first.right_factor.data_ptr() == layer.lora_A["default"].weight.data_ptr()
    assert not first.left_factor.requires_grad


def test_experts_are_read_by_reference() -> None:
    model = get_peft_model(FAMILIES["mixtral"].model(), FAMILIES["mixtral"].lora())

    for watched in find_watched(model, r"\["):
        matrix = watched.read()
        assert isinstance(matrix, LowRankMatrix)
        storages = {matrix.left_factor.untyped_storage().data_ptr(), matrix.right_factor.untyped_storage().data_ptr()}
        assert storages == {parameter.untyped_storage().data_ptr() for parameter in watched.parameters}
