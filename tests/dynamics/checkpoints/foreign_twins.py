"""Updates of foreign adapter files, formed whole by the formulas of the libraries: slow, and obvious."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

ENDS = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".down.weight": "down",
    ".up.weight": "up",
    ":down": "down",
    ":up": "up",
    ".alpha": "alpha",
    ".dora_scale": "dora",
    **{f".{kind}_{part}": f"{kind}_{part}" for kind in ("hada", "lokr") for part in ("w1", "w2", "t2")},
    **{f".{kind}_{part}_{x}": f"{kind}_{part}_{x}" for kind in ("hada", "lokr") for part in ("w1", "w2") for x in "ab"},
}


def modules(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Module → part → tensor in float64; what is no part of an adapter is left out."""
    found: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        end = next((end for end in ENDS if key.endswith(end)), None)
        if end is not None:
            found[key.removesuffix(end)][ENDS[end]] = tensor.double()
    return found


def update(parts: Mapping[str, Tensor]) -> Tensor:
    """The update of one module, ``(out, in·kernel)``."""
    alpha = parts.get("alpha")
    if "hada_w1_a" in parts:
        first = parts["hada_w1_a"] @ parts["hada_w1_b"]
        second = parts["hada_w2_a"] @ parts["hada_w2_b"]
        return first * second * scale(alpha, parts["hada_w1_b"].shape[0])
    if any(part.startswith("lokr") for part in parts):
        return lokr(parts)
    up, down = parts["up"].flatten(1), parts["down"]
    if "mid" in parts:
        kernel = torch.einsum("im,mnwh,nj->ijwh", up, parts["mid"], down.flatten(1))
        return kernel.flatten(1) * scale(alpha, down.shape[0])
    return up @ down.flatten(1) * scale(alpha, down.shape[0])


def lokr(parts: Mapping[str, Tensor]) -> Tensor:
    """LyCORIS' Kronecker product; alpha counts where one side is factored."""
    rank = None
    first = parts.get("lokr_w1")
    if first is None:
        first, rank = parts["lokr_w1_a"] @ parts["lokr_w1_b"], parts["lokr_w1_b"].shape[0]
    second = parts.get("lokr_w2")
    if second is None:
        a, b = parts["lokr_w2_a"], parts["lokr_w2_b"]
        rank = b.shape[0]
        second = torch.einsum("ijkl,jr,ip->prkl", parts["lokr_t2"], b, a) if "lokr_t2" in parts else a @ b.flatten(1)
    return torch.kron(first, second.flatten(1).contiguous()) * (
        1.0 if rank is None else scale(parts.get("alpha"), rank)
    )


def scale(alpha: Tensor | None, rank: int) -> float:
    """alpha / r; 1 where the file has no alpha."""
    return 1.0 if alpha is None else float(alpha) / rank
