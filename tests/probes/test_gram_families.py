"""What is watched of models of many families, adapted by PEFT or trained whole, beside what PEFT says of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

import dynamics
from probes.watched import WatchedModel, find
from tests.families import COVERED, FAMILIES, Family


@dataclass(frozen=True)
class Adapted:
    """A family's model under LoRA, in float64, with the gradients of one batch."""

    family: Family
    model: PeftModel
    found: WatchedModel


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def adapted(name: str) -> Adapted:
    family = FAMILIES[name]
    model, batch = family.model_and_batch()
    torch.manual_seed(0)
    peft_model = get_peft_model(model, family.lora())
    peft_model(**batch).loss.backward()
    peft_model.double()
    return Adapted(family, peft_model, find(peft_model))


def peft_deltas(model: nn.Module) -> dict[str, Tensor]:
    """PEFT's own updates by name, each as (out, in)."""
    deltas = {}
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            name = path.removeprefix("base_model.model.").replace(".base_layer", "")
            delta = layer.get_delta_weight("default").detach().clone()
            if type(layer).__name__ == "ParamWrapper":
                deltas |= {f"{name}.{layer.parameter_name}[{e}]": expert for e, expert in enumerate(delta)}
            else:
                turned = getattr(layer, "fan_in_fan_out", False)
                deltas[name] = delta.T if turned else delta.flatten(1)
    return deltas


def peft_deltas_moved(model: nn.Module, sign: float) -> dict[str, Tensor]:
    """The same after each factor has gone a step of ``sign`` along its gradient; the factors are put back."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter in trained:
            parameter += sign * parameter.grad
        deltas = peft_deltas(model)
        for parameter, value in zip(trained, before, strict=True):
            parameter.copy_(value)
    return deltas


def gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def test_the_table_lists_every_family() -> None:
    assert COVERED.keys() == FAMILIES.keys()


def test_every_trainable_matrix_is_found(name: str, adapted: Adapted) -> None:
    found = adapted.found

    assert (len(found.watched), found.covered_share) == COVERED[name]
    assert (found.skipped, found.uncovered) == ({}, ())
    assert {watched.name for watched in found.watched} == peft_deltas(adapted.model).keys()


def test_names_are_those_of_the_model_as_it_was_built(adapted: Adapted) -> None:
    base = adapted.family.model()
    modules = dict(base.named_modules())
    parameters = dict(base.named_parameters())

    for watched in adapted.found.watched:
        plain, bracket, _ = watched.name.partition("[")
        assert plain in (parameters if bracket else modules)


def test_values_are_pefts_own(adapted: Adapted) -> None:
    deltas = peft_deltas(adapted.model)

    for watched in adapted.found.watched:
        torch.testing.assert_close(watched.read().to_dense(), deltas[watched.name], rtol=1e-6, atol=1e-12)


def test_the_saved_adapter_has_the_same_matrices(adapted: Adapted, tmp_path: Path) -> None:
    adapted.model.save_pretrained(tmp_path)

    with dynamics.open_trajectory(tmp_path).checkpoints[-1].open() as saved:
        assert saved.keys() == {watched.name for watched in adapted.found.watched}
        for watched in adapted.found.watched:
            assert torch.equal(saved[watched.name].to_dense(), watched.read().to_dense())


def test_gradients_are_the_change_along_the_factors_gradients(adapted: Adapted) -> None:
    # (B + G)(A + H) − (B − G)(A − H) = 2(G A + B H), exactly.
    forwards, backwards = peft_deltas_moved(adapted.model, 1), peft_deltas_moved(adapted.model, -1)

    for watched in adapted.found.watched:
        expected = (forwards[watched.name] - backwards[watched.name]) / 2
        torch.testing.assert_close(watched.gradient(gradient).to_dense(), expected, rtol=1e-6, atol=1e-12)


def test_gradients_of_linear_layers_are_those_written_out(adapted: Adapted) -> None:
    found = {watched.name: watched for watched in adapted.found.watched}
    linear = {
        path.removeprefix("base_model.model."): layer
        for path, layer in adapted.model.named_modules()
        if isinstance(layer, LoraLayer) and type(layer).__name__ == "Linear"
    }
    assert linear

    for path, layer in linear.items():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        expected = layer.scaling["default"] * (b.grad @ a + b @ a.grad)
        torch.testing.assert_close(found[path].gradient(gradient).to_dense(), expected.detach(), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_what_is_read_follows_the_training(name: str, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
    family = FAMILIES[name]
    model, batch = family.model_and_batch()
    peft_model = get_peft_model(model, family.lora())
    watched = find(peft_model).watched
    before = [each.read().to_dense() for each in watched]

    peft_model(**batch).loss.backward()
    optimizer([p for p in peft_model.parameters() if p.requires_grad], lr=0.1).step()

    still = [each.name for each, old in zip(watched, before, strict=True) if torch.equal(each.read().to_dense(), old)]
    assert still == []


def test_trained_whole(name: str) -> None:
    model = FAMILIES[name].model()
    found = find(model)

    vectors = [path for path, parameter in model.named_parameters() if parameter.ndim < 2]
    assert list(found.uncovered) == vectors
    numbers = sum(parameter.numel() for parameter in model.parameters())
    share = 1 - sum(model.get_parameter(path).numel() for path in vectors) / numbers
    assert found.covered_share == pytest.approx(share, rel=1e-12)
    assert sum(watched.read().numel() for watched in found.watched) == pytest.approx(share * numbers)
    stems = {path.removesuffix(".weight") for path, parameter in model.named_parameters() if parameter.ndim >= 2}
    assert {watched.name.partition("[")[0] for watched in found.watched} == stems
