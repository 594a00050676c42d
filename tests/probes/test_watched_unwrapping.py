"""Models in wrappers are watched under the names that they have without."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, PeftMixedModel, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from probes.watched import base_model, find, plain_path, watched_matrices


def network() -> nn.Module:
    return nn.ModuleDict({"first": nn.Linear(3, 4), "block": nn.ModuleDict({"second": nn.Linear(4, 4)})})


def adapted(model: nn.Module, **changes: object) -> nn.Module:
    return get_peft_model(model, LoraConfig(target_modules=["first", "second"], r=2, **changes))


OUTER: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda model: model,
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "compiled data parallel": lambda model: torch.compile(nn.DataParallel(model)),
    "data parallel of compiled": lambda model: nn.DataParallel(torch.compile(model)),
}


@pytest.mark.parametrize("outer", OUTER)
def test_around_a_model(outer: str) -> None:
    model = network()

    wrapped = OUTER[outer](model)

    assert base_model(wrapped) is model
    assert list(watched_matrices(wrapped)) == ["first", "block.second"]


@pytest.mark.parametrize("outer", OUTER)
def test_around_an_adapted_model(outer: str) -> None:
    model = network()

    wrapped = OUTER[outer](adapted(model))

    assert base_model(wrapped) is model
    assert list(watched_matrices(wrapped)) == ["first", "block.second"]


def test_mixed_adapters() -> None:
    model = network()

    wrapped = get_peft_model(model, LoraConfig(target_modules=["first"]), mixed=True)

    assert isinstance(wrapped, PeftMixedModel)
    assert base_model(wrapped) is model
    assert list(watched_matrices(wrapped)) == ["first"]


@pytest.mark.parametrize("inner", [torch.compile, checkpoint_wrapper, nn.DataParallel])
def test_inside_a_model(inner: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    model["block"] = inner(model["block"])

    found = find(model)

    assert [watched.name for watched in found.watched] == ["first", "block.second"]
    assert found.uncovered == ("first.bias", "block.second.bias")


@pytest.mark.parametrize("inner", [torch.compile, checkpoint_wrapper])
def test_inside_an_adapted_model(inner: Callable[[nn.Module], nn.Module]) -> None:
    model = network()
    adapter = adapted(model, use_dora=True)
    model["block"]["second"] = inner(model["block"]["second"])

    found = find(adapter)

    assert list(found.skipped) == ["first", "block.second"]


@pytest.mark.parametrize("word", ["module", "base_layer", "_orig_mod", "modules_to_save", "base_model", "model"])
def test_a_models_own_names_stay(word: str) -> None:
    model = nn.ModuleDict(
        {word: nn.ModuleDict({"first": nn.Linear(3, 4), word: nn.Linear(4, 4)}), "first": nn.Linear(3, 4)}
    )
    names = [f"{word}.first", f"{word}.{word}", "first"]

    assert list(watched_matrices(model)) == names
    assert list(watched_matrices(nn.DataParallel(model))) == names
    assert list(watched_matrices(get_peft_model(model, LoraConfig(target_modules=["first"])))) == [names[0], names[2]]


def test_two_matrices_never_get_one_name() -> None:
    layer = get_peft_model(nn.ModuleDict({"a": nn.Linear(2, 2)}), LoraConfig(target_modules=["a"])).base_model.model[
        "a"
    ]
    layer.requires_grad_(True)  # the adapter and the weight beneath it

    names = list(watched_matrices(nn.ModuleDict({"a": layer})))

    assert len(names) == len(set(names)) == 2


def test_words_that_wrappers_put_into_paths() -> None:
    model = get_peft_model(network(), LoraConfig(target_modules=["second"], modules_to_save=["first"]))
    base = base_model(model)

    assert plain_path(base, "first.modules_to_save.default.weight") == "first.weight"
    assert plain_path(base, "block.second.base_layer.weight") == "block.second.weight"
    assert plain_path(base, "not.there") == "not"


def test_flattened_parameters_are_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        pass

    message = (
        "Expected a model whose parameters are matrices, got one wrapped by FullyShardedDataParallel (FSDP 1), "
        "which flattens them. Use FSDP 2 (torch.distributed.fsdp.fully_shard; accelerate: fsdp_version: 2)."
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        base_model(FullyShardedDataParallel())
