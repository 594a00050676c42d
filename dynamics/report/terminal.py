"""The summary for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynamics.findings import FindingGroup, grouped, location
from dynamics.report.sentences import answers, informative_directions, what_was_analysed
from dynamics.text import number, one_line

#: Rows of the table: what fits a screen together with the findings.
ROWS = 12
#: Sentences of each kind; all are in the result.
STATEMENTS = 5
_NAME_WIDTH = 34
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def terminal_summary(summary: Mapping[str, Any]) -> RenderableType:
    """A short table of the largest updates, then the findings by code.

    Args:
        summary: See ``summarise``.

    Returns:
        Something that ``rich`` prints. Text from files is never read as markup, and what a terminal would obey is
        written out, wherever it comes from: names of runs, tasks and matrices, stored findings, errors.
    """
    if "runs" in summary:
        runs = [part for name, run in summary["runs"].items() for part in (*_one_run(name, run), Text())]
        return Group(*_statements(summary), *runs, *_findings(summary["findings"]))
    return Group(*_one_run(summary["run"], summary))


def _one_run(name: str, summary: Mapping[str, Any]) -> list[RenderableType]:
    head = Text.assemble((one_line(name), "bold"), ": ", one_line(what_was_analysed(summary)))
    said = [_text(sentence) for sentence in answers(summary)]
    of_the_fisher = [part for words in informative_directions(summary) for part in (Text(), _text(words))]
    return [
        head,
        *said,
        *of_the_fisher,
        *_statements(summary),
        Text(),
        _table(summary),
        Text(),
        *_findings(summary["findings"]),
    ]


def _statements(summary: Mapping[str, Any]) -> list[RenderableType]:
    """How groups differ, and what goes with scores; those of the measure named before looking, and what holds."""
    found = [summary[name] for name in ("comparison", "association") if summary[name] is not None]
    said = [sentence for each in found for sentence in each["statements"][:STATEMENTS]]
    return [*(part for sentence in said for part in (Text(), _text(sentence))), *([Text()] if said else [])]


def _table(summary: Mapping[str, Any]) -> Table:
    rows = summary["table"]
    shown = rows[:ROWS]
    what = f"the {ROWS} largest of {len(rows)} updates" if len(rows) > ROWS else "updates, largest first"
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title=f"{what}, step {summary['last_step']:,}",
        title_justify="left",
        title_style="italic",
    )
    table.add_column("matrix", no_wrap=True, max_width=_NAME_WIDTH)
    held = f"rank for\n{summary['suggested_rank_energy']:.0%}"
    for heading in ("Frobenius\nnorm", "eff. rank\n(energy)", "adapter\nrank", "deficit\n(nat)", held):
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split("\n"))))
    for row in shown:
        table.add_row(
            Text(_ending(one_line(row["name"]), _NAME_WIDTH)),
            number(row["frobenius_norm"]),
            number(row["effective_rank_energy"]),
            number(row["adapter_rank"]),
            number(row["entropy_deficit"]),
            number(row["suggested_rank"]),
        )
    return table


def _text(words: str) -> Text:
    """Words from a result as a line that the terminal shows and does not obey."""
    return Text(one_line(words))


def _ending(name: str, width: int) -> str:
    """The end of a long name: it says more than its beginning."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _findings(findings: list[Mapping[str, Any]]) -> list[RenderableType]:
    if not findings:
        return [Text("No findings.")]
    return [part for group in grouped(findings) for part in _group(group)]


def _group(group: FindingGroup) -> list[RenderableType]:
    first = group.findings[0]
    count = len(group.findings)
    times = f" ({count} times)" if count > 1 else ""
    code, title = one_line(f"{group.severity} {group.code}"), one_line(f"{group.title}{times}")
    head = Text.assemble((code, _STYLES[group.severity]), " ", title)
    where = location(first)
    text = f"{where}: {first['message']}" if where else first["message"]
    if count > 1:
        text += f" And {count - 1:,} more."
    lines = [text, *(group.remedies[:1])]
    return [head, Padding(_text(" ".join(lines)), (0, 0, 0, 2))]
