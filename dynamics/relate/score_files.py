"""Score files as tools write them: Trainer logs and results, lm-evaluation-harness results, tidy CSV."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from dynamics.checkpoints.errors import UnreadableFile
from dynamics.checkpoints.files import read_json, read_text
from dynamics.checkpoints.logs import SCORE_PREFIX, is_score
from dynamics.checkpoints.names import shown
from dynamics.checkpoints.steps import LARGEST_STEP, named_step
from dynamics.checkpoints.trainings import parse_training_state
from dynamics.findings import Finding
from dynamics.text import first_line

_CODE = "OD506"
_SPLITS = (SCORE_PREFIX, "test_", "predict_")
#: What the harness writes beside a task's metrics.
_NOT_METRICS = ("alias", "name", "sample_len", "sample_count", "samples")
_COLUMNS = ("run", "step", "task", "metric", "score", "items", "standard_error")
_NAMED = 8
#: Characters of a name, and of a cell in a message.
_LONGEST_NAME, _LONGEST_CELL = 1000, 60


@dataclass(frozen=True)
class ScoreRow:
    """One score.

    Args:
        run: Name of the run, its folder's.
        step: Optimizer step, ``None`` if the file does not say.
        task: Name of the score: task and metric.
        score: Its value, as given.
        items: How many items it is over; NaN if not said.
        standard_error: NaN if not said.
        higher_is_better: ``None`` if the file does not say.
    """

    run: str
    step: int | None
    task: str
    score: float
    items: float = math.nan
    standard_error: float = math.nan
    higher_is_better: bool | None = None


@dataclass(frozen=True)
class ScoreFile:
    """What one file holds."""

    rows: tuple[ScoreRow, ...]
    findings: tuple[Finding, ...] = ()


def read_scores(path: str | Path, *, run: str | None = None) -> ScoreFile:
    """Read one score file; its kind is told by its name and content.

    Names of runs and tasks that cannot be shown (control characters, lone surrogates, more than 1,000 characters) are
    escaped and shortened. A file that cannot be read costs only itself.

    Args:
        path: ``trainer_state.json``; ``all_results.json``, ``eval_results.json`` and the like; a result file of
            lm-evaluation-harness; or a CSV with the columns ``run, step, task, score`` and optionally ``metric``,
            ``items``, ``standard_error`` (comma, semicolon or tab). Without a ``run`` column or name in it, rows are of
            ``run``.
        run: Name of the run it belongs to; by default what the file says, else the run folder's name.

    Returns:
        Its rows, and findings: OD504 for cells that are no numbers, OD506 if the file cannot be read at all.
    """
    path = Path(path)
    try:
        file = _read(path, run)
        rows = [
            replace(row, task=shown(row.task, _LONGEST_NAME), run=row.run if row.run == run else shown(row.run))
            for row in file.rows
        ]
        return replace(file, rows=tuple(rows))
    except UnreadableFile as error:
        return ScoreFile((), (error.to_finding(shown(path.name)),))
    except Exception as error:  # whatever a stranger's file holds, the analysis goes on without it
        problem = f"It cannot be read as scores: {type(error).__name__}: {first_line(error)}."
        remedy = "Give scores as a CSV with the columns run, step, task, score."
        return ScoreFile((), (UnreadableFile(_CODE, problem, remedy).to_finding(shown(path.name)),))


def _read(path: Path, run: str | None) -> ScoreFile:
    if path.suffix.lower() in (".csv", ".tsv"):
        return _read_table(_table_text(path), path, run)
    if path.suffix.lower() != ".json":
        raise UnreadableFile(
            _CODE,
            f"Expected a score file whose name ends in .csv, .tsv or .json, got {shown(path.name)!r}.",
            "Give scores as a CSV with the columns run, step, task, score, as trainer_state.json, or as a result file "
            "of lm-evaluation-harness.",
        )
    content = read_json(path, _CODE)
    if isinstance(content.get("results"), dict):
        return _numbers_only(_harness(content, path, run), path)
    if "log_history" in content:
        return ScoreFile(tuple(_trainer_log(content, run or _run_of(path))))
    if path.name.endswith("_results.json"):
        return _numbers_only(_trainer_results(content, path, run or _run_of(path)), path)
    problem = "Expected trainer_state.json, *_results.json, lm-evaluation-harness results or a CSV; it is none of them."
    raise UnreadableFile(_CODE, problem, "Give scores as a CSV with the columns run, step, task, score.")


def score_files(run: str | Path) -> list[Path]:
    """Return score files in a run folder, and harness results up to three folders below it, oldest first.

    The Trainer's log is not among them: whoever opens the run has it already.
    """
    folder = Path(run)
    paths = [*folder.glob("*_results.json")]
    paths += [path for path in folder.glob("*/*_results.json") if _step_of(path.parent.name) is not None]
    for depth in ("", "*/", "*/*/", "*/*/*/"):
        paths += folder.glob(f"{depth}results_*.json")
    usable = {path for path in paths if path.is_file() and path.name != "train_results.json"}
    return sorted(usable, key=lambda path: (path.name, str(path)))


def _run_of(path: Path) -> str:
    """Return the folder's name, or that of the folder around a checkpoint."""
    parents = [parent for parent in path.resolve().parents if parent.name]
    names = [parent.name for parent in parents if _step_of(parent.name) is None]
    return names[0] if names else path.stem


