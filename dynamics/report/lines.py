"""Findings as lines of text, one each: for stderr, where programs read along."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from dynamics.text import one_line


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


def _parts(*parts: str) -> Iterable[str]:
    return (part for part in parts if part)
