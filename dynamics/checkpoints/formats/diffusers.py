"""The metadata of diffusers' adapter files: the PEFT configuration of each component of the pipeline."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.formats.peft_config import AdapterConfig, Budget, parse_adapter_config
from dynamics.checkpoints.matrices import Refusal
from dynamics.text import first_line

#: Where diffusers' training scripts save an adapter.
FILE = "pytorch_lora_weights.safetensors"
_KEY = "lora_adapter_metadata"
_AGAIN = "Save the adapter again with diffusers."


@dataclass(frozen=True)
class Components:
    """Configurations of the components of a pipeline (``transformer``, ``unet``, ``text_encoder``).

    Args:
        configs: First word of the keys to the configuration.
        budget: What matching their patterns may cost.
    """

    configs: Mapping[str, AdapterConfig]
    budget: Budget = field(default_factory=Budget)

    def scale_of(self, module: str, rank: int) -> float | Refusal | None:
        """Return the scale of a module, by its name in the file; ``None`` if its component has no configuration."""
        component, _, inner = module.partition(".")
        config = self.configs.get(component)
        if config is None:
            return None
        if config.moved_start:
            reason = (
                f"It was initialised by {config.moved_start}, which moves a part of the base weight into the adapter."
            )
            return Refusal("OD105", reason, "Convert it to a plain LoRA before saving.")
        slow = config.slow_pattern([inner], self.budget)
        return config.refusal or slow or config.scale_of(inner, stored=rank)


def read_components(metadata: Mapping[str, str]) -> Components | None:
    """Return the configurations in a file's metadata; ``None`` if there are none.

    Args:
        metadata: Of the safetensors file.

    Raises:
        UnreadableFile: ``OD102`` if diffusers does not write such configurations, or PEFT does not accept them.

    >>> components = read_components({"lora_adapter_metadata": '{"unet.r": 4, "unet.lora_alpha": 8}'})
    >>> components.scale_of("unet.mid.to_q", 4), components.scale_of("vae.to_q", 4)
    (2.0, None)
    """
    if _KEY not in metadata:
        return None
    try:
        content = json.loads(metadata[_KEY])
    except (ValueError, RecursionError) as error:
        problem = f"The {_KEY} in its header is not valid JSON: {first_line(error)}."
        raise UnreadableFile("OD102", problem, _AGAIN) from error
    if not isinstance(content, dict):
        raise UnreadableFile("OD102", f"The {_KEY} in its header is not a JSON object.", _AGAIN)
    configs: dict[str, dict[str, Any]] = defaultdict(dict)
    for key, value in content.items():
        component, _, name = key.partition(".")
        configs[component][name] = value
    return Components({name: parse_adapter_config({"peft_type": "LORA", **config}) for name, config in configs.items()})