def _trainer_log(content: Mapping[str, Any], run: str) -> Iterator[ScoreRow]:
    for step, name, value in parse_training_state(dict(content)).log:
        if is_score(name) and not math.isnan(value):
            yield ScoreRow(run, step, name, value)


def _trainer_results(content: Mapping[str, Any], path: Path, run: str) -> Iterator[tuple[ScoreRow, Any]]:
    """Yield rows of ``Trainer.save_metrics``, at the step of the checkpoint folder or of the training state."""
    step = _step_of(path.resolve().parent.name)
    state = path.with_name("trainer_state.json")
    if step is None and state.is_file():
        step = parse_training_state(read_json(state, "OD108")).step
    for name, value in content.items():
        prefix = next((prefix for prefix in _SPLITS if name.startswith(prefix)), None)
        if prefix is None or not is_score(SCORE_PREFIX + name.removeprefix(prefix)):
            continue
        items = content.get(f"{name.rsplit('_', 1)[0]}_samples", content.get(f"{prefix}samples"))
        yield ScoreRow(run, step, name, math.nan, _number(items)), value


def _harness(content: Mapping[str, Any], path: Path, run: str | None) -> Iterator[tuple[ScoreRow, Any]]:
    """Yield rows of ``results: {task: {"acc,none": …, "acc_stderr,none": …}}``, older: without a filter, ``"acc"``.

    Tasks of a group that has a score of its own are left out: they are in it.
    """
    step, evaluated = _checkpoint_of(content, path) or (None, None)
    run = run or evaluated or _run_of(path)
    results = {task: values for task, values in content["results"].items() if isinstance(values, dict)}
    members = {
        member
        for group, tasks in _mapping(content.get("group_subtasks")).items()
        if any(_is_metric(key) for key in results.get(group, {})) and isinstance(tasks, list)
        for member in tasks
        if isinstance(member, str) and member != group
    }
    better, counts = _mapping(content.get("higher_is_better")), _mapping(content.get("n-samples"))
    for task, values in results.items():
        if task in members:
            continue
        items = _number(_mapping(counts.get(task)).get("effective", values.get("sample_len")))
        for key, value in values.items():
            if not _is_metric(key):
                continue
            metric, _, filter_ = key.partition(",")
            error = _number(values.get(f"{metric}_stderr,{filter_}" if filter_ else f"{metric}_stderr"))
            higher = _mapping(better.get(task)).get(metric)
            name = f"{task}/{metric}" + (f",{filter_}" if filter_ not in ("", "none") else "")
            yield ScoreRow(run, step, name, math.nan, items, error, higher if isinstance(higher, bool) else None), value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _is_metric(key: str) -> bool:
    metric = key.partition(",")[0].strip()
    return bool(metric) and metric not in _NOT_METRICS and not metric.endswith("_stderr")


def _checkpoint_of(content: Mapping[str, Any], path: Path) -> tuple[int, str | None] | None:
    """Return step and run of the evaluated checkpoint, from the model's path, else from the file's own."""
    arguments = _mapping(content.get("config")).get("model_args")
    if isinstance(arguments, str):
        arguments = {part.partition("=")[0]: part.partition("=")[2] for part in arguments.split(",")}
    arguments = _mapping(arguments)
    models = [arguments.get(key) for key in ("peft", "delta", "pretrained", "model", "path")]
    for model in [*models, content.get("model_name"), str(path.resolve())]:
        parts = PurePosixPath(str(model).replace("\\", "/").replace("__", "/")).parts if model else ()
        for number in range(len(parts) - 1, -1, -1):
            if (step := _step_of(parts[number])) is not None:
                before = parts[number - 1] if number else ""
                return step, before if before not in ("", "/", ".", "..") else None
    return None


