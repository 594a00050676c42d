"""Match the matrices of two models that hold the same weights under names of different libraries or versions.

Names are compared by their path within one part of the model. The weights of a vision-language model are
``model.layers.0`` and ``visual`` on the hub, ``model.language_model.layers.0`` and ``model.visual`` in memory, and
``language_model.model.layers.0`` and ``vision_tower`` in older libraries; experts are single matrices
(``experts.3.gate_proj``) or stacks (``experts.gate_up_proj[3]``). An ambiguous name is matched to nothing.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from dynamics.checkpoints.matrices import StoredMatrix, rows, stack_blocks, turned

Size = tuple[int, int]

#: Words before a name that only wrap the model.
_WRAPPERS = frozenset(("model", "language_model", "text_model", "llm", "thinker", "base_model"))
#: Words before a name → the part of the model that they name.
_PARTS = {
    **dict.fromkeys(
        ("visual", "vision_tower", "vision_model", "vision_encoder", "vision_backbone", "image_encoder", "vit", "vpm"),
        "vision",
    ),
    **dict.fromkeys(("audio_tower", "audio_model", "audio_encoder", "speech_encoder"), "audio"),
}
#: How many first words are tried; models have one or two.
_PREFIXES = 4
_EXPERT = re.compile(r"(?P<stem>(?:.+\.)?experts)\.(?P<index>[0-9]+)\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)")
_STACKED = re.compile(r"(?P<stem>(?:.+\.)?experts)\.(?P<role>gate_up_proj|down_proj)\[(?P<index>[0-9]+)\]")
_MIXTRAL = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def aligned(wanted: Mapping[str, Size | None], sizes: Mapping[str, Size]) -> dict[str, str]:
    """Return each wanted name → the name that the other model has for it, where it has one.

    A name that both models have is the same matrix. Other names are compared by their path within their part of the
    model, then without, or with, one first word that most of them share (``transformer.h.0.attn``). Of two candidates
    the one of the wanted size is chosen, or none. ``name@adapter`` is the matrix ``name``.

    Args:
        wanted: Name → size, ``None`` where unknown.
        sizes: Name → size in the other model.

    >>> aligned({"model.language_model.layers.0.q": (4, 4)}, {"model.layers.0.q": (4, 4), "visual.q": (4, 4)})
    {'model.language_model.layers.0.q': 'model.layers.0.q'}
    """
    plain = {name: name if name in sizes else name.rpartition("@")[0] or name for name in wanted}
    pairs = {name: matrix for name, matrix in plain.items() if matrix in sizes}
    paths = {name: _path(matrix) for name, matrix in plain.items() if name not in pairs}
    free: dict[tuple[str, str], list[str]] = defaultdict(list)
    for name in sizes.keys() - set(pairs.values()):
        free[_path(name)].append(name)
    by_path: dict[tuple[str, str], set[str]] = defaultdict(set)
    for name, path in paths.items():
        by_path[path].add(plain[name])
    changes: list[Callable[[str], str]] = [str]
    changes += [partial(_without, word) for word in _first_words(rest for _, rest in paths.values())]
    changes += [partial(_with, word) for word in _first_words(rest for _, rest in free)]
    options = []
    for change in changes:
        option = {}
        for name, (part, rest) in paths.items():
            candidates = free.get((part, change(rest)), [])
            if len(by_path[part, rest]) == 1 and (match := _only(candidates, wanted[name], sizes)) is not None:
                option[name] = match
        claims = Counter(match for match, _ in {(match, plain[name]) for name, match in option.items()})
        options.append({name: match for name, match in option.items() if claims[match] == 1})
    return {**pairs, **max(options, key=len)}  # the first of those that match most


def _path(name: str) -> tuple[str, str]:
    """Return the part of the model that a name belongs to, and its path there."""
    words, part = name.split("."), ""
    while len(words) > 1 and (words[0] in _WRAPPERS or words[0] in _PARTS):
        part = _PARTS.get(words[0], part)
        words = words[1:]
    path = ".".join(words).replace("block_sparse_moe.", "mlp.")
    match = _EXPERT.fullmatch(path)
    if match is not None:
        path = f"{match['stem']}.{match['index']}.{_MIXTRAL.get(match['role'], match['role'])}"
    return part, path


def _only(candidates: list[str], size: Size | None, sizes: Mapping[str, Size]) -> str | None:
    fitting = [name for name in candidates if size in (None, sizes[name], sizes[name][::-1])]
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
    """A matrix of an expert in another form than the stored one.

    Args:
        matrix: The matrix.
        parts: Names of the stored matrices that it is made of.
    """

    matrix: StoredMatrix
    parts: tuple[str, ...]


def expert_forms(matrices: Mapping[str, StoredMatrix], wanted: Mapping[str, Size]) -> dict[str, Form]:
    """Return experts in the other form: stacks of single experts, or single experts of stacks, as views if possible.

    ``gate_up_proj`` is the gate above the up projection, both (intermediate, hidden); a stack is stored so or
    transposed, and the shapes of ``gate_up_proj`` and ``down_proj`` together show which.

    Args:
        matrices: Name → dense matrix.
        wanted: Name → size of the matrices to find; stacks get their orientation.
    """
    single: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    joint: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    for name in matrices:
        if matrices[name].shape.rank:
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
            forms |= _joined(stem, index, names, matrices, size)
    for (stem, index), names in joint.items():
        if names.keys() == {"gate_up_proj", "down_proj"}:
            forms |= _parted(stem, index, names, matrices)
    return {name: form for name, form in forms.items() if name not in matrices}


def _joined(
    stem: str, index: str, names: Mapping[str, str], matrices: Mapping[str, StoredMatrix], wanted: Mapping[str, Size]
) -> dict[str, Form]:
    """Return ``gate_up_proj[e]`` and ``down_proj[e]`` from the three matrices of one expert, oriented as wanted."""
    gate, up = matrices[names["gate_proj"]], matrices[names["up_proj"]]
    if gate.shape.in_ != up.shape.in_:
        return {}
    by_role = {"gate_up_proj": stack_blocks([gate, up]), "down_proj": matrices[names["down_proj"]]}
    parts = {"gate_up_proj": (names["gate_proj"], names["up_proj"]), "down_proj": (names["down_proj"],)}
    natural = {role: (matrix.shape.out, matrix.shape.in_) for role, matrix in by_role.items()}
    straight = all(natural[role] == size for role, size in wanted.items())
    across = all(natural[role][::-1] == size for role, size in wanted.items())
    if straight == across:
        return {}  # other sizes, or square matrices of unknown orientation
    return {
        f"{stem}.{role}[{index}]": Form(turned(matrix) if across else matrix, parts[role])
        for role, matrix in by_role.items()
    }


def _parted(stem: str, index: str, names: Mapping[str, str], matrices: Mapping[str, StoredMatrix]) -> dict[str, Form]:
    """Return the three matrices of one expert from its slices of two stacks."""
    up, down = matrices[names["gate_up_proj"]], matrices[names["down_proj"]]
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
