"""Slopes along singular directions are what the loss does when a singular value changes, in every kind of adapter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import Tensor, nn

from probes import LowRankMatrix, Task
from probes.additions import added
from probes.singular_directions import Directions, loss_slopes, low_rank_matrices, singular_directions
from tests.families import FAMILIES
from tests.probes.test_additions import IDS, NAMES, Layers

TARGETS = torch.randn(3, 12, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch["ids"]) - batch["target"].to(next(model.parameters()).dtype)).square().sum((1, 2))


def task(batch_size: int = 2) -> Task:
    samples = [{"ids": ids, "target": target} for ids, target in zip(IDS, TARGETS, strict=True)]
    return Task("squares", samples, loss=squares, batch_size=batch_size)


def adapted(config: LoraConfig | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """One adapted layer of each kind; no factor is zero."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, target_modules=list(NAMES), lora_alpha=2, use_rslora=True) if config is None else config
    model = get_peft_model(Layers(), config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.5)
    return model.to(dtype).eval()


def measured(model: nn.Module, probe: Task | None = None) -> tuple[dict[str, Directions], dict[str, Tensor]]:
    watched = low_rank_matrices(model)
    directions = {name: singular_directions(matrix.read()) for name, matrix in watched.items()}
    return directions, loss_slopes(model, task() if probe is None else probe, watched, directions)[1]


def mean_loss(model: nn.Module, probe: Task) -> float:
    with torch.no_grad():
        losses = [probe.losses(model, batch) for batch in probe.batches()]
    return torch.cat(losses).double().mean().item()


def finite_difference(model: nn.Module, name: str, part: Directions, number: int, step: float = 1e-4) -> float:
    """The slope from losses with σ a little larger and smaller."""
    unit = LowRankMatrix(part.left[:, [number]], part.right[:, [number]].mT, step)
    with added(model, {name: unit}):
        more = mean_loss(model, task())
    with added(model, {name: LowRankMatrix(unit.left_factor, unit.right_factor, -step)}):
        less = mean_loss(model, task())
    return (more - less) / (2 * step)


def by_differentiation(model: nn.Module, directions: dict[str, Directions]) -> dict[str, Tensor]:
    """The same slopes without the factors' gradients: of Σ θ_i u_i v_iᵀ added to the outputs, by θ at 0."""
    theta = {name: torch.zeros_like(part.values, requires_grad=True) for name, part in directions.items()}
    changes = {
        name: LowRankMatrix(part.left, part.right.mT, column_scale=theta[name]) for name, part in directions.items()
    }
    with added(model, changes):
        loss = torch.cat([task().losses(model, batch) for batch in task().batches()]).mean()
    return dict(zip(theta, torch.autograd.grad(loss, list(theta.values())), strict=True))


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (torch.randn(7, 3), torch.randn(3, 5)),
        (torch.randn(2, 3), torch.randn(3, 5)),
        (torch.randn(7, 3) * torch.tensor([1.0, 0.0, 1e-5]), torch.randn(3, 5)),
        (torch.zeros(7, 3), torch.randn(3, 5)),
    ],
    ids=["full", "wide", "deficient", "zero"],
)
def test_directions_add_up_to_the_matrix(left: Tensor, right: Tensor) -> None:
    matrix = LowRankMatrix(left, right, 2.0, column_scale=torch.tensor([1.0, 3.0, 1.0]))
    part = singular_directions(matrix)
    rank = int(torch.linalg.matrix_rank(matrix.to_dense(), rtol=1e-12))
    assert len(part.values) == part.left.shape[1] == part.right.shape[1] == rank
    torch.testing.assert_close(part.part(part.values > 0).to_dense(), matrix.to_dense(), rtol=0, atol=1e-13)
    torch.testing.assert_close(part.left.mT @ part.left, torch.eye(rank, dtype=torch.float64))
    torch.testing.assert_close(part.values, torch.linalg.svdvals(matrix.to_dense())[:rank])


def test_slopes_are_finite_differences_on_every_kind_of_layer() -> None:
    model = adapted()
    directions, slopes = measured(model)
    assert set(slopes) == set(NAMES)
    for name, part in directions.items():
        for number in range(len(part.values)):
            expected = finite_difference(model, name, part, number)
            assert slopes[name][number].item() == pytest.approx(expected, rel=1e-6, abs=1e-6), (name, number)


@pytest.mark.parametrize("batch_size", [1, 8])
def test_slopes_are_those_by_differentiation(batch_size: int) -> None:
    model = adapted()
    directions, slopes = measured(model, task(batch_size))
    torch.testing.assert_close(slopes, by_differentiation(model, directions), rtol=1e-9, atol=1e-9)


def test_they_add_up_to_the_derivative_by_the_adapters_size() -> None:
    """Σ σ_i g_i = d/dλ L(λΔW) at λ = 1."""
    model, step = adapted(), 1e-5
    directions, slopes = measured(model)
    losses = []
    for scale in (step, -step):
        with added(model, {name: part.part(part.values > 0, scale) for name, part in directions.items()}):
            losses.append(mean_loss(model, task()))
    derivative = (losses[0] - losses[1]) / (2 * step)
    total = sum(float(part.values @ slopes[name]) for name, part in directions.items())
    assert total == pytest.approx(derivative, rel=1e-7)


