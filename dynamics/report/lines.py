"""Findings as lines of text, one each: for stderr, where programs read along."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

#: Control characters but for tabs and line breaks, halves of surrogate pairs, and marks that hide or turn text.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def finding_lines(summary: Mapping[str, Any], severities: Collection[str]) -> Iterator[str]:
    """A line for each finding of these severities, errors first.

    Args:
        summary: See ``summarise``; of several runs each line names its run.
        severities: ``"error"``, ``"warning"``, ``"note"``: which to tell.
    """
    found = [("", finding) for finding in summary["findings"]]
    for name, run in summary.get("runs", {}).items():
        found += [(name, finding) for finding in run["findings"]]
    for severity in ("error", "warning", "note"):
        if severity in severities:
            yield from (finding_line(finding, run) for run, finding in found if finding["severity"] == severity)


def finding_line(finding: Mapping[str, Any], run: str = "") -> str:
    """One finding in one line.

    >>> finding_line(
    ...     {
    ...         "code": "OD101",
    ...         "severity": "error",
    ...         "file": "checkpoint-2/x.bin",
    ...         "matrix": "",
    ...         "message": "It is empty.",
    ...         "remedy": "Copy it again.",
    ...     }
    ... )
    'OD101 error checkpoint-2/x.bin: It is empty. Copy it again.'
    """
    where = ", ".join(_parts(run, finding["file"], finding["matrix"]))
    head = " ".join(_parts(finding["code"], finding["severity"], f"{where}:" if where else ""))
    return one_line(" ".join(_parts(head, finding["message"], finding["remedy"])))


def one_line(text: str) -> str:
    """The same without line breaks, and with what a terminal would obey written out.

    >>> one_line("a\\n  b \\x1b[31m")
    'a b \\\\x1b[31m'
    """
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in " ".join(text.split())
    )


def visible(text: str) -> str:
    """The same text with everything that cannot be seen written out; line breaks and tabs stay.

    >>> visible("a\\n\\x1b[31m")
    'a\\n\\\\x1b[31m'
    """
    return _UNSEEN.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def _parts(*parts: str) -> Iterable[str]:
    return (part for part in parts if part)
