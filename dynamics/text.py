"""Numbers, names and lines as text: one format for all rooms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
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
    """Return a number with so many significant digits and a minus sign, or a dash where there is none.

    >>> number(0.0123456), number(-12345.6), number(None), number(2.0), number(3.1e-9)
    ('0.0123', '−12,346', '–', '2.00', '3.10e-09')
    """
    if value is None:
        return UNKNOWN
    if value < 0:
        return f"−{number(-value, digits)}"
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0:
        return "0"
    if abs(value) >= 10 ** (digits - 1) and abs(value) < 1e7:
        return f"{value:,.0f}"
    if not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    return f"{value:#.{digits}g}".rstrip(".")


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share as percent, with so many digits after the point.

    >>> percent(0.1234), percent(-0.0699, 0), percent(None)
    ('12.3 %', '−7 %', '–')
    """
    return UNKNOWN if share is None else with_minus(f"{100 * share:z.{digits}f} %")


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


def with_minus(text: str) -> str:
    """Return a number's text with a minus sign in place of a leading hyphen.

    >>> with_minus("-0.00123"), with_minus("3.10e-09")
    ('−0.00123', '3.10e-09')
    """
    return f"−{text[1:]}" if text.startswith("-") else text


def signed(value: float) -> str:
    """Return a number of order 1, such as a correlation, with two decimals.

    >>> signed(-0.314), signed(-0.001)
    ('−0.31', '0.00')
    """
    return with_minus(f"{value:z.2f}")


def p_value(value: float) -> str:
    """Return a p-value with two significant digits.

    >>> p_value(0.25), p_value(0.00012)
    ('0.25', '0.00012')
    """
    return f"{value:.2g}" if value >= 1e-5 else f"{value:.1e}"


def interval(low: float, high: float, write: Callable[[float], str] = signed) -> str:
    """Return a 95 % interval in words, or that there is none.

    Args:
        low, high: Its ends; NaN for none.
        write: Writes one end.

    >>> interval(-0.1, 0.4), interval(math.nan, math.nan)
    ('95 % interval −0.10 to 0.40', 'no interval')
    """
    if math.isnan(low) or math.isnan(high):
        return "no interval"
    return f"95 % interval {write(low)} to {write(high)}"


def sentence_case(text: str) -> str:
    """Return text with its first letter as a capital; Greek symbols stay as they are.

    >>> sentence_case("stable rank"), sentence_case("ρ of the Fisher")
    ('Stable rank', 'ρ of the Fisher')
    """
    return text[:1].upper() + text[1:] if text[:1].isascii() else text


def listed(parts: Iterable[str]) -> str:
    """Return parts as one list in words.

    >>> listed(["a"]), listed(["a", "b", "c"])
    ('a', 'a, b and c')
    """
    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last
