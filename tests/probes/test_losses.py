"""Losses by sample: their mean over tokens is the model's own loss, each is that of the sample alone."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from probes.losses import token_losses
from tests.families import FAMILIES


class Words(nn.Module):
    """Logits are a table's rows; the loss is what is asked for."""

    def __init__(self, loss: Any, rows: int = 4) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, rows, generator=torch.Generator().manual_seed(0)).double())
        self.loss = loss

    def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
        logits = self.table[input_ids]
        return SimpleNamespace(logits=logits, loss=self.loss(logits, labels))


def shifted(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def unshifted(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def batch() -> dict[str, Tensor]:
    """Three labels in the first sample, one in the second; the first label of each is not predicted by decoders."""
    return {
        "input_ids": torch.tensor([[0, 1, 2, 3], [2, 3, 0, 0]]),
        "labels": torch.tensor([[0, 1, 2, 3], [2, 3, -100, -100]]),
    }


@pytest.mark.parametrize("name", FAMILIES)
def test_the_models_own_loss(name: str) -> None:
    model, inputs = FAMILIES[name].model_and_batch()
    model.eval()
    own = model(**inputs).loss
    losses = token_losses(model, inputs, "mean")  # all samples have as many labels
    assert losses.shape == (2,)
    assert losses.mean().item() == pytest.approx(own.item(), rel=1e-5)


def test_half_precision() -> None:
    model, inputs = FAMILIES["llama"].model_and_batch()
    model = model.bfloat16().eval()
    losses = token_losses(model, inputs, "mean")
    assert losses.dtype == torch.float32
    assert losses.mean().item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        model = model.float()
        assert token_losses(model, inputs, "mean").mean().item() == pytest.approx(model(**inputs).loss.item(), rel=1e-5)


@pytest.mark.parametrize("loss", [shifted, unshifted])
def test_sums_and_means_by_hand(loss: Any) -> None:
    model, inputs = Words(loss), batch()
    offset = int(loss is shifted)
    log_probabilities = model.table.detach().log_softmax(1).tolist()
    expected = [
        [-log_probabilities[word][label] for word, label in zip(words, labels[offset:], strict=False) if label >= 0]
        for words, labels in zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True)
    ]
    assert token_losses(model, inputs).tolist() == pytest.approx([sum(row) for row in expected], rel=1e-14)
    assert token_losses(model, inputs, "mean").tolist() == pytest.approx(
        [sum(row) / len(row) for row in expected], rel=1e-14
    )


def test_gradient_of_the_mean_is_that_of_the_models_own_loss() -> None:
    model, inputs = Words(shifted), batch()
    inputs["labels"][1, 2] = 1
    tokens = (inputs["labels"][:, 1:] != -100).sum()
    expected = torch.autograd.grad(model(**inputs).loss, model.table)[0]
    torch.testing.assert_close(
        torch.autograd.grad(token_losses(model, inputs).sum() / tokens, model.table)[0], expected
    )


def test_a_sample_does_not_depend_on_its_batch() -> None:
    model, inputs = FAMILIES["llama"].model_and_batch()
    model = model.double().eval()
    inputs["attention_mask"][1, 4:] = 0
    inputs["labels"][1, 4:] = -100
    alone = {key: value[1:, :4] for key, value in inputs.items()}
    torch.testing.assert_close(token_losses(model, inputs)[1:], token_losses(model, alone), rtol=1e-12, atol=0)


def test_a_sample_without_labels_is_missing() -> None:
    inputs = batch()
    inputs["labels"][0] = -100
    for reduction in ("sum", "mean"):
        first, second = token_losses(Words(shifted), inputs, reduction).tolist()
        assert math.isnan(first)
        assert math.isfinite(second)
    inputs["labels"][1] = -100
    assert token_losses(Words(shifted), inputs).isnan().all()


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        (
            Words(lambda logits, labels: 1.1 * shifted(logits, labels)),
            {},
            r"Expected the model's own loss to be a mean cross-entropy \(\S+ for the next labels, \S+ for the labels\)"
            r", got \S+: it is weighted, smoothed or has other terms\. Pass loss=",
        ),
        (Words(lambda *_: None), {}, "Expected Words to return loss and logits, got SimpleNamespace. Pass loss="),
        (
            Words(lambda *_: torch.ones(())),
            {"labels": torch.zeros(2, 3, dtype=torch.long)},
            re.escape(
                "Expected integer labels of shape (2, 4) for logits of shape (2, 4, 4), got (2, 3) in torch.int64."
            ),
        ),
        (
            Words(shifted),
            {"labels": None},
            "Expected 'labels' in the batch for the model's own loss, got 'input_ids', 'labels'",
        ),
    ],
    ids=["weighted", "no loss", "shape", "no labels"],
)
def test_other_models(model: nn.Module, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_losses(model, {**batch(), **changes})


def test_other_reduction() -> None:
    with pytest.raises(ValueError, match=r"^Expected reduction 'sum' or 'mean', got 'max'\.$"):
        token_losses(Words(shifted), batch(), "max")
