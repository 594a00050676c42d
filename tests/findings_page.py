"""docs/findings.md from the catalogue and from what the code says: `python -m tests.findings_page` writes it."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

from dynamics.findings import CATALOGUE

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "findings.md"
_ROOMS = {
    "1": "Reading checkpoints",
    "2": "Spectra",
    "3": "Recording a training",
    "4": "The Fisher",
    "5": "Scores and statistics",
    "6": "Results on disk",
}
_HEAD = """# Findings

A finding is one thing that a reader of a result must know. Each has a stable id, a severity, a message with its
evidence and, where something can be done, a remedy. They stand in the terminal, in `report.html`, in `summary.json` and
in the result's attribute `findings`.

* **error**: an input was not analysed, or a number is not finite. Exit status 1.
* **warning**: a number may mislead, or something is missing that could be there.
* **note**: what must be known to read the numbers.

`--fail-on note|warning|error` chooses from which level on the exit status is 1. Below, … stands for what is filled in.
"""


def _text(node: ast.expr | None) -> str:
    """A message as it is written, with what is filled in left out."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left) + _text(node.right)
    return ""


def _said() -> dict[str, list[tuple[str, str]]]:
    """Id → messages and remedies, as the code makes them."""
    found: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in sorted((ROOT / "dynamics").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            code = node.args[0].value
            if code not in CATALOGUE:
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            message = _text(node.args[1] if len(node.args) > 1 else keywords.get("message"))
            remedy = _text(node.args[2] if len(node.args) > 2 else keywords.get("remedy"))
            if message and (message, remedy) not in found[code]:
                found[code].append((message, remedy))
    return found


def findings_page() -> str:
    """The page."""
    said, lines, room = _said(), [_HEAD], ""
    for code, (severity, title) in CATALOGUE.items():
        if code[2] != room:
            room = code[2]
            lines.append(f"\n## {_ROOMS[room]}\n")
        lines.append(f"\n**{code}** ({severity}) {title}")
        for message, remedy in said[code]:
            what = f" *What to do:* {remedy}" if remedy else ""
            lines.append(f"\n> {message}{what}".replace("<", "&lt;"))
    return "\n".join(lines).replace("\n\n\n", "\n\n") + "\n"


if __name__ == "__main__":
    PAGE.write_text(findings_page())
