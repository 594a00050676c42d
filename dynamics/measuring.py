"""One run: its checkpoints measured, probed, and merged with what its training recorded."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import xarray as xr

from dynamics.checkpoints import Trajectory
from dynamics.checkpoints.logs import log_groups
from dynamics.findings import Finding
from dynamics.options import DEFAULTS, Options, Progress
from dynamics.recording.checkpoint_probe import Loader, probe_checkpoints
from dynamics.spectra.beside_base import beside_base
from dynamics.spectra.over_trajectory import raw_spectra
from dynamics.spectra.path_over_trajectory import path_of
from dynamics.spectra.weights import weights_of
from dynamics.store.probed import joined_fisher, joined_scores
from dynamics.store.records import Captured
from dynamics.store.tree import Parts, result_tree

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
