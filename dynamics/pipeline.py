"""The whole path on one screen: open → measure, merge → draw → write.

How a run is analysed: what a user can choose, checked before anything is read.

One run: its checkpoints measured, probed, and merged with what its training recorded.

Several runs, or one with scores: what the root of a result says of how they differ and what goes with scores.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TypeVar, cast

import torch
import xarray as xr
import yaml

from dynamics import schema
from dynamics.checkpoints import NotARun, Trajectory
from dynamics.checkpoints.logs import log_groups
from dynamics.findings import Finding
from dynamics.recording.checkpoint_probe import Loader, load_function, probe_checkpoints
from dynamics.relate.association import Given
from dynamics.relate.run_measures import MEASURES, Related, relate
from dynamics.relate.score_files import read_scores, score_files
from dynamics.report import summarise
from dynamics.spectra.against_base import beside_base
from dynamics.spectra.dataset import raw_spectra
from dynamics.spectra.measures import rank_pattern
from dynamics.spectra.null_models import SEED
from dynamics.spectra.path import path_of
from dynamics.spectra.weights import weights_of
from dynamics.store import FOLDER, RESULT, encodable_dataset, provenance, staged, write_text, write_tree, writing
from dynamics.store.opening import add_findings, incomplete
from dynamics.store.records import Captured, joined_fisher, joined_scores
from dynamics.store.tree import Parts, Source, as_json, open_source, result_tree, results_folder
from dynamics.text import encodable, first_line, visible

#: Called with a run's name, the matrices done (all steps counted) and the matrices in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How to analyse, as it is written into ``run.yaml`` and into the result.

    Args:
        matrices: Regular expression; only matrices whose name it finds are watched. ``None`` for all.
        device: ``"auto"``, ``"cpu"`` or ``"cuda[:i]"``: where the QR decompositions run.
        report: Whether figures and ``report.html`` are made.
        base: Folder of the model's weights before training.
        intruders: Whether directions of the newest update are compared with the base's, which takes seconds a matrix.
        weights: Whether spectra of the last checkpoint's weights themselves are wanted too.
        probe: ``module:function``; called with a checkpoint's folder, it returns the model there and its tasks.
        scores: Score files, beside those that lie in the runs.
        higher, lower: Tasks of which a higher, or a lower, score is better, where names do not tell.
        headline: The measure named before looking at associations and comparisons; a name in ``run_measures.MEASURES``.
        given: What associations over steps hold equal: ``"loss"`` or ``"trend"``; see :func:`dynamics.associate`.

    Raises:
        ValueError: If a task is in both, the headline is no measure, or ``given`` is none of these.
    """

    matrices: str | None = None
    device: str = "auto"
    report: bool = True
    base: str | None = None
    intruders: bool = False
    weights: bool = False
    probe: str | None = None
    scores: tuple[str, ...] = ()
    higher: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()
    headline: str | None = None
    given: str | None = None

    def __post_init__(self) -> None:
        if both := sorted(set(self.higher) & set(self.lower)):
            raise ValueError(f"Expected each task among higher or lower, got {both[0]!r} in both.")
        if self.headline is not None and self.headline not in MEASURES:
            raise ValueError(f"headline: expected one of the measures {', '.join(MEASURES)}, got {self.headline!r}.")
        if self.given not in (None, "loss", "trend"):
            raise ValueError(f"given: expected 'loss' or 'trend', got {self.given!r}.")


DEFAULTS = Options()


