"""Gradients passed through an optimizer, beside each sample's own multiplied out, in float64."""

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn

from dynamics.fisher.concentration import DRAWN, predictive_draws
from probes import gradient_gram
from probes.losses import token_losses
from probes.preconditioner import preconditioner_of
from probes.watched import find
from tests.reference import per_sample_gradients
from tests.runs import VOCABULARY, llama

SAMPLES = 6
BATCH = {"x": torch.randn(SAMPLES, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)}
ROWS = torch.randint(VOCABULARY, (SAMPLES, 8), generator=torch.Generator().manual_seed(3))
TOKENS = {"input_ids": ROWS, "attention_mask": torch.ones_like(ROWS), "labels": ROWS}


class Layers(nn.Module):
    """Dense layers with biases, and a norm."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.last = nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3, bias=False)
        self.double()

    def forward(self, x):
        return self.last(torch.tanh(self.norm(self.first(x))))


def squares(model, batch):
    return model(batch["x"]).square().sum(1)


def adapted(**options):
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ["q_proj", "down_proj"]}
    return get_peft_model(llama(), LoraConfig(**{**config, **options})).double()


def stepped(model, make, steps=4):
    """An optimizer of two groups with different rates, after some steps along random gradients."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = make([{"params": weights[::2]}, {"params": weights[1::2], "lr": 2e-3}])
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
        optimizer.step()
    optimizer.zero_grad()
    return optimizer


MAKE = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.9)),
    "adafactor": lambda groups: torch.optim.Adafactor(groups, lr=1e-3),
}


def by_hand(model, optimizer, batch, loss):
    """Each sample's gradients and the same after P, by parameter: ``[sample, number]``."""
    gradients = per_sample_gradients(model, batch, loss or token_losses)
    preconditioner, trained = preconditioner_of(optimizer), dict(model.named_parameters())
    return gradients, {name: value * preconditioner.of(trained[name]) for name, value in gradients.items()}


def products(one, other):
    return sum(a.flatten(1) @ b.flatten(1).mT for a, b in zip(one.values(), other.values(), strict=True))


@pytest.mark.parametrize("name", MAKE)
def test_dense_weights_biases_and_norms(name):
    model = Layers()
    optimizer = stepped(model, MAKE[name])
    found = gradient_gram(model, BATCH, squares, optimizer=optimizer)
    gradients, passed = by_hand(model, optimizer, BATCH, squares)
    torch.testing.assert_close(found.preconditioned_product["global"], products(gradients, passed))
    torch.testing.assert_close(found.preconditioned_gram["global"], products(passed, passed))
    weight = {"w": gradients["first.weight"]}, {"w": passed["first.weight"]}
    torch.testing.assert_close(found.preconditioned_product["first"], products(*weight))
    assert set(found.preconditioned_gram) == set(found.gram)
    assert found.unpreconditioned == ""


@pytest.mark.parametrize("name", MAKE)
def test_factors_as_they_are(name):
    model = adapted()
    optimizer = stepped(model, MAKE[name])
    found = gradient_gram(model, TOKENS, space="factor", optimizer=optimizer)
    gradients, passed = by_hand(model, optimizer, TOKENS, None)
    torch.testing.assert_close(found.preconditioned_product["global"], products(gradients, passed))
    torch.testing.assert_close(found.preconditioned_gram["global"], products(passed, passed))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_steps_of_factors_in_tangent_space(name, zero):
    """s(dB A + B dA) multiplied out; its product with ∇W is that of the factors' gradients."""
    model = adapted()
    optimizer = stepped(model, MAKE[name])
    if zero:
        for matrix in find(model).watched:
            matrix.terms[0].left.data.zero_()
    found = gradient_gram(model, TOKENS, optimizer=optimizer)
    gradients, passed = by_hand(model, optimizer, TOKENS, None)
    torch.testing.assert_close(found.preconditioned_product["global"], products(gradients, passed))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    within = torch.zeros(SAMPLES, SAMPLES, dtype=torch.float64)
    for matrix in find(model).watched:
        (product,) = matrix.terms
        left, right = product.left.detach(), product.right.detach()
        moved_left, moved_right = (passed[names[id(factor)]] for factor in (product.left, product.right))
        moved = product.scale() * (moved_left @ right + left @ moved_right)
        own = moved.flatten(1) @ moved.flatten(1).mT
        torch.testing.assert_close(found.preconditioned_gram[matrix.name], own)
        within += own
    torch.testing.assert_close(found.preconditioned_gram["global"], within)


def test_k_is_the_same_bit_for_bit_with_and_without_an_optimizer():
    model = adapted()
    optimizer = stepped(model, MAKE["adamw"])
    one, other = gradient_gram(model, TOKENS), gradient_gram(model, TOKENS, optimizer=optimizer)
    for name, k in one.gram.items():
        assert torch.equal(k, other.gram[name])


