"""The summary for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynamics.findings import FindingGroup, grouped, location
from dynamics.report.scores import did_it_forget, which_checkpoint
from dynamics.report.sentences import answers, does_it_matter, informative_directions, what_was_analysed
from dynamics.text import counted, number, one_line, percent

#: Rows of the table: what fits a screen together with the findings.
ROWS = 12
#: Sentences of each kind; all are in the result.
STATEMENTS = 5
_NAME_WIDTH = 34
_STYLES = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def terminal_summary(summary: Mapping[str, Any]) -> RenderableType:
    """Return answers in sentences, a short table of the largest updates, and the findings by code.

    Args:
        summary: See ``summarise``.

    Returns:
        Something that ``rich`` prints. Text from files (names of runs, tasks and matrices, findings, errors) is never
        read as markup, and control characters in it are written out.
    """
    if "runs" in summary:
        runs = [part for name, run in summary["runs"].items() for part in (*_one_run(name, run), Text())]
        statements = _statements(summary)
        apart = [Text()] if statements else []
        return Group(*statements, *apart, *runs, *_findings(summary["findings"]))
    return Group(*_one_run(summary["run"], summary))


def _one_run(name: str, summary: Mapping[str, Any]) -> list[RenderableType]:
    head = Text.assemble((one_line(name), "bold"), ": ", one_line(what_was_analysed(summary)))
    return [
        head,
        *map(_text, answers(summary)),
        *map(_text, filter(None, (which_checkpoint(summary), did_it_forget(summary)))),
        *_paragraphs([*informative_directions(summary), *does_it_matter(summary)]),
        *_statements(summary),
        Text(),
        _table(summary),
        Text(),
        *_findings(summary["findings"]),
    ]


def _statements(summary: Mapping[str, Any]) -> list[RenderableType]:
    """Return the first sentences about groups, in scores and in measures, and about both together."""
    relations = [
        summary[name] for name in ("score_comparison", "comparison", "association") if summary[name] is not None
    ]
    return _paragraphs(sentence for relation in relations for sentence in relation["statements"][:STATEMENTS])


def _table(summary: Mapping[str, Any]) -> Table:
    rows = summary["table"]
    step = f"step {summary['last_step']:,}"
    largest = f"The {ROWS} largest of {counted(len(rows), 'update')} at {step}"
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title=largest if len(rows) > ROWS else f"Updates at {step}, largest first",
        title_justify="left",
        title_style="italic",
    )
    table.add_column("matrix", no_wrap=True, max_width=_NAME_WIDTH)
    rank = f"rank for\n{percent(summary['suggested_rank_energy'], 0)}"
    for heading in ("Frobenius\nnorm", "eff. rank\n(energy)", "adapter\nrank", "deficit\n(nat)", rank):
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split("\n"))))
    for row in rows[:ROWS]:
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
    """Return words from a result as one line, with control characters written out."""
    return Text(one_line(words))


def _paragraphs(sentences: Iterable[str]) -> list[RenderableType]:
    """Return each sentence after an empty line."""
    return [part for sentence in sentences for part in (Text(), _text(sentence))]


def _ending(name: str, width: int) -> str:
    """Return the end of a long name, which tells more than its beginning."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"


def _findings(findings: list[Mapping[str, Any]]) -> list[RenderableType]:
    if not findings:
        return [Text("No findings.")]
    return [part for group in grouped(findings) for part in _group(group)]


def _group(group: FindingGroup) -> list[RenderableType]:
    first = group.findings[0]
    count = len(group.findings)
    times = f" ({count:,} times)" if count > 1 else ""
    code, title = one_line(f"{group.severity} {group.code}:"), one_line(f"{group.title}{times}")
    head = Text.assemble((code, _STYLES[group.severity]), " ", title)
    where = location(first)
    text = f"{where}: {first['message']}" if where else first["message"]
    if count > 1:
        text += f" And {count - 1:,} more."
    lines = [text, *(group.remedies[:1])]
    return [head, Padding(_text(" ".join(lines)), (0, 0, 0, 2))]
