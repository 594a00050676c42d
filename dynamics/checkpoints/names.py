"""From keys in a weight file to names of matrices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

_KEY = re.compile(r"(?P<stem>.+)\.lora_(?P<part>[A-Za-z0-9_]+)(?P<rest>(?:\..+)?)")
#: PEFT's own prefix; what may stand before it are wrappers around the whole model.
_PEFT_PREFIX = "base_model.model."
_OUTER_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")
#: Names that libraries reserve for wrappers around a submodule; no model calls a submodule so.
_INNER_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})


@dataclass(frozen=True)
class AdapterKey:
    """One key of an adapter file, taken apart.

    Args:
        stem: The adapted module as the file writes it, wrappers included.
        part: What of the adapter it is: ``A``, ``B``, ``embedding_A``, ``magnitude_vector``, ...
        leaf: ``weight``, ``bias``, or ``""`` for a bare parameter.
        adapter: Name of the adapter if the key carries one (``lora_A.default.weight``), else ``""``.
    """

    stem: str
    part: str
    leaf: str
    adapter: str


def parse_key(key: str) -> AdapterKey | None:
    """Takes an adapter key apart; ``None`` if it is none.

    >>> parse_key("base_model.model.layers.0.q_proj.lora_A.weight")
    AdapterKey(stem='base_model.model.layers.0.q_proj', part='A', leaf='weight', adapter='')
    >>> parse_key("layers.0.q_proj.lora_B.default.weight").adapter
    'default'
    >>> parse_key("base_model.model.classifier.weight") is None
    True
    """
    match = _KEY.fullmatch(key)
    if match is None:
        return None
    words = match["rest"].split(".")[1:]
    leaf = words.pop() if words and words[-1] in ("weight", "bias") else ""
    return AdapterKey(match["stem"], match["part"], leaf, ".".join(words))


def module_name(stem: str) -> str:
    """The module's name inside the adapted model, as PEFT's patterns see it.

    Wrappers are taken off in the order in which they nest: what surrounds the whole model, then
    PEFT's ``base_model.model.`` once. A module of the model that happens to be called ``module`` stays.

    >>> module_name("module.base_model.model.model.layers.0.q_proj")
    'model.layers.0.q_proj'
    >>> module_name("module.encoder")
    'module.encoder'
    """
    rest = stem
    while rest.startswith(_OUTER_WRAPPERS):
        rest = rest.split(".", 1)[1]
    return rest.removeprefix(_PEFT_PREFIX) if rest.startswith(_PEFT_PREFIX) else stem


def matrix_names(stems: Iterable[str]) -> dict[str, str]:
    """Name of the matrix for each stem; two stems never get one name.

    Stems whose names would coincide keep everything that tells them apart.

    >>> matrix_names(["base_model.model.attn.base_layer.out_proj"])
    {'base_model.model.attn.base_layer.out_proj': 'attn.out_proj'}
    >>> matrix_names(["_orig_mod.base_model.model.q", "base_model.model.q"])
    {'_orig_mod.base_model.model.q': '_orig_mod.base_model.model.q', 'base_model.model.q': 'base_model.model.q'}
    """
    stems = list(dict.fromkeys(stems))
    names = {stem: _without_inner_wrappers(module_name(stem)) for stem in stems}
    taken = Counter(names.values())
    return {stem: name if taken[name] == 1 else stem for stem, name in names.items()}


def _without_inner_wrappers(name: str) -> str:
    words = [word for word in name.split(".") if word not in _INNER_WRAPPERS]
    return ".".join(words) or name


def natural_order(name: str) -> tuple[str | int, ...]:
    """Sort key that puts layer 2 before layer 10, as the model does.

    >>> sorted(["h.10.q", "h.2.q"], key=natural_order)
    ['h.2.q', 'h.10.q']
    """
    return tuple(int(word) if i % 2 else word for i, word in enumerate(re.split(r"([0-9]+)", name)))


def some(names: Iterable[str], limit: int = 3) -> str:
    """A few names for a sentence.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
