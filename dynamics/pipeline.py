"""The whole path on one screen: open → measure, merge → draw → write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from os import PathLike
from pathlib import Path

import torch
import xarray as xr
import yaml

from dynamics import schema
from dynamics.checkpoints import NotARun
from dynamics.findings import Finding
from dynamics.measuring import attempt, measure
from dynamics.options import DEFAULTS, Options, Progress
from dynamics.recording.checkpoint_probe import Loader, load_function
from dynamics.relating import add_relations
from dynamics.report import summarise
from dynamics.spectra.null_models import SEED
from dynamics.spectra.rank_suggestion import rank_pattern
from dynamics.store import FOLDER, RESULT, provenance, staged, write_text, write_tree, writing
from dynamics.store.opening import add_findings, incomplete
from dynamics.store.sources import Source, open_source, results_folder
from dynamics.store.tree import as_json
from dynamics.text import encodable, visible


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
