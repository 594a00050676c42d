"""Results of runs and rows of scores → ``/association``, ``/comparison``, ``/score_comparison``, and findings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from dynamics.findings import Finding
from dynamics.relate.association import HEADLINE, Given, associate
from dynamics.relate.comparison import compare
from dynamics.relate.directions import is_of_task
from dynamics.relate.findings import findings_of
from dynamics.relate.score_comparison import compare_scores
from dynamics.relate.score_files import ScoreRow
from dynamics.relate.score_tables import rows_of, score_table, with_file_scores
from dynamics.schema import ALL, GLOBAL
from dynamics.text import some

#: Leading directions at which the log gain stands for concentration, as in the report.
GAIN_AT = 16
#: Of the Fisher of all trainable parameters, all samples together: the primary measure, and the two of the literature.
_OF_FISHER = (HEADLINE, "spectral_entropy", "dominant_ratio")
#: Of updates, medians over matrices: how many directions, how dominated, how far below chance, how far moved.
_OF_UPDATES = ("effective_rank_energy", "stable_rank", "entropy_deficit", "frobenius_norm")
#: Kinds of update that have them.
_KINDS = ("increment", "total")
#: Of the effect of an update, all samples together, at the headline's k: what its part in the leading directions does.
_OF_INTERVENTIONS = ("share", "relative_excess")
#: Stands for the headline where no run has a Fisher.
UPDATE_HEADLINE = f"increment/{HEADLINE}"
#: Every measure that can be related.
MEASURES = (
    *_OF_FISHER,
    f"ln_gain_{GAIN_AT}",
    *(f"intervention/{name}" for name in _OF_INTERVENTIONS),
    *(f"{kind}/{name}" for kind in _KINDS for name in (*_OF_UPDATES, HEADLINE)),
)


@dataclass(frozen=True)
class Related:
    """What was related.

    Args:
        groups: ``association``, ``comparison`` and ``score_comparison``, those that there are.
        findings: Why one is missing, and what must be known of the others.
        scores: Run → all its scores, from its result and from files, as the group ``/score``.
    """

    groups: Mapping[str, xr.Dataset]
    findings: Sequence[Finding]
    scores: Mapping[str, xr.Dataset]


def measures_of_run(tree: xr.DataTree) -> xr.Dataset:
    """Return the measures of one run that can be related, ``(step)`` each: of Fisher, concentration, parts and updates.

    ``ln_participation_ratio``, ``spectral_entropy``, ``dominant_ratio`` of the Fisher; ``ln_gain_16``; medians over
    matrices of increments and totals (``increment/effective_rank_energy``, …). Of each update that was taken apart, at
    the headline's k and of all samples: ``intervention/share``, the share s = φ/D(full) of the effect that its leading
    part has, NaN where the effect is not resolved or the parts have no shares, and ``intervention/relative_excess``,
    T/D(full), NaN where it is not resolved.
    """
    measures: dict[str, xr.DataArray] = {}
    if "fisher" in tree.children and GLOBAL in tree["fisher"].to_dataset()["block"].values:
        fisher = tree["fisher"].to_dataset().sel(block=GLOBAL, task=ALL)
        measures |= {name: fisher[name] for name in _OF_FISHER}
    if "concentration" in tree.children and GLOBAL in tree["concentration"].to_dataset()["block"].values:
        concentration = tree["concentration"].to_dataset().sel(block=GLOBAL)
        if GAIN_AT in concentration["k"].values and "ln_gain" in concentration:
            measures[f"ln_gain_{GAIN_AT}"] = concentration["ln_gain"].sel(k=GAIN_AT)
    if "intervention" in tree.children:
        group = tree["intervention"].to_dataset()
        at_headline = group.sel(task=ALL).where(group["headline"] == 1)
        # Of a step only the headline's k is left, so the largest is its.
        measures |= {
            f"intervention/{name}": at_headline[name].max("k") for name in _OF_INTERVENTIONS if name in at_headline
        }
    medians = tree["summary"].to_dataset().sel(quantile=0.5)
    for kind in _KINDS:
        of_kind = medians.sel(kind=kind)
        measures |= {f"{kind}/{name}": of_kind[f"{name}_quantile"] for name in _OF_UPDATES}
        measures[f"{kind}/{HEADLINE}"] = _logarithm(of_kind["participation_ratio_quantile"])
    plain = [array.reset_coords(drop=True).astype(np.float64).rename(name) for name, array in measures.items()]
    return xr.merge(plain, join="outer").load()


def relate_runs(
    runs: Mapping[str, xr.DataTree],
    rows: Iterable[ScoreRow] = (),
    *,
    headline: str | None = None,
    given: Given | None = None,
    directions: Mapping[str, str] | None = None,
    labels: Mapping[str, str] | None = None,
    retained: Sequence[str] = (),
) -> Related:
    """Relate measures of runs to their scores, and compare groups of runs in scores and measures.

    Args:
        runs: Run → its result.
        rows: Scores from files, beside those in the results.
        headline: The measure named before looking, one of ``MEASURES``; by default ``ln_participation_ratio`` of the
            Fisher. Where no run has it, that of increments, with a finding.
        given: What is held equal, see :func:`dynamics.associate`; where it cannot be, nothing is, with a finding.
        directions: Task → ``"higher"`` or ``"lower"``.
        labels: Run → group; two groups or more are compared.
        retained: Tasks of what the base could do, whose scores are marked.

    Raises:
        ValueError: If a direction is none.
    """
    measures = _aligned({name: measures_of_run(tree) for name, tree in runs.items()})
    chosen, findings = _headline(measures, headline)
    if len(runs) == 1 and headline is None:
        findings = []  # one run is related to nothing, whichever measure comes first
    steps = {name: _measured_steps(measures, name) for name in runs}
    recorded = {name: tree["score"].to_dataset().load() for name, tree in runs.items() if "score" in tree.children}
    scores = [*rows_of(recorded), *rows]
    groups: dict[str, xr.Dataset] = {}
    of_runs: dict[str, xr.Dataset] = {}
    by_label = _by_label(runs, labels or {})
    if scores:
        table = score_table(scores, runs=steps, directions=directions)
        findings += table.findings
        of_runs = {
            str(run): with_file_scores(recorded.get(str(run)), table.scores.sel(run=run), retained)
            for run in table.scores["run"].values
        }
        if table.scores.sizes["task"] and table.scores.sizes["run"]:
            loss = _aligned({name: training_loss(tree, steps[name]) for name, tree in runs.items()})["loss"]
            association, refused = _associated(measures, table.scores, chosen, given, loss)
            groups["association"] = _with_values(association, measures, table.scores)
            findings += [*refused, *findings_of(association)]
            members = [run for of_group in by_label.values() for run in of_group]
            after_start = table.scores["score"].sel(step=table.scores["step"] > 0).reindex(run=members)
            if len(by_label) > 1 and after_start.notnull().any():
                groups["score_comparison"] = compare_scores(table.scores, by_label)
    elif directions:
        findings.append(
            Finding(
                "OD512",
                f"A direction is given for {', '.join(directions)}, but there are no scores.",
                "Pass them with --scores.",
            )
        )
    if len(by_label) > 1:
        comparison = compare(measures, by_label, headline=chosen)
        groups["comparison"] = comparison
        findings += findings_of(comparison)
    if groups:
        findings += _directions(runs)
    names = list(dict.fromkeys(row.task for row in scores))
    if absent := [task for task in retained if not any(is_of_task(name, task) for name in names)]:
        findings.append(
            Finding(
                "OD520",
                f"Expected retained tasks among the scores, got {', '.join(map(repr, absent))}; there are "
                f"{f'scores of {some(map(repr, names), 8)}' if names else 'no scores'}.",
                "Check the task's name, or pass its scores with --scores.",
                evidence={"tasks": absent},
            )
        )
    return Related(groups, findings, of_runs)


def _directions(runs: Mapping[str, xr.DataTree]) -> list[Finding]:
    """Return a finding where parts of updates have different numbers of directions in them."""
    k: dict[str, list[int]] = {}
    for name, tree in runs.items():
        if "intervention" in tree.children:
            headline = tree["intervention"].to_dataset()["headline"]
            k[name] = headline["k"].values[(headline == 1).any("step").values].tolist()
    numbers = sorted({count for counts in k.values() for count in counts})
    if len(numbers) < 2:
        return []
    return [
        Finding(
            "OD516",
            f"Updates were taken apart along different numbers of directions ({', '.join(map(str, numbers))}). More "
            "directions hold more of an update and of its effect, so shares cannot be compared between them.",
            "Intervene with the same k in all runs.",
            evidence={"k": k},
        )
    ]


def _associated(
    measures: xr.Dataset, scores: xr.Dataset, headline: str, given: Given | None, loss: xr.DataArray
) -> tuple[xr.Dataset, list[Finding]]:
    """Return the association with ``given`` held equal, or without it and a finding that says why."""
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
    for number in np.unique(ends[ends < len(steps)]):
        means[number] = np.mean([logged[step] for step, end in zip(sorted(logged), ends, strict=True) if end == number])
    return xr.Dataset({"loss": ("step", means)}, coords={"step": np.asarray(steps, dtype=np.int64)})


def _with_values(association: xr.Dataset, measures: xr.Dataset, scores: xr.Dataset) -> xr.Dataset:
    """Return associations with the measures and scores behind them, so that these can be drawn."""
    values = measures.to_dataarray("measure").sel(measure=association["measure"].values)
    values = values.transpose("run", "step", "measure").rename("measure_value")
    values.attrs = {"units": "of the measure", "long_name": "measure of each run", "definition": "as it was related"}
    original = scores["score"].rename(task="scored_task").reset_coords(drop=True)
    runs = [run for run in values["run"].values if run in original["run"].values]
    parts = xr.merge([values.sel(run=runs), original.sel(run=runs)], join="outer")
    return association.merge(parts, combine_attrs="override")


def _logarithm(ratio: xr.DataArray) -> xr.DataArray:
    return np.log(ratio.where(ratio > 0))  # type: ignore[return-value]


def _aligned(measures: Mapping[str, xr.Dataset]) -> xr.Dataset:
    """Return all runs over the union of their steps, NaN where a run has nothing."""
    runs = xr.DataArray(list(measures), dims="run", name="run")
    return xr.concat(list(measures.values()), dim=runs, join="outer", data_vars="all").sortby("step")


def _headline(measures: xr.Dataset, headline: str | None) -> tuple[str, list[Finding]]:
    """Return the headline measure, and a finding where it is not the one that was asked for."""
    names = [str(name) for name, array in measures.data_vars.items() if array.notnull().any()]
    headline = headline or HEADLINE
    if headline in names:
        return headline, []
    return UPDATE_HEADLINE, [
        Finding(
            "OD513",
            f"No run has {headline}. The headline measure is {UPDATE_HEADLINE} instead: the log participation ratio of "
            "increments, median over matrices.",
            "Probe samples in training (DynamicsCallback(out, tasks)) or afterwards (--probe), or choose another "
            "measure before looking at scores (--headline).",
        )
    ]


def _measured_steps(measures: xr.Dataset, run: str) -> list[int]:
    """Return the steps at which the run has any measure."""
    present = measures.sel(run=run).to_dataarray("measure").notnull().any("measure").values
    return measures["step"].values[present].tolist()


def _by_label(runs: Mapping[str, xr.DataTree], labels: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for run in runs:
        if run in labels:
            groups.setdefault(labels[run], []).append(run)
    return groups