def test_plain_sgd_leaves_gradients_as_they_are():
    model = Layers()
    found = gradient_gram(model, BATCH, squares, optimizer=torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert found.preconditioned_product is found.gram
    assert found.preconditioned_gram is found.gram
    lora = adapted()
    adapters = gradient_gram(lora, TOKENS, optimizer=torch.optim.SGD(lora.parameters(), lr=0.1))
    assert not torch.equal(adapters.preconditioned_gram["global"], adapters.gram["global"])


def test_only_all_blocks_together():
    model = adapted()
    optimizer = stepped(model, MAKE["adamw"])
    found = gradient_gram(model, TOKENS, blocks=["global"], optimizer=optimizer)
    every = gradient_gram(model, TOKENS, optimizer=optimizer)
    assert list(found.preconditioned_gram) == ["global"]
    torch.testing.assert_close(found.preconditioned_gram["global"], every.preconditioned_gram["global"])


@pytest.mark.parametrize("kind", ["dense", "tangent", "factor"])
def test_drawn_gradients_are_stepped_by_muon(kind):
    """A model of which Muon steps the matrices: each drawn gradient, orthogonalised whole."""
    model, batch, loss = (Layers(), BATCH, squares) if kind == "dense" else (adapted(), TOKENS, None)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.requires_grad and parameter.ndim == 2)
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Muon(weights, lr=0.01)
    space = "factor" if kind == "factor" else "tangent"
    drawn = torch.randn(3, SAMPLES, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = gradient_gram(model, batch, loss, space=space, optimizer=optimizer, draws=lambda k: drawn)
    gradients, _ = by_hand(model, torch.optim.SGD(weights, lr=1.0), batch, loss)
    preconditioner, trained = preconditioner_of(optimizer), dict(model.named_parameters())
    moved = {
        name: torch.stack([preconditioner.of(trained[name])(one) for one in torch.einsum("ds,sij->dij", drawn, value)])
        for name, value in gradients.items()
    }
    expected = sum(value.flatten(1) @ moved[name].flatten(1).mT for name, value in gradients.items())
    torch.testing.assert_close(found.drawn_product["global"], expected, rtol=1e-4, atol=1e-4 * expected.abs().max())
    assert found.drawn_product["global"].shape == (SAMPLES, 3)
    assert not found.preconditioned_gram
    if kind != "tangent":
        norms = sum(value.flatten(1).square().sum(1) for value in moved.values())
        torch.testing.assert_close(found.drawn_norm_squared["global"], norms, rtol=1e-4, atol=0)


def test_draws_are_made_of_k():
    model = Layers()
    for parameter in (model.norm.weight, model.norm.bias, model.first.bias):
        parameter.requires_grad_(False)
    optimizer = torch.optim.Muon([model.first.weight, model.last.weight], lr=0.01)
    group = torch.arange(SAMPLES).numpy()
    draws = lambda k: torch.from_numpy(predictive_draws(k.numpy(), group, 4, splits=2))  # noqa: E731
    found = gradient_gram(model, BATCH, squares, optimizer=optimizer, draws=draws)
    assert found.drawn_norm_squared["global"].shape == (4 * DRAWN,)
    assert bool((found.drawn_norm_squared["global"] > 0).all())


def test_reasons_why_nothing_is_known_of_a_block():
    model = Layers()
    muon = torch.optim.Muon([model.first.weight, model.last.weight])
    for parameter in (model.norm.weight, model.norm.bias, model.first.bias):
        parameter.requires_grad_(False)
    without = gradient_gram(model, BATCH, squares, optimizer=muon)
    assert without.unpreconditioned == "Muon is not linear, and no gradients are drawn for it"
    assert not without.drawn_product
    lora = adapted()
    optimizer = torch.optim.AdamW(lora.parameters())
    found = gradient_gram(lora, TOKENS, space="weight", optimizer=optimizer)
    assert found.unpreconditioned == "the optimizer steps factors, which in weight space is not measured"
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["q_proj"], init_lora_weights=False)
    ada = get_peft_model(llama(), config).double()
    found = gradient_gram(ada, TOKENS, optimizer=torch.optim.AdamW(ada.parameters()))
    assert found.unpreconditioned == "AdaLoRA's diagonal moves beside the factors, which is not measured"
    assert "global" not in found.preconditioned_gram


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Muon])
def test_weights_that_another_optimizer_may_step_have_no_null(make):
    """Muon for the matrices and AdamW beside it: only one of them is known."""
    model = Layers()
    optimizer = make([model.last.weight], lr=0.1)
    found = gradient_gram(model, BATCH, squares, optimizer=optimizer, draws=lambda k: torch.eye(SAMPLES).double())
    assert found.unpreconditioned == f"{make.__name__} does not step all that is trained; another may"
    assert list(found.preconditioned_gram or found.drawn_norm_squared) == ["last"]


def test_an_unknown_optimizer_is_refused():
    model = Layers()
    with pytest.raises(ValueError, match=r"^Expected an optimizer whose steps are known, but the preconditioner of "):
        gradient_gram(model, BATCH, squares, optimizer=torch.optim.Adadelta(model.parameters()))