def analyze_run(
    run: str | PathLike[str] | Mapping[str, str | PathLike[str]],
    *,
    out: str | PathLike[str] | None = None,
    options: Options = DEFAULTS,
    labels: Mapping[str, str] | None = None,
    probe: Loader | None = None,
    progress: Progress = lambda run, done, total: None,
) -> xr.DataTree:
    """Analyses a run, or several, and writes the result atomically.

    Args:
        run: Run folder, or name → run folder for several.
        out: Output folder; by default ``RUN/dynamics``, for several runs ``./dynamics``.
        options: See :class:`Options`.
        labels: Name → group of runs it belongs to, kept as the attribute ``label``; for one run its only entry counts.
        probe: The function that ``options.probe`` would name, itself; see ``checkpoint_probe.Loader``.
        progress: See ``Progress``.

    Returns:
        The result as written to ``analysis.zarr``; several runs stand under ``/runs/<name>``.

    Raises:
        NotARun: If there is nothing in any run that can be analysed.
        ValueError: If the regular expression, the device, a run's name or the output folder is not one.
        OutputError: If the output cannot be written; an earlier result is then as it was.
    """
    runs = {name: Path(folder) for name, folder in run.items()} if isinstance(run, Mapping) else {"": Path(run)}
    folder = output_folder(list(runs.values()), out)
    options = replace(options, device=resolve_device(options.device))
    if probe is not None:
        name = getattr(probe, "__qualname__", type(probe).__name__)
        options = replace(options, probe=f"{getattr(probe, '__module__', '')}:{name}")
    load = probe if probe is not None or options.probe is None else load_function(options.probe)
    configuration = _configuration(runs, folder, options)
    if isinstance(run, Mapping):
        _refuse_names(runs)

    sources, refused = _open_all(runs, options)
    with staged(folder, _file_names(sources, options), ["figures"] if options.report else []) as stage:
        with writing(folder):
            write_text(stage / "run.yaml", yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True))
        trees = {
            name: _labelled(_measure(source, options, configuration, progress, load), name, labels)
            for name, source in sources.items()
        }
        tree = _joined(trees, refused, configuration) if isinstance(run, Mapping) else next(iter(trees.values()))
        add_relations(tree, trees, {name: runs[name] for name in sources}, options, labels or {})
        add_findings(tree, incomplete(folder))
        schema.check(tree)
        texts = _drawn(tree) if options.report else {}
        with writing(folder):
            _write(tree, stage, texts)
    return tree


def output_folder(runs: Sequence[Path], out: str | PathLike[str] | None = None) -> Path:
    """Return where results go: ``out``, else ``RUN/dynamics`` (of a capture beside it), for several ``./dynamics``.

    Raises:
        ValueError: If the folder is a Python package, as ``./dynamics`` is in a clone of this project, or a link that
            nobody named: a run may come from somebody else.
    """
    folder = Path(out) if out is not None else results_folder(runs[0]) if len(runs) == 1 else Path(FOLDER)
    if out is None and folder.is_symlink() and folder not in runs:
        raise ValueError(
            f"The output folder '{folder}' is a link to '{os.readlink(folder)}', which is not followed. "
            "If results belong there, name that folder with --out."
        )
    if (folder / "__init__.py").exists():
        raise ValueError(f"The output folder '{folder}' is a Python package. Choose another with --out.")
    return folder


