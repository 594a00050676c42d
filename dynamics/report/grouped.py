"""Findings of one code as one thing to read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

_GRAVEST_FIRST = ("error", "warning", "note")
#: A list in the evidence is told up to so many entries.
_LISTED = 8


@dataclass(frozen=True)
class FindingGroup:
    """All findings of one code.

    Args:
        code: E.g. ``"OD204"``.
        severity: ``"error"``, ``"warning"`` or ``"note"``.
        title: What the code means.
        findings: In the order in which they were made.
    """

    code: str
    severity: str
    title: str
    findings: tuple[Mapping[str, Any], ...]

    @property
    def remedies(self) -> list[str]:
        """What to do, each remedy once."""
        return list(dict.fromkeys(finding["remedy"] for finding in self.findings if finding["remedy"]))


def grouped(findings: Iterable[Mapping[str, Any]]) -> list[FindingGroup]:
    """Findings by code, errors first.

    Args:
        findings: As ``Finding.to_dict`` gives them.
    """
    by_code: dict[str, list[Mapping[str, Any]]] = {}
    for finding in findings:
        by_code.setdefault(finding["code"], []).append(finding)
    groups = [FindingGroup(code, own[0]["severity"], own[0]["title"], tuple(own)) for code, own in by_code.items()]
    return sorted(groups, key=lambda group: (_GRAVEST_FIRST.index(group.severity), group.code))


def severities(findings: Iterable[Mapping[str, Any]]) -> str:
    """How many of each severity, gravest first.

    >>> severities([{"severity": "note"}, {"severity": "error"}, {"severity": "note"}])
    '1 error, 2 notes'
    """
    found = [finding["severity"] for finding in findings]
    counts = ((severity, found.count(severity)) for severity in _GRAVEST_FIRST)
    return ", ".join(f"{count} {severity}{'' if count == 1 else 's'}" for severity, count in counts if count)


def place(finding: Mapping[str, Any]) -> str:
    """Where a finding is: file, matrix, step, as far as known; a step that the message names is left out."""
    step = "" if finding["step"] is None else f"step {finding['step']}"
    if f"{step} " in finding["message"].replace(",", " ").lower():
        step = ""
    return ", ".join(part for part in (finding["file"], finding["matrix"], step) if part)


def evidence_words(evidence: Mapping[str, Any]) -> str:
    """Evidence in one line.

    >>> evidence_words({"threshold": 0.1, "largest_share": 0.25, "steps": [1, 2]})
    'threshold 0.1; largest share 0.25; steps 1, 2'
    """
    return "; ".join(f"{key.replace('_', ' ')} {_value_words(value)}" for key, value in evidence.items())


def _value_words(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_value_words(each)}" for key, each in value.items())
    if isinstance(value, list):
        rest = f" and {len(value) - _LISTED} more" if len(value) > _LISTED else ""
        return ", ".join(_value_words(each) for each in value[:_LISTED]) + rest
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
