"""Measures × scores → association with uncertainty. The run is what was repeated, not the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from typing import Literal

import numpy as np
import xarray as xr

from dynamics.relate import statements
from dynamics.relate.correlation import common_grid
from dynamics.relate.inputs import HEADLINE, as_measures, as_scores, cluster_codes, look_like_repeats
from dynamics.relate.mixed_models import NOT_FITTED, mixed_model
from dynamics.relate.pairwise import (
    LEAST_STEPS,
    LEAST_UNITS,
    METHODS,
    Asked,
    Coefficient,
    Question,
    associations,
    coefficients,
)
from dynamics.relate.permutations import DRAWS, EXACT_UNITS, LEVEL, false_discovery_rates
from dynamics.relate.score_tables import ALL, better
from dynamics.relate.variables import ASSOCIATION
from dynamics.schema import labelled

Given = Literal["loss", "trend"]
#: Tasks whose mixed model is fitted, which takes a tenth of a second each.
_MIXED = 16


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
        draws, seed: Of random permutations.

    Returns:
        Variables over ``(measure, task)``: ``coefficient``, ``low``, ``high`` (the interval that belongs to the
        decision: it excludes 0 exactly where the association is shown), ``p_value``, ``p_familywise`` (max-T),
        ``q_value`` (Benjamini–Hochberg), ``smallest_p``, ``smallest_p_adjusted``, ``decidable``, ``holds``,
        ``coefficient_given_loss``, ``n_runs``, ``n_units``, ``n_steps``, ``mixed_slope`` and its interval (headline
        measure, eight runs or more), ``method``, ``reason`` and ``statement``. Attributes: ``question``, ``headline``,
        ``given``, ``statements``, ``repeats``.

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
    equal = _loss_at(loss, x)
    _check_given(given, question, equal)
    asked = Asked(
        question,
        coefficient if question == "between_runs" else "pearson",
        equal if given == "loss" else None,
        slopes=given == "trend",
    )
    names = list(product(x["measure"].values.tolist(), y["task"].values.tolist()))
    shape = x.sizes["measure"], y.sizes["task"]
    leading = _headline_pair(names, headline).reshape(shape)
    columns = asdict(associations(x.values, y.values, cluster, asked, leading, draws=draws, seed=seed))
    deciding = np.where(leading, columns["p_value"], columns["p_familywise"])
    columns["decidable"] = np.asarray(columns["smallest_p_adjusted"] <= LEVEL)
    columns["holds"] = np.asarray(deciding <= LEVEL) & columns["decidable"]
    columns["q_value"] = false_discovery_rates(columns["p_value"])
    columns["method"] = np.full(shape, METHODS[question, asked.coefficient])
    columns["coefficient_given_loss"] = (
        np.full(shape, np.nan)
        if equal is None or question != "over_steps"
        else coefficients(x.values, y.values, cluster, replace(asked, covariate=equal))
    )
    columns |= _mixed(x.values, y.values, [(clusters is None) & (measure == headline) for measure, _ in names], shape)
    sign = dict(zip(y["task"].values.tolist(), y["direction"].values.tolist(), strict=True))
    words = statements.Asked(
        question=question,
        given=given,
        unit="runs" if clusters is None else "clusters of runs",
        least=LEAST_UNITS[asked.coefficient],
        pairs=len(names),
    )
    flat = {name: column.ravel() for name, column in columns.items()}
    columns["statement"] = np.array(
        [
            statements.association_statement(
                *names[place],
                sign[names[place][1]],
                words,
                {name: column[place].item() for name, column in flat.items()},
                alone=bool(leading.flat[place]),
            )
            for place in range(len(names))
        ],
        dtype=str,
    ).reshape(shape)
    dataset = xr.Dataset(
        labelled(ASSOCIATION, columns),
        coords={"measure": x["measure"].values, "task": y["task"].values, "direction": ("task", y["direction"].values)},
    )
    dataset.attrs = {
        "question": question,
        "headline": headline,
        "given": given or "",
        "method": METHODS[question, asked.coefficient] + _GIVEN[given],
        "level": LEVEL,
        "runs": runs,
        "runs_left_out": _left_out(of_runs, turned, runs),
        "steps": [int(step) for step in x["step"].values],
        "permutations": "all" if columns["n_units"].max(initial=0) <= EXACT_UNITS else f"{draws} random",
        "seed": seed,
        "statements": _leading_statements(columns, names, headline, leading),
        "repeats": [] if clusters else [", ".join(alike) for alike in look_like_repeats(runs).values()],
    }
    return dataset


#: What the method says of ``given``.
_GIVEN = {
    None: "",
    "loss": "; a cubic of the training loss removed from both",
    "trend": "; each run's straight line over the steps removed from both",
}


def _loss_at(loss: xr.DataArray | None, x: xr.DataArray) -> np.ndarray | None:
    """The loss of these runs and steps; ``None`` where there is none at all.

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
    """What the data can answer: see ``associate``."""
    present = np.asarray(np.isfinite(x).any(-1) & np.isfinite(y).any(-1))
    runs = len(np.flatnonzero(present.any(-1)))
    if runs == 1:
        return "one_run"
    sharing = len(common_grid(present, LEAST_STEPS["over_steps"]).runs)
    return "over_steps" if sharing >= max(2, runs / 2) else "between_runs"


