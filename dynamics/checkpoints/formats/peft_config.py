"""``adapter_config.json``: what kind of adapter it is, and the scale that PEFT gives each module.

PEFT matches ``rank_pattern`` and ``alpha_pattern`` as regular expressions with ``re``, so they mean what ``re`` says.
They come from strangers, and ``re`` tries the ways in which a pattern can match one by one: ``(a+)+$`` has 2ⁿ of them
on n characters, and cannot be interrupted. So the ways are counted before ``re`` is asked, and a pattern with too many
is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import Weights
from dynamics.checkpoints.formats.variants import judge, moved_start
from dynamics.checkpoints.matrices import Refusal, Remark, StoredMatrix
from dynamics.checkpoints.names import name_fault, shown
from dynamics.checkpoints.trajectory import MatrixShape
from dynamics.text import first_line

CONFIG = "adapter_config.json"
#: PEFT's defaults for keys that a configuration leaves out (``LoraConfig``, ``AdaLoraConfig``).
_DEFAULT_RANK = {"LORA": ("r", 8), "ADALORA": ("init_r", 12)}
_DEFAULT_ALPHA = 8
_RESAVE = "Save the adapter again with PEFT's save_pretrained."
#: Sizes of normal float32 numbers: PEFT multiplies by the scale in float32 or coarser.
_SMALLEST, _LARGEST = 1e-37, 3e38
_LARGEST_RANK = 2**31 - 1
_LONGEST_KEY = 1000
#: What an alpha of zero means: it cannot have been trained with, since no gradient passes.
NO_SCALE = "Its {} is 0, so that its scale is 0 and PEFT adds nothing to the model, whatever the factors hold."
SET_ALPHA = "Set it in adapter_config.json to the value of the training; some exporters write 0 for an unknown one."
_MOST_LAYERS = 100_000
#: The number of a layer, in PEFT's list of what layers are called (``replicate_layers``).
_LAYER = re.compile(r"(?:^|\.)(?:layers|layer|h|blocks)\.(?P<number>[0-9]{1,9})(?=\.)")

Patterns = tuple[tuple[str, re.Pattern[str], float], ...]


@dataclass(frozen=True)
class AdapterConfig:
    """The part of a configuration that decides which product is analysed, and its scale.

    Args:
        peft_type: ``LORA`` or ``ADALORA``; any other kind is a refusal.
        rank: ``r`` (AdaLoRA: ``init_r``).
        alpha: ``lora_alpha``.
        rslora: Whether the scale is alpha / √r instead of alpha / r.
        fan_in_fan_out: Whether the base stores its weights as (in, out), as GPT-2's Conv1D does.
        rank_pattern: Pattern, compiled pattern and rank, in order.
        alpha_pattern: The same for alpha.
        target_parameters: Parameters (not modules) that were adapted, as written.
        layers: For each layer of the adapted model the layer of the base that it is a copy of, where PEFT repeats
            layers (``layer_replication``).
        moved_start: Name of the initialisation that moved a part of the base weight into the adapter, or ``""``.
        refusal: Why nothing of this adapter is analysed, if so.
        remarks: How its matrices must be read.
        settings: What distinguishes one training's configuration from another's.
    """

    peft_type: str
    rank: int
    alpha: float
    rslora: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Patterns = ()
    alpha_pattern: Patterns = ()
    target_parameters: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    moved_start: str = ""
    refusal: Refusal | None = None
    remarks: tuple[Remark, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False, compare=False)

    def rank_of(self, module: str, stored: int | None = None) -> int:
        """Return the rank that PEFT gives a module, by its name inside the model.

        PEFT takes the first pattern that matches, but sorts the patterns when it saves them: if
        several match, the rank of the stored factors shows which of them was the first in training.

        Args:
            module: The module's name.
            stored: Rank of its stored factors.
        """
        ranks = _matches(self.rank_pattern, module)
        return int(stored if stored in ranks else ranks[0] if ranks else self.rank)

    def ambiguous_alphas(self, module: str) -> tuple[float, ...]:
        """Return the different alphas that patterns give a module, if several; their order in training is unknown."""
        alphas = tuple(dict.fromkeys(_matches(self.alpha_pattern, module)))
        return alphas if len(alphas) > 1 else ()

    def source_of(self, name: str) -> str:
        """Return the base's name of a matrix: another one if the adapter repeats layers of the base.

        >>> AdapterConfig("LORA", 8, 16.0, layers=(0, 1, 1)).source_of("model.layers.2.q_proj")
        'model.layers.1.q_proj'
        """
        match = _LAYER.search(name) if self.layers else None
        if match is None or int(match["number"]) >= len(self.layers):
            return name
        return f"{name[: match.start('number')]}{self.layers[int(match['number'])]}{name[match.end('number') :]}"

    def slow_pattern(self, modules: Sequence[str], budget: Budget) -> Refusal | None:
        """Refuse a configuration with patterns that could take forever to match.

        Args:
            modules: Names of the modules.
            budget: Of the run.
        """
        length = max(map(len, modules), default=0)
        for table, patterns in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern)):
            for key, _, _ in patterns:
                if paths(key, length) > MOST_PATHS:
                    ways = f"more than {MOST_PATHS // 10**6} million ways"
                    reason = f"Its {table} has the key {shown(key)!r}, which may match in {ways}."
                    remedy = "Write the key without nested repeats, or as the name of the module."
                    return Refusal("OD102", reason, remedy)
        keys = [key for key, _, _ in (*self.rank_pattern, *self.alpha_pattern)]
        if not budget.allows(keys, modules):
            reason = (
                f"Its rank_pattern and alpha_pattern have {len(keys)} keys for {len(modules)} modules, which together "
                f"may match in more than {MOST_WORK // 10**6} million ways."
            )
            return Refusal("OD102", reason, "Write the keys without repeats, as the names of the modules.")
        return None

    def scale_of(self, module: str, stored: int | None = None) -> float:
        r"""Return the factor before B A: \(\alpha/r\), rsLoRA \(\alpha/\sqrt r\), AdaLoRA \(\alpha/(r_0+10^{-5})\).

        Sources: ``LoraLayer.update_layer`` and ``SVDLinear.get_delta_weight`` of PEFT 0.21;
        rsLoRA: Kalajdzievski 2023.

        >>> AdapterConfig("LORA", rank=16, alpha=32.0, rslora=True).scale_of("q_proj")
        8.0
        """
        alpha = next(iter(_matches(self.alpha_pattern, module)), self.alpha)
        if self.peft_type == "ADALORA":
            # PEFT keeps the initial rank in the scale when it prunes, and replaces an alpha that is not positive.
            return (alpha if alpha > 0 else float(self.rank)) / (self.rank + 1e-5)
        rank = self.rank_of(module, stored)
        return alpha / (math.sqrt(rank) if self.rslora else rank)


@lru_cache(maxsize=2**16)
def _matches(patterns: Patterns, module: str) -> tuple[float, ...]:
    """Return the values of the patterns that match the end of a name, at a dot, in order (``get_pattern_key``)."""
    values = tuple(value for _, pattern, value in patterns if pattern.match(module))
    # PEFT then looks up the whole name as text: it may hold signs that mean something in a pattern.
    return values or tuple(value for key, _, value in patterns if key == module)


def parse_adapter_config(content: Mapping[str, Any], *, has_base: bool = False) -> AdapterConfig:
    """Return the configuration from its JSON object.

    >>> config = parse_adapter_config({"peft_type": "LORA", "r": 8, "lora_alpha": 16})
    >>> config.scale_of("model.layers.0.self_attn.q_proj")
    2.0

    Raises:
        UnreadableFile: ``OD102`` if a value is missing or not what PEFT accepts.
    """
    peft_type = content.get("peft_type")
    if not isinstance(peft_type, str):
        raise UnreadableFile("OD102", f"Its peft_type is {peft_type!r}; expected a name such as 'LORA'.", _RESAVE)
    for key in ("use_rslora", "fan_in_fan_out", "use_dora", "use_qalora"):
        _switch(content, key)
    refusal, remarks = judge(content, has_base=has_base)
    if peft_type not in _DEFAULT_RANK:
        return AdapterConfig(peft_type, rank=1, alpha=1.0, refusal=refusal, settings={"peft_type": peft_type})
    rank_key, default_rank = _DEFAULT_RANK[peft_type]
    rank = _positive(content, rank_key, default_rank)
    alpha = _finite("lora_alpha", content.get("lora_alpha", _DEFAULT_ALPHA))
    if alpha == 0 and peft_type == "LORA":
        refusal = refusal or Refusal("OD102", NO_SCALE.format("lora_alpha"), SET_ALPHA)
    missing = [key for key in (rank_key, "lora_alpha") if key not in content]
    if missing:
        text = f"The configuration lacks {', '.join(missing)}: PEFT assumes {rank_key}={rank}, lora_alpha={alpha:g}."
        remarks += (Remark("OD119", text),)
    # AdaLoRA's rank_pattern holds masks of what was pruned, already applied to the stored factors.
    ranks = () if peft_type == "ADALORA" else _patterns(content, "rank_pattern")
    return AdapterConfig(
        peft_type,
        rank,
        alpha,
        rslora=_switch(content, "use_rslora") and peft_type == "LORA",
        fan_in_fan_out=_switch(content, "fan_in_fan_out"),
        rank_pattern=ranks,
        alpha_pattern=() if peft_type == "ADALORA" else _patterns(content, "alpha_pattern"),
        target_parameters=_names(content, "target_parameters"),
        layers=_layers(content),
        moved_start=moved_start(content),
        refusal=refusal,
        remarks=remarks,
        settings=_settings(content, rank, alpha),
    )


def _settings(content: Mapping[str, Any], rank: int, alpha: float) -> dict[str, Any]:
    modules = content.get("target_modules")
    return {
        "peft_type": content["peft_type"],
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": _switch(content, "use_rslora"),
        "fan_in_fan_out": _switch(content, "fan_in_fan_out"),
        "target_modules": sorted(map(str, modules)) if isinstance(modules, list) else modules,
        "rank_pattern": content.get("rank_pattern") or {},
        "alpha_pattern": content.get("alpha_pattern") or {},
    }


def _positive(content: Mapping[str, Any], key: str, default: int) -> int:
    value = content.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= _LARGEST_RANK:
        problem = f"Its {key} is {shown(repr(value))}; expected a positive integer below 2**31."
        raise UnreadableFile("OD102", problem, _RESAVE)
    return value


def _switch(content: Mapping[str, Any], key: str) -> bool:
    value = content.get(key)
    if value is not None and not isinstance(value, bool):
        raise UnreadableFile("OD102", f"Its {key} is {shown(repr(value))}; expected true or false.", _RESAVE)
    return value is True


def _names(content: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names = content.get(key) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and not name_fault(name) for name in names):
        raise UnreadableFile("OD102", f"Its {key} is {shown(repr(names))}; expected a list of names.", _RESAVE)
    return tuple(names)


def _layers(content: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the base's layer of each layer: 0, 1, 2, 1, 2, 3 for ``[[0, 3], [1, 4]]``."""
    ranges = content.get("layer_replication") or []
    is_list = isinstance(ranges, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in ranges)
    if not is_list or not all(type(end) is int and 0 <= end <= _MOST_LAYERS for pair in ranges for end in pair):
        problem = f"Its layer_replication is {shown(repr(ranges))}; expected a list of layer ranges [start, end]."
        raise UnreadableFile("OD102", problem, _RESAVE)
    if sum(max(0, end - start) for start, end in ranges) > _MOST_LAYERS:
        problem = f"Its layer_replication makes more than {_MOST_LAYERS} layers."
        raise UnreadableFile("OD102", problem, _RESAVE)
    return tuple(layer for start, end in ranges for layer in range(start, end))