def resolve_device(device: str) -> str:
    """``auto`` to a device; a name that is not one, or is not there, is refused.

    >>> resolve_device("cpu")
    'cpu'
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind, index = torch.device(device).type, torch.device(device).index or 0
    except RuntimeError:
        kind, index = "", 0
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"Expected the device to be auto, cpu, cuda or cuda:i, got {device!r}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"The device {device!r} is asked for, but torch sees no CUDA device. Use --device cpu.")
    if kind == "cuda" and index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"The device {device!r} is asked for, but the last one is cuda:{last}. Use --device auto.")
    return device


def _configuration(runs: Mapping[str, Path], folder: Path, options: Options) -> dict[str, object]:
    """The resolved options; paths are absolute, since the result may be read from anywhere."""
    paths = {"runs": [str(run.absolute()) for run in runs.values()], "out": str(folder.absolute())}
    return encodable({**paths, **asdict(options)})


def _refuse_names(names: Iterable[str]) -> None:
    """Names of several runs are those of groups and of files."""
    for name in names:
        if not name or name.startswith(".") or set(name) & {"/", "\\", "\0"} or len(name.encode()) > 200:
            raise ValueError(f"Expected the name of a run to be a plain name of at most 200 bytes, got {name!r}.")


def _file_names(runs: Iterable[str], options: Options) -> list[str]:
    patterns = [_rank_pattern_file(name) for name in runs]
    return ["run.yaml", RESULT, "summary.json", *patterns, *(["report.html"] if options.report else [])]


def _rank_pattern_file(run: str) -> str:
    return f"rank_pattern.{run}.json" if run else "rank_pattern.json"


def _open_all(runs: Mapping[str, Path], options: Options) -> tuple[dict[str, Source], list[Finding]]:
    """Every run that can be opened; the last refusal is raised if none can."""
    sources: dict[str, Source] = {}
    refused: list[Finding] = []
    for name, folder in runs.items():
        try:
            sources[name] = open_source(folder, options.matrices, options.base)
        except NotARun as error:
            if len(runs) == 1:
                raise
            refused += [Finding("OD100", str(error), file=str(folder)), *error.findings]
    if not sources:
        raise NotARun(
            "None of the runs could be analysed: " + " ".join(f.message for f in refused if f.code == "OD100")
        )
    return sources, refused


def _measure(
    source: Source, options: Options, configuration: Mapping[str, object], progress: Progress, probe: Loader | None
) -> xr.DataTree:
    return measure(source.trajectory, options.device, configuration, progress, source.captured, probe, options)


def _labelled(tree: xr.DataTree, name: str, labels: Mapping[str, str] | None) -> xr.DataTree:
    label = (labels or {}).get(name) if name else next(iter((labels or {}).values()), None)
    if label:
        tree.attrs["label"] = encodable(label)
    return tree


def _joined(
    trees: Mapping[str, xr.DataTree], refused: Sequence[Finding], configuration: Mapping[str, object]
) -> xr.DataTree:
    tree = xr.DataTree.from_dict({f"/runs/{name}": each for name, each in trees.items()})
    inputs = [{**file, "run": name} for name, each in trees.items() for file in json.loads(each.attrs["inputs"])]
    tree.attrs = provenance("", configuration, inputs, SEED)
    tree.attrs["findings"] = as_json(refused)
    return tree


def _write(tree: xr.DataTree, stage: Path, texts: Mapping[str, str]) -> None:
    write_tree(tree, stage / RESULT)
    summary = json.dumps(summarise(tree), indent=2, allow_nan=False, ensure_ascii=False)
    write_text(stage / "summary.json", summary + "\n")
    runs = tree["runs"].children if "runs" in tree.children else {"": tree}
    for name, run in runs.items():
        pattern = json.dumps(rank_pattern(run["update"].to_dataset()), indent=2)
        write_text(stage / _rank_pattern_file(str(name)), pattern + "\n")
    for name, text in texts.items():
        write_text(stage / name, text)


def _drawn(tree: xr.DataTree) -> dict[str, str]:
    """The page and its figures, by file; where one of the two fails the tree gets a finding."""
    # Here, not above: an analysis without figures must not wait for matplotlib.
    from dynamics import plot
    from dynamics.report.page import page

    failures: list[Finding] = []
    drawings = attempt(
        "figures/", lambda: {name: plot.to_svg(figure) for name, figure in plot.figures(tree).items()}, failures
    )
    add_findings(tree, failures)  # the page tells them
    unwritten: list[Finding] = []
    text = attempt("report.html", lambda: page(tree, figures=drawings or {}), unwritten)
    add_findings(tree, unwritten)
    texts = {f"figures/{name}.svg": visible(drawing) for name, drawing in (drawings or {}).items()}
    return texts if text is None else texts | {"report.html": text}


_Part = TypeVar("_Part")


def attempt(what: str, make: Callable[[], _Part], findings: list[Finding]) -> _Part | None:
    """Make one part of a result; where that fails, the others must not be lost.

    Args:
        what: The part, as the subject of a sentence.
        make: Makes it.
        findings: Gets an OD209 if it fails.
    """
    try:
        return make()
    except Exception as error:  # whatever it is, what has been measured is worth more
        reason = " ".join(str(error).split())[:300]
        findings.append(
            Finding(
                "OD209",
                f"{what} could not be made ({type(error).__name__}{': ' if reason else ''}{reason}). "
                "The rest of the result is written.",
                "Correct the input that the message names; if it names none, report this as a bug.",
            )
        )
        return None


def measure(
    trajectory: Trajectory,
    device: str = "cpu",
    configuration: Mapping[str, object] | None = None,
    progress: Progress = lambda run, done, total: None,
    captured: Captured | None = None,
    probe: Loader | None = None,
    options: Options = DEFAULTS,
) -> xr.DataTree:
    """The result of one trajectory, merged with what its training captured; not written anywhere."""
    total = sum(len(checkpoint.shapes) for checkpoint in trajectory.checkpoints)
    done = 0

    def advance(matrices: int) -> None:
        nonlocal done
        done += matrices
        progress(trajectory.name, done, total)

    checkpoints, found = raw_spectra(trajectory, device=device, progress=advance) if total else (None, [])
    inputs = [{**file, "step": checkpoint.step} for checkpoint in trajectory.checkpoints for file in checkpoint.inputs]
    if trajectory.base is not None:
        inputs += [{**file, "step": trajectory.base.step, "role": "base"} for file in trajectory.base.inputs]
    findings = [*trajectory.findings, *found]
    probed, news = _probed(trajectory, probe, options.matrices, progress)
    groups, failures = _of_checkpoints(trajectory, checkpoints, options, progress)
    beside = log_groups(trajectory) | groups
    parts = Parts(trajectory.name, checkpoints, captured, beside, [*findings, *news, *failures], inputs, **probed)
    return result_tree(parts, configuration or {})


def _of_checkpoints(
    trajectory: Trajectory, update: xr.Dataset | None, options: Options, progress: Progress
) -> tuple[dict[str, xr.Dataset], list[Finding]]:
    """``path``, ``base`` and ``weights``, where there is something to tell; and which of them failed."""
    if update is None:
        return {}, []
    done = 0

    def advance(matrices: int) -> None:
        nonlocal done
        done += matrices
        progress(f"{trajectory.name}: base", done, update.sizes["matrix"])

    shown = advance if options.intruders else lambda matrices: None
    makers: dict[str, Callable[[], xr.Dataset | None]] = {
        "path": lambda: path_of(trajectory),
        "base": lambda: beside_base(trajectory, update, directions=options.intruders, progress=shown),
    }
    if options.weights:
        makers["weights"] = lambda: weights_of(trajectory)
    failures: list[Finding] = []
    groups = {name: attempt(f"/{name}", make, failures) for name, make in makers.items()}
    return {name: dataset for name, dataset in groups.items() if dataset is not None}, failures


def _probed(
    trajectory: Trajectory, probe: Loader | None, matrices: str | None, progress: Progress
) -> tuple[dict[str, xr.Dataset | None], list[Finding]]:
    """``fisher`` and ``score`` of the checkpoints, joined over steps."""
    if probe is None:
        return {}, []
    if not trajectory.checkpoints:
        return {}, [Finding("OD411", "There are no checkpoints to probe.", "Keep checkpoints, or probe in training.")]
    found = probe_checkpoints(
        trajectory.checkpoints,
        probe,
        None if matrices is None else lambda name: re.search(matrices, name) is not None,
        lambda done, total: progress(f"{trajectory.name}: Fisher", done, total),
    )
    fisher, news = joined_fisher(found.fisher, re.compile(""))
    return {"fisher": fisher, "score": joined_scores(found.score)}, [*found.findings, *news]


def add_relations(
    tree: xr.DataTree,
    trees: Mapping[str, xr.DataTree],
    folders: Mapping[str, Path],
    options: Options,
    labels: Mapping[str, str],
) -> None:
    """Add ``/association`` and ``/comparison`` to the root, where there are scores or groups.

    What fails here is a finding (OD515): it never costs what was measured of the runs.
    """
    named = trees if "runs" in tree.children else {Path(os.path.abspath(folders[""])).name: tree}
    paths = dict(zip(named, folders.values(), strict=True))
    files = [read_scores(path, run=name) for name, folder in paths.items() for path in score_files(folder)]
    files += [read_scores(path) for path in options.scores]
    rows = [row for file in files for row in file.rows]
    directions = dict.fromkeys(options.higher, "higher") | dict.fromkeys(options.lower, "lower")
    try:
        related = relate(
            named,
            rows,
            headline=options.headline,
            given=cast(Given | None, options.given),
            directions=directions,
            labels=labels,
        )
        for name, group in related.groups.items():
            tree[name] = xr.DataTree(encodable_dataset(group.assign_attrs(encodable(group.attrs))))
    except Exception as error:
        problem = f"Scores and groups could not be related: {type(error).__name__}: {first_line(error)}."
        failed = [Finding("OD515", problem, "Please report it, with the score files.")]
        related = Related({}, ())
    else:
        failed = list(related.findings) if related.groups or rows or options.scores else []
    findings = [*(finding for file in files for finding in file.findings), *failed]
    if findings:
        tree.attrs["findings"] = json.dumps([*json.loads(tree.attrs["findings"]), *json.loads(as_json(findings))])
