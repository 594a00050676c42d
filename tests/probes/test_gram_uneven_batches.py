"""Batches of images in any number and order a sample: K in each space beside explicit gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from probes import gradient_gram
from probes.losses import token_losses
from probes.watched import find
from tests.families import UNEVEN, Family
from tests.reference import flat_gradients, per_sample_gradients

Batch = dict[str, Tensor]


def adapted(family: Family, **lora: object) -> tuple[nn.Module, Batch]:
    model, batch = family.model_and_batch()
    torch.manual_seed(0)
    model = get_peft_model(model, family.lora(**lora)).double().eval()
    return model, {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}


def of_matrices(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """∇W of each adapted matrix, ``(sample, out · in)``, of a plain model with the adapters merged into it."""
    names = {each.name for each in find(model).watched}
    merged = copy.deepcopy(model).merge_and_unload()  # pyright: ignore[reportCallIssue]
    for name, parameter in merged.named_parameters():
        parameter.requires_grad_(name.removesuffix(".weight") in names)
    gradients = per_sample_gradients(merged, batch, token_losses)
    assert {name.removesuffix(".weight") for name in gradients} == names
    return {name.removesuffix(".weight"): gradient.flatten(2) for name, gradient in gradients.items()}


def on_tangent_space(model: nn.Module, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    """P_B X + X P_A − P_B X P_A, with P the projections on the columns of B and the rows of A."""
    projected = {}
    for watched in find(model).watched:
        matrix, full = watched.read(), gradients[watched.name]
        left, right = matrix.left.detach(), matrix.right.detach()
        onto_left, onto_right = left @ torch.linalg.pinv(left), torch.linalg.pinv(right) @ right
        projected[watched.name] = onto_left @ full + full @ onto_right - onto_left @ full @ onto_right
    return projected


def assert_grams(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each entry judged by its own two gradients: a small one does not hide behind a large one."""
    assert found.keys() - {"global"} == expected.keys()
    for name, gradients in expected.items():
        gram = gradients.flatten(1) @ gradients.flatten(1).mT
        sizes = gram.diagonal().sqrt()
        assert bool(((found[name] - gram).abs() <= 1e-10 * sizes[:, None] * sizes).all()), name


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("space", ["tangent", "weight"])
def test_spaces_of_matrices(name: str, space: str) -> None:
    model, batch = adapted(UNEVEN[name])
    expected = of_matrices(model, batch)
    found = gradient_gram(model, batch, space=space)
    assert_grams(dict(found.gram), expected if space == "weight" else on_tangent_space(model, expected))
    assert found.one_by_one == ()


@pytest.mark.parametrize("name", UNEVEN)
def test_factors_and_everything_else(name: str) -> None:
    model, batch = adapted(UNEVEN[name], bias="all")
    gradients = flat_gradients(model, batch, token_losses)
    found = gradient_gram(model, batch, space="factor")
    torch.testing.assert_close(found.gram["global"], gradients @ gradients.mT, rtol=1e-10, atol=0)
    assert found.one_by_one == ()


@pytest.mark.parametrize("space", ["tangent", "factor", "weight"])
def test_streams_with_batches_of_text_alone(space: str) -> None:
    """A layer that a batch does not use has gradients of zero there."""
    model, batch = adapted(UNEVEN["an image in two of three samples"])
    text = {key: value[1:2] for key, value in batch.items() if key != "pixel_values"}
    images = {key: value if key == "pixel_values" else value[[0, 2]] for key, value in batch.items()}
    together = gradient_gram(model, batch, space=space)
    apart = gradient_gram(model, [images, text], space=space)
    order = torch.tensor([0, 2, 1])  # of the samples in the stream
    for name, gram in together.gram.items():
        torch.testing.assert_close(apart.gram[name], gram[order][:, order], rtol=1e-9, atol=1e-14)


class Shared(nn.Module):
    """Images that several samples look at: rows belong to no single sample."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tower, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, images: Tensor, looked_at: Tensor) -> Tensor:
        return self.head(looked_at @ self.tower(images).tanh())


@pytest.mark.parametrize("space", ["tangent", "weight"])
@pytest.mark.parametrize("looked_at", [[[1, 1], [0, 1], [1, 0]], [[1, 1, 0], [0, 1, 0], [0, 1, 1]]])
def test_images_that_several_samples_share(space: str, looked_at: list[list[int]]) -> None:
    config = LoraConfig(r=2, target_modules=["tower", "head"], init_lora_weights=False)
    model = get_peft_model(Shared(), config).double()  # pyright: ignore[reportArgumentType]
    samples = torch.tensor(looked_at).double()
    batch = {"images": torch.randn(samples.shape[1], 4, dtype=torch.float64), "looked_at": samples}
    loss = lambda model, batch: model(**batch).square().sum(1)  # noqa: E731
    merged = copy.deepcopy(model).merge_and_unload()  # pyright: ignore[reportCallIssue]
    gradients = per_sample_gradients(merged.requires_grad_(True), batch, loss)
    expected = {name: gradients[f"{name}.weight"] for name in ("tower", "head")}
    found = gradient_gram(model, batch, loss, space=space)
    assert_grams(dict(found.gram), expected if space == "weight" else on_tangent_space(model, expected))
    assert {name.split(".")[0] for name in found.one_by_one} == {"tower"}


def test_layers_that_compute_otherwise_are_refused_in_weight_space() -> None:
    """∇W is no product of unfolded inputs where these are reflected at the border."""
    layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"), nn.Flatten())
    config = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(layers, config)  # pyright: ignore[reportArgumentType]
    loss = lambda model, batch: model(batch["x"]).square().sum(1)  # noqa: E731
    message = (
        "give the gradient of '0', got a Conv2d that is called, or computes, in another way. Choose space='tangent'"
    )
    with pytest.raises(ValueError, match=message):
        gradient_gram(model, {"x": torch.randn(2, 3, 4, 4)}, loss, space="weight")
    gradient_gram(model, {"x": torch.randn(2, 3, 4, 4)}, loss, space="tangent")