def _finite(key: str, value: Any) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN lies in no range; zero must be 0, not −0.
    if not number or not (_SMALLEST <= abs(value) <= _LARGEST or str(value) in ("0", "0.0")):
        expected = f"0, or a number that float32 holds ({_SMALLEST:g} to {_LARGEST:g} in size)"
        raise UnreadableFile("OD102", f"Its {key} is {shown(repr(value))}; expected {expected}.", _RESAVE)
    return float(value)


def _patterns(content: Mapping[str, Any], name: str) -> Patterns:
    table = content.get(name) or {}
    if not isinstance(table, dict):
        problem = f"Its {name} is {shown(repr(table))}; expected an object of name: number."
        raise UnreadableFile("OD102", problem, _RESAVE)
    patterns = []
    for key, value in table.items():
        if len(key) > _LONGEST_KEY:
            problem = f"Its {name} has a key of {len(key)} characters; expected at most {_LONGEST_KEY}."
            raise UnreadableFile("OD102", problem, f"Write {name} with shorter patterns.")
        try:
            pattern = re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            problem = f"Its {name} has the key {shown(key)!r}, which is not a regular expression ({first_line(error)})."
            raise UnreadableFile("OD102", problem, f"Correct {name} as PEFT would have to.") from error
        number = _finite(f"{name}[{shown(key)!r}]", value)
        if name == "rank_pattern" and (number <= 0 or number != int(number)):
            problem = f"Its {name}[{shown(key)!r}] is {value!r}; expected a positive integer."
            raise UnreadableFile("OD102", problem, _RESAVE)
        patterns.append((key, pattern, number))
    return tuple(patterns)


