"""K and b beside gradients taken one sample at a time: whatever the model is made of, in whatever space."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from peft import AdaLoraConfig, IA3Config, LoHaConfig, LoraConfig, PrefixTuningConfig, get_peft_model
from torch import Tensor, nn

from probes import LowRankMatrix, gradient_gram
from probes.blocks import trained_parameters
from probes.losses import token_losses
from probes.watched import find
from tests.families import FAMILIES
from tests.reference import flat_gradients, per_sample_gradients
from tests.runs import VOCABULARY, llama

ROWS = torch.randint(VOCABULARY, (5, 8), generator=torch.Generator().manual_seed(3))


def tokens(rows: Tensor = ROWS) -> dict[str, Tensor]:
    """A batch with a prompt that is not predicted, and padding of different lengths."""
    labels, mask = rows.clone(), torch.ones_like(rows)
    labels[0, :3] = -100
    for row in range(len(rows)):
        mask[row, 8 - row % 3 :] = 0
        labels[row, 8 - row % 3 :] = -100
    return {"input_ids": rows, "attention_mask": mask, "labels": labels}


def adapted(**lora) -> nn.Module:
    torch.manual_seed(0)
    options = {"r": 3, "lora_alpha": 6, "init_lora_weights": False, "target_modules": "all-linear", "lora_dropout": 0.1}
    return get_peft_model(llama(num_hidden_layers=2), LoraConfig(**{**options, **lora})).double()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def assert_is_twins(model: nn.Module, batch: dict[str, Tensor], loss: Callable = token_losses, bound: float = 1e-10):
    found = gradient_gram(model, batch, loss, space="factor")
    gradients = flat_gradients(model, batch, loss)
    assert relative(found.gram["global"], gradients @ gradients.mT) < bound
    assert found.covered_share == 1.0
    assert found.uncovered == ()
    parts = sum(each for name, each in found.gram.items() if name != "global")
    assert relative(found.gram["global"], parts) < 1e-14
    return found


# ---- families ----


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_under_lora(name):
    family = FAMILIES[name]
    model, batch = family.model_and_batch()
    torch.manual_seed(0)
    model = get_peft_model(model, family.lora())
    if name != "mixtral":  # its grouped products have no float64
        model = model.double()
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    found = assert_is_twins(model, batch, bound=1e-10 if name != "mixtral" else 1e-5)
    assert {each.name for each in find(model).watched} <= set(found.gram)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5", "vit", "llava", "mixtral"])
def test_families_trained_whole(name):
    """Convolutions, embeddings, norms, biases, Conv1D, tied weights, positions, relative biases, fused experts."""
    model, batch = FAMILIES[name].model_and_batch()
    if name != "mixtral":
        model = model.double()
        batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    assert_is_twins(model, batch, bound=1e-10 if name != "mixtral" else 1e-5)


def test_what_no_rule_takes_apart_is_named():
    model, batch = FAMILIES["vit"].model_and_batch()
    found = gradient_gram(model, batch)
    assert set(found.one_by_one) == {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"}
    assert gradient_gram(adapted(), tokens()).one_by_one == ()


ADAPTERS = {
    "DoRA": LoraConfig(use_dora=True, target_modules=["q_proj"]),
    "AdaLoRA": AdaLoraConfig(target_modules=["q_proj"], total_step=10),
    "embedding": LoraConfig(target_modules=["embed_tokens", "q_proj"]),
    "biases": LoraConfig(target_modules=["q_proj"], bias="all", lora_bias=True),
    "tokens": LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2, 3]),
    "modules": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head", "norm", "embed_tokens"]),
    "LoHa": LoHaConfig(target_modules=["q_proj"]),
    "IA³": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prefix": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_adapter(name):
    torch.manual_seed(0)
    model = get_peft_model(llama(num_hidden_layers=2), ADAPTERS[name]).double()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    assert_is_twins(model, tokens())


# ---- batches ----


@pytest.mark.parametrize("space", ["tangent", "factor", "weight"])
@pytest.mark.parametrize("cuts", [(2, 3), (1, 1, 3), (4, 1)])
def test_batches_of_any_size_are_one(space, cuts):
    model = adapted(modules_to_save=["lm_head"], target_modules=["q_proj", "down_proj"])
    batch = tokens()
    parts = [
        dict(zip(batch, rows, strict=True)) for rows in zip(*(v.split(list(cuts)) for v in batch.values()), strict=True)
    ]
    shorter = [
        {key: value[:, : int(part["attention_mask"].sum(1).max())] for key, value in part.items()} for part in parts
    ]
    whole, split = gradient_gram(model, batch, space=space), gradient_gram(model, iter(shorter), space=space)
    assert relative(split.gram["global"], whole.gram["global"]) < 1e-10
    torch.testing.assert_close(split.losses, whole.losses)


def test_tied_embeddings_sum_before_the_product():
    model = llama(num_hidden_layers=2, tie_word_embeddings=True).double()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    found = assert_is_twins(model, tokens())
    assert "model.embed_tokens" in found.gram
    assert "lm_head" not in found.gram


class Odd(nn.Module):
    """A layer used twice, one changed in place behind its back, one used by a function, one not at all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.twice, self.in_place, self.by_function, self.unused = (nn.Linear(4, 4) for _ in range(4))
        self.norm, self.scale = nn.LayerNorm(4), nn.Parameter(torch.rand(4))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.twice(self.twice(x).tanh())
        x = self.in_place(x)
        x.mul_(2.0).add_(x.detach())
        return nn.functional.linear(self.norm(x), self.by_function.weight) + self.by_function(x) * self.scale