def test_factors_of_one_product_have_the_same_slopes() -> None:
    """For (B M, M⁻¹A), M far from a rotation."""
    model, turned = adapted(), adapted()
    generator = torch.Generator().manual_seed(5)
    for matrix in low_rank_matrices(turned).values():
        (product,) = matrix.terms
        mix = torch.randn(3, 3, dtype=torch.float64, generator=generator)
        product.left.data = (product.left_view(product.left.data) @ mix).reshape(product.left.shape)
        inverse = torch.linalg.solve(mix, product.right_view(product.right.data))
        product.right.data = inverse.reshape(product.right.shape)
    (directions, slopes), (_, others) = measured(model), measured(turned)
    assert all(len(part.values) == 3 for part in directions.values())
    torch.testing.assert_close(others, slopes, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("frozen", ["_A", "_B"])
def test_one_trained_factor_is_enough(frozen: str) -> None:
    model = adapted()
    _, expected = measured(model)
    for name, parameter in model.named_parameters():
        if frozen in name:
            parameter.requires_grad_(False)
    torch.testing.assert_close(measured(model)[1], expected, rtol=1e-9, atol=1e-9)


def test_adapters_on_one_matrix_count_as_their_sum() -> None:
    model = adapted(LoraConfig(r=2, target_modules=["linear"], lora_alpha=3))
    model.add_adapter("second", LoraConfig(r=1, target_modules=["linear"], lora_alpha=5, init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])
    model.double()
    directions, slopes = measured(model)
    assert {name: len(part.values) for name, part in directions.items()} == {"linear": 3}
    torch.testing.assert_close(slopes, by_differentiation(model, directions), rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        if "second" in name:
            parameter.requires_grad_(False)
    assert measured(model)[1]["linear"].isnan().all()  # no direction of the sum lies in the trained adapter alone


def test_adaloras_diagonal_is_part_of_the_matrix() -> None:
    config = AdaLoraConfig(target_modules=["linear"], init_r=3, lora_alpha=4, total_step=10)
    model = adapted(config)
    directions, slopes = measured(model)
    torch.testing.assert_close(slopes, by_differentiation(model, directions), rtol=1e-9, atol=1e-9)
    next(p for name, p in model.named_parameters() if "lora_E" in name).data[1] = 0.0
    directions, slopes = measured(model)
    assert len(directions["linear"].values) == 2
    torch.testing.assert_close(slopes, by_differentiation(model, directions), rtol=1e-9, atol=1e-9)


def test_fused_experts_have_slopes_each() -> None:
    """Over all experts, Σ σ_i g_i = ⟨∇_B, B⟩: how the loss changes with the size of B."""
    family = next(family for family in FAMILIES.values() if family.parameters)
    model, batch = family.model_and_batch()
    model = get_peft_model(model, family.lora()).eval()
    rows = [{key: value[number] for key, value in batch.items()} for number in range(2)]
    probe = Task("words", rows, loss=lambda model, batch: model(**batch).loss.expand(len(batch["labels"])))
    directions, slopes = measured(model, probe)
    watched = low_rank_matrices(model)
    experts = [name for name in watched if name.endswith("]")]
    assert experts
    left = {id(watched[name].terms[0].left): watched[name].terms[0].left for name in experts}
    loss = torch.cat([probe.losses(model, batch) for batch in probe.batches()]).mean()
    gradients = torch.autograd.grad(loss, list(left.values()))
    expected = sum((gradient * value).sum().item() for gradient, value in zip(gradients, left.values(), strict=True))
    total = sum(float(directions[name].values @ slopes[name]) for name in experts)
    assert total == pytest.approx(expected, rel=1e-5)


def test_nothing_is_lost_where_one_factor_is_badly_conditioned() -> None:
    """Q_Bᵀ∇W from ∇_A would lose seven digits here; from ∇_B it loses none."""
    model = adapted(LoraConfig(r=3, target_modules=["linear"]), torch.float32)
    factor = next(p for name, p in model.named_parameters() if "lora_B" in name)
    factor.data *= torch.tensor([1.0, 1e-4, 1e-7])
    directions, slopes = measured(model)
    assert len(slopes["linear"]) == 3
    exact = by_differentiation(model.double(), directions)
    torch.testing.assert_close(slopes["linear"], exact["linear"], rtol=1e-4, atol=1e-4 * exact["linear"].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_as_the_model_itself_does(dtype: torch.dtype) -> None:
    """The way by the factors' gradients adds nothing to what rounding in the model does to any slope."""
    model = adapted(dtype=dtype)
    directions, slopes = measured(model)
    directly = by_differentiation(model, directions)
    exact = by_differentiation(model.double(), directions)
    for name, values in slopes.items():
        rounding = (directly[name] - exact[name]).norm()
        assert 0 < rounding < 0.1 * exact[name].norm(), name
        assert (values - exact[name]).norm() < 2 * rounding, name


def test_a_zero_update_has_no_directions() -> None:
    model = get_peft_model(Layers(), LoraConfig(r=2, target_modules=list(NAMES))).double()
    directions, slopes = measured(model)
    assert all(len(part.values) == 0 for part in directions.values())
    assert all(len(values) == 0 for values in slopes.values())


def test_what_has_no_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="trainable low-rank adapters, got one without"):
        low_rank_matrices(Layers())
    with pytest.raises(ValueError, match="adapters whose name matches 'nothing'"):
        low_rank_matrices(adapted(), "nothing")


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="finite factors"):
        singular_directions(LowRankMatrix(torch.full((3, 1), torch.nan), torch.ones(1, 2)))
    infinite = Task("squares", task().samples, loss=lambda model, batch: squares(model, batch) * torch.inf)
    with pytest.raises(ValueError, match="Task 'squares': expected finite losses"):
        measured(adapted(), infinite)