@runtime_checkable
class BaseMatrices(Protocol):
    """The weights before training, as far as adapters need them; see :class:`dynamics.checkpoints.base.Base`."""

    def find(self, wanted: Mapping[str, MatrixShape]) -> dict[str, tuple[str, StoredMatrix]]: ...
    def refused(self, names: Iterable[str]) -> dict[str, Refusal]: ...


_TOKEN = re.compile(
    r"""
      \\.                                             # an escaped character, or a class such as \d
    | \[\^?\]?(?:\\.|[^\]\\])*\]                      # a set
    | (?P<open>\((?:\?(?::|=|!|>|<=|<!|P<\w+>))?)     # a group, a look around
    | (?P<close>\))
    | (?P<either>\|)
    | (?P<repeat>[*+?]|\{\d+,?\d*\}|\{,\d*\})[?+]?    # lazy or possessive: the same ways in another order
    | .                                               # any other character
    """,
    re.VERBOSE | re.DOTALL,
)
#: Ways that are tried in about a second: of one pattern on one name.
MOST_PATHS = 10**7
#: Ways of all patterns on all names that are tried for one run.
MOST_WORK = 10**8


class Budget:
    """A limit on the cost of matching the patterns of one run; the same patterns on the same names cost only once.

    >>> budget = Budget()
    >>> budget.allows([".*q"], ["a", "b"]), budget.allows(["(a?){12}"] * 600, ["aaaaaaaaaaaa"] * 50)
    (True, False)
    """

    def __init__(self) -> None:
        self._spent: dict[object, float] = {}

    def allows(self, patterns: Sequence[str], names: Sequence[str]) -> bool:
        """Return whether the patterns may be matched against the names, given all that was matched before."""
        length = max(map(len, names), default=0)
        work = len(names) * sum(paths(pattern, length) for pattern in patterns)
        self._spent[tuple(patterns), tuple(names)] = work
        return sum(self._spent.values()) <= MOST_WORK


