"""``adapter_config.json`` of MLX-LM and MLX-VLM: it shares its name with PEFT's, and says other things."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.formats.variants import Refusal
from dynamics.checkpoints.names import shown

#: Name of its newest adapter; those before are ``0000100_adapters.safetensors``.
ADAPTERS = "adapters.safetensors"
_KEYS = ("lora_parameters", "fine_tune_type", "adapter_path")


def is_mlx(content: Mapping[str, Any]) -> bool:
    """Whether a configuration is MLX-LM's.

    >>> is_mlx({"lora_parameters": {"scale": 20.0}}), is_mlx({"peft_type": "LORA"})
    (True, False)
    """
    return "peft_type" not in content and any(key in content for key in _KEYS)


def mlx_scale(content: Mapping[str, Any]) -> float | Refusal:
    """The factor before B A, the same for every module, or why the adapter is not analysed.

    Args:
        content: The configuration.

    Raises:
        UnreadableFile: ``OD102`` if the scale is missing or no number.

    >>> mlx_scale({"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}})
    20.0
    """
    kind = content.get("fine_tune_type", "dora" if content.get("use_dora") else "lora")
    if kind != "lora":
        reason = f"It is of MLX-LM's fine_tune_type {shown(repr(kind))}; only 'lora' is analysed."
        return Refusal("OD105" if kind == "dora" else "OD103", reason, "Analyse a LoRA run.")
    parameters = content.get("lora_parameters")
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if not isinstance(scale, int | float) or isinstance(scale, bool) or not math.isfinite(scale):
        problem = f"The scale in its lora_parameters is {shown(repr(scale))}; expected a number."
        raise UnreadableFile("OD102", problem, "Restore the configuration that MLX-LM wrote.")
    return float(scale)


def is_mlx_vlm(content: Mapping[str, Any]) -> bool:
    """Return whether a configuration is MLX-VLM's.

    >>> is_mlx_vlm({"rank": 4, "alpha": 0.1, "dropout": 0.0}), is_mlx_vlm({"peft_type": "LORA"})
    (True, False)
    """
    return "peft_type" not in content and not is_mlx(content) and {"rank", "alpha"} <= content.keys()


def mlx_vlm_scale(content: Mapping[str, Any]) -> float:
    """Return the factor before (A B)ᵀ: MLX-VLM multiplies by alpha itself (``LoRaLayer.__call__``).

    Raises:
        UnreadableFile: ``OD102`` if it is no number.

    >>> mlx_vlm_scale({"rank": 4, "alpha": 0.1})
    0.1
    """
    return finite(content.get("alpha"), "alpha", "MLX-VLM")


def finite(value: object, name: str, writer: str) -> float:
    """Return a number of a configuration.

    Raises:
        UnreadableFile: ``OD102`` if it is no finite number.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        problem = f"Its {name} is {shown(repr(value))}; expected a number."
        raise UnreadableFile("OD102", problem, f"Restore the configuration that {writer} wrote.")
    return float(value)
