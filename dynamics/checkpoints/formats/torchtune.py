"""LoRA files of torchtune and mistral-finetune, whose scale is in a configuration of their own."""

from __future__ import annotations

from functools import partial

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import read_json
from dynamics.checkpoints.formats.lycoris import read_lycoris
from dynamics.checkpoints.formats.mlx import finite_setting
from dynamics.checkpoints.formats.peft_config import AdapterFile
from dynamics.checkpoints.matrices import FileContent, Refusal

_FACTORS = (".lora_a.weight", ".lora_b.weight")
#: mistral-finetune's configuration of the whole model, beside ``lora.safetensors``.
_PARAMS = "params.json"


def is_torchtune(file: AdapterFile) -> bool:
    """Return whether the keys are torchtune's (``….lora_a.weight``)."""
    return any(key.endswith(_FACTORS) for key in file.weights.tensors)


def read_torchtune(file: AdapterFile) -> FileContent:
    """Return the matrices of a file of torchtune, of scale ``lora_alpha / r`` (``LoRALinear.forward``).

    Raises:
        UnreadableFile: ``OD102`` if r or lora_alpha is missing or no number, or r is not positive.
    """
    if file.config is None:
        reason = "It is a LoRA file in torchtune's format, and there is no adapter_config.json beside it."
        remedy = "Copy adapter_config.json, which has r and lora_alpha, from the same training."
        return FileContent(refusal=Refusal("OD102", reason, remedy))
    rank, alpha = (finite_setting(file.config.get(name), name, "torchtune") for name in ("r", "lora_alpha"))
    if rank <= 0:
        problem = f"Its r is {rank:g}; expected a positive number."
        raise UnreadableFile("OD102", problem, "Restore the configuration that torchtune wrote.")
    return read_lycoris(file, partial(_scale_of_rank, rank, alpha / rank))


def is_mistral(file: AdapterFile) -> bool:
    """Return whether mistral-finetune's ``params.json`` is the only configuration beside the file.

    Raises:
        UnreadableFile: ``OD102`` if it is no JSON object.
    """
    params = file.weights.path.parent / _PARAMS
    return file.config is None and params.exists() and isinstance(read_json(params, "OD102").get("lora"), dict)


def read_mistral(file: AdapterFile) -> FileContent:
    """Return the matrices of a file of mistral-finetune, of scale ``scaling`` (``LoRALinear.forward``).

    Raises:
        UnreadableFile: ``OD102`` if rank or scaling is missing or no number.
    """
    lora = read_json(file.weights.path.parent / _PARAMS, "OD102")["lora"]
    rank, scaling = (finite_setting(lora.get(name), f"lora.{name}", "mistral-finetune") for name in ("rank", "scaling"))
    return read_lycoris(file, partial(_scale_of_rank, rank, scaling))


def _scale_of_rank(rank: float, scale: float, stored: int) -> float | Refusal:
    if stored == rank:
        return scale
    reason = f"The configuration gives it rank {rank:g}, its factors have rank {stored}."
    return Refusal("OD104", reason, "Put the configuration and the weights of one training together.")
