"""Regular expressions that come with a run, and that none of them may keep the reader busy.

``re`` tries the ways in which a pattern can match one by one: ``(a+)+$`` has 2ⁿ of them on n characters,
and cannot be interrupted. PEFT matches ``rank_pattern`` and ``alpha_pattern`` like that, so what they
mean is what ``re`` says; here the ways are counted before it is asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import lru_cache

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
    """What matching the patterns of one run may cost; the same patterns on the same names cost only once.

    >>> budget = Budget()
    >>> budget.allows([".*q"], ["a", "b"]), budget.allows(["(a?){12}"] * 600, ["aaaaaaaaaaaa"] * 50)
    (True, False)
    """

    def __init__(self) -> None:
        self._spent: dict[object, float] = {}

    def allows(self, patterns: Sequence[str], names: Sequence[str]) -> bool:
        """Whether the patterns may be matched against the names, with all that was matched before."""
        length = max(map(len, names), default=0)
        work = len(names) * sum(paths(pattern, length) for pattern in patterns)
        self._spent[tuple(patterns), tuple(names)] = work
        return sum(self._spent.values()) <= MOST_WORK


@lru_cache(maxsize=2**16)  # a run has the same patterns in each checkpoint
def paths(pattern: str, length: int) -> int | float:
    """In how many ways at most a pattern can be matched against a text.

    Ways of parts one after another multiply, those of alternatives add up, and a part repeated low to high
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
