"""Names on disk, beside the names and the values that `save_pretrained` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from dynamics.recording.disk_names import disk_names
from probes.watched import find
from tests.families import FAMILIES, TEXT, VISION

#: Families of which transformers writes some weights under other names.
RENAMED = {"llava", "qwen2_5_vl", "internvl", "paligemma", "gemma3", "mllama", "vit", "mixtral"}


def as_saved(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `save_pretrained` does to a state dict."""
    return revert_weight_conversion(model, remove_tied_weights_from_state_dict(state, model))


def dense(model: nn.Module) -> dict[str, Tensor]:
    """Each matrix of a model that is trained whole, by its live name."""
    return {watched.name: watched.read() for watched in find(model).watched}


def saved(model: Any, folder: Path) -> dict[str, Tensor]:
    """What is on disk: each tensor, and each matrix of a stack, without `.weight`."""
    model.save_pretrained(folder)
    tensors = {key.removesuffix(".weight"): tensor for key, tensor in load_file(folder / "model.safetensors").items()}
    stacks = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 3}
    return tensors | {f"{name}[{e}]": matrix for name, stack in stacks.items() for e, matrix in enumerate(stack)}


def flat(tensor: Tensor) -> Tensor:
    """A tensor from disk as the matrix that is watched."""
    return tensor[0] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor.flatten(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_each_matrix_lies_where_the_map_says(name: str, tmp_path: Path) -> None:
    model = FAMILIES[name].model()
    matrices, disk = dense(model), saved(model, tmp_path)

    names = disk_names(model, matrices, state_dict_conversion=as_saved)

    assert bool(names) == (name in RENAMED)
    for live, matrix in matrices.items():
        place = names.get(live, live)
        parts = [place] if isinstance(place, str) else place
        assert torch.equal(torch.cat([flat(disk[part]) for part in parts]), matrix)


def test_examples(tmp_path: Path) -> None:
    def names(family: str) -> dict[str, str | list[str]]:
        model = FAMILIES[family].model()
        return disk_names(model, dense(model), state_dict_conversion=as_saved)

    assert names("llava")["lm_head"] == "language_model.lm_head"
    assert names("mixtral") == {
        f"model.layers.{layer}.mlp.{live}": disk
        for layer in range(2)
        for moe in [f"model.layers.{layer}.block_sparse_moe"]
        for live, disk in {
            "gate": f"{moe}.gate",
            **{f"experts.gate_up_proj[{e}]": [f"{moe}.experts.{e}.w1", f"{moe}.experts.{e}.w3"] for e in range(3)},
            **{f"experts.down_proj[{e}]": f"{moe}.experts.{e}.w2" for e in range(3)},
        }.items()
    }


def test_weights_that_are_merged_on_disk(tmp_path: Path) -> None:
    text = {key: value for key, value in TEXT.items() if key not in ("head_dim", "num_key_value_heads")}
    model = hf.NomicBertModel(hf.NomicBertConfig(**text))
    disk = saved(model, tmp_path)

    names = disk_names(model, dense(model), state_dict_conversion=as_saved)

    merged = "encoder.layers.0.attn.Wqkv"
    assert [names[f"layers.0.self_attn.{role}_proj"] for role in "qkv"] == [[merged]] * 3
    assert disk[merged].shape == (48, 16)


def test_weights_that_are_transposed_on_disk_are_still_one(tmp_path: Path) -> None:
    def conversion(_: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("mlp", "moe"): t.transpose(-1, -2).contiguous() for key, t in state.items() if t.ndim > 1}

    model = FAMILIES["mixtral"].model()
    names = disk_names(model, dense(model), state_dict_conversion=conversion)

    assert names["model.layers.1.mlp.experts.down_proj[2]"] == "model.layers.1.moe.experts.down_proj[2]"


def test_a_tied_weight_goes_by_the_name_that_is_kept(tmp_path: Path) -> None:
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(
            vision_config=hf.CLIPVisionConfig(**VISION, projection_dim=16),
            text_config=hf.LlamaConfig(**TEXT, tie_word_embeddings=True),
            image_token_index=60,
            tie_word_embeddings=True,
        )
    )
    matrices, disk = dense(model), saved(model, tmp_path)

    names = disk_names(model, matrices, state_dict_conversion=as_saved)

    assert "lm_head" not in matrices
    assert names["model.language_model.embed_tokens"] in disk


