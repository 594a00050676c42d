"""From results of runs and rows of scores to ``/association`` and ``/comparison``, with what a reader must know."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from dynamics.findings import Finding
from dynamics.relate.association import Given, associate
from dynamics.relate.comparison import compare
from dynamics.relate.findings import association_notes, comparison_notes
from dynamics.relate.inputs import HEADLINE
from dynamics.relate.score_tables import Row, rows_of, score_table
from dynamics.schema import ALL, GLOBAL

#: Leading directions at which the log gain stands for concentration, as in the report.
GAIN_AT = 16
#: Of the Fisher of all trainable parameters, all samples together: the primary measure, and the two of the literature.
_OF_FISHER = (HEADLINE, "spectral_entropy", "dominant_ratio")
#: Of updates, medians over matrices: how many directions, how dominated, how far below chance, how far moved.
_OF_UPDATES = ("effective_rank_energy", "stable_rank", "entropy_deficit", "frobenius_norm")
#: Kinds of update that have them.
_KINDS = ("increment", "total")
#: Stands for the headline where no run has a Fisher.
UPDATE_HEADLINE = f"increment/{HEADLINE}"
#: Every measure that can be related.
MEASURES = (
    *_OF_FISHER,
    f"ln_gain_{GAIN_AT}",
    *(f"{kind}/{name}" for kind in _KINDS for name in (*_OF_UPDATES, HEADLINE)),
)


@dataclass(frozen=True)
class Related:
    """What was related.

    Args:
        groups: ``association`` and ``comparison``, those that there are.
        findings: Why one is missing, and what must be known of the others.
    """

    groups: Mapping[str, xr.Dataset]
    findings: Sequence[Finding]


def measures_of(tree: xr.DataTree) -> xr.Dataset:
    """What is related of one run, ``(step)`` each: of the Fisher, of concentration, and of updates.

    ``ln_participation_ratio``, ``spectral_entropy``, ``dominant_ratio`` of the Fisher; ``ln_gain_16``; and medians over
    matrices of increments and totals (``increment/effective_rank_energy``, …).
    """
    found: dict[str, xr.DataArray] = {}
    if "fisher" in tree.children and GLOBAL in tree["fisher"].to_dataset()["block"].values:
        fisher = tree["fisher"].to_dataset().sel(block=GLOBAL, task=ALL)
        found |= {name: fisher[name] for name in _OF_FISHER}
    if "concentration" in tree.children and GLOBAL in tree["concentration"].to_dataset()["block"].values:
        shares = tree["concentration"].to_dataset().sel(block=GLOBAL)
        if GAIN_AT in shares["k"].values and "ln_gain" in shares:
            found[f"ln_gain_{GAIN_AT}"] = shares["ln_gain"].sel(k=GAIN_AT)
    summary = tree["summary"].to_dataset().sel(quantile=0.5)
    for kind in _KINDS:
        here = summary.sel(kind=kind)
        found |= {f"{kind}/{name}": here[f"{name}_quantile"] for name in _OF_UPDATES}
        found[f"{kind}/{HEADLINE}"] = _logarithm(here["participation_ratio_quantile"])
    plain = {name: array.reset_coords(drop=True).astype(np.float64) for name, array in found.items()}
    return xr.merge([array.rename(name) for name, array in plain.items()], join="outer").load()


def relate(
    runs: Mapping[str, xr.DataTree],
    rows: Iterable[Row] = (),
    *,
    headline: str | None = None,
    given: Given | None = None,
    directions: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
) -> Related:
    """Relate measures of runs to their scores, and compare groups of runs.

    Args:
        runs: Run → its result.
        rows: Scores from files, beside those in the results.
        headline: The measure named before looking, one of ``MEASURES``; by default ``ln_participation_ratio`` of the
            Fisher. Where no run has it, that of increments, with a finding.
        given: What is held equal, see :func:`dynamics.associate`; where it cannot be, nothing is, with a finding.
        directions: Task → ``"higher"`` or ``"lower"``.
        labels: Run → group; two groups or more are compared.

    Raises:
        ValueError: If a direction is none.
    """
    measures = _aligned({name: measures_of(tree) for name, tree in runs.items()})
    chosen, findings = _headline(measures, headline)
    steps = {name: measures["step"].values[_known(measures, name)].tolist() for name in runs}
    own = {name: tree["score"].to_dataset().load() for name, tree in runs.items() if "score" in tree.children}
    scores = [*rows_of(own), *rows]
    groups: dict[str, xr.Dataset] = {}
    if scores:
        table = score_table(scores, runs=steps, directions=directions)
        findings += table.findings
        if table.scores.sizes["task"] and table.scores.sizes["run"]:
            loss = _aligned({name: training_loss(tree, steps[name]) for name, tree in runs.items()})["loss"]
            association, refused = _associated(measures, table.scores, chosen, given, loss)
            groups["association"] = _with_values(association, measures, table.scores)
            findings += [*refused, *association_notes(association)]
    elif directions:
        findings.append(
            Finding(
                "OD512", f"A direction is given for {', '.join(directions)}, and there are no scores.", "Give them."
            )
        )
    by_label = _by_label(runs, labels or {})
    if len(by_label) > 1:
        comparison = compare(measures, by_label, headline=chosen)
        groups["comparison"] = comparison
        findings += comparison_notes(comparison)
    return Related(groups, findings)


def _associated(
    measures: xr.Dataset, scores: xr.Dataset, headline: str, given: Given | None, loss: xr.DataArray
) -> tuple[xr.Dataset, list[Finding]]:
    """The association with ``given`` held equal, or without it and a finding that says why."""
    if given is not None:
        try:
            return associate(measures, scores, headline=headline, given=given, loss=loss), []
        except ValueError as error:
            remedy = "Log the training loss at each checkpoint, or pass --given trend."
            refused = Finding("OD514", f"Nothing is held equal. {error}", remedy if given == "loss" else "")
            return associate(measures, scores, headline=headline, loss=loss), [refused]
    return associate(measures, scores, headline=headline, loss=loss), []


def training_loss(tree: xr.DataTree, steps: Sequence[int]) -> xr.Dataset:
    """Return ``loss(step)``: at each step the mean of what the training logged since the step before.

    Where a training was resumed, what the later one logged of a step counts. NaN where nothing was logged.
    """
    logged: dict[int, float] = {}
    if "training" in tree.children:
        log = tree["training"].to_dataset()
        if "loss" in log["metric"].values:
            values = log["value"].sel(metric="loss").values
            rows = zip(log["log_segment"].values.tolist(), log["log_step"].values.tolist(), values, strict=True)
            logged = {step: float(value) for _, step, value in sorted(rows) if np.isfinite(value)}
    ends = np.searchsorted(np.asarray(steps), np.array(sorted(logged), dtype=np.int64))
    means = np.full(len(steps), np.nan)
    for place in np.unique(ends[ends < len(steps)]):
        means[place] = np.mean([logged[step] for step, end in zip(sorted(logged), ends, strict=True) if end == place])
    return xr.Dataset({"loss": ("step", means)}, coords={"step": np.asarray(steps, dtype=np.int64)})


def _with_values(association: xr.Dataset, measures: xr.Dataset, scores: xr.Dataset) -> xr.Dataset:
    """What was related beside the associations, so that it can be drawn."""
    values = measures.to_dataarray("measure").sel(measure=association["measure"].values)
    values = values.transpose("run", "step", "measure").rename("measure_value")
    values.attrs = {"units": "of the measure", "long_name": "measure of each run", "definition": "as it was related"}
    given = scores["score"].rename(task="scored_task").reset_coords(drop=True)
    runs = [run for run in values["run"].values if run in given["run"].values]
    parts = xr.merge([values.sel(run=runs), given.sel(run=runs)], join="outer")
    return association.merge(parts, combine_attrs="override")


def _logarithm(ratio: xr.DataArray) -> xr.DataArray:
    return np.log(ratio.where(ratio > 0))  # type: ignore[return-value]


def _aligned(measures: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Over the union of steps, NaN where a run has nothing."""
    runs = xr.DataArray(list(measures), dims="run", name="run")
    return xr.concat(list(measures.values()), dim=runs, join="outer", data_vars="all").sortby("step")


def _headline(measures: xr.Dataset, asked: str | None) -> tuple[str, list[Finding]]:
    names = [str(name) for name, array in measures.data_vars.items() if array.notnull().any()]
    wanted = asked or HEADLINE
    if wanted in names:
        return wanted, []
    return UPDATE_HEADLINE, [
        Finding(
            "OD513",
            f"No run has {wanted}, so the headline measure is {UPDATE_HEADLINE}: the log participation ratio of "
            "increments, median over matrices.",
            "Probe samples in training (DynamicsCallback(out, tasks)) or afterwards (--probe), or name another measure "
            "before looking (--headline).",
        )
    ]


def _known(measures: xr.Dataset, run: str) -> np.ndarray:
    """Steps at which the run has any measure."""
    return measures.sel(run=run).to_dataarray("measure").notnull().any("measure").values


def _by_label(runs: Mapping[str, xr.DataTree], labels: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for run in runs:
        if run in labels:
            groups.setdefault(labels[run], []).append(run)
    return groups
