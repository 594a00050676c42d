"""The whole path on one screen: open → measure → draw → write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import torch
import xarray as xr
import yaml

from dynamics import schema
from dynamics.checkpoints import NotARun, Trajectory, open_trajectory
from dynamics.checkpoints.logs import log_groups
from dynamics.findings import Finding
from dynamics.report import summarise
from dynamics.spectra.null_models import SEED
from dynamics.spectra.over_trajectory import analyse_spectra
from dynamics.spectra.rank_suggestion import rank_pattern
from dynamics.store import FOLDER, RESULT, provenance, staged, write_text, write_tree

#: Called with a run's name, the matrices done (all steps counted) and the matrices in all.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Options:
    """How to analyse, as it is written into ``run.yaml`` and into the result.

    Args:
        matrices: Regular expression; only matrices whose name it finds are watched. ``None`` for all.
        device: ``"auto"``, ``"cpu"`` or ``"cuda[:i]"``: where the QR decompositions run.
        report: Whether figures and ``report.html`` are made.
    """

    matrices: str | None = None
    device: str = "auto"
    report: bool = True


DEFAULTS = Options()


def analyze_run(
    run: str | PathLike[str] | Mapping[str, str | PathLike[str]],
    *,
    out: str | PathLike[str] | None = None,
    options: Options = DEFAULTS,
    labels: Mapping[str, str] | None = None,
    progress: Progress = lambda run, done, total: None,
) -> xr.DataTree:
    """Analyses a run, or several, and writes the result atomically.

    Args:
        run: Run folder, or name → run folder for several.
        out: Output folder; by default ``RUN/dynamics``, for several runs ``./dynamics``.
        options: See :class:`Options`.
        labels: Name → group of runs it belongs to, kept as the attribute ``label``.
        progress: See ``Progress``.

    Returns:
        The result as written to ``analysis.zarr``; several runs stand under ``/runs/<name>``.

    Raises:
        NotARun: If there is nothing in any run that can be analysed.
        ValueError: If the regular expression or the device is not one.
        OSError: If the output cannot be written; an earlier result is then as it was.
    """
    runs = {name: Path(folder) for name, folder in run.items()} if isinstance(run, Mapping) else {"": Path(run)}
    folder = default_output(list(runs.values())) if out is None else Path(out)
    device = resolve_device(options.device)
    configuration = {"runs": [str(each) for each in runs.values()], "out": str(folder), **asdict(options)}

    trajectories, refused = _open_all(runs, options)
    write_text(folder / "run.yaml", yaml.safe_dump(configuration, sort_keys=False, allow_unicode=True))
    trees = {
        name: _labelled(measure(trajectory, device, configuration, progress), name, labels)
        for name, trajectory in trajectories.items()
    }
    tree = _joined(trees, refused) if isinstance(run, Mapping) else next(iter(trees.values()))
    schema.check(tree)
    _write(tree, folder, options)
    return tree


def measure(
    trajectory: Trajectory,
    device: str = "cpu",
    configuration: Mapping[str, object] | None = None,
    progress: Progress = lambda run, done, total: None,
) -> xr.DataTree:
    """The result of one trajectory, not written anywhere."""
    total = sum(len(checkpoint.shapes) for checkpoint in trajectory.checkpoints)
    done = 0

    def advance(matrices: int) -> None:
        nonlocal done
        done += matrices
        progress(trajectory.name, done, total)

    groups, found = analyse_spectra(trajectory, device=device, progress=advance)
    tree = xr.DataTree.from_dict({f"/{name}": group for name, group in (groups | log_groups(trajectory)).items()})
    inputs = [{**file, "step": checkpoint.step} for checkpoint in trajectory.checkpoints for file in checkpoint.inputs]
    tree.attrs = provenance(trajectory.name, configuration or {}, inputs, SEED)
    tree.attrs["findings"] = _as_json([*trajectory.findings, *found])
    return tree


def default_output(runs: Sequence[Path]) -> Path:
    """``RUN/dynamics``, for several runs ``./dynamics``."""
    return runs[0] / FOLDER if len(runs) == 1 else Path(FOLDER)


def resolve_device(device: str) -> str:
    """``auto`` to a device; a name that is not one, or is not there, is refused.

    >>> resolve_device("cpu")
    'cpu'
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"Expected the device to be auto, cpu, cuda or cuda:i, got {device!r}.")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"The device {device!r} is asked for, but torch sees no CUDA device. Use --device cpu.")
    return device


def _open_all(runs: Mapping[str, Path], options: Options) -> tuple[dict[str, Trajectory], list[Finding]]:
    """Every run that can be opened; the last refusal is raised if none can."""
    trajectories: dict[str, Trajectory] = {}
    refused: list[Finding] = []
    for name, folder in runs.items():
        try:
            trajectories[name] = open_trajectory(folder, options.matrices)
        except NotARun as error:
            if len(runs) == 1:
                raise
            refused += [Finding("OD100", str(error), file=str(folder)), *error.findings]
    if not trajectories:
        raise NotARun(
            "None of the runs could be analysed: " + " ".join(f.message for f in refused if f.code == "OD100")
        )
    return trajectories, refused


def _labelled(tree: xr.DataTree, name: str, labels: Mapping[str, str] | None) -> xr.DataTree:
    if labels and name in labels:
        tree.attrs["label"] = labels[name]
    return tree


def _joined(trees: Mapping[str, xr.DataTree], refused: Sequence[Finding]) -> xr.DataTree:
    tree = xr.DataTree.from_dict({f"/runs/{name}": each for name, each in trees.items()})
    tree.attrs["findings"] = _as_json(refused)
    return tree


def _as_json(findings: Sequence[Finding]) -> str:
    return json.dumps([finding.to_dict() for finding in findings], allow_nan=False)


def _write(tree: xr.DataTree, folder: Path, options: Options) -> None:
    with staged(folder) as partial:
        write_tree(tree, partial / RESULT)
        write_text(
            partial / "summary.json", json.dumps(summarise(tree), indent=2, allow_nan=False, ensure_ascii=False) + "\n"
        )
        runs = tree["runs"].children if "runs" in tree.children else {"": tree}
        for name, run in runs.items():
            pattern = json.dumps(rank_pattern(run["update"].to_dataset()), indent=2)
            write_text(partial / f"rank_pattern{'.' if name else ''}{name}.json", pattern + "\n")
        if options.report:
            _write_report(tree, partial)


def _write_report(tree: xr.DataTree, folder: Path) -> None:
    # Here, not above: an analysis without figures must not wait for matplotlib.
    from dynamics import plot
    from dynamics.report.page import page

    drawings = {name: plot.to_svg(figure) for name, figure in plot.figures(tree).items()}
    for name, drawing in drawings.items():
        write_text(folder / "figures" / f"{name}.svg", drawing)
    write_text(folder / "report.html", page(tree, figures=drawings))
