"""Keys of adapter files that PEFT did not write, taken apart: module and part.

The parts have one name each here, whatever a library calls them: ``down`` and ``up`` are LoRA's A and B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_LOKR = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t1", "t2")
_HADA = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")

#: End of the key → part. The longest that fits counts.
_ENDS: Mapping[str, str] = {
    # kohya, LyCORIS, and what diffusers takes from them
    ".lora_down.weight": "down", ".lora_up.weight": "up", ".lora_mid.weight": "mid",
    ".alpha": "alpha", ".scalar": "scalar", ".diff": "diff", ".dora_scale": "dora",
    **{f".lokr_{part}": f"lokr_{part}" for part in _LOKR},
    **{f".hada_{part}": f"hada_{part}" for part in _HADA},
    # diffusers, old and new, ai-toolkit
    ".lora.down.weight": "down", ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down", ".lora_linear_layer.up.weight": "up",
    "_lora.down.weight": "down", "_lora.up.weight": "up",
    ".lora_A.weight": "down", ".lora_B.weight": "up",
    ".lora_A.default.weight": "down", ".lora_B.default.weight": "up",
    ".lora_magnitude_vector": "dora", ".lora_magnitude_vector.weight": "dora",
    # cloneofsimo
    ":down": "down", ":up": "up",
    # MLX
    ".lora_a": "mlx_a", ".lora_b": "mlx_b", ".m": "dora", ".A": "mlx_a", ".B": "mlx_b",
    # torchtune
    ".lora_a.weight": "down", ".lora_b.weight": "up", ".magnitude": "dora",
}  # fmt: skip
_LONGEST_FIRST = sorted(_ENDS, key=len, reverse=True)
#: xlabs: two adapters on one processor, whose numbers belong to the module's name.
_XLABS = re.compile(r"(.+_lora\d)\.(down|up)\.weight", re.DOTALL)


#: Parts as (in, rank) and (rank, out).
_TRANSPOSED = {"down": "mlx_a", "up": "mlx_b"}


def parse_foreign(key: str, *, is_transposed: bool = False) -> tuple[str, str] | None:
    """Module and part of a key; ``None`` if it is no part of an adapter.

    Args:
        key: The key.
        is_transposed: Whether the file stores A as (in, rank) and B as (rank, out).

    >>> parse_foreign("lora_unet_blocks_0_q.lora_down.weight")
    ('lora_unet_blocks_0_q', 'down')
    >>> parse_foreign("double_blocks.0.processor.qkv_lora2.up.weight")
    ('double_blocks.0.processor.qkv_lora2', 'up')
    >>> parse_foreign("unet:12:down")
    ('unet:12', 'down')
    >>> parse_foreign("norm.weight") is None
    True
    """
    if match := _XLABS.fullmatch(key):
        return match[1], match[2]
    end = next((end for end in _LONGEST_FIRST if key.endswith(end) and key != end), None)
    if end is None:
        return None
    part = _ENDS[end]
    return key.removesuffix(end), _TRANSPOSED.get(part, part) if is_transposed else part
