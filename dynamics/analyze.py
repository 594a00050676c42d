"""The command line: ``python -m dynamics.analyze RUN``."""

from __future__ import annotations

import gc
import json
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

#: Lines on stderr for findings of one code, beside a page that has them all.
_LINES = 3
_LEVELS = ("error", "warning", "note")
ANALYSED, INPUT_REFUSED, NOTHING_ANALYSED, INTERRUPTED = 0, 1, 2, 130

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


def _show_version(requested: bool) -> bool:
    if requested:
        typer.echo(__version__)
        raise typer.Exit
    return requested


@app.command()
def analyze(
    runs: Annotated[
        list[str],
        typer.Argument(
            metavar="[LABEL=]RUN",
            help="A training's output folder, one checkpoint or adapter, or a folder of records. "
            "Runs with one label form a group.",
            show_default=False,
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder of the model before training."),
    ] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Compare directions with the base's, too; takes seconds a matrix.")
    ] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Measure the last checkpoint's weights themselves, too.")
    ] = False,
    top: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Only the K leading singular values of dense matrices; entropies get bounds. For 7B and more.",
        ),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Measure the Fisher at each checkpoint; FUNCTION takes its folder and returns model and tasks.",
        ),
    ] = None,
    intervene: Annotated[
        bool,
        typer.Option(
            "--intervene", help="Run parts of each update on the probe samples: which of them lower the loss?"
        ),
    ] = False,
    arms: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Parts to run. [default: full,on,off,random,matched]", show_default=False),
    ] = None,
    k: Annotated[
        str | None,
        typer.Option(
            "--k",
            metavar="K[,K]",
            help="Leading directions in a part; the first K is the headline's. [default: 16, of few samples fewer]",
            show_default=False,
        ),
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the parts of the last update as adapters to DIR, new or empty."),
    ] = None,
    matrices: Annotated[
        str | None, typer.Option(metavar="REGEX", help="Analyse only matrices whose name matches.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write to DIR/analysis. [default: RUN/dynamics; of several runs ./dynamics-comparison]",
            show_default=False,
        ),
    ] = None,
    scores: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Scores: a CSV with run, step, task, score, or an evaluation's results."),
    ] = None,
    higher: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Higher scores are better for TASK.")] = None,
    lower: Annotated[list[str] | None, typer.Option(metavar="TASK", help="Lower scores are better for TASK.")] = None,
    retained: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="TASK is what the base could do: did training cost any of it?"),
    ] = None,
    headline: Annotated[
        str | None, typer.Option(metavar="MEASURE", help="The primary measure; choose it before looking at scores.")
    ] = None,
    given: Annotated[
        str | None,
        typer.Option(metavar="loss|trend", help="Hold the training loss, or each run's trend, equal in associations."),
    ] = None,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda[:i]", help="Where the linear algebra runs.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON and nothing else.")] = False,
    report: Annotated[
        bool,
        typer.Option("--report/--no-report", help="Write figures and report.html. Without, earlier ones are removed."),
    ] = True,
    progress: Annotated[
        bool | None, typer.Option("--progress/--no-progress", help="Show progress on stderr. [default: on a terminal]")
    ] = None,
    fail_on: Annotated[
        str, typer.Option(metavar="note|warning|error", help="Exit with 1 for findings of this level or above.")
    ] = "error",
    quiet: Annotated[bool, typer.Option("--quiet", help="Print errors only.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure what training did to the weights: spectra of the updates, with a null model beside each number.

    \b
    python -m dynamics.analyze runs/imax
    python -m dynamics.analyze imax=runs/a imax=runs/b dmax=runs/c dmax=runs/d

    Writes analysis.zarr, summary.json, report.html, figures/, rank_pattern.json, checkpoint_choice.json (where there
    are scores or probe losses) and run.yaml to RUN/dynamics/analysis/.

    Exit status: 0 analysed; 1 an input was refused or a number is not finite (each is named, the rest is saved);
    2 nothing analysed; 130 interrupted.
    """
    choices = {"matrices": matrices, "device": device, "report": report, "base": base and str(base)}
    choices |= {"intruders": intruders, "weights": weights, "top": top, "probe": probe}
    choices |= {"headline": headline, "given": given}
    choices |= {"intervene": intervene, "arms": _listed(arms), "k": _numbers(k), "export": export and str(export)}
    choices |= {"scores": tuple(map(str, scores or ())), "higher": tuple(higher or ()), "lower": tuple(lower or ())}
    choices |= {"retained": tuple(retained or ())}
    if fail_on not in _LEVELS:
        raise typer.BadParameter(f"expected note, warning or error, got {fail_on!r}", param_hint="--fail-on")
    sys.exit(_analyze(runs, choices, out, as_json, progress, quiet, fail_on))


def _analyze(
    runs: Sequence[str],
    choices: Mapping[str, Any],
    out: Path | None,
    as_json: bool,
    progress: bool | None,
    quiet: bool,
    fail_on: str = "error",
) -> int:
    try:
        # Here, not above: --help must not wait for torch.
        from dynamics.checkpoints import NotARun
        from dynamics.pipeline import Options, analyze_runs, named_runs, output_folder
        from dynamics.report import finding_line

        if not gc.isenabled():
            gc.freeze()
            gc.enable()

        try:
            named = named_runs(_labels_and_folders(runs))
            if len(runs) == 1:
                named = named.unnamed()
            folder = output_folder(list(named.folders.values()), out)
            options = Options(**choices)
            with _progress_bar(shown=_shows_progress(progress, quiet)) as advance:
                tree = analyze_runs(named, folder, options, progress=advance)
        except NotARun as error:
            for finding in error.findings:
                if finding.severity in _severities(quiet):
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

    from dynamics.report import all_findings, finding_lines, summarise, terminal_answers, terminal_numbers

    summary = summarise(tree)
    _write_any_text()
    if as_json:
        typer.echo(json.dumps(summary, allow_nan=False))
    elif not quiet:
        Console().print(terminal_answers(summary))
    # Between the answers and the numbers in a terminal; all of them only where nothing else tells them.
    for line in finding_lines(summary, _severities(quiet), most=None if as_json or quiet else _LINES):
        _complain(line)
    if not as_json and not quiet:
        # A report of an earlier analysis is removed with its result: what is there is new.
        page = folder / "analysis" / "report.html"
        written = page if page.exists() else page.with_name("summary.json")
        Console().print(terminal_numbers(summary, written.name))
        _point_to(written)
    counted = _LEVELS[: _LEVELS.index(fail_on) + 1]
    failed = any(finding["severity"] in counted for finding in all_findings(summary))
    return INPUT_REFUSED if failed else ANALYSED


def _point_to(path: Path) -> None:
    """Print a path, which a terminal that can opens on a click."""
    from rich.console import Console
    from rich.style import Style
    from rich.text import Text

    from dynamics.text import one_line

    link = Style(link=path.absolute().as_uri())
    Console().print(Text(one_line(str(path)), style=link), soft_wrap=True)


def _listed(text: str | None) -> tuple[str, ...] | None:
    """Return the entries of a list with commas.

    >>> _listed("on, off")
    ('on', 'off')
    """
    return None if text is None else tuple(entry.strip() for entry in text.split(","))


def _numbers(text: str | None) -> tuple[int, ...] | None:
    """Return the whole numbers of a list with commas.

    >>> _numbers("16,4")
    (16, 4)
    """
    try:
        return None if text is None else tuple(map(int, text.split(",")))
    except ValueError:
        raise typer.BadParameter(
            f"expected whole numbers, such as 16 or 16,4, got {text!r}", param_hint="--k"
        ) from None


def _severities(quiet: bool) -> tuple[str, ...]:
    """Return the severities that go to stderr."""
    return ("error",) if quiet else ("error", "warning")


def _write_any_text() -> None:
    """Let stdout escape what its encoding lacks: names in a result are anybody's."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _labels_and_folders(runs: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the label, ``""`` where there is none, and the folder of each ``[LABEL=]RUN``.

    Raises:
        ValueError: If a run is the empty text.

    >>> list(_labels_and_folders(["a=runs/x", "other/x"]))
    [('a', 'runs/x'), ('', 'other/x')]
    """
    for run in runs:
        label, separator, folder = run.partition("=")
        if not separator or Path(run).exists():
            label, folder = "", run
        if not folder:
            raise ValueError(f"Expected [LABEL=]RUN with RUN a folder, got {run!r}. For this folder, pass a dot.")
        yield label, folder


def _shows_progress(progress: bool | None, quiet: bool) -> bool:
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
            bar.update(tasks[run], completed=done, total=total)

        yield advance


def _complain(message: str) -> None:
    from dynamics.text import one_line

    typer.echo(one_line(message), err=True)


if __name__ == "__main__":
    gc.disable()  # until all is imported: to look for garbage in what stays takes an eighth of that time
    app()
