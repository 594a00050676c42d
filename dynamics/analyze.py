"""The command line: ``python -m dynamics.analyze RUN``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dynamics._version import __version__

if TYPE_CHECKING:
    import xarray as xr

_LEVELS = ("error", "warning", "note")
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
            help="A Trainer output folder with checkpoints or a capture, one checkpoint or adapter, a capture store.",
            show_default=False,
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="The model before training, which dense weights are compared with."),
    ] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Compare directions with the base's too: seconds a matrix.")
    ] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Measure the last checkpoint's weights themselves too.")
    ] = False,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Measures the Fisher at each checkpoint: the function takes its folder, gives model and tasks.",
        ),
    ] = None,
    matrices: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Watch only matrices whose name it finds.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where results go. [default: RUN/dynamics]", show_default=False)
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Scores: a CSV (run, step, task, score), or results of an evaluation."),
    ] = None,
    higher: Annotated[
        list[str] | None, typer.Option(metavar="TASK", help="Of this task, a higher score is better.")
    ] = None,
    lower: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Of this task, a lower score is.")] = None,
    headline: Annotated[
        str | None, typer.Option(metavar="MEASURE", help="The one measure named before looking at scores.")
    ] = None,
    given: Annotated[
        str | None,
        typer.Option(metavar="loss|trend", help="Hold the training loss, or each run's trend, equal."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where to compute.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON, and nothing else.")] = False,
    report: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Make figures and report.html. Without, earlier ones are removed."),
    ] = True,
    progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Show progress on stderr. [default: if a terminal]")
    ] = None,
    fail_on: Annotated[
        str, typer.Option(metavar="note|warning|error", help="Exit status 1 for findings of this level or above.")
    ] = "error",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure what a training did to the weights: spectra of its updates, with a null model beside each number.

    Writes analysis.zarr, summary.json, report.html, figures/, rank_pattern.json and run.yaml.

    Exit status: 0 analysed; 1 something was refused or not finite (named, the rest is saved); 2 nothing analysed.
    """
    asked = {"matrices": matrices, "device": device, "report": report, "base": base and str(base)}
    asked |= {"intruders": intruders, "weights": weights, "probe": probe, "headline": headline, "given": given}
    asked |= {"scores": tuple(map(str, scores or ())), "higher": tuple(higher or ()), "lower": tuple(lower or ())}
    if fail_on not in _LEVELS:
        raise typer.BadParameter(f"expected note, warning or error, got {fail_on!r}", param_hint="--fail-on")
    sys.exit(_analyze(runs, asked, out, as_json, progress, quiet, fail_on))


def _analyze(
    runs: Sequence[str],
    asked: Mapping[str, Any],
    out: Path | None,
    as_json: bool,
    progress: bool | None,
    quiet: bool,
    fail_on: str = "error",
) -> int:
    try:
        # Here, not above: --help must not wait for torch.
        from dynamics.checkpoints import NotARun
        from dynamics.pipeline import Options, analyze_run, output_folder
        from dynamics.report import finding_line

        try:
            named, labels = _named_runs(runs)
            target: Any = next(iter(named.values())) if len(named) == 1 else named
            folder = output_folder([Path(run) for run in named.values()], out)
            options = Options(**asked)
            with _progress_bar(shown=_wanted(progress, quiet)) as advance:
                tree = analyze_run(target, out=folder, options=options, labels=labels, progress=advance)
        except NotARun as error:
            for finding in error.findings:
                if finding.severity in _told(quiet):
                    _complain(finding_line(finding.to_dict()))
            _complain(str(error))
            return NOTHING_ANALYSED
        except (OSError, ValueError, ArithmeticError, RuntimeError, MemoryError) as error:
            _complain(str(error) or type(error).__name__)
            return NOTHING_ANALYSED
        return _tell(tree, folder, as_json, quiet, fail_on)
    except KeyboardInterrupt as interrupt:
        # Not by _complain, which imports: ^C may have come in the middle of that.
        typer.echo(
            f"Interrupted; {interrupt.args[0] if interrupt.args else 'an earlier result is as it was'}.", err=True
        )
        return INTERRUPTED


def _tell(tree: xr.DataTree, folder: Path, as_json: bool, quiet: bool, fail_on: str) -> int:
    from rich.console import Console

    from dynamics.report import all_findings, finding_lines, summarise, terminal_summary
    from dynamics.text import one_line

    summary = summarise(tree)
    _write_any_text()
    if as_json:
        typer.echo(json.dumps(summary, allow_nan=False))
    elif not quiet:
        Console().print(terminal_summary(summary))
        # A report of an earlier analysis is removed with its result: what is there is new.
        page = folder / "report.html"
        typer.echo(one_line(str(page if page.exists() else folder / "summary.json")))
    for line in finding_lines(summary, _told(quiet)):
        _complain(line)
    counted = _LEVELS[: _LEVELS.index(fail_on) + 1]
    failed = any(finding["severity"] in counted for finding in all_findings(summary))
    return INPUT_REFUSED if failed else ANALYSED


def _told(quiet: bool) -> tuple[str, ...]:
    """Severities that go to stderr."""
    return ("error",) if quiet else ("error", "warning")


def _write_any_text() -> None:
    """Lets stdout escape what its encoding lacks: names in a result are anybody's."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _named_runs(runs: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Name → folder, names made unique; and name → label.

    Raises:
        ValueError: If a run is the empty text.

    >>> _named_runs(["a=runs/x", "other/x"])
    ({'x': 'runs/x', 'x-2': 'other/x'}, {'x': 'a'})
    """
    named: dict[str, str] = {}
    labels: dict[str, str] = {}
    for run in runs:
        label, separator, folder = run.partition("=")
        if not separator or Path(run).exists():
            label, folder = "", run
        if not folder:
            raise ValueError(f"Expected [LABEL=]RUN with RUN a folder, got {run!r}. For this folder, pass a dot.")
        base = name = _plain_name(folder)
        count = 1
        while name in named:
            count += 1
            name = f"{base}-{count}"
        named[name] = folder
        if label:
            labels[name] = label
    return named, labels


def _plain_name(folder: str) -> str:
    """The folder's own name, a link's too, as it can name a group and a file.

    >>> _plain_name("runs/a/../b"), _plain_name("/"), _plain_name(".hidden")
    ('b', 'run', 'hidden')
    """
    name = os.path.basename(os.path.abspath(folder)).encode("utf-8", "backslashreplace").decode()
    # 190 bytes: with what goes before and after it, it is still a file's name.
    return name.replace("\\", "_").lstrip(".").encode()[:190].decode(errors="ignore") or "run"


def _wanted(progress: bool | None, quiet: bool) -> bool:
    return not quiet and (sys.stderr.isatty() if progress is None else progress)


@contextmanager
def _progress_bar(*, shown: bool) -> Iterator[Callable[[str, int, int], None]]:
    if not shown:
        yield lambda run, done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from dynamics.text import one_line

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=console.is_terminal) as bar:
        tasks: dict[str, Any] = {}

        def advance(run: str, done: int, total: int) -> None:
            if run not in tasks:
                tasks[run] = bar.add_task(one_line(run), total=total)
            bar.update(tasks[run], completed=done)

        yield advance


def _complain(message: str) -> None:
    from dynamics.text import one_line

    typer.echo(one_line(message), err=True)


if __name__ == "__main__":
    app()
