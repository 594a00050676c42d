"""An arm on disk, with the adapter at the increment's start: whatever loads adapters can evaluate it.

The sum of the adapter and the arm is compressed to the rank that it has: 2r for a part along gradients in tangent
space, 3r for the rest. All matrices get the largest rank.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dynamics.intervention.changes import total
from probes.blocks import trained_parameters
from probes.layer_rules import adapted_layer, is_conv1d, is_convolution
from probes.low_rank import LowRankMatrix
from probes.undisturbed import bare
from probes.watched import Dense, Matrix, Watched, base_model, class_names, find, plain_path

#: Singular values of the sum below this share of the arm's largest are the rounding of its single precision.
_ROUNDING = 1e-6
#: What PEFT reads of a configuration and an arm does not change.
_KEPT = ("auto_mapping", "base_model_name_or_path", "revision", "task_type", "fan_in_fan_out", "modules_to_save")
_PREFIX = "base_model.model."
_README = """# Arm `{arm}` of an update

{what}

Written by optimization-dynamics: the weights at the start of an increment plus the part `{arm}` of the update made
afterwards, whose directions come from all probe samples. Do not judge it by the loss of these samples.

{how}
"""
_ADAPTER = """    model = PeftModel.from_pretrained(base, "{folder}")
    lm_eval --model hf --model_args pretrained=BASE,peft={folder} --tasks …"""
_DENSE = """    for name, difference in safetensors.torch.load_file("{folder}/differences.safetensors").items():
        model.get_parameter(name).data += difference.to(model.dtype)   # a model in half precision rounds it away"""


def save_arm(model: nn.Module, change: Mapping[str, Matrix], folder: Path, arm: str) -> Path:
    """Write a change of a model's matrices for evaluation elsewhere.

    Args:
        model: At the weights to which the change is added; with adapters, or dense.
        change: Matrix → its change; of other parameters by name.
        folder: New or empty. With adapters it gets ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT
            loads them; without, ``differences.safetensors``, float32 differences by parameter.
        arm: Its name, for the README beside them.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds anything.
        ValueError: If a matrix has no place in a PEFT adapter: fused experts, or parameters trained beside it.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"Expected a new or empty folder for the arm, got {folder}, which holds files.")
    adapted = [
        watched for watched in find(model).watched if not watched.part_of and not isinstance(watched.terms, Dense)
    ]
    if adapted:
        tensors, config = _adapter(model, adapted, change)
        files, how = {"adapter_config.json": json.dumps(config, indent=2)}, _ADAPTER
        name, what = "adapter_model.safetensors", f"A LoRA adapter of rank {config['r']}."
    else:
        tensors, how = _differences(model, change), _DENSE
        files: dict[str, str] = {}
        name, what = "differences.safetensors", "Differences of the weights, in single precision."
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, {"format": "pt", "arm": arm})
    files["README.md"] = _README.format(arm=arm, what=what, how=how.format(folder=folder.name))
    for file, text in files.items():
        (folder / file).write_text(text, encoding="utf-8")
    return folder


def _adapter(
    model: nn.Module, adapted: list[Watched], change: Mapping[str, Matrix]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    layers = _layers(model)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for watched in adapted:
        if "[" in watched.name or watched.name not in layers:
            raise ValueError(f"Expected matrices of layers, got {watched.name!r}, which PEFT's LoRA cannot hold alone.")
        before = watched.read()
        assert isinstance(before, LowRankMatrix)
        sums[watched.name] = _compressed(before, change.get(watched.name))
    rank = max(1, *(left.shape[1] for left, _ in sums.values()))
    tensors: dict[str, Tensor] = {}
    for name, (left, right) in sums.items():
        path, layer = layers[name]
        tensors |= _tensors(_PREFIX + path, layer, *_padded(left, right, rank))
    beside = [name for name in change if name not in sums]
    live = dict(getattr(bare(model), "peft_config", {}))
    config = live[min(live)].to_dict() if live else {}
    tensors |= _saved_modules(model, {name: change[name] for name in beside})
    kept = {key: _plain(config.get(key)) for key in _KEPT}
    return tensors, {
        **kept,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(path for path, _ in (layers[name] for name in sums)),
        "inference_mode": True,
    }


def _layers(model: nn.Module) -> dict[str, tuple[str, nn.Module]]:
    """Return the path in the base model, and the layer itself, that each adapted matrix belongs to, by its name."""
    base = base_model(model)
    owners = {
        id(parameter): (plain_path(base, path), adapted_layer(module))
        for path, module in base.named_modules()
        if "BaseTunerLayer" in class_names(module)
        for parameter in module.parameters()
    }
    return {
        watched.name: owners[id(watched.terms[0].left)]
        for watched in find(model).watched
        if not isinstance(watched.terms, Dense) and id(watched.terms[0].left) in owners
    }


def _compressed(before: LowRankMatrix, change: Matrix | None) -> tuple[Tensor, Tensor]:
    """Return factors ``(out, rank)`` and ``(rank, in)``, of equal norms, of the sum; of the rank that it has."""
    if change is None:
        whole, floor = before, 0.0
    else:
        assert isinstance(change, LowRankMatrix)
        whole = total([(1.0, {"": before}), (1.0, {"": change})])[""]
        floor = _ROUNDING * float(_core(change)[1][:1].sum())
    assert isinstance(whole, LowRankMatrix)
    left, values, right = _core(whole)
    floor = max(floor, max(whole.shape) * torch.finfo(torch.float64).eps * float(values[:1].sum()))
    rank = int((values > floor).sum())
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _core(matrix: LowRankMatrix) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular value decomposition of a product, never multiplied out."""
    (left, first), (right, last) = torch.linalg.qr(matrix.left.detach()), torch.linalg.qr(matrix.right.detach().mT)
    vectors, values, turned = torch.linalg.svd(first @ last.mT, full_matrices=False)
    return left @ vectors, values, turned @ right.mT