def _step_of(name: str) -> int | None:
    """Return the step in the name of a checkpoint's folder."""
    step = named_step(name)
    return step.number if step is not None and step.is_plain and step.number <= LARGEST_STEP else None


def _numbers_only(pairs: Iterable[tuple[ScoreRow, Any]], path: Path) -> ScoreFile:
    rows, bad = [], []
    for row, value in pairs:
        number = _number(value)
        if math.isfinite(number):
            rows.append(ScoreRow(**{**row.__dict__, "score": number}))
        else:
            bad.append(f"{shown(row.task, _LONGEST_CELL)} = {shown(repr(value), _LONGEST_CELL)}")
    return ScoreFile(tuple(rows), tuple(_not_numbers(bad, path, "Evaluate again, or leave them out.")))


def _number(value: Any) -> float:
    """Return a JSON number or a text that is one; NaN for anything else (``"N/A"``, booleans)."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return math.nan
    try:
        return float(value)
    except (ValueError, OverflowError):
        return math.nan


def _not_numbers(bad: list[str], path: Path, remedy: str) -> Iterator[Finding]:
    if bad:
        more = f"; and {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        yield Finding(
            "OD504",
            f"Expected finite numbers, got {'; '.join(bad[:_NAMED])}{more}. These are left out.",
            remedy,
            file=path.name,
            evidence={"cells": len(bad)},
        )


def _table_text(path: Path) -> str:
    try:
        return read_text(path, _CODE)
    except UnreadableFile as error:
        if not isinstance(error.__cause__, UnicodeDecodeError):
            raise
        problem = f"Expected UTF-8, got another encoding ({first_line(error.__cause__)})."
        raise UnreadableFile(_CODE, problem, "Save the table as UTF-8 (Excel: 'CSV UTF-8').") from error


def _read_table(text: str, path: Path, run: str | None) -> ScoreFile:
    header = text.splitlines()[0] if text.strip() else ""
    delimiter = max(",;\t", key=header.count)
    try:
        reader = csv.DictReader(io.StringIO(text), delimiter=delimiter, strict=True)
        names = {str(name).strip().lower(): name for name in reader.fieldnames or ()}
        lines = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise UnreadableFile(_CODE, f"It is not a CSV table: {error}.", "Save it again as CSV.") from error
    lacking = [name for name in ("step", "task", "score") if name not in names]
    if lacking or ("run" not in names and run is None):
        lacking = lacking or ["run"]
        columns = ", ".join(shown(name, _LONGEST_CELL) for name in list(names)[:_NAMED])
        problem = f"Expected the columns run, step, task, score, got {columns}: no {', '.join(lacking)}."
        raise UnreadableFile(_CODE, problem, "Make it tidy: one row for each run, step and task.")
    rows, bad = [], []
    for line, row in lines:
        cells = {key: str(row[names[key]] or "").strip() for key in _COLUMNS if key in names}
        if not any(cells.values()):
            continue
        score, problems = _table_row(cells, run)
        bad += [f"line {line}, {problem}" for problem in problems]
        rows += [score] if score else []
    return ScoreFile(tuple(rows), tuple(_not_numbers(bad, path, "Leave cells of missing scores out of the table.")))


def _table_row(cells: Mapping[str, str], run: str | None) -> tuple[ScoreRow | None, list[str]]:
    score, step = _number(cells["score"]), _number(cells["step"] or None)
    quoted = {name: shown(repr(cell), _LONGEST_CELL) for name, cell in cells.items()}
    problems = [] if math.isfinite(score) else [f"score {quoted['score']}"]
    if cells["step"] and not (math.isfinite(step) and step.is_integer() and 0 <= step <= LARGEST_STEP):
        problems.append(f"step {quoted['step']}")
    problems += [
        f"{name} {quoted[name]}"
        for name in ("items", "standard_error")
        if cells.get(name) and not math.isfinite(_number(cells[name]))
    ]
    name = cells.get("run") or run or ""
    if not name or not cells["task"]:
        problems.append(f"run {shown(repr(name), _LONGEST_CELL)}, task {quoted['task']}")
    if any(problem.startswith(("score", "step", "run")) for problem in problems):
        return None, problems
    task = "/".join(part for part in (cells["task"], cells.get("metric")) if part)
    items, error = (_number(cells.get(name) or None) for name in ("items", "standard_error"))
    return ScoreRow(name, int(step) if cells["step"] else None, task, score, items, error), problems
