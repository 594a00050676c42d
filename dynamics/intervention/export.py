"""An arm on disk, with the adapter at the increment's start: whatever loads adapters can evaluate it.

The sum of the adapter and the arm is compressed to the rank that it has: 2r for a part along gradients in tangent
space, 3r for the rest. All matrices get the largest rank.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dynamics.intervention.update_vectors import weighted_sum
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

Written by optimization-dynamics. Directions come from all probe samples: do not judge it by the loss of these samples.

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
        folder: New or empty; it is filled whole, or not at all. With adapters it gets ``adapter_model.safetensors`` and
            ``adapter_config.json``, as PEFT loads them; without, ``differences.safetensors``, float32 differences by
            parameter.
        arm: Its name, for the README beside them.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds anything, or is a file.
        ValueError: If a change has no matrix, or something of the model has no place in a PEFT adapter of LoRA's kind:
            fused experts, a variant of LoRA, adapters that are frozen, parameters trained beside adapters.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(f"Expected a new or empty folder for the arm, got {folder}, which is or holds a file.")
    adapted = [
        watched for watched in find(model).watched if not watched.part_of and not isinstance(watched.terms, Dense)
    ]
    matrices = {*(watched.name for watched in adapted), *_parameters(model)}
    if unknown := [name for name in change if name not in matrices]:
        raise ValueError(f"Expected changes of matrices of layers, such as {sorted(matrices)[:3]}, got {unknown[:3]}.")
    if adapted:
        tensors, config = _adapter(model, adapted, change)
        files, how = {"adapter_config.json": json.dumps(config, indent=2)}, _ADAPTER
        name = "adapter_model.safetensors"
        what = (
            f"A LoRA adapter of rank {config['r']}: the adapter at the start of an increment plus the part `{arm}` of "
            "the update made afterwards."
        )
    else:
        tensors, how = _differences(model, change), _DENSE
        files: dict[str, str] = {}
        name = "differences.safetensors"
        what = (
            f"Differences of the weights, in single precision: the part `{arm}` of an update alone. "
            "Add them to the model at the start of the increment, not at its end."
        )
    files["README.md"] = _README.format(arm=arm, what=what, how=how.format(folder=folder.name))
    with _filled(folder) as stage:
        save_file({key: part.contiguous() for key, part in tensors.items()}, stage / name, {"format": "pt", "arm": arm})
        for file, text in files.items():
            (stage / file).write_text(text, encoding="utf-8")
    return folder


@contextmanager
def _filled(folder: Path) -> Iterator[Path]:
    """Give a hidden folder that takes the place of a new or empty one if the block completes."""
    target = Path(os.path.realpath(folder))
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = target.with_name(f".arm-{secrets.token_hex(8)}")
    stage.mkdir()
    try:
        yield stage
        if target.exists():
            target.rmdir()
        stage.rename(target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


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
    saved, sources = _saved_modules(model, change)
    _require_whole(model, sources | {id(parameter) for watched in adapted for parameter in watched.sources})
    tensors |= saved
    config = _live_config(model)
    settings = {key: _plain(config.get(key)) for key in _KEPT}
    return tensors, {
        **settings,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(path for path, _ in (layers[name] for name in sums)),
        "inference_mode": True,
    }


def _live_config(model: nn.Module) -> dict[str, Any]:
    """Return the configuration of the first active adapter; nothing where there is none."""
    layers = (module for module in base_model(model).modules() if "BaseTunerLayer" in class_names(module))
    active = [adapter for module in layers for adapter in module.active_adapters]  # pyright: ignore[reportGeneralTypeIssues]
    live = dict(getattr(bare(model), "peft_config", {}))
    return next((live[adapter].to_dict() for adapter in active if adapter in live), {})


def _require_whole(model: nn.Module, written: set[int]) -> None:
    """Refuse a model of which an adapter of the written parameters would not be all that is beside the base."""
    base = base_model(model)
    missing = [name for name, parameter in trained_parameters(model).items() if id(parameter) not in written]
    for path, module in base.named_modules():
        if "LoraLayer" not in class_names(module):
            continue
        if getattr(module, "lora_variant", {}):
            missing.append(plain_path(base, path))
        for name, parameter in module.named_parameters():
            kind, _, path_below = name.partition(".")
            is_active = kind.startswith("lora_") and path_below.partition(".")[0] in module.active_adapters  # pyright: ignore[reportOperatorIssue]
            if is_active and id(parameter) not in written:
                missing.append(plain_path(base, f"{path}.{name}"))
    if missing:
        raise ValueError(
            f"Expected trained adapters (LoRA) and modules_to_save, nothing else beside the base, got {missing[:3]}, "
            "which PEFT's LoRA cannot hold. Merge it into the base, or evaluate with dynamics.intervene."
        )


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
        matrix, floor = before, 0.0
    else:
        if not isinstance(change, LowRankMatrix):
            left, values, right = torch.linalg.svd(change.detach().to(torch.float64), full_matrices=False)
            change = LowRankMatrix(left * values, right)
        matrix = weighted_sum([(1.0, {"": before}), (1.0, {"": change})])[""]
        floor = _ROUNDING * float(_core(change)[1][:1].sum())
    assert isinstance(matrix, LowRankMatrix)
    left, values, right = _core(matrix)
    floor = max(floor, max(matrix.shape) * torch.finfo(torch.float64).eps * float(values[:1].sum()))
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


def _saved_modules(model: nn.Module, change: Mapping[str, Matrix]) -> tuple[dict[str, Tensor], set[int]]:
    """Return ``modules_to_save``, which PEFT saves whole, with their change; and the identities of their tensors."""
    base = base_model(model)
    names = {id(parameter): name for name, parameter in _parameters(model).items() if name in change}
    tensors: dict[str, Tensor] = {}
    sources: set[int] = set()
    for path, module in base.named_modules():
        if "ModulesToSaveWrapper" not in class_names(module):
            continue
        for adapter in module.active_adapters:  # pyright: ignore[reportGeneralTypeIssues]
            copy = module.modules_to_save[adapter]  # pyright: ignore[reportIndexIssue]
            for key, value in copy.state_dict(keep_vars=True).items():  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                sources.add(id(value))
                weight = value.detach()
                if id(value) in names:
                    weight = weight.double() + _like(change[names[id(value)]], value)
                is_float = weight.is_floating_point()
                tensors[f"{_PREFIX}{plain_path(base, path)}.{key}"] = (weight.float() if is_float else weight).cpu()
    return tensors, sources


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