def test_a_tied_weight_of_which_the_second_name_is_kept() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight

    names = disk_names(model, ["0"], state_dict_conversion=lambda _, state: {"1.weight": state["1.weight"]})

    assert names == {"0": "1"}


def test_a_model_that_was_loaded_is_saved_as_it_was(tmp_path: Path) -> None:
    FAMILIES["llava"].model().save_pretrained(tmp_path / "first", save_original_format=False)
    model = hf.LlavaForConditionalGeneration.from_pretrained(tmp_path / "first")
    matrices, disk = dense(model), saved(model, tmp_path / "second")

    names = disk_names(model, matrices, state_dict_conversion=as_saved)

    assert {names.get(name, name) for name in matrices} <= disk.keys()
    assert names == {}  # transformers remembers that it was loaded under live names


@pytest.mark.parametrize("family", ["llava", "mixtral"])
def test_under_adapters_and_wrappers_the_base_models_weights(family: str) -> None:
    base = FAMILIES[family].model()
    matrices = list(dense(base))
    expected = disk_names(base, matrices, state_dict_conversion=as_saved)
    config = FAMILIES[family].lora(modules_to_save=["lm_head"])
    model = torch.compile(nn.DataParallel(get_peft_model(base, config)))

    watched = [each.name for each in find(model).watched]

    assert disk_names(model, matrices, state_dict_conversion=as_saved) == expected
    names = disk_names(model, watched, state_dict_conversion=as_saved)
    assert names == {name: expected[name] for name in watched if name in expected}


def test_the_conversion_sees_the_model_as_it_was_built() -> None:
    keys = list(FAMILIES["mixtral"].model().state_dict())
    seen: list[str] = []

    def conversion(_: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.extend(state)
        return state

    config = FAMILIES["mixtral"].lora(modules_to_save=["lm_head"], trainable_token_indices=[1])
    disk_names(get_peft_model(FAMILIES["mixtral"].model(), config), [], state_dict_conversion=conversion)

    assert sorted(seen) == sorted(keys)


def test_names_that_are_no_weights_are_passed_over() -> None:
    model = get_peft_model(FAMILIES["llama"].model(), LoraConfig(target_modules=["q_proj"]))

    assert disk_names(model, ["model.layers.0.self_attn.q_proj@default"], state_dict_conversion=as_saved) == {}


def test_what_is_not_written_is_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    names = disk_names(model, ["0", "1"], state_dict_conversion=lambda _, state: {"x.weight": state["1.weight"]})

    assert names == {"1": "x"}


class Stored(TorchDispatchMode):
    """Size in bytes of the largest storage that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        tensors = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and not leaf.is_meta]
        self.largest = max(self.largest, *(tensor.untyped_storage().nbytes() for tensor in tensors), 0)
        return result


@pytest.mark.parametrize("family", ["mixtral", "nomic_bert"])
def test_nothing_of_the_size_of_a_weight_is_made(family: str) -> None:
    with torch.device("meta"):
        if family == "mixtral":
            model = hf.MixtralForCausalLM(hf.MixtralConfig(num_hidden_layers=2))  # 8x7B
            live, disk = "model.layers.1.mlp.experts.down_proj[7]", "model.layers.1.block_sparse_moe.experts.7.w2"
        else:
            model = hf.NomicBertModel(hf.NomicBertConfig())
            live, disk = "layers.1.self_attn.q_proj", ["encoder.layers.1.attn.Wqkv"]

    with Stored() as stored:
        names = disk_names(model, [live], state_dict_conversion=as_saved)

    assert names == {live: disk}
    assert 0 < stored.largest <= 8 * 8