def squares(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return model(batch["x"]).square().flatten(1).sum(1)


@pytest.mark.parametrize("shape", [(6, 4), (6, 3, 4), (6, 6, 4)])
def test_odd_uses_of_parameters_are_found_out(shape):
    batch = {"x": torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    found = assert_is_twins(Odd(), batch, squares)
    assert {"in_place.weight", "in_place.bias", "by_function.weight", "scale"} == set(found.one_by_one)
    assert found.gram["unused"].abs().max() == 0


class TimeFirst(nn.Module):
    """A layer that sees tokens first and samples second."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1)


@pytest.mark.parametrize("tokens_", [3, 6])
def test_rows_in_another_order_are_found_out(tokens_):
    batch = {"x": torch.randn(6, tokens_, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    found = assert_is_twins(TimeFirst(), batch, squares)
    assert found.one_by_one == ()


def test_samples_share_an_image():
    """As many images as samples, but not one each: rows of the vision tower are not samples."""

    class Pairs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.tower, self.head = (nn.Linear(4, 4).double() for _ in range(2))

        def forward(self, images: Tensor) -> Tensor:
            seen = self.tower(images).tanh().mean(1)
            return self.head(torch.stack([seen[0] + seen[1], seen[2], seen[2] * 2]))

    batch = {"images": torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))}
    loss = lambda model, batch: model(**batch).square().sum(1)  # noqa: E731
    found = assert_is_twins(Pairs(), batch, loss)
    assert any(name.startswith("tower") for name in found.one_by_one)


# ---- spaces ----


def explicit(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """∇W of each adapted matrix by merging the adapters into a plain Llama, and the projection on the tangent space."""
    base, found = llama(num_hidden_layers=2).double(), {}
    matrices = {each.name: each.read() for each in find(model).watched if not each.part_of}
    plain = {n.replace("base_model.model.", "").replace(".base_layer", ""): p for n, p in model.named_parameters()}
    for name, parameter in base.named_parameters():
        parameter.data.copy_(plain[name].detach())
        if name.removesuffix(".weight") in matrices:
            parameter.data.add_(matrices[name.removesuffix(".weight")].to_dense().detach())
        else:
            parameter.requires_grad_(False)
    gradients = per_sample_gradients(base, batch, token_losses)
    for name, matrix in matrices.items():
        full = gradients[f"{name}.weight"]
        left, right = (torch.linalg.pinv(f) for f in (matrix.left.detach(), matrix.right.detach()))
        onto_left, onto_right = matrix.left.detach() @ left, right @ matrix.right.detach()
        found[name] = full, onto_left @ full + full @ onto_right - onto_left @ full @ onto_right
    return found


MODELS = {
    "plain": {},
    "rank 1": {"r": 1},
    "rank above the width": {"r": 20},
    "rsLoRA": {"use_rslora": True},
    "B = 0": {"init_lora_weights": True},
}


@pytest.mark.parametrize("name", MODELS)
def test_tangent_space_is_the_explicit_projection(name):
    model, batch = adapted(**MODELS[name]), tokens()
    found, full = gradient_gram(model, batch), gradient_gram(model, batch, space="weight")
    for matrix, (gradient, projected) in explicit(model, batch).items():
        assert relative(found.gram[matrix], projected.flatten(1) @ projected.flatten(1).mT) < 1e-10
        assert relative(full.gram[matrix], gradient.flatten(1) @ gradient.flatten(1).mT) < 1e-10


def test_several_adapters_on_one_matrix_have_one_tangent_space():
    model = adapted()
    torch.manual_seed(1)
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    model = model.double()
    found = gradient_gram(model, tokens())
    for matrix, (_, projected) in explicit(model, tokens()).items():
        assert relative(found.gram[matrix], projected.flatten(1) @ projected.flatten(1).mT) < 1e-10


def test_tangent_space_does_not_know_the_gauge_and_factor_space_does():
    model, batch = adapted(), tokens()
    before = {space: gradient_gram(model, batch, space=space).gram["global"] for space in ("tangent", "factor")}
    generator = torch.Generator().manual_seed(5)
    for layer in model.modules():
        if hasattr(layer, "lora_A") and "default" in getattr(layer, "lora_A", {}):
            change = torch.randn(3, 3, dtype=torch.float64, generator=generator) + 2 * torch.eye(3, dtype=torch.float64)
            layer.lora_B["default"].weight.data = layer.lora_B["default"].weight.data @ change
            layer.lora_A["default"].weight.data = torch.linalg.solve(change, layer.lora_A["default"].weight.data)
    after = {space: gradient_gram(model, batch, space=space).gram["global"] for space in before}
    assert relative(after["tangent"], before["tangent"]) < 1e-10
    assert relative(after["factor"], before["factor"]) > 0.1


def test_nearly_dependent_columns_do_not_amplify_rounding():
    """As B is after a few steps from zero: a solve for what ∇_A says would lose as many digits as B's condition has."""
    model, batch = adapted(), tokens()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            left, values, right = torch.linalg.svd(parameter.data, full_matrices=False)
            parameter.data = left * torch.tensor([1, 1e-3, 1e-6]).double() * values[0] @ right
    found = gradient_gram(model.float(), batch)
    expected = gradient_gram(model.double(), batch)
    for matrix in expected.gram:
        assert relative(found.gram[matrix], expected.gram[matrix]) < 1e-4


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_opens_no_directions(frozen):
    model, batch = adapted(), tokens()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    found = gradient_gram(model, batch)
    matrices = {each.name: each.read() for each in find(model).watched}
    for name, (gradient, _) in explicit(adapted(), batch).items():
        factor = matrices[name].right.detach() if frozen == "lora_A" else matrices[name].left.detach()
        onto = torch.linalg.pinv(factor) @ factor if frozen == "lora_A" else factor @ torch.linalg.pinv(factor)
        projected = (gradient @ onto if frozen == "lora_A" else onto @ gradient).flatten(1)
        assert relative(found.gram[name], projected @ projected.mT) < 1e-10
        out, in_ = matrices[name].shape
        assert found.dimension[name] == 3 * (out if frozen == "lora_A" else in_)


def test_dimensions():
    model = adapted(target_modules=["q_proj"])
    found = {space: gradient_gram(model, tokens(), space=space).dimension for space in ("tangent", "factor", "weight")}
    name = "model.layers.0.self_attn.q_proj"
    assert [found[space][name] for space in found] == [3 * (16 + 16 - 3), 3 * (16 + 16), 16 * 16]
    assert found["tangent"]["global"] == 2 * 3 * (16 + 16 - 3)


# ---- updates ----


@pytest.mark.parametrize("space", ["tangent", "weight"])
@pytest.mark.parametrize("dense", [True, False])
def test_update_products_are_those_of_the_explicit_vectors(space, dense):
    model, batch = adapted(), tokens()
    generator = torch.Generator().manual_seed(7)
    update, inside, whole, product = {}, 0.0, 0.0, 0.0
    for name, (full, projected) in explicit(model, batch).items():
        factors = (
            torch.randn(*s, dtype=torch.float64, generator=generator) for s in ((full.shape[1], 2), (2, full.shape[2]))
        )
        change = LowRankMatrix(*factors, 0.1)
        update[name] = change.to_dense() if dense else change
        product = product + (projected if space == "tangent" else full).flatten(1) @ change.to_dense().flatten()
        whole += float(change.to_dense().square().sum())
    found = gradient_gram(model, batch, space=space, update=update)
    assert relative(found.update_product["global"], product) < 1e-10
    inside = found.update_norm_squared["global"]
    assert found.share_outside_space["global"] == pytest.approx(1 - inside / whole, abs=1e-12)
    assert (0.3 < found.share_outside_space["global"] < 1) == (space == "tangent")


def test_a_step_of_the_factors_lies_in_the_tangent_space():
    model, batch = adapted(), tokens()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = {each.name: each.read() for each in find(model).watched}
    old = {name: matrix.to_dense().detach().clone() for name, matrix in before.items()}
    outside = []
    for size in (1e-2, 1e-4):
        steps = torch.autograd.grad(token_losses(model.eval(), batch).sum(), trained)
        with torch.no_grad():
            for p, step in zip(trained, steps, strict=True):
                p.sub_(size * step)
        update = {each.name: each.read().to_dense().detach() - old[each.name] for each in find(model).watched}
        with torch.no_grad():
            for p, step in zip(trained, steps, strict=True):
                p.add_(size * step)
        outside.append(gradient_gram(model, batch, update=update).share_outside_space["global"])
    assert outside[0] < 0.05
    assert outside[1] < outside[0] * 1e-3  # second order in the step, squared


def test_factor_updates_go_by_parameters():
    model, batch = adapted(target_modules=["q_proj"]), tokens()
    generator = torch.Generator().manual_seed(7)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    update = {
        name.removeprefix("base_model.model."): torch.randn(p.shape, dtype=torch.float64, generator=generator)
        for name, p in trained.items()
    }
    found = gradient_gram(model, batch, space="factor", update=update)
    flat = torch.cat([change.flatten() for change in update.values()])
    assert relative(found.update_product["global"], flat_gradients(model, batch, token_losses) @ flat) < 1e-10
    assert found.update_norm_squared["global"] == pytest.approx(float(flat.square().sum()))
    assert found.share_outside_space["global"] == 0.0


def test_factor_updates_of_experts_are_parts_of_parameters():
    model, batch = FAMILIES["mixtral"].model_and_batch()
    torch.manual_seed(0)
    model = get_peft_model(model, FAMILIES["mixtral"].lora())
    update, flat = {}, []
    for name, parameter in trained_parameters(model).items():
        update[name] = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7))
        flat.append(update[name].flatten().double())
    found = gradient_gram(model, batch, space="factor", update=update)
    expected = flat_gradients(model, batch, token_losses) @ torch.cat(flat)
    assert relative(found.update_product["global"], expected) < 1e-5
    assert found.update_norm_squared["global"] == pytest.approx(float(torch.cat(flat).square().sum()))


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_updates_of_dense_parameters(name):
    model, batch = FAMILIES[name].model_and_batch()
    model = model.double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in batch.items()}
    generator = torch.Generator().manual_seed(7)
    names = {id(each.sources[0]): each.name for each in find(model).watched}
    update, flat = {}, []
    for path, p in model.named_parameters():
        change = torch.randn(p.shape, dtype=torch.float64, generator=generator)
        shaped = change.flatten(1) if p.ndim > 3 else change[0] if p.ndim == 3 else change
        update[names.get(id(p), path)] = shaped
        flat.append(change.flatten())
    found = gradient_gram(model, batch, update=update)
    expected = flat_gradients(model, batch, token_losses) @ torch.cat(flat)
    assert relative(found.update_product["global"], expected) < 1e-10


