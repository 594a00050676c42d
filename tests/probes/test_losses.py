"""Losses by sample: their mean over tokens is the model's own loss, each is that of the sample alone."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from probes import gradient_gram
from probes.losses import token_losses
from tests.families import FAMILIES, TEXT


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


def mixture(coefficient: float, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, dict[str, Tensor]]:
    """Experts whose routers have an auxiliary loss of about 1."""
    torch.manual_seed(0)
    config = hf.MixtralConfig(
        **TEXT,
        num_local_experts=4,
        num_experts_per_tok=1,
        output_router_logits=True,
        router_aux_loss_coef=coefficient,
        experts_implementation="eager",
    )
    rows = torch.randint(3, 50, (3, 8))
    return hf.MixtralForCausalLM(config).to(dtype).eval(), {"input_ids": rows, "labels": rows}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("coefficient", [1e-4, 1e-3, 0.02])
def test_auxiliary_losses_are_refused_and_can_be_left_out(coefficient: float, dtype: torch.dtype) -> None:
    """Also those far below what was once tolerated: 2 % of the loss."""
    model, inputs = mixture(coefficient, dtype)
    message = re.escape(
        "it has an auxiliary loss (aux_loss), which belongs to a batch and not to its samples. To probe the "
        "cross-entropy alone, pass loss=lambda model, batch: probes.losses.token_losses(model, {**batch, "
        "'output_router_logits': False})."
    )
    with pytest.raises(ValueError, match=message):
        token_losses(model, inputs)
    with pytest.raises(ValueError, match=message):
        gradient_gram(model, inputs, fisher="sampled")
    alone = lambda model, batch: token_losses(model, {**batch, "output_router_logits": False})  # noqa: E731
    expected = gradient_gram(mixture(0.0, dtype)[0], inputs)
    found = gradient_gram(model, inputs, alone)
    torch.testing.assert_close(found.gram["global"], expected.gram["global"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("other", [1 + 1e-4, 1 - 1e-3])
def test_what_rounding_does_not_explain_is_refused(dtype: torch.dtype, other: float) -> None:
    model = Words(lambda logits, labels: other * shifted(logits, labels)).to(dtype)
    with pytest.raises(ValueError, match="it is weighted, smoothed or has other terms"):
        token_losses(model, batch())


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_losses_rounded_to_half_precision_are_the_models_own(scale: float) -> None:
    """A model may compute its loss in half precision, token by token and as a mean."""

    class Half(Words):
        def forward(self, input_ids: Tensor, labels: Tensor) -> SimpleNamespace:
            logits = (scale * self.table[input_ids]).bfloat16()
            return SimpleNamespace(logits=logits, loss=self.loss(logits, labels))

    rows = torch.randint(4, (8, 64), generator=torch.Generator().manual_seed(0))
    own = lambda logits, labels: shifted(logits, labels).bfloat16()  # noqa: E731
    assert token_losses(Half(own), {"input_ids": rows, "labels": rows}).isfinite().all()
    smoothed = lambda logits, labels: 1.05 * shifted(logits, labels).bfloat16()  # noqa: E731
    with pytest.raises(ValueError, match="it is weighted, smoothed or has other terms"):
        token_losses(Half(smoothed), {"input_ids": rows, "labels": rows})
