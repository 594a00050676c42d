"""Adapters of MLX-LM and MLX-VLM. Their ``adapter_config.json`` shares its name with PEFT's, not its content."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeGuard

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.formats.lycoris import read_lycoris
from dynamics.checkpoints.formats.peft_config import AdapterFile
from dynamics.checkpoints.matrices import FileContent, Refusal, Remark
from dynamics.checkpoints.names import shown

#: Name of its newest adapter; those before are ``0000100_adapters.safetensors``.
ADAPTERS = "adapters.safetensors"
_KEYS = ("lora_parameters", "fine_tune_type", "adapter_path")
_RANDOM_START = "MLX-VLM may start B at ones. If it did, totals include that start."


def is_mlx(file: AdapterFile) -> bool:
    """Return whether a configuration is MLX-LM's: it has no ``peft_type``, and one of MLX-LM's own keys."""
    return _is_foreign(file.config) and any(key in file.config for key in _KEYS)


def read_mlx(file: AdapterFile) -> FileContent:
    """Return the matrices of an adapter of MLX-LM.

    Raises:
        UnreadableFile: ``OD102`` if the scale is missing or no number.
    """
    scale = mlx_scale(file.config or {})
    return FileContent(refusal=scale) if isinstance(scale, Refusal) else read_lycoris(file, scale)


def mlx_scale(config: Mapping[str, Any]) -> float | Refusal:
    """Return the factor before B A, the same for every module, or why the adapter is not analysed.

    Args:
        config: The configuration.

    Raises:
        UnreadableFile: ``OD102`` if the scale is missing or no number.

    >>> mlx_scale({"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}})
    20.0
    """
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind != "lora":
        reason = f"It is of MLX-LM's fine_tune_type {shown(repr(kind))}; only 'lora' is analysed."
        return Refusal("OD105" if kind == "dora" else "OD103", reason, "Analyse a LoRA run.")
    parameters = config.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    return finite_setting(scale, "lora_parameters.scale", "MLX-LM")


def is_mlx_vlm(file: AdapterFile) -> bool:
    """Return whether a configuration is MLX-VLM's: ``rank`` and ``alpha`` without ``peft_type``."""
    return _is_foreign(file.config) and not is_mlx(file) and {"rank", "alpha"} <= file.config.keys()


def read_mlx_vlm(file: AdapterFile) -> FileContent:
    """Return the matrices of an adapter of MLX-VLM, which multiplies (A B)ᵀ by alpha itself (``LoRaLayer.__call__``).

    Raises:
        UnreadableFile: ``OD102`` if alpha is no number.
    """
    alpha = finite_setting((file.config or {}).get("alpha"), "alpha", "MLX-VLM")
    content = read_lycoris(file, alpha, is_transposed=True)
    return replace(content, remarks=(*content.remarks, Remark("OD121", _RANDOM_START)))


def _is_foreign(config: Mapping[str, Any] | None) -> TypeGuard[Mapping[str, Any]]:
    return config is not None and "peft_type" not in config


def finite_setting(value: object, name: str, writer: str) -> float:
    """Return a number of a configuration.

    Args:
        value: The number.
        name: Its name in the configuration.
        writer: The library that wrote the configuration.

    Raises:
        UnreadableFile: ``OD102`` if it is no finite number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        problem = f"Its {name} is {shown(repr(value))}; expected a number."
        raise UnreadableFile("OD102", problem, f"Restore the configuration that {writer} wrote.")
    return float(value)