# ---- oracles ----


def test_torchjds_gramian():
    autogram = pytest.importorskip("torchjd.autogram", reason="compares with TorchJD: install the 'benchmark' extra")
    model, batch = adapted().float().eval(), tokens()
    found = gradient_gram(model, batch, space="factor").gram["global"]
    theirs = autogram.Engine(model, batch_dim=0).compute_gramian(token_losses(model, batch))
    assert relative(theirs.detach().double(), found) < 1e-5


def test_eigenvalues_are_those_of_the_explicit_fisher():
    model, batch = adapted(target_modules=["q_proj"]), tokens()
    gradients = flat_gradients(model, batch, token_losses)
    fisher = torch.linalg.eigvalsh(gradients.mT @ gradients / len(gradients)).flip(0)[: len(gradients)]
    found = gradient_gram(model, batch, space="factor").gram["global"]
    torch.testing.assert_close(torch.linalg.eigvalsh(found / len(found)).flip(0), fisher, rtol=1e-8, atol=1e-12)


def test_sampled_labels_give_the_true_fisher_of_softmax_regression():
    """At zero weights F = Cov ⊗ (I/C − 11ᵀ/C²): sampling the labels of one input many times, K's mean is known."""

    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 4, bias=False).double()
            nn.init.zeros_(self.layer.weight)

        def forward(self, x: Tensor, labels: Tensor):
            from types import SimpleNamespace

            logits = self.layer(x)
            return SimpleNamespace(logits=logits, loss=nn.functional.cross_entropy(logits, labels))

    x = torch.randn(600, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "labels": torch.zeros(600, dtype=torch.long)}
    found = {kind: gradient_gram(Regression(), batch, fisher=kind).gram["global"] for kind in ("sampled", "empirical")}
    # Labels that are all one class point one way; the model's own point all ways: E over pairs is 0.
    pairs = {kind: (k.sum() - k.trace()) / (x @ x.mT).fill_diagonal_(0).abs().sum() for kind, k in found.items()}
    traces = [float(found[kind].trace()) for kind in ("sampled", "empirical")]
    assert traces[0] == pytest.approx(traces[1], rel=1e-9)  # ‖e_y − p‖² is the same for all y
    spectrum = torch.linalg.eigvalsh(found["sampled"] / 600).flip(0)[:9]
    expected = torch.linalg.eigvalsh(x.mT @ x / 600).flip(0).repeat_interleave(3) / 4
    torch.testing.assert_close(spectrum, expected, rtol=0.25, atol=0)
    assert abs(pairs["sampled"]) < abs(pairs["empirical"])
    again = gradient_gram(Regression(), batch, fisher="sampled", seed=0).gram["global"]
    assert torch.equal(again, found["sampled"])