def _headline_pair(names: Sequence[tuple[str, str]], headline: str) -> np.ndarray:
    """Which pair is the one that was named before looking: none if there are several tasks and no mean of them."""
    tasks = {task for _, task in names}
    chosen = ALL if ALL in tasks else next(iter(tasks)) if len(tasks) == 1 else None
    return np.array([name == (headline, chosen) for name in names])


def _leading_statements(
    columns: Mapping[str, np.ndarray], names: Sequence[tuple[str, str]], headline: str, leading: np.ndarray
) -> list[str]:
    """The headline pair's statement, what is shown beside it, then the headline measure with every other task.

    Tasks of which nothing can be said for the same reason share a sentence.
    """
    flat = {name: columns[name].ravel() for name in ("statement", "reason", "holds")}
    of_headline = [place for place, (measure, _) in enumerate(names) if measure == headline]
    order = sorted(
        {*of_headline, *np.flatnonzero(flat["holds"]).tolist()},
        key=lambda place: (not leading.flat[place], not flat["holds"][place], place),
    )
    reasons: dict[str, list[str]] = {}
    for place in of_headline:
        if flat["reason"][place]:
            reasons.setdefault(flat["reason"][place], []).append(names[place][1])
    said = [str(flat["statement"][place]) for place in order if not flat["reason"][place]]
    return said + [statements.nothing_said(headline, tasks, reason) for reason, tasks in reasons.items()]


def _mixed(x: np.ndarray, y: np.ndarray, fitted: Sequence[bool], shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """Mixed models of the headline measure with the first tasks; x and y ``[run, step, measure | task]``."""
    models = []
    for place, wanted in enumerate(fitted):
        measure, task = divmod(place, shape[1])
        both = np.isfinite(x[..., measure]) & np.isfinite(y[..., task])
        grid = common_grid(both, 2) if wanted and task < _MIXED else None
        chosen = grid and np.ix_(grid.runs, grid.steps)
        models.append(mixed_model(x[..., measure][chosen], y[..., task][chosen]) if chosen else NOT_FITTED)
    rows = [asdict(model) for model in models]
    return {
        f"mixed_{name}": np.array([row[name] for row in rows]).reshape(shape)
        for name in ("slope", "low", "high", "converged")
    }


def _left_out(of_runs: xr.DataArray, turned: xr.DataArray, runs: Sequence[str]) -> list[str]:
    both = {*of_runs["run"].values.tolist(), *turned["run"].values.tolist()}
    return sorted(both - set(runs))
