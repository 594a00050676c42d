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
    "7": "Interventions",
}
_HEAD = """# Findings

A finding is one thing that you must know to read a result. Each has a stable code, a severity, a message with its
evidence and, where something can be done, a remedy. Findings appear in the terminal, `report.html`, `summary.json`
and the result's attribute `findings`.

* **error**: an input was not analysed, or a number is not finite. Exit status 1.
* **warning**: a number may mislead, or something is missing that could be there.
* **note**: what you must know to read the numbers.

`--fail-on note|warning|error` sets the level from which the exit status is 1. Below, … stands for what is filled in.
"""


def findings_page() -> str:
    """Return the page."""
    messages, lines, room = _messages(), [_HEAD], ""
    for code, (severity, title) in CATALOGUE.items():
        if code[2] != room:
            room = code[2]
            lines.append(f"## {_ROOMS[room]}\n")
        lines.append(f"### {code}: {title}\n\n**{severity}**\n")
        for message, remedy in messages[code]:
            advice = f" *What to do:* {remedy}" if remedy else ""
            lines.append(f"- {message}{advice}".replace("<", "&lt;"))
        lines += [""] if messages[code] else []
    return "\n".join(lines)


def _messages() -> dict[str, list[tuple[str, str]]]:
    """Return code → messages and remedies, as the code makes them."""
    messages: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for path in sorted((ROOT / "dynamics").rglob("*.py")):
        tree = ast.parse(path.read_text())
        assigned = _assigned(tree)
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            code = node.args[0].value
            if code not in CATALOGUE:
                continue
            keywords = {keyword.arg: keyword.value for keyword in node.keywords}
            message = _text(node.args[1] if len(node.args) > 1 else keywords.get("message"), assigned)
            remedy = _text(node.args[2] if len(node.args) > 2 else keywords.get("remedy"), assigned)
            if message and (message, remedy) not in messages[code]:
                messages[code].append((message, remedy))
    return messages


def _assigned(tree: ast.Module) -> dict[str, list[tuple[int, ast.expr]]]:
    """Return name → line and value of each assignment, in order of lines."""
    values: dict[str, list[tuple[int, ast.expr]]] = defaultdict(list)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for name, value in pairs:
                    if isinstance(name, ast.Name):
                        values[name.id].append((node.lineno, value))
    return {name: sorted(pairs, key=lambda pair: pair[0]) for name, pairs in values.items()}


def _text(node: ast.expr | None, assigned: dict[str, list[tuple[int, ast.expr]]]) -> str:
    """Return a message as it is written, with … for what is filled in; of a name, the last value before it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _text(node.left, assigned) + _text(node.right, assigned)
    if isinstance(node, ast.Name):
        values = [value for line, value in assigned.get(node.id, []) if line < node.lineno]
        earlier = {name: [pair for pair in pairs if pair[0] < node.lineno] for name, pairs in assigned.items()}
        earlier.pop(node.id, None)
        return _text(values[-1], earlier) if values else ""
    return ""


if __name__ == "__main__":
    PAGE.write_text(findings_page())
