"""The whole path: open → measure → relate → draw → write."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
import xarray as xr
import yaml

from dynamics import schema
from dynamics.checkpoints import NotARun, Trajectory
from dynamics.checkpoints.logs import log_groups
from dynamics.findings import Finding, to_json
from dynamics.intervention.counterfactuals import ARMS, chosen_arms, chosen_k
from dynamics.recording.checkpoint_probe import Loader, load_function, probe_checkpoints
from dynamics.recording.fisher import Interventions
from dynamics.relate.association import Given
from dynamics.relate.run_measures import MEASURES, relate_runs
from dynamics.relate.score_files import read_scores, score_files
from dynamics.report import summarise
from dynamics.spectra.against_base import compare_with_base
from dynamics.spectra.measures import rank_pattern
from dynamics.spectra.null_models import SEED
from dynamics.spectra.path import training_path
from dynamics.spectra.trajectory_spectra import trajectory_spectra
from dynamics.spectra.weights import weights
from dynamics.store import RESULT, encodable_dataset, provenance, staged, write_text, write_tree, writing
from dynamics.store.loss_records import joined_losses
from dynamics.store.opening import add_findings
from dynamics.store.records import (
    TrainingRecords,
    joined_fisher,
    joined_interventions,
    joined_scores,
    joined_sharpness,
)
from dynamics.store.replace import ANALYSIS, notes_before
from dynamics.store.tree import Parts, Source, open_source, result_tree, results_folder
from dynamics.text import encodable, first_line, visible

#: Where the result of several runs goes by default.
COMPARISON = Path("dynamics-comparison")
#: Called with a run's name, the number of matrices done (all steps counted) and the number of all matrices; with
#: ``"NAME: Fisher"``, the numbers of probe samples; with ``"NAME: interventions"``, of forward passes over samples.
Progress = Callable[[str, int, int], None]
Folder = str | PathLike[str]


@dataclass(frozen=True)
class Options:
    """The choices behind one analysis, as ``run.yaml`` and the result hold them; see :func:`analyze_run`.

    Raises:
        ValueError: If a task is in both ``higher`` and ``lower``, the headline is not a measure, ``given`` is neither
            ``"loss"`` nor ``"trend"``, ``top`` is less than 1, an arm is unknown, or ``arms``, ``k`` or ``export`` come
            without ``intervene``.
    """

    matrices: str | None = None
    device: str = "auto"
    report: bool = True
    base: str | None = None
    intruders: bool = False
    weights: bool = False
    top: int | None = None
    probe: str | None = None
    scores: tuple[str, ...] = ()
    higher: tuple[str, ...] = ()
    lower: tuple[str, ...] = ()
    retained: tuple[str, ...] = ()
    headline: str | None = None
    given: str | None = None
    intervene: bool = False
    arms: tuple[str, ...] | None = None
    k: tuple[int, ...] | None = None
    export: str | None = None

    def __post_init__(self) -> None:
        if both := sorted(set(self.higher) & set(self.lower)):
            raise ValueError(f"Expected each task in higher or in lower, got {both[0]!r} in both.")
        if self.headline is not None and self.headline not in MEASURES:
            raise ValueError(f"headline: expected one of the measures {', '.join(MEASURES)}, got {self.headline!r}.")
        if self.given not in (None, "loss", "trend"):
            raise ValueError(f"given: expected 'loss' or 'trend', got {self.given!r}.")
        if self.top is not None and self.top < 1:
            raise ValueError(f"top: expected at least 1 singular value, got {self.top}.")
        for name in () if self.intervene else ("arms", "k", "export"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected together with intervene, got it alone. Add --intervene.")
        _ = self.interventions  # refuses unknown arms

    @property
    def interventions(self) -> Interventions | None:
        """What is run of each increment."""
        return Interventions(ARMS if self.arms is None else self.arms, self.k) if self.intervene else None


@dataclass(frozen=True)
class Runs:
    """The runs of one analysis.

    Args:
        folders: Name → run folder; the only name is ``""`` where one run is analysed by itself.
        labels: Name → the group of runs that it belongs to, for runs that have one.
    """

    folders: Mapping[str, Path]
    labels: Mapping[str, str]

    @property
    def alone(self) -> bool:
        """Whether one run is analysed by itself."""
        return "" in self.folders

    def unnamed(self) -> Runs:
        """Return the only run as one that is analysed by itself."""
        (name,) = self.folders
        return Runs({"": self.folders[name]}, {"": self.labels[name]} if name in self.labels else {})


def analyze_run(
    run: Folder | Sequence[Folder] | Mapping[str, Folder | Sequence[Folder]],
    *,
    out: Folder | None = None,
    base: Folder | None = None,
    scores: Sequence[Folder] = (),
    matrices: str | None = None,
    probe: str | Loader | None = None,
    intervene: bool = False,
    arms: Sequence[str] | None = None,
    k: int | Sequence[int] | None = None,
    export: Folder | None = None,
    intruders: bool = False,
    weights: bool = False,
    top: int | None = None,
    higher: Sequence[str] = (),
    lower: Sequence[str] = (),
    retained: Sequence[str] = (),
    headline: str | None = None,
    given: Given | None = None,
    device: str = "auto",
    report: bool = True,
    progress: Progress = lambda run, done, total: None,
    options: Options | None = None,
    labels: Mapping[str, str] | None = None,
) -> xr.DataTree:
    """Analyse one run, or compare several, and write the result; an earlier result is replaced as a whole.

    Args:
        run: Run folder; several of them; or label → the run folders of one group, e.g. of one recipe.
        out: Output folder; the result goes to ``OUT/analysis``. By default ``RUN/dynamics``, for several runs
            ``./dynamics-comparison``.
        base: Folder of the model's weights before training.
        scores: Score files, beside those that lie in the runs.
        matrices: Regular expression; only matrices whose name matches are analysed.
        probe: ``"module:function"`` or the function itself: called with a checkpoint's folder, it returns the model
            there and its tasks; see ``recording.checkpoint_probe.Loader``.
        intervene: Run parts of each increment between probed checkpoints on the probe samples, to see which of them
            lower the loss: the group ``/intervention``. With the default arms an increment takes 23 forward passes over
            the probe samples and two forward and backward. Then the singular directions of the last checkpoint's
            adapters, see :func:`dynamics.sensitivity`: ten passes more; and how long each increment may be, see
            :func:`dynamics.critical_sharpness`: about eight passes, and as many for each task's gradient.
        arms: Which parts, as for :func:`dynamics.counterfactuals`.
        k: In how many directions, as for :func:`dynamics.counterfactuals`.
        export: New or empty folder for the parts of the last increment, each added to the weights where it began, as
            adapters that any evaluator loads: ``EXPORT/on``, …; of several runs ``EXPORT/<run>/on``, ….
        intruders: Compare directions of the newest update with the base's, too; takes seconds a matrix.
        weights: Measure the spectra of the last checkpoint's weights themselves, too.
        top: Compute only so many leading singular values of dense matrices; norms and participation ratios stay exact,
            entropies get bounds, what needs all values is NaN. For matrices of 4096 rows and more.
        higher: Tasks for which a higher score is better, where names do not tell.
        lower: Tasks for which a lower score is better.
        retained: Tasks of what the base could do; a checkpoint is chosen by these and by the new ones, see
            :func:`dynamics.choose_checkpoint`.
        headline: The primary measure of associations and comparisons; choose it before looking at scores.
        given: What associations over steps hold equal: ``"loss"`` or ``"trend"``; see :func:`dynamics.associate`.
        device: ``"auto"``, ``"cpu"`` or ``"cuda[:i]"``: where the linear algebra runs.
        report: Make figures and ``report.html``.
        progress: See ``Progress``.
        options: Deprecated; pass the keywords.
        labels: Deprecated; pass label → runs. Name → label.

    Returns:
        The result as written to ``analysis.zarr``; several runs stand under ``/runs/<name>``.

    Raises:
        NotARun: If no run holds anything that can be analysed.
        ValueError: If an argument, a run's name or the output folder is invalid.
        OutputError: If the output cannot be written; an earlier result is then as it was.

    Example: two recipes, three seeds each::

        recipes = {name: [f"runs/{name}-{seed}" for seed in range(3)] for name in ("imax", "dmax")}
        tree = dynamics.analyze_run(recipes, scores=["scores.csv"])
        tree["comparison"]["difference"].sel(measure="total/effective_rank_energy")
    """
    if options is None:
        options = Options(
            matrices=matrices,
            device=device,
            report=report,
            base=None if base is None else fspath(base),
            intruders=intruders,
            weights=weights,
            top=top,
            probe=probe if isinstance(probe, str) else None,
            intervene=intervene,
            arms=None if arms is None else chosen_arms(arms),
            k=None if k is None else chosen_k(k),
            export=None if export is None else fspath(export),
            scores=tuple(fspath(path) for path in scores),
            higher=tuple(higher),
            lower=tuple(lower),
            retained=tuple(retained),
            headline=headline,
            given=given,
        )
    else:
        _deprecated("options=Options(matrices=…, …)", "analyze_run(run, matrices=…, …)", stacklevel=3)
    runs = _runs(run, labels)
    if not runs.folders:
        raise ValueError("Expected at least one run folder, got none.")
    load = None if isinstance(probe, str) else probe
    return analyze_runs(runs, output_folder(list(runs.folders.values()), out), options, load, progress)


def analyze_runs(
    runs: Runs, folder: Path, options: Options, load: Loader | None = None, progress: Progress = lambda *counts: None
) -> xr.DataTree:
    """Analyse named runs with resolved choices, and write the result; see :func:`analyze_run`.

    Args:
        runs: What to analyse.
        folder: Output folder, see :func:`output_folder`.
        options: How.
        load: The function that ``options.probe`` names, where it is given itself.
        progress: See ``Progress``.
    """
    options = replace(options, device=resolve_device(options.device))
    if load is not None:
        name = getattr(load, "__qualname__", type(load).__name__)
        options = replace(options, probe=f"{getattr(load, '__module__', '')}:{name}")
    elif options.probe is not None:
        load = load_function(options.probe)
    elif options.intervene:
        raise ValueError(
            "intervene: expected probe samples to run the parts of an update on, got none. Add --probe MODULE:FUNCTION."
        )
    if options.export is not None:
        _refuse_export(Path(options.export), folder)
    configuration = _configuration(runs.folders, folder, options)

    sources, refused = _open_all(runs.folders, options)
    with staged(folder) as stage:
        with writing(folder):
            write_text(stage / "run.yaml", yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True))
        trees = {
            name: measure(source.trajectory, configuration, progress, source.records, load, _of_run(name, options))
            for name, source in sources.items()
        }
        for name, label in runs.labels.items():
            if name in trees:
                trees[name].attrs["label"] = encodable(label)
        tree = trees[""] if runs.alone else _joined(trees, refused, configuration)
        add_relations(tree, trees, {name: runs.folders[name] for name in sources}, options, runs.labels)
        add_findings(tree, notes_before(folder))
        schema.check(tree)
        texts = _drawn(tree) if options.report else {}
        with writing(folder):
            _write(tree, stage, texts)
    return tree


def _runs(
    run: Folder | Sequence[Folder] | Mapping[str, Folder | Sequence[Folder]], labels: Mapping[str, str] | None = None
) -> Runs:
    """Return what the user calls a run, several, or groups of them, with names.

    >>> runs = _runs({"a": ["runs/x"], "b": ["other/x", "y"]})
    >>> dict(runs.labels)
    {'x': 'a', 'x-2': 'b', 'y': 'b'}
    """
    if labels is not None:
        _deprecated("labels={'run': 'label'}", "analyze_run({'label': ['run']})", stacklevel=4)
    if isinstance(run, str | PathLike):
        return Runs({"": Path(run)}, {"": label} if (label := next(iter((labels or {}).values()), None)) else {})
    if not isinstance(run, Mapping):
        return named_runs([("", folder) for folder in run])
    texts = {name: Path(folder) for name, folder in run.items() if isinstance(folder, str | PathLike)}
    if len(texts) < len(run):
        pairs = [(label, folder) for label, folders in run.items() for folder in _listed(folders)]
        return named_runs(pairs)
    _refuse_names(texts)
    if texts:
        _deprecated(
            "analyze_run({'name': 'run'})", "analyze_run(['run']) or analyze_run({'label': ['run']})", stacklevel=4
        )
    return Runs(texts, {name: label for name, label in (labels or {}).items() if label and name in texts})


def _listed(folders: Folder | Sequence[Folder]) -> Sequence[Folder]:
    return [folders] if isinstance(folders, str | PathLike) else folders


def named_runs(pairs: Iterable[tuple[str, Folder]]) -> Runs:
    """Return runs under the names of their folders, made unique.

    Args:
        pairs: Label, ``""`` where there is none, and folder.

    >>> dict(named_runs([("a", "runs/x"), ("", "other/x")]).folders)
    {'x': PosixPath('runs/x'), 'x-2': PosixPath('other/x')}
    """
    folders: dict[str, Path] = {}
    labels: dict[str, str] = {}
    for label, folder in pairs:
        stem = name = _plain_name(folder)
        count = 1
        while name in folders:
            count += 1
            name = f"{stem}-{count}"
        folders[name] = Path(folder)
        if label:
            labels[name] = label
    return Runs(folders, labels)


def _plain_name(folder: Folder) -> str:
    """Return a folder's own name, a link's too, so that it can name a group and a file.

    >>> _plain_name("runs/a/../b"), _plain_name("/"), _plain_name(".hidden")
    ('b', 'run', 'hidden')
    """
    name = os.path.basename(os.path.abspath(folder)).encode("utf-8", "backslashreplace").decode()
    # 190 bytes: with what goes before and after it, it is still a file's name.
    return name.replace("\\", "_").lstrip(".").encode()[:190].decode(errors="ignore") or "run"


def _deprecated(old: str, new: str, stacklevel: int) -> None:
    message = f"{old} is deprecated and will be removed in the next release; use {new}."
    warnings.warn(message, DeprecationWarning, stacklevel=stacklevel)


def output_folder(runs: Sequence[Path], out: Folder | None = None) -> Path:
    """Return the folder of a result: ``out``, else ``RUN/dynamics``, of several runs ``./dynamics-comparison``.

    Raises:
        ValueError: If ``RUN/dynamics`` is a link, which is followed only where ``out`` names it: a run may come from
            somebody else.
    """
    folder = Path(out) if out is not None else results_folder(runs[0]) if len(runs) == 1 else COMPARISON
    if out is None and folder.is_symlink() and folder not in runs:
        raise ValueError(
            f"The output folder '{folder}' is a link to '{os.readlink(folder)}', which is not followed. "
            "If results belong there, name that folder with --out."
        )
    return folder


def resolve_device(device: str) -> str:
    """Return the device for ``auto``, or the named one.

    Raises:
        ValueError: If the name is not a device, or torch does not see it.

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
        raise ValueError(f"Torch sees no CUDA device, so {device!r} cannot be used. Use --device cpu.")
    if kind == "cuda" and index >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ValueError(f"The device {device!r} does not exist; the last one is cuda:{last}. Use --device auto.")
    return device


