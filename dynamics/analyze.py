"""The command line: ``python -m dynamics.analyze RUN``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamics._version import __version__

if TYPE_CHECKING:
    import xarray as xr

ANALYSED, INPUT_REFUSED, NOTHING_ANALYSED, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(asked: bool) -> bool:
    if asked:
        typer.echo(__version__)
        raise typer.Exit
    return asked


@app.command()
def analyze(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]RUN...",
            help="A Trainer output folder with checkpoint-N/, one checkpoint, or one adapter folder.",
            show_default=False,
        ),
    ],
    matrices: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Watch only matrices whose name it finds.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go. [default: RUN/dynamics]", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to compute.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
    report: Annotated[bool, typer.Option("--report/--no-report", help="Make figures and report.html.")] = True,
    progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Show progress on stderr. [default: if a terminal]")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure what a training did to the weights: spectra of its updates, with a null model beside each number.

    Writes analysis.zarr, summary.json, report.html, figures/, rank_pattern.json and run.yaml.

    Exit status: 0 analysed; 1 something was refused or not finite (named, the rest is saved); 2 nothing analysed.
    """
    sys.exit(_analyze(runs, matrices, out, device, as_json, report, progress, quiet))


def _analyze(
    runs: Sequence[str],
    matrices: str | None,
    out: Path | None,
    device: str,
    as_json: bool,
    with_report: bool,
    progress: bool | None,
    quiet: bool,
) -> int:
    # Here, not above: --help must not wait for torch.
    from dynamics.checkpoints import NotARun
    from dynamics.pipeline import Options, analyze_run, default_output

    options = Options(matrices, device, with_report)
    named, labels = _named_runs(runs)
    target: Any = next(iter(named.values())) if len(named) == 1 else named
    try:
        with _progress_bar(shown=_wanted(progress, quiet)) as advance:
            tree = analyze_run(target, out=out, options=options, labels=labels, progress=advance)
    except NotARun as error:
        for finding in error.findings:
            _complain(str(finding))
        _complain(str(error))
        return NOTHING_ANALYSED
    except (OSError, ValueError) as error:
        _complain(_one_line(error))
        return NOTHING_ANALYSED
    except KeyboardInterrupt:
        _complain("Interrupted; an earlier result is as it was.")
        return INTERRUPTED
    folder = out or default_output([Path(run) for run in named.values()])
    return _tell(tree, folder, as_json, with_report, quiet)


def _tell(tree: xr.DataTree, folder: Path, as_json: bool, with_report: bool, quiet: bool) -> int:
    from rich.console import Console

    from dynamics.report import all_findings, summarise, terminal_summary

    summary = summarise(tree)
    errors = [finding for finding in all_findings(summary) if finding["severity"] == "error"]
    if as_json:
        json.dump(summary, sys.stdout, allow_nan=False, ensure_ascii=False)
        sys.stdout.write("\n")
    elif not quiet:
        console = Console()
        console.print(terminal_summary(summary))
        console.print(str(folder / ("report.html" if with_report else "summary.json")), soft_wrap=True, highlight=False)
    if as_json or quiet:
        for finding in errors:
            where = ", ".join(part for part in (finding["file"], finding["matrix"]) if part)
            _complain(
                " ".join(part for part in (finding["code"], f"{where}:", finding["message"], finding["remedy"]) if part)
            )
    return INPUT_REFUSED if errors else ANALYSED


def _named_runs(runs: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Name → folder, names made unique; and name → label.

    >>> _named_runs(["a=runs/x", "other/x"])
    ({'x': 'runs/x', 'x-2': 'other/x'}, {'x': 'a'})
    """
    named: dict[str, str] = {}
    labels: dict[str, str] = {}
    for run in runs:
        label, separator, folder = run.partition("=")
        if not separator or Path(run).exists():
            label, folder = "", run
        base = name = Path(folder).resolve().name or "run"
        count = 1
        while name in named:
            count += 1
            name = f"{base}-{count}"
        named[name] = folder
        if label:
            labels[name] = label
    return named, labels


def _wanted(progress: bool | None, quiet: bool) -> bool:
    return not quiet and (sys.stderr.isatty() if progress is None else progress)


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    if not shown:
        yield lambda run, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def advance(run: str, done: int, total: int) -> None:
            if run not in tasks:
                tasks[run] = bar.add_task(run.replace("[", r"\["), total=total)
            bar.update(tasks[run], completed=done)

        yield advance


def _one_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.filename:
        return f"{error.strerror}: '{error.filename}'."
    return " ".join(str(error).split()) or type(error).__name__


def _complain(message: str) -> None:
    typer.echo(message, err=True)


if __name__ == "__main__":
    app()