# ---- a guest ----


def test_the_model_is_left_as_it_was():
    model, batch = adapted(), tokens()
    model.train()
    model.base_model.model.model.layers[0].eval()
    next(p for p in model.parameters() if p.requires_grad).grad = torch.ones(1)[0] * torch.ones(3, 16).double()
    state = {
        "modes": [module.training for module in model.modules()],
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "trained": [p.requires_grad for p in model.parameters()],
        "hooks": sum(len(module._forward_hooks) for module in model.modules()),
        "random": torch.get_rng_state(),
    }
    with torch.no_grad():
        gradient_gram(model, batch)
    assert [module.training for module in model.modules()] == state["modes"]
    assert [p.requires_grad for p in model.parameters()] == state["trained"]
    assert sum(len(module._forward_hooks) for module in model.modules()) == state["hooks"]
    assert torch.equal(torch.get_rng_state(), state["random"])
    for p, gradient in zip(model.parameters(), state["gradients"], strict=True):
        assert (p.grad is None) == (gradient is None)
        assert gradient is None or torch.equal(p.grad, gradient)


@pytest.mark.parametrize("how", ["bfloat16 autocast", "gradient checkpointing", "wrapped"])
def test_ways_of_training(how):
    model, batch = adapted().float(), tokens()
    expected = gradient_gram(model, batch).gram["global"]
    if how == "gradient checkpointing":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model.train()
        found, bound = gradient_gram(model, batch), 1e-6
    elif how == "wrapped":
        found, bound = gradient_gram(nn.DataParallel(torch.compile(model, backend="eager")), batch), 1e-6
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found, bound = gradient_gram(model, batch), 0.1  # what the passes round by themselves
    assert relative(found.gram["global"], expected) < bound