def _of_run(name: str, options: Options) -> Options:
    """Return the options of one run; of several runs each exports into a folder of its own."""
    return options if options.export is None else replace(options, export=os.path.join(options.export, name))


def _refuse_export(export: Path, folder: Path) -> None:
    """Refuse a folder for exported parts that holds anything, cannot be made, or is where the result goes.

    Raises:
        ValueError: Names it.
    """
    if (folder / ANALYSIS).resolve() in (export.resolve(), *export.resolve().parents):
        raise ValueError(f"export: expected another folder than that of the result, got '{export}'.")
    if export.is_dir() and (names := os.listdir(export)):
        raise ValueError(
            f"export: expected a new or empty folder, got '{export}', which holds '{min(names)}'. Choose another one."
        )
    try:
        export.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"export: the folder '{export}' cannot be made ({error.strerror}). Choose another one."
        ) from error


def _configuration(runs: Mapping[str, Path], folder: Path, options: Options) -> dict[str, object]:
    """Return the resolved choices; paths are absolute, since the result may be read from anywhere."""
    paths = {"runs": [str(run.absolute()) for run in runs.values()], "out": str(folder.absolute())}
    return encodable({**paths, **asdict(options)})


def _refuse_names(names: Iterable[str]) -> None:
    """Refuse names that cannot name a group of the result and a file."""
    for name in names:
        if not name or name.startswith(".") or set(name) & {"/", "\\", "\0"} or len(name.encode()) > 200:
            raise ValueError(f"Expected the name of a run to be a plain name of at most 200 bytes, got {name!r}.")


