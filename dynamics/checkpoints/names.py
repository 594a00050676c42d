"""Names of matrices, from the keys in a weight file; text from files as it may stand in a message."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

_KEY = re.compile(r"(?P<stem>.+)\.lora_(?P<part>[A-Za-z0-9_]+)(?P<rest>(?:\..+)?)", re.DOTALL)
#: PEFT's prefix; only wrappers around the whole model may stand before it.
_PEFT_PREFIX = "base_model.model."
_OUTER_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")
#: Names that libraries reserve for wrappers around a submodule; no model uses them for a submodule.
_INNER_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
#: Far beyond any model's names; what stores, draws or prints a name relies on it.
_LONGEST_NAME = 1000
_LARGEST_NUMBER = 2**63 - 1
#: How many wrappers are removed from a whole model; nobody nests more.
_DEEPEST = 8


@dataclass(frozen=True)
class AdapterKey:
    """One key of an adapter file in its parts.

    Args:
        stem: The adapted module as the file writes it, wrappers included.
        part: The part of the adapter: ``A``, ``B``, ``embedding_A``, ``magnitude_vector``, …
        leaf: ``weight``, ``bias``, or ``""`` for a bare parameter.
        adapter: Name of the adapter if the key holds one (``lora_A.default.weight``), else ``""``.
    """

    stem: str
    part: str
    leaf: str
    adapter: str


def parse_key(key: str) -> AdapterKey | None:
    """Return the parts of an adapter's key, or ``None`` for any other key.

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
    """Return the module's name inside the adapted model, which PEFT's patterns match.

    Wrappers are removed from the outside in: those around the whole model, then PEFT's ``base_model.model.`` once.
    A module of the model that happens to be called ``module`` stays.

    >>> module_name("module.base_model.model.model.layers.0.q_proj")
    'model.layers.0.q_proj'
    >>> module_name("module.encoder")
    'module.encoder'
    """
    rest = stem
    while rest.startswith(_OUTER_WRAPPERS) and len(stem) < 2 * _LONGEST_NAME:  # longer names are refused anyway
        rest = rest.split(".", 1)[1]
    return rest.removeprefix(_PEFT_PREFIX) if rest.startswith(_PEFT_PREFIX) else stem


def matrix_names(stems: Iterable[str]) -> dict[str, str]:
    """Return the name of the matrix of each stem; no two stems share a name.

    Stems whose names would coincide keep their full text.

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


def without_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Return each key of a whole model's weights without wrappers.

    A wrapper around the whole model stands before all of its keys; a module of the model that happens to be called
    ``module`` does not.

    >>> without_wrappers(["module.a", "module._orig_mod.b"])
    {'module.a': 'a', 'module._orig_mod.b': 'b'}
    >>> without_wrappers(["module.a", "b"])
    {'module.a': 'module.a', 'b': 'b'}
    """
    names = {key: key for key in keys}
    for _ in range(_DEEPEST):
        prefix = _common_wrapper(names.values())
        names = {key: name.removeprefix(prefix) for key, name in names.items()}
    return {key: _without_inner_wrappers(name) for key, name in names.items()}


def _common_wrapper(names: Iterable[str]) -> str:
    names = list(names)
    return next((p for p in (*_OUTER_WRAPPERS, _PEFT_PREFIX) if names and all(n.startswith(p) for n in names)), "")


def name_fault(name: str) -> str | None:
    """Return a sentence that says why a matrix's name cannot be stored or shown, or ``None`` if it can.

    >>> name_fault("model.layers.0.q_proj") is None
    True
    >>> name_fault("model.layers.99999999999999999999.q_proj")
    'Its name holds a number that does not fit into 64 bits.'
    """
    if not name:
        return "Its name is empty."
    if len(name) > _LONGEST_NAME:
        return f"Its name has {len(name)} characters; expected at most {_LONGEST_NAME}."
    if not name.isprintable():  # control characters, lone surrogates
        return "Its name holds characters that cannot be shown or stored."
    if any(int(digits) > _LARGEST_NUMBER for digits in re.findall("[0-9]+", name)):
        return "Its name holds a number that does not fit into 64 bits."
    return None


def shown(text: str, limit: int = 120) -> str:
    r"""Return text of unknown content as it may stand in a message: on one line, escaped as in Python, shortened.

    >>> shown("a\nb"), shown("x" * 300, limit=5)
    ('a\\nb', 'xxxxx… (300 characters)')
    """
    start = text[:limit]
    escaped = start if start.isprintable() else repr(start)[1:-1]
    return escaped if len(text) <= limit else f"{escaped}… ({len(text)} characters)"


def shown_path(path: PurePath, folder: PurePath) -> str:
    """Return a file's path relative to a folder, with slashes, as it may stand in a message.

    >>> shown_path(PurePath("run/checkpoint-1/x.bin"), PurePath("run"))
    'checkpoint-1/x.bin'
    """
    return shown(path.relative_to(folder).as_posix(), limit=_LONGEST_NAME)


def natural_order(name: str) -> tuple[str | tuple[int, str], ...]:
    """Return a sort key that puts layer 2 before layer 10, as the model does.

    >>> sorted(["h.10.q", "h.2.q"], key=natural_order)
    ['h.2.q', 'h.10.q']
    """
    words = enumerate(re.split(r"([0-9]+)", name))
    return tuple(_digits_order(word) if i % 2 else word for i, word in words)


def _digits_order(digits: str) -> tuple[int, str]:
    significant = digits.lstrip("0")  # not int(): Python refuses more than some thousand digits
    return len(significant), significant