# ---- bad input ----


def test_one_sample_is_a_number():
    found = gradient_gram(adapted(), {key: value[:1] for key, value in tokens().items()})
    assert found.gram["global"].shape == (1, 1)
    assert found.gram["global"].item() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"space": "gauge"}, "Expected space to be one of tangent, factor, weight, got 'gauge'."),
        ({"fisher": "true"}, "Expected fisher to be one of empirical, sampled, got 'true'."),
        ({"blocks": ["nothing"]}, "got ['nothing']."),
        ({"blocks": []}, "Expected names of blocks, got none."),
        (
            {"space": "factor", "update": {"model.layers.0.self_attn.q_proj": torch.ones(16, 16)}},
            "Expected the update of parameters, such as",
        ),
        ({"update": {"nothing": torch.ones(1, 1)}}, "Leave out what is not measured."),
        (
            {"loss": lambda model, batch: model(**batch).loss},
            "Expected loss(model, batch) to return one number for each",
        ),
        ({"loss": lambda model, batch: torch.ones(5)}, "got some that do not depend on any trainable parameter."),
    ],
)
def test_what_is_no_argument_is_refused(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        gradient_gram(adapted(), tokens(), **options)


def test_no_batch_and_no_trainable_parameter_are_refused():
    with pytest.raises(ValueError, match=r"Expected at least one batch of probe samples, got none\."):
        gradient_gram(adapted(), [])
    with pytest.raises(ValueError, match="got one in which none requires a gradient"):
        gradient_gram(llama(num_hidden_layers=2).requires_grad_(False), tokens())


@pytest.mark.parametrize("broken", ["labels", "loss"])
def test_a_broken_sample_is_named_or_left_out(broken):
    model, batch = adapted(), tokens()
    whole = gradient_gram(model, batch)
    loss = token_losses
    if broken == "labels":
        batch["labels"][2] = -100
    else:

        def loss(model, batch):
            return token_losses(model, batch) * torch.tensor([1, 1, torch.nan, 1, 1])

    with pytest.raises(ValueError, match=re.escape("got 1 of 5 samples without (samples 2).")):
        gradient_gram(model, batch, loss)
    found = gradient_gram(model, batch, loss, skip_broken=True)
    assert found.left_out == (2,)
    kept = [0, 1, 3, 4]
    assert relative(found.gram["global"], whole.gram["global"][kept][:, kept]) < 1e-10


def test_chosen_blocks_say_what_they_leave_out():
    model = adapted()
    name = "model.layers.0.self_attn.q_proj"
    found = gradient_gram(model, tokens(), blocks=[name])
    assert set(found.gram) == {name, "global"}
    assert 0 < found.covered_share < 0.2
    assert len(found.uncovered) == 2 * 13
    whole = gradient_gram(model, tokens())
    assert relative(found.gram[name], whole.gram[name]) < 1e-12


@pytest.mark.parametrize("projection", [0, 16])
def test_only_all_blocks_together(projection):
    model = adapted()
    update = {"model.layers.0.self_attn.q_proj": torch.ones(16, 16)}
    found, whole = (
        gradient_gram(model, tokens(), update=update, blocks=blocks, projection=projection)
        for blocks in (["global"], None)
    )
    assert found.blocks == ("global",)
    for name in ("gram", "update_product"):
        assert torch.equal(getattr(found, name)["global"], getattr(whole, name)["global"]), name
    for name in ("update_norm_squared", "share_outside_space", "dimension"):
        assert getattr(found, name) == {"global": getattr(whole, name)["global"]}, name
    assert found.covered_share == 1
