"""From keys in a weight file to names of matrices."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import PurePath

_KEY = re.compile(r"(?P<stem>.+)\.lora_(?P<part>[A-Za-z0-9_]+)(?P<rest>(?:\..+)?)", re.DOTALL)
#: PEFT's own prefix; what may stand before it are wrappers around the whole model.
_PEFT_PREFIX = "base_model.model."
_OUTER_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_forward_module.")
#: Names that libraries reserve for wrappers around a submodule; no model calls a submodule so.
_INNER_WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"})
#: Far beyond any model's names; whoever stores, draws or prints a name may rely on it.
_LONGEST_NAME = 1000
_LARGEST_NUMBER = 2**63 - 1
#: So many wrappers are taken off a whole model; nobody nests more.
_DEEPEST = 8


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
    while rest.startswith(_OUTER_WRAPPERS) and len(stem) < 2 * _LONGEST_NAME:  # a longer one is not analysed anyway
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


def without_wrappers(keys: Iterable[str]) -> dict[str, str]:
    """Each key of a whole model's weights without wrappers.

    What surrounds the whole model stands before all of its keys; a module of the model that happens to be called
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
    """What keeps the name of a matrix from being stored and shown, as a sentence; ``None`` if nothing does.

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
    r"""Text that may be anything, as it can stand in a message: on one line, escaped as Python would, shortened.

    >>> shown("a\nb"), shown("x" * 300, limit=5)
    ('a\\nb', 'xxxxx… (300 characters)')
    """
    start = text[:limit]
    escaped = start if start.isprintable() else repr(start)[1:-1]
    return escaped if len(text) <= limit else f"{escaped}… ({len(text)} characters)"


def shown_path(path: PurePath, folder: PurePath) -> str:
    """A file's path relative to a folder, with slashes, as it can stand in a message.

    >>> shown_path(PurePath("run/checkpoint-1/x.bin"), PurePath("run"))
    'checkpoint-1/x.bin'
    """
    return shown(path.relative_to(folder).as_posix(), limit=_LONGEST_NAME)


def natural_order(name: str) -> tuple[str | tuple[int, str], ...]:
    """Sort key that puts layer 2 before layer 10, as the model does.

    >>> sorted(["h.10.q", "h.2.q"], key=natural_order)
    ['h.2.q', 'h.10.q']
    """
    words = enumerate(re.split(r"([0-9]+)", name))
    return tuple(_digits_order(word) if i % 2 else word for i, word in words)


def _digits_order(digits: str) -> tuple[int, str]:
    significant = digits.lstrip("0")  # as a number, which Python makes of some thousand digits only
    return len(significant), significant