def _padded(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    missing = rank - left.shape[1]
    pad = torch.nn.functional.pad
    return pad(left, (0, missing)).float().cpu(), pad(right, (0, 0, 0, missing)).float().cpu()


def _tensors(path: str, layer: nn.Module, left: Tensor, right: Tensor) -> dict[str, Tensor]:
    """Return the factors under the names and in the shapes that PEFT gives them."""
    if isinstance(layer, nn.Embedding):
        return {f"{path}.lora_embedding_A": right, f"{path}.lora_embedding_B": left}
    if is_convolution(layer):
        weight = layer.weight
        assert isinstance(weight, Tensor)
        kernel = weight.shape[1:]
        left, right = left.reshape(*left.shape, *[1] * (len(kernel) - 1)), right.reshape(len(right), *kernel)
    elif not (isinstance(layer, nn.Linear) or is_conv1d(layer) or hasattr(layer, "weight")):
        raise ValueError(
            f"Expected a linear layer, a convolution or an embedding, got {path!r}, a {type(layer).__name__}."
        )
    return {f"{path}.lora_A.weight": right, f"{path}.lora_B.weight": left}


def _saved_modules(model: nn.Module, change: Mapping[str, Matrix]) -> dict[str, Tensor]:
    """Return weights that PEFT saves whole beside an adapter (``modules_to_save``), with their change."""
    parameters = _parameters(model)
    paths = {id(parameter): path for path, parameter in base_model(model).named_parameters()}
    tensors: dict[str, Tensor] = {}
    for name, value in change.items():
        parameter = parameters[name]
        path = paths[id(parameter)]
        if "modules_to_save" not in path.split("."):
            raise ValueError(
                f"Expected changes of adapters and of modules_to_save, got {name!r}. Choose blocks without it."
            )
        whole = parameter.detach().double() + _like(value, parameter)
        tensors[_PREFIX + plain_path(base_model(model), path)] = whole.float().cpu()
    return tensors


def _differences(model: nn.Module, change: Mapping[str, Matrix]) -> dict[str, Tensor]:
    """Return float32 differences by the names of the model's own parameters."""
    parameters = _parameters(model)
    paths = {id(parameter): path for path, parameter in bare(model).named_parameters()}
    return {paths[id(parameters[name])]: _like(value, parameters[name]).float().cpu() for name, value in change.items()}


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return dense trained parameters by the names of their matrices, or their own."""
    dense = {
        watched.name: watched.terms.parameter
        for watched in find(model).watched
        if isinstance(watched.terms, Dense) and "[" not in watched.name
    }
    return trained_parameters(model) | dense


def _like(value: Matrix, parameter: nn.Parameter) -> Tensor:
    dense = value.to_dense() if isinstance(value, LowRankMatrix) else value.to(torch.float64)
    return dense.to(parameter.device).reshape(parameter.shape)


def _plain(value: Any) -> Any:
    """Return a value of a configuration as JSON holds it."""
    if isinstance(value, set | tuple | list):
        return sorted(value) if isinstance(value, set) else list(value)
    return getattr(value, "value", value)
