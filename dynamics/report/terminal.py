"""The first screen in a terminal of 80 columns: the answers, then the numbers behind them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dynamics.findings import severities
from dynamics.report.answers.answer import how_sure, recipe_first, remedy_of, verdict_words
from dynamics.report.sentences import answers, what_was_analysed, what_was_compared
from dynamics.report.summary import all_findings
from dynamics.text import counted, number, one_line, percent, sentence_case

#: Rows of the table: what fits a screen together with the answers.
ROWS = 12
_NAME_WIDTH, _RUN_WIDTH = 34, 26
_STYLES = {"yes": "bold green", "no": "bold red", "mixed": "bold yellow", "undecided": "bold cyan"}


def terminal_answers(summary: Mapping[str, Any]) -> RenderableType:
    """Return what was analysed, and the questions with their answers.

    Args:
        summary: See ``summarise``.

    Returns:
        Something that ``rich`` prints. Text from files (names of runs, tasks and matrices) is never read as markup, and
        control characters in it are written out.
    """
    if "runs" not in summary:
        head = Text.assemble((one_line(summary["run"]), "bold"), ": ", one_line(what_was_analysed(summary)))
        return Group(head, Text(), *_answers(summary["answers"]))
    ordered = recipe_first(summary["answers"])
    return Group(_text(what_was_compared(summary)), Text(), *_answers(ordered), *_statements(summary))


def terminal_numbers(summary: Mapping[str, Any], explained_in: str = "report.html") -> RenderableType:
    """Return how many findings there are, and a short table: of the largest updates, or of the runs.

    Errors and warnings are not repeated: the command writes them to stderr.

    Args:
        summary: See ``summarise``.
        explained_in: Name of the file that has the findings in full.
    """
    findings = _findings(summary, explained_in)
    if "runs" in summary:
        return Group(Text(), findings, Text(), _table_of_runs(summary["runs"]))
    sentences = [*answers(summary), *([summary["routing"]["sentence"]] if summary["routing"] is not None else [])]
    return Group(Text(), findings, Text(), _text(" ".join(sentences)), Text(), _table(summary))


def _answers(answered: Iterable[Mapping[str, Any]]) -> list[RenderableType]:
    """Return a paragraph for each question that was put, then the others, each with how to ask it."""
    asked = [answer for answer in answered if answer["verdict"] != "not_asked"]
    parts: list[RenderableType] = [part for answer in asked for part in _answer(answer)]
    unasked = sorted((answer for answer in answered if answer["verdict"] == "not_asked"), key=remedy_of)
    if unasked:
        parts.append(Text("Not asked"))
        for remedy, members in groupby(unasked, key=remedy_of):
            words = _text(" ".join(answer["question"] for answer in members))
            words.append(f" To ask: {one_line(remedy)}." if remedy else "", style="dim")
            parts.append(Padding(words, (0, 0, 0, 2)))
    return parts


def _answer(answer: Mapping[str, Any]) -> list[RenderableType]:
    verdict = answer["verdict"]
    head = Text.assemble(
        (one_line(answer["question"]), "bold"), " ", (sentence_case(verdict_words(verdict)), _STYLES[verdict])
    )
    words = Text(one_line(answer["answer"]))
    if aside := how_sure(answer):
        words.append(f" {one_line(aside)}", style="dim")
    return [head, Padding(words, (0, 0, 0, 2))]


def _statements(summary: Mapping[str, Any]) -> list[RenderableType]:
    """Return the sentence on the headline measure of groups, and on that measure and scores; all are on the page."""
    relations = [summary[name] for name in ("comparison", "association") if summary[name] is not None]
    return [part for relation in relations for words in relation["statements"][:1] for part in (Text(), _text(words))]


def _findings(summary: Mapping[str, Any], explained_in: str) -> Text:
    """Return one line: how many findings need action, and the codes of the notes."""
    findings = all_findings(summary)
    grave = severities(finding for finding in findings if finding["severity"] != "note")
    notes = sorted({finding["code"] for finding in findings if finding["severity"] == "note"})
    folded = f"{'note' if len(notes) == 1 else 'notes'} {', '.join(notes)}" if notes else ""
    parts = "; ".join(filter(None, (grave, folded)))
    return _text(f"Findings: {parts}. They are explained in {explained_in}." if parts else "No findings.")


def _table(summary: Mapping[str, Any]) -> Table:
    rows = summary["table"]
    step = f"step {summary['last_step']:,}"
    largest = f"The {ROWS} largest of {counted(len(rows), 'update')} at {step}"
    table = _plain_table(largest if len(rows) > ROWS else f"Updates at {step}, largest first")
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


def _table_of_runs(runs: Mapping[str, Mapping[str, Any]]) -> Table:
    """Return a line for each run."""
    table = _plain_table("Runs at their last step")
    table.add_column("run", no_wrap=True, max_width=_RUN_WIDTH)
    table.add_column("group", no_wrap=True, max_width=12)
    for heading in ("step", "Frobenius\nnorm", "eff. rank\n(energy)", "findings\nto act on"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=max(map(len, heading.split("\n"))))
    for name, run in runs.items():
        acted_on = [finding for finding in run["findings"] if finding["severity"] != "note"]
        table.add_row(
            Text(_ending(one_line(name), _RUN_WIDTH)),
            Text(_ending(one_line(run["label"]) or "–", 12)),
            number(run["last_step"]),
            number(run["totals"]["frobenius_norm_all"]),
            number(run["over_matrices"]["effective_rank_energy"]["median"]),
            number(len(acted_on)),
        )
    return table


def _plain_table(title: str) -> Table:
    return Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        title=title,
        title_justify="left",
        title_style="italic",
    )


def _text(words: str) -> Text:
    """Return words from a result as one line, with control characters written out."""
    return Text(one_line(words))


def _ending(name: str, width: int) -> str:
    """Return the end of a long name, which tells more than its beginning."""
    return name if len(name) <= width else f"…{name[len(name) - width + 1 :]}"
