"""Measures × scores → association with uncertainty. The run is what was repeated, not the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product

import numpy as np
import xarray as xr

from dynamics.described import labelled
from dynamics.relate import statements
from dynamics.relate.families import false_discovery_rates, permutation_tests
from dynamics.relate.grids import common_grid
from dynamics.relate.inputs import HEADLINE, as_measures, as_scores, cluster_codes
from dynamics.relate.mixed_models import NOT_FITTED, mixed_model
from dynamics.relate.pairs import LEAST_STEPS, LEAST_UNITS, METHODS, Coefficient, Pair, Question, pair_of
from dynamics.relate.permutations import DRAWS, EXACT_UNITS
from dynamics.relate.power import LEVEL, units_needed
from dynamics.relate.run_names import look_like_repeats
from dynamics.relate.score_table import ALL, better
from dynamics.relate.variables import ASSOCIATION


def associate(
    measures: xr.DataArray | xr.Dataset,
    scores: xr.DataArray | xr.Dataset,
    *,
    headline: str = HEADLINE,
    question: Question | None = None,
    coefficient: Coefficient = "spearman",
    clusters: Mapping[str, str] | None = None,
    directions: Mapping[str, str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """How measures go with scores, over independent runs.

    Three questions, of which one is answered:

    * ``"over_steps"``: within runs on shared steps, does the score move when the measure does? Both are demeaned by run
      and by step, so that trends that all runs share do not count; whole runs are permuted.
    * ``"between_runs"``: do runs with a higher measure have higher scores at the same step?
    * ``"one_run"``: the same as the first for a single run, its trend removed. Descriptive, without a p-value.

    All permutations are listed up to eight runs; else there are ``draws`` random ones, p = (b + 1)/(B + 1). Runs and
    steps that a pair lacks are left out of it. Scores are turned so that higher is better; task ``"all"`` is the mean
    of the standardised tasks.

    Args:
        measures: ``(run, step, measure)``, or a dataset of variables ``(run, step)``.
        scores: ``(run, step, task)``, or :class:`~dynamics.relate.score_table.ScoreTable`'s dataset.
        headline: The one measure named before looking: with task ``"all"`` (or the only task) its p-value stands as it
            is, everything else is adjusted over measures × tasks.
        question: By default ``"one_run"`` for one run, ``"over_steps"`` where at least half of the runs (and two) share
            three steps, else ``"between_runs"``.
        coefficient: ``"spearman"`` or ``"pearson"`` between runs; over steps it is always Pearson's.
        clusters: Run → what it shares with others (model, data set): then clusters are the independent units, and a
            cluster's runs are averaged.
        directions: Task → ``"higher"`` or ``"lower"``, where names do not tell which is better.
        draws, seed: Of random permutations.

    Returns:
        Variables over ``(measure, task)``: ``coefficient``, ``low``, ``high``, ``p_value``, ``p_familywise`` (max-T),
        ``q_value`` (Benjamini–Hochberg), ``smallest_p``, ``decidable``, ``holds``, ``n_runs``, ``n_units``,
        ``n_steps``, ``units_needed``, ``mixed_slope`` and its interval (headline measure, eight runs or more),
        ``method``, ``reason`` and ``statement``. Attributes: ``question``, ``headline``, ``statements``, ``repeats``.

    Raises:
        ValueError: If dimensions or coordinates are missing, the headline is not a measure, no run is in both, a run
            has no cluster, or a word is none of those above.

    >>> rng = np.random.default_rng(0)
    >>> coords = {"run": list("abcdef"), "step": [10, 20, 30, 40]}
    >>> gini = xr.DataArray(rng.standard_normal((6, 4)), coords, ("run", "step"))
    >>> found = associate(xr.Dataset({"gini": gini}), (2 * gini).expand_dims(task=["qa/accuracy"]), headline="gini")
    >>> found["coefficient"].round(3).values.tolist(), found.attrs["question"]
    ([[1.0]], 'over_steps')
    """
    given, turned = as_measures(measures, headline), better(as_scores(scores, directions))
    x, y = xr.align(given, turned, join="inner", exclude={"measure", "task"})
    runs = x["run"].values.tolist()
    if not runs:
        raise ValueError(
            f"Expected runs that have both measures and scores, got measures of {given['run'].values.tolist()} and "
            f"scores of {turned['run'].values.tolist()}."
        )
    cluster = cluster_codes(runs, clusters)
    question = question or _question(x.values, y.values)
    if question not in LEAST_STEPS or coefficient not in LEAST_UNITS:
        words = f"{tuple(LEAST_STEPS)} and {tuple(LEAST_UNITS)}"
        raise ValueError(f"Expected question and coefficient among {words}, got {question!r} and {coefficient!r}.")
    if question == "one_run" and len(runs) > 1:
        raise ValueError(f"question 'one_run': expected one run, got {len(runs)}. Select one, or ask 'over_steps'.")
    coefficient = coefficient if question == "between_runs" else "pearson"
    names = list(product(x["measure"].values.tolist(), y["task"].values.tolist()))
    places = list(product(range(x.sizes["measure"]), range(y.sizes["task"])))
    pairs = [pair_of(x.values[..., m], y.values[..., t], cluster, question, coefficient) for m, t in places]
    columns = _columns(pairs, cluster, question, coefficient, draws, seed)
    leading = _headline_pair(names, headline)
    deciding = np.where(leading, columns["p_value"], columns["p_familywise"])
    columns["holds"] = np.asarray(deciding <= LEVEL) & columns["decidable"]
    columns |= _mixed(x.values, y.values, pairs, [clusters is None and measure == headline for measure, _ in names])
    sign = dict(zip(y["task"].values.tolist(), y["direction"].values.tolist(), strict=True))
    unit = "runs" if clusters is None else "clusters of runs"
    columns["statement"] = np.array(
        [
            statements.association_statement(
                *names[place],
                question=question,
                direction=sign[names[place][1]],
                p=float(deciding[place]),
                correction="" if leading[place] else f" (adjusted for {len(pairs)} associations)",
                smallest_p=float(columns["smallest_p"][place]),
                coefficient=pairs[place].coefficient,
                low=pairs[place].low,
                high=pairs[place].high,
                units=int(columns["n_units"][place]),
                steps=int(columns["n_steps"][place]),
                effective_steps=pairs[place].effective_steps,
                least=LEAST_UNITS[coefficient],
                needed=float(columns["units_needed"][place]),
                reason=pairs[place].reason,
                unit=unit,
            )
            for place in range(len(pairs))
        ],
        dtype=str,
    )
    shape = x.sizes["measure"], y.sizes["task"]
    dataset = xr.Dataset(
        labelled(ASSOCIATION, {name: column.reshape(shape) for name, column in columns.items()}),
        coords={"measure": x["measure"].values, "task": y["task"].values, "direction": ("task", y["direction"].values)},
    )
    dataset.attrs = {
        "question": question,
        "headline": headline,
        "method": METHODS[question, coefficient],
        "level": LEVEL,
        "runs": runs,
        "runs_left_out": _left_out(given, turned, runs),
        "steps": [int(step) for step in x["step"].values],
        "permutations": "all" if columns["n_units"].max(initial=0) <= EXACT_UNITS else f"{draws} random",
        "seed": seed,
        "statements": _leading_statements(columns, names, headline),
        "repeats": [] if clusters else [", ".join(found) for found in look_like_repeats(runs).values()],
    }
    return dataset


def _question(x: np.ndarray, y: np.ndarray) -> Question:
    """What the data can answer: see ``associate``."""
    present = np.asarray(np.isfinite(x).any(-1) & np.isfinite(y).any(-1))
    runs = len(np.flatnonzero(present.any(-1)))
    if runs == 1:
        return "one_run"
    sharing = len(common_grid(present, LEAST_STEPS["over_steps"]).runs)
    return "over_steps" if sharing >= max(2, runs / 2) else "between_runs"


def _columns(
    pairs: Sequence[Pair], cluster: np.ndarray, question: Question, coefficient: Coefficient, draws: int, seed: int
) -> dict[str, np.ndarray]:
    """Everything that is a number of each pair, ``[pair]``."""
    test = permutation_tests(pairs, draws=draws, seed=seed)
    units = np.array([len(np.unique(cluster[list(pair.grid.runs)])) for pair in pairs], dtype=np.int64)
    estimates = {name: np.array([getattr(pair, name) for pair in pairs]) for name in ("coefficient", "low", "high")}
    z = np.arctanh(np.clip(estimates["coefficient"], -0.999999, 0.999999))
    errors = np.array([pair.error for pair in pairs])
    return estimates | {
        "p_value": test.p_value,
        "p_familywise": test.p_familywise,
        "q_value": false_discovery_rates(test.p_value),
        "smallest_p": test.smallest_p,
        "decidable": np.asarray(test.smallest_p <= LEVEL),
        "n_runs": np.array([len(pair.grid.runs) for pair in pairs], dtype=np.int64),
        "n_units": units,
        "n_steps": np.array([len(pair.grid.steps) for pair in pairs], dtype=np.int64),
        "units_needed": units_needed(z, errors, units, LEAST_UNITS[coefficient]),
        "effective_steps": np.array([pair.effective_steps for pair in pairs]),
        "method": np.array([METHODS[question, coefficient]] * len(pairs), dtype=str),
        "reason": np.array([pair.reason for pair in pairs], dtype=str),
    }


def _headline_pair(names: Sequence[tuple[str, str]], headline: str) -> np.ndarray:
    """Which pair is the one that was named before looking: none if there are several tasks and no mean of them."""
    tasks = {task for _, task in names}
    chosen = ALL if ALL in tasks else next(iter(tasks)) if len(tasks) == 1 else None
    return np.array([name == (headline, chosen) for name in names])


def _leading_statements(
    columns: Mapping[str, np.ndarray], names: Sequence[tuple[str, str]], headline: str
) -> list[str]:
    """Statements of the headline measure first, then of what holds beside it."""
    own = [place for place, (measure, _) in enumerate(names) if measure == headline]
    others = [place for place in np.flatnonzero(columns["holds"]).tolist() if place not in own]
    return [str(columns["statement"][place]) for place in [*own, *others]]


def _mixed(x: np.ndarray, y: np.ndarray, pairs: Sequence[Pair], fitted: Sequence[bool]) -> dict[str, np.ndarray]:
    """Mixed models of the headline measure with each task; x and y ``[run, step, measure | task]``."""
    tasks = y.shape[-1]
    models = [
        mixed_model(*(values[np.ix_(pair.grid.runs, pair.grid.steps)] for values in (x[..., m], y[..., t])))
        if fitted[place] and not pair.reason
        else NOT_FITTED
        for place, pair in enumerate(pairs)
        for m, t in [divmod(place, tasks)]
    ]
    rows = [asdict(model) for model in models]
    return {f"mixed_{name}": np.array([row[name] for row in rows]) for name in ("slope", "low", "high", "converged")}


def _left_out(given: xr.DataArray, turned: xr.DataArray, runs: Sequence[str]) -> list[str]:
    both = {*given["run"].values.tolist(), *turned["run"].values.tolist()}
    return sorted(both - set(runs))
