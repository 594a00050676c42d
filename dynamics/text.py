"""Numbers, names and lines as text: one format for all rooms."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

UNKNOWN = "–"

#: Control characters but for tabs and line breaks, halves of surrogate pairs, and marks that hide or turn text.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)
#: Torch's advice to load a pickle all the same that it does not load: it is not passed on.
_ADVICE = re.compile(
    r"Weights only load failed.*(WeightsUnpickler error: |trusted source\.\s+)| Please use .torch\.serialization.*",
    re.DOTALL,
)


def finite(value: Any) -> float | None:
    """Return a number as JSON has it: ``None`` for NaN and infinity.

    >>> finite(2), finite(math.nan), finite(math.inf)
    (2.0, None, None)
    """
    number = float(value)
    return number if math.isfinite(number) else None


def integer(value: Any) -> int | None:
    """Return a finite number without its fraction, else ``None``.

    >>> integer(2.0), integer(math.nan)
    (2, None)
    """
    number = finite(value)
    return None if number is None else int(number)


def encodable(value: Any) -> Any:
    """Return JSON-compatible content with every half of a surrogate pair escaped.

    Folder names that are not UTF-8 and ``"\\ud800"`` in JSON contain such halves, which no file can hold.

    >>> encodable({"run": "caf\\udce9"})
    {'run': 'caf\\\\udce9'}
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    if isinstance(value, Mapping):
        return {encodable(key): encodable(content) for key, content in value.items()}
    if isinstance(value, list | tuple):
        return [encodable(content) for content in value]
    return value


def one_line(text: str) -> str:
    """Return text without line breaks; what a terminal would obey is written out.

    >>> one_line("a\\n  b \\x1b[31m")
    'a b \\\\x1b[31m'
    """
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in " ".join(text.split())
    )


def visible(text: str) -> str:
    """Return text with every invisible character written out; line breaks and tabs stay.

    >>> visible("a\\n\\x1b[31m")
    'a\\n\\\\x1b[31m'
    """
    return _UNSEEN.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def first_line(error: BaseException, limit: int = 160) -> str:
    """Return the first line of an error's text, shortened: other libraries write paragraphs.

    >>> first_line(ValueError("bad\\nvery bad"))
    'bad'
    """
    text = _ADVICE.sub("", str(error)).strip() or type(error).__name__
    line = text.splitlines()[0].strip()
    return line if len(line) <= limit else line[: limit - 1] + "…"


def number(value: float | int | None, digits: int = 3) -> str:
    """Return a number with so many significant digits, or a dash where there is none.

    >>> number(0.0123456), number(12345.6), number(None), number(2.0), number(3.1e-9)
    ('0.0123', '12,346', '–', '2.00', '3.10e-09')
    """
    if value is None:
        return UNKNOWN
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1) and abs(value) < 1e7:
        return f"{value:,.0f}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(share: float | None) -> str:
    """Return a share as percent.

    >>> percent(0.1234), percent(None)
    ('12.3 %', '–')
    """
    return UNKNOWN if share is None else f"{100 * share:.1f} %"


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun.

    >>> counted(1, "checkpoint"), counted(2, "matrix", "matrices")
    ('1 checkpoint', '2 matrices')
    """
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def some(names: Iterable[str], limit: int = 3) -> str:
    """A few names for a sentence.

    >>> some(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    names = list(names)
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