def _rank_patterns(tree: xr.DataTree) -> dict[str, dict[str, int]]:
    """Return rank patterns of one run by the file's stem: by energy, and by effect where that is measured."""
    ranks = {"rank_pattern": tree["update"].to_dataset()["suggested_rank"]}
    if "sensitivity" in tree.children:
        ranks["rank_pattern_by_effect"] = tree["sensitivity"].to_dataset()["rank_by_effect"].isel(step=-1)
    return {stem: rank_pattern(array) for stem, array in ranks.items()}


def _open_all(runs: Mapping[str, Path], options: Options) -> tuple[dict[str, Source], list[Finding]]:
    """Open every run that can be opened.

    Raises:
        NotARun: If none can.
    """
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


def _joined(
    trees: Mapping[str, xr.DataTree], refused: Sequence[Finding], configuration: Mapping[str, object]
) -> xr.DataTree:
    tree = xr.DataTree.from_dict({f"/runs/{name}": run for name, run in trees.items()})
    inputs = [{**file, "run": name} for name, run in trees.items() for file in json.loads(run.attrs["inputs"])]
    tree.attrs = provenance("", configuration, inputs, SEED)
    tree.attrs["findings"] = to_json(refused)
    return tree


def _write(tree: xr.DataTree, stage: Path, texts: Mapping[str, str]) -> None:
    write_tree(tree, stage / RESULT)
    summary = summarise(tree)
    write_text(stage / "summary.json", json.dumps(summary, indent=2, allow_nan=False, ensure_ascii=False) + "\n")
    runs = tree["runs"].children if "runs" in tree.children else {"": tree}
    for run, part in runs.items():
        name = f".{run}.json" if run else ".json"
        for stem, pattern in _rank_patterns(part).items():
            write_text(stage / f"{stem}{name}", json.dumps(pattern, indent=2) + "\n")
        choice = (summary["runs"][run] if run else summary)["checkpoint_choice"]
        if choice is not None and choice["best"] is not None:
            text = json.dumps(choice, indent=2, allow_nan=False, ensure_ascii=False)
            write_text(stage / f"checkpoint_choice{name}", text + "\n")
    for name, text in texts.items():
        write_text(stage / name, text)