@lru_cache(maxsize=2**16)  # a run has the same patterns in each checkpoint
def paths(pattern: str, length: int) -> int | float:
    """Return a bound on the number of ways in which a pattern can match a text.

    The ways of consecutive parts multiply, those of alternatives add up, and a part repeated low to high
    times has the sum of its powers; no part is repeated more often than the text has characters.

    Args:
        pattern: A valid regular expression. Groups with flags or conditions count as infinitely many.
        length: Number of characters of the text.

    >>> paths(r".*layers\\.\\d+\\.q", 30), paths("(a|b)c?", 30)
    (930, 4)
    >>> paths("(a+)+", 30)
    inf
    """
    groups = [[0, 1, 1]]  # of each open group: the sum of its alternatives, the product so far, the last part
    for token in _TOKEN.finditer(pattern):
        if token["open"]:
            if token["open"] == "(" and pattern[token.end() : token.end() + 1] == "?":
                return math.inf
            groups.append([0, 1, 1])
        elif token["close"]:
            alternatives, product, last = groups.pop()
            groups[-1] = [groups[-1][0], groups[-1][1] * groups[-1][2], alternatives + product * last]
        elif token["either"]:
            alternatives, product, last = groups[-1]
            groups[-1] = [alternatives + product * last, 1, 1]
        elif token["repeat"]:
            groups[-1][2] = _repeated(groups[-1][2], *_bounds(token["repeat"], length))
        else:
            groups[-1] = [groups[-1][0], groups[-1][1] * groups[-1][2], 1]
        if max(groups[-1]) > MOST_PATHS:
            return math.inf
    ((alternatives, product, last),) = groups
    return alternatives + product * last


def _bounds(repeat: str, length: int) -> tuple[int, int]:
    if repeat in "*+?":
        return int(repeat == "+"), 1 if repeat == "?" else length
    low, comma, high = repeat[1:-1].partition(",")
    least = int(low or 0)
    return least, min(int(high), max(length, least)) if high else (max(length, least) if comma else least)


def _repeated(ways: int, low: int, high: int) -> int:
    if ways == 1:
        return high - low + 1
    total = 0
    for times in range(low, high + 1):
        total += ways ** min(times, 24)  # 2²⁴ is beyond the limit
        if total > MOST_PATHS:
            break
    return total


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's weights, and what helps to read them.

    Args:
        weights: The header of its file.
        config: The ``adapter_config.json`` beside it; ``None`` if there is none.
        base: The weights before training, if they were given: DoRA and saved modules need them.
        budget: What matching the patterns of all configurations of the run may cost.
    """

    weights: Weights
    config: Mapping[str, Any] | None = None
    base: BaseMatrices | None = None
    budget: Budget = field(default_factory=Budget)
