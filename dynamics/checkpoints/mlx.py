"""MLX-LM's ``adapter_config.json``: it shares its name with PEFT's, and says other things."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.names import shown
from dynamics.checkpoints.variants import Refusal

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