def _drawn(tree: xr.DataTree) -> dict[str, str]:
    """Return the page and its figures by file name; what fails becomes a finding of the tree."""
    # Here, not above: an analysis without figures must not wait for matplotlib.
    from dynamics import plot
    from dynamics.report.page import page

    failures: list[Finding] = []
    drawings: dict[str, str] = {}
    draws = attempt("figures/", lambda: plot.drawings(tree), failures)
    for name, draw in (draws or {}).items():
        drawing = attempt(f"figures/{name}.svg", lambda draw=draw: plot.to_svg(draw()), failures)
        if drawing is not None:
            drawings[name] = drawing
    add_findings(tree, failures)  # the page tells them
    unwritten: list[Finding] = []
    text = attempt("report.html", lambda: page(tree, figures=drawings), unwritten)
    add_findings(tree, unwritten)
    texts = {f"figures/{name}.svg": visible(drawing) for name, drawing in drawings.items()}
    return texts if text is None else texts | {"report.html": text}


_Part = TypeVar("_Part")


def attempt(part: str, make: Callable[[], _Part], findings: list[Finding]) -> _Part | None:
    """Make one part of a result; if that fails, the others are kept.

    Args:
        part: The part, as the subject of a sentence.
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
                f"{part} could not be made ({type(error).__name__}{': ' if reason else ''}{reason}). "
                "The rest of the result is written.",
                "Correct the input that the message names. If it names none, please report this as a bug.",
            )
        )
        return None


def measure(
    trajectory: Trajectory,
    configuration: Mapping[str, object] | None = None,
    progress: Progress = lambda run, done, total: None,
    records: TrainingRecords | None = None,
    load: Loader | None = None,
    options: Options | None = None,
) -> xr.DataTree:
    """Return the result of one trajectory, merged with the records of its training; nothing is written."""
    options = options or Options()
    total = sum(len(checkpoint.shapes) for checkpoint in trajectory.checkpoints)
    advance = _counter(progress, trajectory.name, total)
    device = resolve_device(options.device)
    nothing: tuple[None, list[Finding], Mapping[tuple[int, str], np.ndarray]] = (None, [], {})
    spectra, findings, grams = nothing
    if total:
        spectra, findings, grams = trajectory_spectra(trajectory, top=options.top, device=device, progress=advance)
    inputs = [{**file, "step": checkpoint.step} for checkpoint in trajectory.checkpoints for file in checkpoint.inputs]
    if trajectory.base is not None:
        inputs += [{**file, "step": trajectory.base.step, "role": "base"} for file in trajectory.base.inputs]
    probed, probe_findings = _probed(trajectory, load, options, progress)
    groups, failures = _groups_of_checkpoints(trajectory, spectra, grams, options, progress)
    if (directions := probed.pop("sensitivity", None)) is not None:
        groups["sensitivity"] = directions
    findings = [*trajectory.findings, *findings, *probe_findings, *failures]
    parts = Parts(trajectory.name, spectra, records, log_groups(trajectory) | groups, findings, inputs, **probed)
    return result_tree(parts, configuration or {})


def _counter(progress: Progress, name: str, total: int) -> Callable[[int], None]:
    """Return a function that adds up what is done and passes it on."""
    done = 0

    def advance(matrices: int) -> None:
        nonlocal done
        done += matrices
        progress(name, done, total)

    return advance


def _groups_of_checkpoints(
    trajectory: Trajectory,
    update: xr.Dataset | None,
    grams: Mapping[tuple[int, str], np.ndarray],
    options: Options,
    progress: Progress,
) -> tuple[dict[str, xr.Dataset], list[Finding]]:
    """Return the groups ``path``, ``base`` and ``weights`` as far as there are any, and a finding for each failure."""
    if update is None:
        return {}, []
    advance = _counter(progress, f"{trajectory.name}: base", update.sizes["matrix"])
    shown = advance if options.intruders else lambda matrices: None
    makers: dict[str, Callable[[], xr.Dataset | None]] = {
        "path": lambda: training_path(trajectory, grams),
        "base": lambda: compare_with_base(trajectory, update, directions=options.intruders, progress=shown),
    }
    if options.weights:
        makers["weights"] = lambda: weights(trajectory, top=options.top)
    failures: list[Finding] = []
    groups = {name: attempt(f"/{name}", make, failures) for name, make in makers.items()}
    return {name: dataset for name, dataset in groups.items() if dataset is not None}, failures


def _probed(
    trajectory: Trajectory, load: Loader | None, options: Options, progress: Progress
) -> tuple[dict[str, xr.Dataset | None], list[Finding]]:
    """Return groups of the checkpoints, joined over steps, and findings.

    Groups are ``fisher``, ``score``, ``intervention``, ``sharpness``, and ``sensitivity`` of the last one.
    """
    if load is None:
        return {}, []
    if not trajectory.checkpoints:
        return {}, [Finding("OD411", "There are no checkpoints to probe.", "Keep checkpoints, or probe in training.")]
    matrices = options.matrices
    probes = probe_checkpoints(
        trajectory.checkpoints,
        load,
        None if matrices is None else lambda name: re.search(matrices, name) is not None,
        lambda done, total: progress(f"{trajectory.name}: Fisher", done, total),
        interventions=options.interventions,
        export=None if options.export is None else Path(options.export),
        runs=lambda done, total: progress(f"{trajectory.name}: interventions", done, total),
    )
    fisher, findings = joined_fisher(probes.fisher, re.compile(""))
    groups = {
        "fisher": fisher,
        "score": joined_scores(probes.score),
        "intervention": joined_interventions(probes.intervention),
        "sensitivity": probes.sensitivity,
        "sharpness": joined_sharpness(probes.sharpness),
        "loss": joined_losses([part.assign_coords(recorded=("step", [False])) for part in probes.loss]),
    }
    return groups, [*probes.findings, *findings]


def add_relations(
    tree: xr.DataTree,
    trees: Mapping[str, xr.DataTree],
    folders: Mapping[str, Path],
    options: Options,
    labels: Mapping[str, str],
) -> None:
    """Add ``/association``, ``/comparison`` and ``/score_comparison`` to the root, and each run's scores to ``/score``.

    A failure becomes a finding (OD515) and costs nothing of what was measured of the runs.
    """
    runs = trees if "runs" in tree.children else {Path(os.path.abspath(folders[""])).name: tree}
    paths = dict(zip(runs, folders.values(), strict=True))
    files = [read_scores(path, run=name) for name, folder in paths.items() for path in score_files(folder)]
    files += [read_scores(path) for path in options.scores]
    rows = [row for file in files for row in file.rows]
    directions = dict.fromkeys(options.higher, "higher") | dict.fromkeys(options.lower, "lower")
    findings = [finding for file in files for finding in file.findings]
    try:
        related = relate_runs(
            runs,
            rows,
            headline=options.headline,
            given=cast(Given | None, options.given),
            directions=directions,
            labels=labels,
            retained=options.retained,
        )
        for name, group in related.groups.items():
            tree[name] = xr.DataTree(encodable_dataset(group.assign_attrs(encodable(group.attrs))))
        for name, scores in related.scores.items():
            run = tree["runs"][name] if "runs" in tree.children else tree
            run["score"] = xr.DataTree(encodable_dataset(scores))
    except Exception as error:  # whatever it is, what has been measured is worth more
        problem = f"Scores and groups could not be related: {type(error).__name__}: {first_line(error)}."
        findings.append(Finding("OD515", problem, "Please report it, with the score files."))
    else:
        if related.groups or rows or options.scores or options.retained:
            findings += related.findings
    add_findings(tree, findings)
