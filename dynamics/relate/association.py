"""Measures × scores → association with uncertainty. The run is what was repeated, not the checkpoint."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Any, Literal

import numpy as np
import xarray as xr

from dynamics.relate import statements
from dynamics.relate.correlation import common_grid
from dynamics.relate.pairwise import (
    LEAST_STEPS,
    LEAST_UNITS,
    METHODS,
    Coefficient,
    Question,
    Specification,
    associate_pairs,
    coefficients,
)
from dynamics.relate.permutations import DRAWS, EXACT_UNITS, LEVEL, false_discovery_rates
from dynamics.relate.score_tables import ALL, as_scores, better, run_step_grid
from dynamics.schema import ASSOCIATION, label_arrays

Given = Literal["loss", "trend"]
#: The measure that is named before looking. The logarithm of the participation ratio is a lower bound of the
#: spectral entropy, of the Fisher it has a nearly unbiased estimate, and its differences are ratios.
HEADLINE = "ln_participation_ratio"


def associate(
    measures: xr.DataArray | xr.Dataset,
    scores: xr.DataArray | xr.Dataset,
    *,
    headline: str = HEADLINE,
    question: Question | None = None,
    coefficient: Coefficient = "spearman",
    given: Given | None = None,
    loss: xr.DataArray | None = None,
    clusters: Mapping[str, str] | None = None,
    directions: Mapping[str, str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """Relate measures to scores, over independent runs.

    Three questions, of which one is answered:

    * ``"over_steps"``: within runs on shared steps, does the score move when the measure does? Both are demeaned by run
      and by step, so that trends that all runs share do not count; whole runs are permuted. Trends of single runs do
      count: whatever makes a run learn faster moves nearly every measure and every score (a common cause). ``given``
      holds it equal.
    * ``"between_runs"``: do runs with a higher measure have higher scores at the same step?
    * ``"one_run"``: the same as the first for a single run, its trend removed. Descriptive, without a p-value.

    An association is shown only if a permutation test and an interval agree; the p-value is the larger of the two. All
    permutations are listed up to eight runs; else there are ``draws`` random ones, p = (b + 1)/(B + 1). Runs and steps
    that a pair lacks are left out of it. Scores are turned so that higher is better; task ``"all"`` is the mean of the
    standardised tasks.

    Args:
        measures: ``(run, step, measure)``, or a dataset of variables ``(run, step)``.
        scores: ``(run, step, task)``, or :class:`~dynamics.relate.score_tables.ScoreTable`'s dataset.
        headline: The one measure named before looking: with task ``"all"`` (or the only task) its p-value stands as it
            is, everything else is adjusted over measures × tasks.
        question: By default ``"one_run"`` for one run, ``"over_steps"`` where at least half of the runs (and two) share
            three steps, else ``"between_runs"``.
        coefficient: ``"spearman"`` or ``"pearson"`` between runs; over steps it is always Pearson's.
        given: What is held equal over steps: ``"loss"``, a cubic of the training loss; or ``"trend"``, each run's own
            straight line over the steps (run × step slope).
        loss: Training loss ``(run, step)`` at these steps. Without ``given``, the correlation with it held equal is
            stated beside.
        clusters: Run → what it shares with others (model, data set): then clusters are the independent units, and a
            cluster's runs are averaged.
        directions: Task → ``"higher"`` or ``"lower"``, where names do not tell which is better.
        draws: Number of random permutations.
        seed: Of the random permutations.

    Returns:
        Variables over ``(measure, task)``: ``coefficient``, ``low``, ``high`` (the interval that belongs to the
        decision: it excludes 0 exactly where the association is shown), ``p_value``, ``p_familywise`` (max-T),
        ``q_value`` (Benjamini–Hochberg), ``smallest_p``, ``smallest_p_adjusted``, ``decidable``, ``holds``,
        ``coefficient_given_loss``, ``n_runs``, ``n_units``, ``n_steps``, ``method``, ``reason`` and ``statement``.
        Attributes: ``question``, ``headline``, ``given``, ``statements``, ``repeats``.

    Raises:
        ValueError: If dimensions or coordinates are missing, the headline is not a measure, no run is in both, a run
            has no cluster, the loss is missing where it is given, or a word is none of those above.

    >>> rng = np.random.default_rng(0)
    >>> coords = {"run": list("abcdef"), "step": [10, 20, 30, 40]}
    >>> gini = xr.DataArray(rng.standard_normal((6, 4)), coords, ("run", "step"))
    >>> result = associate(xr.Dataset({"gini": gini}), (2 * gini).expand_dims(task=["qa/accuracy"]), headline="gini")
    >>> result["coefficient"].round(3).values.tolist(), result.attrs["question"]
    ([[1.0]], 'over_steps')
    """
    of_runs, turned = as_measures(measures, headline), better(as_scores(scores, directions))
    x, y = xr.align(of_runs, turned, join="inner", exclude={"measure", "task"})
    runs = x["run"].values.tolist()
    if not runs:
        raise ValueError(
            f"Expected runs that have both measures and scores, got measures of {of_runs['run'].values.tolist()} and "
            f"scores of {turned['run'].values.tolist()}."
        )
    cluster = cluster_codes(runs, clusters)
    question = question or _question(x.values, y.values)
    if question not in LEAST_STEPS or coefficient not in LEAST_UNITS:
        words = f"{tuple(LEAST_STEPS)} and {tuple(LEAST_UNITS)}"
        raise ValueError(f"Expected question and coefficient among {words}, got {question!r} and {coefficient!r}.")
    if question == "one_run" and len(runs) > 1:
        raise ValueError(f"question 'one_run': expected one run, got {len(runs)}. Select one, or ask 'over_steps'.")
    losses = _loss_at(loss, x)
    _check_given(given, question, losses)
    specification = Specification(
        question,
        coefficient if question == "between_runs" else "pearson",
        losses if given == "loss" else None,
        slopes=given == "trend",
    )
    shape = x.sizes["measure"], y.sizes["task"]
    leading = _leading(x["measure"].values, y["task"].values, headline)
    columns = asdict(associate_pairs(x.values, y.values, cluster, specification, leading, draws=draws, seed=seed))
    deciding = np.where(leading, columns["p_value"], columns["p_familywise"])
    columns["decidable"] = np.asarray(columns["smallest_p_adjusted"] <= LEVEL)
    columns["holds"] = np.asarray(deciding <= LEVEL) & columns["decidable"]
    columns["q_value"] = false_discovery_rates(columns["p_value"])
    method = METHODS[question, specification.coefficient]
    columns["method"] = np.full(shape, method)
    columns["coefficient_given_loss"] = (
        np.full(shape, np.nan)
        if losses is None or question != "over_steps"
        else coefficients(x.values, y.values, cluster, replace(specification, covariate=losses))
    )
    context = statements.AssociationContext(
        question=question,
        given=given,
        unit="run" if clusters is None else "cluster of runs",
        least=LEAST_UNITS[specification.coefficient],
        pairs=leading.size,
    )
    rows = _rows(columns, x["measure"].values, y["task"].values, y["direction"].values, leading)
    for row in rows:
        row["statement"] = statements.association_statement(row, context)
    columns["statement"] = np.array([row["statement"] for row in rows], dtype=str).reshape(shape)
    dataset = xr.Dataset(
        label_arrays(ASSOCIATION, columns),
        coords={"measure": x["measure"].values, "task": y["task"].values, "direction": ("task", y["direction"].values)},
    )
    dataset.attrs = {
        "question": question,
        "headline": headline,
        "given": given or "",
        "method": method + _GIVEN[given],
        "level": LEVEL,
        "runs": runs,
        "runs_left_out": sorted({*of_runs["run"].values.tolist(), *turned["run"].values.tolist()} - set(runs)),
        "steps": [int(step) for step in x["step"].values],
        "permutations": "all" if columns["n_units"].max(initial=0) <= EXACT_UNITS else f"{draws} random",
        "seed": seed,
        "statements": _leading_statements(rows, headline),
        "repeats": [] if clusters else [", ".join(names) for names in look_like_repeats(runs).values()],
    }
    return dataset


#: What the method says of ``given``.
_GIVEN: Mapping[str | None, str] = {
    None: "",
    "loss": "; a cubic of the training loss removed from both",
    "trend": "; each run's straight line over the steps removed from both",
}


def _loss_at(loss: xr.DataArray | None, x: xr.DataArray) -> np.ndarray | None:
    """Return the loss of these runs and steps; ``None`` where there is none at all.

    Raises:
        ValueError: If it has other dimensions than run and step.
    """
    if loss is None:
        return None
    if set(loss.dims) != {"run", "step"}:
        raise ValueError(f"loss: expected the dimensions ('run', 'step'), got {loss.dims}.")
    values = loss.transpose("run", "step").reindex(run=x["run"], step=x["step"]).values.astype(np.float64)
    return values if np.isfinite(values).any() else None


def _check_given(given: str | None, question: Question, loss: np.ndarray | None) -> None:
    if given not in _GIVEN:
        raise ValueError(f"given: expected 'loss', 'trend' or None, got {given!r}.")
    if given and question != "over_steps":
        raise ValueError(
            f"given={given!r}: expected several runs that share at least {LEAST_STEPS['over_steps']} steps, got the "
            f"question {question!r}. Leave it out, or score more checkpoints of each run."
        )
    if given == "loss" and loss is None:
        raise ValueError(
            "given='loss': expected the training loss of these runs at these steps (loss=, (run, step)), got none. "
            "Log it, or ask for given='trend', which holds each run's own straight line over the steps equal."
        )


def _question(x: np.ndarray, y: np.ndarray) -> Question:
    """Return the question that the data can answer: see ``associate``."""
    present = np.asarray(np.isfinite(x).any(-1) & np.isfinite(y).any(-1))
    runs = len(np.flatnonzero(present.any(-1)))
    if runs == 1:
        return "one_run"
    sharing = len(common_grid(present, LEAST_STEPS["over_steps"]).runs)
    return "over_steps" if sharing >= max(2, runs / 2) else "between_runs"


def _leading(measures: np.ndarray, tasks: np.ndarray, headline: str) -> np.ndarray:
    """Return which pair was named before looking; none if there are several tasks and no mean of them."""
    task = ALL if ALL in tasks else tasks[0] if len(tasks) == 1 else None
    return (measures == headline)[:, None] & np.array([name == task for name in tasks.tolist()], dtype=bool)


def _rows(
    columns: Mapping[str, np.ndarray],
    measures: np.ndarray,
    tasks: np.ndarray,
    directions: np.ndarray,
    leading: np.ndarray,
) -> list[dict[str, Any]]:
    """Return the numbers of each pair as a row for its sentence."""
    flat = [column.ravel().tolist() for column in (*columns.values(), leading)]
    names = (*columns, "leading")
    pairs = product(measures.tolist(), zip(tasks.tolist(), directions.tolist(), strict=True))
    return [
        {"measure": measure, "task": task, "direction": direction, **dict(zip(names, values, strict=True))}
        for (measure, (task, direction)), values in zip(pairs, zip(*flat, strict=True), strict=True)
    ]


def _leading_statements(rows: Sequence[Mapping[str, Any]], headline: str) -> list[str]:
    """Return the headline pair's statement, what is shown beside it, then the headline measure with every other task.

    Tasks that cannot be related for the same reason share a sentence.
    """
    chosen = [row for row in rows if row["measure"] == headline or row["holds"]]
    chosen.sort(key=lambda row: (not row["leading"], not row["holds"]))
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row["measure"] == headline and row["reason"]:
            reasons.setdefault(row["reason"], []).append(row["task"])
    sentences = [row["statement"] for row in chosen if not row["reason"]]
    return sentences + [statements.unrelated(headline, tasks, reason) for reason, tasks in reasons.items()]


def as_measures(measures: xr.DataArray | xr.Dataset, headline: str) -> xr.DataArray:
    """Return measures as ``(run, step, measure)`` in float64; of a dataset every variable of ``(run, step)`` is one.

    ``ln_participation_ratio`` is made from ``participation_ratio`` where only that is there and it is the headline.

    Raises:
        ValueError: If dimensions are missing, or the headline measure is not there.
    """
    if isinstance(measures, xr.Dataset):
        fitting = {name: array for name, array in measures.data_vars.items() if set(array.dims) == {"run", "step"}}
        if not fitting:
            raise ValueError(
                f"measures: expected variables of (run, step), got {sorted(map(str, measures.data_vars))} "
                f"of {dict(measures.sizes)}. Choose a matrix, a kind, or take a mean first."
            )
        measures = xr.Dataset(fitting).to_dataarray("measure")
    values = run_step_grid(measures, "measure", "measures")
    names = values["measure"].values.tolist()
    if headline == HEADLINE and HEADLINE not in names and "participation_ratio" in names:
        ratio = values.sel(measure=["participation_ratio"])
        positive = ratio.where(ratio > 0)
        logarithm = positive.copy(data=np.log(positive.values)).assign_coords(measure=[HEADLINE])
        values = xr.concat([logarithm, values], dim="measure").transpose("run", "step", "measure")
        names = values["measure"].values.tolist()
    if headline not in names:
        raise ValueError(f"headline: expected one of the measures {', '.join(map(repr, names))}, got {headline!r}.")
    return values


def cluster_codes(runs: Sequence[str], clusters: Mapping[str, str] | None) -> np.ndarray:
    """Return the number of each run's cluster; without ``clusters`` every run is one.

    Raises:
        ValueError: If a run has no cluster.

    >>> cluster_codes(["a", "b", "c"], {"a": "qwen", "b": "qwen", "c": "llama"}).tolist()
    [0, 0, 1]
    """
    if clusters is None:
        return np.arange(len(runs))
    lacking = [run for run in runs if run not in clusters]
    if lacking:
        raise ValueError(f"clusters: expected a cluster for every run, got none for {', '.join(map(repr, lacking))}.")
    number = {name: code for code, name in enumerate(dict.fromkeys(clusters[run] for run in runs))}
    return np.array([number[clusters[run]] for run in runs])


#: A number at the end, as repeats are told apart: run_3, run-s3, run.seed42.
_SEED = re.compile(r"[-_.]?(?:s|seed|rep|run|r|v)?[-_.]?\d+$", re.IGNORECASE)


def without_seed(run: str) -> str:
    """Return a run's name without the number at its end that tells repeats apart.

    >>> without_seed("imax_seed42"), without_seed("llama-dmax")
    ('imax', 'llama-dmax')
    """
    return _SEED.sub("", run) or run


def look_like_repeats(runs: Iterable[str]) -> dict[str, list[str]]:
    """Return sets of runs that seem to differ by a seed only, by their common name.

    A single set of all runs is what repeats are for, and is not returned.

    >>> look_like_repeats(["imax_s1", "imax_s2", "dmax_s1", "dmax_s2"])
    {'imax': ['imax_s1', 'imax_s2'], 'dmax': ['dmax_s1', 'dmax_s2']}
    >>> look_like_repeats(["run_1", "run_2"])
    {}
    """
    sets = defaultdict(list)
    for run in runs:
        sets[without_seed(run)].append(run)
    repeated = {stem: names for stem, names in sets.items() if len(names) > 1}
    return repeated if len(sets) > 1 else {}
