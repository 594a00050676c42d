"""Weight files that are not PEFT adapters: what they are, by their keys."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

#: (what it is, a pattern that one key must match), in order: the particular before the general. First those whose
#: products are read (``foreign_adapter``).
_READ: tuple[tuple[str, str], ...] = (
    ("a LoKr adapter (Kronecker product)", r"\.lokr_w[12]|\.lokr_t2"),
    ("a LoHa adapter (Hadamard product)", r"\.hada_w[12]"),
    ("a DoRA adapter in kohya's format", r"\.dora_scale$"),
    ("a LoRA file in kohya's format (lora_down, lora_up, alpha)", r"^lora_(unet|te\d?|transformer|prior)_"),
    ("a LoRA file in cloneofsimo's format", r"^[a-z_]+:\d+:(up|down)$"),
    ("a LoRA file in xlabs' format", r"\.processor\..*_lora\d?\.(down|up)\.weight$"),
    ("a LoRA file with lora_down and lora_up keys (kohya or diffusers)", r"\.lora_(down|up)\.weight$"),
    ("a LoRA file in diffusers' format", r"^(transformer|unet|text_encoder(_\d)?|diffusion_model)\..*\.lora(_A|_B|\.)"),
    ("a LoRA file of a diffusion model", r"^(double|single)_blocks\.\d+\..*\.lora_[AB]\."),
)
_OTHERS: tuple[tuple[str, str], ...] = (
    ("a LoRA file in MLX' format", r"\.lora_[ab]$"),
    ("a LoRA file in torchtune's format", r"\.lora_[ab]\.weight$"),
    ("a LoRA file in MLX-VLM's format", r"_proj\.[AB]$"),
    ("a prompt-tuning adapter", r"(^|\.)prompt_embeddings$|(^|\.)prompt_encoder\."),
    ("an adaption-prompt adapter", r"\.adaption_(prompt|gate)$"),
    ("an IA3 adapter", r"\.ia3_l$"),
    ("a VeRA adapter", r"\.vera_lambda_[bd]$"),
    ("an OFT or BOFT adapter", r"\.b?oft_[rRs]\b"),
    ("a textual-inversion embedding", r"^emb_params$|^<.*>$|^string_to_param"),
)


def describe(keys: Iterable[str]) -> str | None:
    """What a weight file is if it is not PEFT LoRA, by its keys; ``None`` if they say nothing.

    >>> describe(["lora_unet_blocks_0_q.lora_down.weight", "lora_unet_blocks_0_q.alpha"])
    "a LoRA file in kohya's format (lora_down, lora_up, alpha)"
    >>> describe(["base_model.model.q.lora_A.weight"]) is None
    True
    """
    keys = list(keys)
    return next((what for what, pattern in (*_READ, *_OTHERS) if any(map(_searcher(pattern), keys))), None)


def is_readable(keys: Iterable[str]) -> bool:
    """Whether the keys are those of a foreign file whose products are read without a configuration.

    >>> is_readable(["unet:0:up", "unet:0:down"]), is_readable(["base_model.model.q.lora_A.weight"])
    (True, False)
    """
    keys = list(keys)
    return any(any(map(_searcher(pattern), keys)) for _, pattern in _READ)


def is_adapter(keys: Iterable[str]) -> bool:
    """Return whether tensors are an adapter's factors, in PEFT's or another form, by their keys.

    >>> is_adapter(["module.q.lora_A.default.weight"]), is_adapter(["q.lora_a"]), is_adapter(["q.A", "q.B"])
    (True, True, True)
    >>> is_adapter(["q.weight"]), is_adapter(["mixer.A"])
    (False, False)
    """
    keys = set(keys)
    factors = (key for key in keys if re.search(r"\.lora_(embedding_)?[ABab](\.|$)", key))
    pairs = (key for key in keys if key.endswith(".A") and f"{key[:-1]}B" in keys)
    return next(factors, None) is not None or next(pairs, None) is not None or is_readable(keys)


def _searcher(pattern: str) -> Callable[[str], object]:
    return re.compile(pattern).search
