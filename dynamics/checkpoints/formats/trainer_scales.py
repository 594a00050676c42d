"""The scale of adapters whose trainers say it in a configuration that is not PEFT's, or by other keys than PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.formats.mlx import finite, is_mlx, is_mlx_vlm, mlx_scale, mlx_vlm_scale
from dynamics.checkpoints.formats.variants import Refusal
from dynamics.checkpoints.plain_files import read_json

#: mistral-finetune's configuration of the whole model, beside ``lora.safetensors``.
_PARAMS = "params.json"
_TORCHTUNE = (".lora_a.weight", ".lora_b.weight")


#: The factor of every module, or by the module's rank.
Scale = float | Callable[[int], float | Refusal | None]


def trainer_scale(keys: Collection[str], content: Mapping[str, Any] | None, folder: Path) -> Scale | Refusal | None:
    """Return the factor before B A that a trainer other than PEFT gave all modules; ``None`` if none did.

    MLX-LM: ``scale``. MLX-VLM: ``alpha``. torchtune: ``lora_alpha / r`` (``LoRALinear.forward``). mistral-finetune:
    ``scaling`` (``LoRALinear.forward`` of its ``model/lora.py``).

    Args:
        keys: Of the weight file.
        content: ``adapter_config.json``; ``None`` if there is none.
        folder: Where the weight file is.

    Raises:
        UnreadableFile: ``OD102`` if the scale is missing or no number.
    """
    if content is not None and is_mlx(content):
        return mlx_scale(content)
    if content is not None and is_mlx_vlm(content):
        return mlx_vlm_scale(content)
    if any(key.endswith(_TORCHTUNE) for key in keys):
        return _torchtune_scale(content)
    lora = read_json(folder / _PARAMS, "OD102").get("lora") if content is None and (folder / _PARAMS).exists() else None
    if not isinstance(lora, dict):
        return None
    rank, scaling = (finite(lora.get(name), f"lora.{name}", "mistral-finetune") for name in ("rank", "scaling"))
    return partial(_of_rank, rank, scaling)


def _torchtune_scale(content: Mapping[str, Any] | None) -> Scale | Refusal:
    if content is None:
        reason = "It is a LoRA file in torchtune's format, and there is no adapter_config.json beside it."
        return Refusal("OD102", reason, "Copy adapter_config.json from the same training, which says r and lora_alpha.")
    rank, alpha = (finite(content.get(name), name, "torchtune") for name in ("r", "lora_alpha"))
    if rank <= 0:
        raise UnreadableFile(
            "OD102", f"Its r is {rank:g}; expected a positive number.", "Restore what torchtune wrote."
        )
    return partial(_of_rank, rank, alpha / rank)


def _of_rank(rank: float, scale: float, stored: int) -> float | Refusal:
    if stored == rank:
        return scale
    reason = f"The configuration gives it rank {rank:g}, its factors have rank {stored}."
    return Refusal("OD104", reason, "Put the configuration and the weights of one training together.")
