"""Which matrix of one model is which of another: the same weights under the names of another library or version.

A name is compared as its path within the part of the model that it belongs to. The weights of a vision-language model
are ``model.layers.0`` and ``visual`` on the hub, ``model.language_model.layers.0`` and ``model.visual`` in memory, and
``language_model.model.layers.0`` and ``vision_tower`` in older libraries; experts are one matrix each
(``experts.3.gate_proj``) or a stack (``experts.gate_up_proj[3]``). Where two matrices could be meant, none is.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from dynamics.checkpoints.matrices import Product, rows, stacked, turned

Size = tuple[int, int]

#: Words before a name that only say what the model is wrapped in.
_WRAPPERS = frozenset(("model", "language_model", "text_model", "llm", "thinker", "base_model"))
#: Words before a name that say which part of the model it belongs to.
_PARTS = {
    **dict.fromkeys(
        ("visual", "vision_tower", "vision_model", "vision_encoder", "vision_backbone", "image_encoder", "vit", "vpm"),
        "vision",
    ),
    **dict.fromkeys(("audio_tower", "audio_model", "audio_encoder", "speech_encoder"), "audio"),
}
#: Names on how many first words are tried: models have one or two.
_PREFIXES = 4
_EXPERT = re.compile(r"(?P<stem>(?:.+\.)?experts)\.(?P<index>[0-9]+)\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)")
_STACKED = re.compile(r"(?P<stem>(?:.+\.)?experts)\.(?P<role>gate_up_proj|down_proj)\[(?P<index>[0-9]+)\]")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def aligned(wanted: Mapping[str, Size | None], held: Mapping[str, Size]) -> dict[str, str]:
    """Name that is wanted to the name under which it is held, where it is held at all.

    A name that is held as it is means that matrix. The others are compared by their path within their part of the
    model, then without, or with, one first word that most of them have in common (``transformer.h.0.attn``). Of two
    candidates the one of the wanted size is meant, or none. ``name@adapter`` is the matrix ``name``.

    Args:
        wanted: Name to size, ``None`` where it is not known.
        held: Name to size.

    >>> aligned({"model.language_model.layers.0.q": (4, 4)}, {"model.layers.0.q": (4, 4), "visual.q": (4, 4)})
    {'model.language_model.layers.0.q': 'model.layers.0.q'}
    """
    plain = {name: name if name in held else name.rpartition("@")[0] or name for name in wanted}
    pairs = {name: one for name, one in plain.items() if one in held}
    left = {name: _path(one) for name, one in plain.items() if name not in pairs}
    free: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in held.keys() - set(pairs.values()):
        free[_path(name)].append(name)
    meant: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, path in left.items():
        meant[path].add(plain[name])
    changes: list[Callable[[str], str]] = [str]
    changes += [partial(_without, word) for word in _first_words(rest for _, rest in left.values())]
    changes += [partial(_with, word) for word in _first_words(rest for _, rest in free)]
    options = []
    for change in changes:
        option = {}
        for name, (part, rest) in left.items():
            candidates = free.get((part, change(rest)), [])
            if len(meant[part, rest]) == 1 and (one := _only(candidates, wanted[name], held)) is not None:
                option[name] = one
        claims = Counter(one for one, _ in {(one, plain[name]) for name, one in option.items()})
        options.append({name: one for name, one in option.items() if claims[one] == 1})
    return {**pairs, **max(options, key=len)}  # the first of those that find as many


def _path(name: str) -> tuple[str, str]:
    """The part of the model, and the path in it."""
    words, part = name.split("."), ""
    while len(words) > 1 and (words[0] in _WRAPPERS or words[0] in _PARTS):
        part = _PARTS.get(words[0], part)
        words = words[1:]
    path = ".".join(words).replace("block_sparse_moe.", "mlp.")
    match = _EXPERT.fullmatch(path)
    if match is not None:
        path = f"{match['stem']}.{match['index']}.{_MIXTRAL.get(match['role'], match['role'])}"
    return part, path


def _only(candidates: list[str], size: Size | None, held: Mapping[str, Size]) -> str | None:
    fitting = [name for name in candidates if size in (None, held[name], held[name][::-1])]
    chosen = fitting if len(candidates) > 1 else candidates
    return chosen[0] if len(chosen) == 1 else None


def _first_words(paths: Iterable[str]) -> list[str]:
    words = Counter(path.partition(".")[0] for path in paths if "." in path)
    return [f"{word}." for word, _ in words.most_common(_PREFIXES)]


def _without(prefix: str, path: str) -> str:
    return path.removeprefix(prefix)


def _with(prefix: str, path: str) -> str:
    return prefix + path


@dataclass(frozen=True)
class Form:
    """Experts in another form than they are stored in.

    Args:
        product: How the matrix is made.
        parts: Names of the matrices that it is made of.
    """

    product: Product
    parts: tuple[str, ...]


def expert_forms(held: Mapping[str, Product], wanted: Mapping[str, Size]) -> dict[str, Form]:
    """Experts in the other form: stacks of single experts, or single experts of stacks, as views where possible.

    ``gate_up_proj`` is the gate above the projection up, both (intermediate, hidden), and a stack is stored as that or
    transposed. Which of the two is told by the shapes of ``gate_up_proj`` and ``down_proj`` together.

    Args:
        held: Name to dense matrix.
        wanted: Name to size of the matrices that are looked for; stacks are oriented like these.
    """
    single: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    joint: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in held:
        if held[name].shape.rank:
            continue
        if match := _EXPERT.fullmatch(name):
            single[match["stem"], match["index"]][_MIXTRAL.get(match["role"], match["role"])] = name
        elif match := _STACKED.fullmatch(name):
            joint[match["stem"], match["index"]][match["role"]] = name
    sizes: dict[object, dict[str, Size]] = defaultdict(dict)
    for name, size in wanted.items():
        if match := _STACKED.fullmatch(name.partition("@")[0]):
            sizes[_path(match["stem"]), match["index"]][match["role"]] = size
    forms: dict[str, Form] = {}
    for (stem, index), names in single.items():
        size = sizes.get((_path(stem), index))
        if size and names.keys() == {"gate_proj", "up_proj", "down_proj"}:
            forms |= _joined(stem, index, names, held, size)
    for (stem, index), names in joint.items():
        if names.keys() == {"gate_up_proj", "down_proj"}:
            forms |= _parted(stem, index, names, held)
    return {name: form for name, form in forms.items() if name not in held}


def _joined(
    stem: str, index: str, names: Mapping[str, str], held: Mapping[str, Product], wanted: Mapping[str, Size]
) -> dict[str, Form]:
    """``gate_up_proj[e]`` and ``down_proj[e]`` of the three matrices of one expert, oriented like those wanted."""
    gate, up = held[names["gate_proj"]], held[names["up_proj"]]
    if gate.shape.in_ != up.shape.in_:
        return {}
    products = {"gate_up_proj": stacked([gate, up]), "down_proj": held[names["down_proj"]]}
    parts = {"gate_up_proj": (names["gate_proj"], names["up_proj"]), "down_proj": (names["down_proj"],)}
    natural = {role: (product.shape.out, product.shape.in_) for role, product in products.items()}
    straight = all(natural[role] == size for role, size in wanted.items())
    across = all(natural[role][::-1] == size for role, size in wanted.items())
    if straight == across:
        return {}  # other sizes, or square ones, of which the orientation is not known
    return {
        f"{stem}.{role}[{index}]": Form(turned(product) if across else product, parts[role])
        for role, product in products.items()
    }


def _parted(stem: str, index: str, names: Mapping[str, str], held: Mapping[str, Product]) -> dict[str, Form]:
    """The three matrices of one expert of its part of two stacks."""
    up, down = held[names["gate_up_proj"]], held[names["down_proj"]]
    if (up.shape.in_, up.shape.out) == (2 * down.shape.out, down.shape.in_):
        up, down = turned(up), turned(down)
    if (up.shape.out, up.shape.in_) != (2 * down.shape.in_, down.shape.out):
        return {}
    middle = up.shape.out // 2
    return {
        f"{stem}.{index}.gate_proj": Form(rows(up, 0, middle), (names["gate_up_proj"],)),
        f"{stem}.{index}.up_proj": Form(rows(up, middle, 2 * middle), (names["gate_up_proj"],)),
        f"{stem}.{index}.down_proj": Form(down, (names["down_proj"],)),
    }
