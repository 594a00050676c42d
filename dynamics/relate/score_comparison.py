"""Scores of groups of runs (recipes), two groups at a time: which is better, or why that cannot be decided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import xarray as xr

from dynamics.relate.comparison import Units, check_groups, decided, least_pairs, pair_labels, units_of
from dynamics.relate.differences import relabelled_difference
from dynamics.relate.permutations import DRAWS, LEVEL
from dynamics.relate.score_tables import ALL, as_scores, better
from dynamics.relate.statements import ScoreContext, score_statement
from dynamics.schema import SCORE_COMPARISON, label_arrays
from dynamics.text import counted

#: How scores are compared.
_PAIRED = "mean of paired differences; p is the larger of exact sign flips of pairs and Student's t test"
_UNPAIRED = "difference of means; p is the larger of permuted labels of runs (statistic Welch's t) and Welch's t test"


def compare_scores(
    scores: xr.DataArray | xr.Dataset,
    groups: Mapping[str, Sequence[str]],
    *,
    pairs: Mapping[str, str] | None = None,
    directions: Mapping[str, str] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> xr.Dataset:
    """Compare scores of groups of runs, two groups at a time, by the tests of :func:`compare`.

    A score is compared at the last step at which every run that has it after the start has it; where there is no such
    step, each run's last score counts. Runs without a score are left out of it. Named before looking is ``all``, the
    mean over tasks of those standardised scores that every run has and whose direction is known, or the only score: its
    p-value is adjusted for the number of comparisons alone. The others are adjusted over scores, too.

    Args:
        scores: ``(run, step, task)``, or :class:`~dynamics.relate.score_tables.ScoreTable`'s dataset.
        groups: Group → its runs; runs without any score are left out.
        pairs: As for :func:`compare`; by default runs are paired by their names where there are pairs enough to decide
            every one of the scores: 6 for one score, 7 for two or three of two groups.
        directions: Task → ``"higher"`` or ``"lower"``, where names do not tell which is better.
        draws: Number of random relabellings, where there are more than 10 000.
        seed: Of these.

    Returns:
        The variables of ``schema.SCORE_COMPARISON`` over ``comparison`` (``"imax − dmax"``) and ``task``, with the
        coordinates ``direction(task)`` and ``run_group(run)``. Attributes: ``headline`` (``""`` where there is none),
        ``scores_in_all``, ``level``, ``statements``: the headline's, then those shown, then those that too few runs
        leave undecided, largest effect first.

    Raises:
        ValueError: If groups are invalid, see :func:`compare`, or no run of the groups has a score.

    >>> runs = {group: [f"{group}{seed}" for seed in range(4)] for group in ("imax", "dmax")}
    >>> coords = {"run": [*runs["imax"], *runs["dmax"]], "step": [10], "task": ["vqa/accuracy"]}
    >>> accuracy = xr.DataArray(np.linspace(0.9, 0.5, 8).reshape(8, 1, 1), coords, ("run", "step", "task"))
    >>> comparison = compare_scores(accuracy, runs)
    >>> comparison["verdict"].item(), comparison["p_value"].round(3).item()
    ('better', 0.029)
    """
    values = as_scores(scores, directions)
    members = [run for runs in groups.values() for run in runs]
    check_groups(members, groups)
    labels = pair_labels(groups) if pairs is None else dict(pairs)
    contrasts = list(combinations(groups, 2))
    selected, steps = _last_common(values.reindex(run=members))
    if not np.isfinite(selected.values).any():
        raise ValueError("scores: expected a score of a run of the groups after step 0, got none.")
    counted_scores = np.flatnonzero(np.isfinite(selected.values).any(0))
    selected, steps = selected.isel(task=counted_scores), steps[:, counted_scores]
    selected, steps, of_all = _with_all(selected, steps)
    tasks = selected["task"].values.tolist()
    beside = max(1, len(tasks) - (of_all > 0))
    least = 2 if pairs is not None else least_pairs(len(contrasts) * beside)
    headline = ALL if of_all or tasks[0] == ALL else tasks[0] if len(tasks) == 1 else ""
    study = _Study(selected, steps, groups, labels, least, headline, of_all, len(contrasts), draws, seed)
    parts = [study.compared(*contrast) for contrast in contrasts]
    columns = {name: np.stack([part[name] for part in parts]) for name in parts[0]}
    of_groups = [selected.sel(run=list(runs)).mean("run", skipna=True).values for runs in groups.values()]
    columns |= {"score": selected.values, "at_step": steps, "group_mean": np.stack(of_groups)}
    coords = {
        "comparison": [f"{first} − {second}" for first, second in contrasts],
        "task": tasks,
        "run": members,
        "group": list(groups),
        "direction": ("task", selected["direction"].values),
        "run_group": ("run", [group for group, runs in groups.items() for _ in runs]),
    }
    dataset = xr.Dataset(label_arrays(SCORE_COMPARISON, columns), coords)
    dataset.attrs = {
        "headline": headline,
        "scores_in_all": of_all,
        "level": LEVEL,
        "seed": seed,
        "statements": _first_statements(dataset, headline),
    }
    return dataset


def _last_common(values: xr.DataArray) -> tuple[xr.DataArray, np.ndarray]:
    """Return the score of each run that is compared, ``(run, task)``, and its step.

    Step 0 is before training, where all runs are the same.
    """
    after = values.sel(step=values["step"] > 0)
    present, numbers = np.isfinite(after.values), after["step"].values
    steps = np.full((after.sizes["run"], after.sizes["task"]), np.nan)
    chosen = np.full_like(steps, np.nan)
    for task in range(after.sizes["task"]):
        rows = present[:, :, task]
        having = rows.any(1)
        common = np.flatnonzero(rows[having].all(0)) if having.any() else np.empty(0, dtype=np.int64)
        for run in np.flatnonzero(having):
            position = common[-1] if common.size else np.flatnonzero(rows[run])[-1]
            chosen[run, task], steps[run, task] = after.values[run, position, task], numbers[position]
    selected = xr.DataArray(chosen, {"run": after["run"].values, "task": after["task"].values}, ("run", "task"))
    return selected.assign_coords(direction=("task", values["direction"].values)), steps


def _with_all(selected: xr.DataArray, steps: np.ndarray) -> tuple[xr.DataArray, np.ndarray, int]:
    """Return scores with the mean over tasks of those that every run has as the first, and of how many that is."""
    everywhere = np.isfinite(selected.values).all(0) & (selected["direction"].values != 0)
    if everywhere.sum() < 2 or ALL in selected["task"].values:
        return selected, steps, 0
    turned = better(selected.isel(task=np.flatnonzero(everywhere)).expand_dims(step=[0], axis=1))
    mean = turned.sel(task=[ALL]).isel(step=0, drop=True)
    unknown = np.full((len(steps), 1), np.nan)
    return xr.concat([mean, selected], dim="task"), np.concatenate([unknown, steps], axis=1), int(everywhere.sum())


@dataclass(frozen=True)
class _Study:
    """Scores that are compared, ``(run, task)``, and what is the same for every comparison."""

    selected: xr.DataArray
    steps: np.ndarray
    groups: Mapping[str, Sequence[str]]
    labels: Mapping[str, str]
    least: int
    headline: str
    of_all: int
    comparisons: int
    draws: int
    seed: int

    def compared(self, first: str, second: str) -> dict[str, np.ndarray]:
        """Return the columns of one comparison, ``[task]``.

        Scores that the same runs have are tested together; the headline is tested alone.
        """
        runs = [*self.groups[first], *self.groups[second]]
        present = np.isfinite(self.selected.sel(run=runs).values)
        families: dict[tuple[bool, bytes], list[int]] = {}
        for column, task in enumerate(self.selected["task"].values.tolist()):
            families.setdefault((task == self.headline, present[:, column].tobytes()), []).append(column)
        beside = [columns for (leading, _), columns in families.items() if not leading]
        rows: dict[int, dict[str, Any]] = {}
        for (leading, _), columns in families.items():
            count = 1 if leading else len(beside)
            others = sum(map(len, beside))
            rows |= self._family(first, second, columns, leading, count, others)
        ordered = [rows[column] for column in range(self.selected.sizes["task"])]
        return {name: np.array([row[name] for row in ordered]) for name in ordered[0] if name in SCORE_COMPARISON}

    def _family(
        self, first: str, second: str, columns: Sequence[int], leading: bool, families: int, others: int
    ) -> dict[int, dict[str, Any]]:
        """Return the rows of scores that the same runs have."""
        scores = self.selected.isel(task=list(columns))
        having = scores["run"].values[np.isfinite(scores.values).all(1)].tolist()
        groups = {group: [run for run in self.groups[group] if run in having] for group in (first, second)}
        if not all(groups.values()):
            return {column: self._nothing(first, second, column, groups) for column in columns}
        units = units_of(groups, first, second, self.labels, self.least)
        sides = [
            np.stack([scores.sel(run=runs).values.mean(0) for runs in side]) for side in (units.first, units.second)
        ]
        times = self.comparisons * families
        difference, test = relabelled_difference(
            *sides, pairs=units.paired, level=LEVEL / times, draws=self.draws, seed=self.seed
        )
        flags = np.full(len(columns), leading)
        decision = decided(difference, test, units, flags, times, len(columns))
        p_decides = decision["mean_p_value"] if leading else decision["mean_p_familywise"]
        tested = 1.0 if units.tested else np.nan
        spread = np.where(np.isnan(difference.effect_size), np.nan, tested)  # equal scores of all runs tell no spread
        numbers = {
            "difference": difference.difference,
            "error": difference.error,
            "low": decision["mean_low"],
            "high": decision["mean_high"],
            "normal_low": difference.low * spread,
            "normal_high": difference.high * spread,
            "effect_size": difference.effect_size,
            "p_value": decision["mean_p_value"] * tested,
            "p_adjusted": np.minimum(1.0, times * p_decides) * tested,
            "smallest_p_adjusted": decision["smallest_p_adjusted"] * tested,
            "decidable": decision["decidable"],
            "holds": decision["holds"],
            "first_mean": sides[0].mean(0),
            "second_mean": sides[1].mean(0),
        }
        equal = np.concatenate(sides).max(0) == np.concatenate(sides).min(0)
        rows = {}
        for position, column in enumerate(columns):
            row = {name: values[position].item() for name, values in numbers.items()}
            row |= self._said(column, units) | {"leading": leading, "direction": self._direction(column)}
            row["verdict"] = "equal" if equal[position] else _verdict(row)
            lacking = len(self.groups[first]) + len(self.groups[second]) - len(having)
            context = self._context(first, second, column, units, times, 1 if leading else others, lacking)
            rows[column] = row | {"statement": score_statement(row, context)}
        return rows

    def _said(self, column: int, units: Units) -> dict[str, Any]:
        task = str(self.selected["task"].values[column])
        return {
            "task": task,
            "mean_of_all": task == ALL and self.of_all > 0,
            "n_first": len(units.first),
            "n_second": len(units.second),
            "n_pairs": len(units.first) if units.paired else 0,
            "method": _PAIRED if units.paired else _UNPAIRED,
        }

    def _direction(self, column: int) -> int:
        return int(self.selected["direction"].values[column])

    def _context(
        self, first: str, second: str, column: int, units: Units, times: int, scores: int, lacking: int
    ) -> ScoreContext:
        counts = [f"{scores} scores"] if scores > 1 else []
        counts += [f"{self.comparisons} comparisons"] if self.comparisons > 1 else []
        lack = f"; {counted(lacking, 'run')} without this score left out" if lacking else ""
        beside = self.headline not in ("", str(self.selected["task"].values[column]))
        pairing = "" if beside else units.pairing  # the headline's sentence says it
        where = f"{pairing}{self._where(first, second, column)}{lack}"
        adjusted = f", adjusted for {' and '.join(counts)}" if counts else ""
        could = units.could(times)
        return ScoreContext(first, second, str(units), where, units.tested, could, adjusted, self.of_all, beside)

    def _where(self, first: str, second: str, column: int) -> str:
        """Return the step at which a score is compared, in words."""
        runs = self.selected["run"].values.tolist()
        rows = [runs.index(run) for group in (first, second) for run in self.groups[group]]
        steps = self.steps[rows, column]
        steps = steps[np.isfinite(steps)]
        if not steps.size:
            return ""
        if steps.min() == steps.max():
            return f", at step {int(steps[0]):,}"
        return f", each run at its last step, {int(steps.min()):,} to {int(steps.max()):,}"

    def _nothing(self, first: str, second: str, column: int, groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        """Return the row of a score that no run of one of the groups has."""
        units = Units([[run] for run in groups[first]], [[run] for run in groups[second]], paired=False, pairing="")
        row: dict[str, Any] = dict.fromkeys(SCORE_COMPARISON, np.nan) | self._said(column, units)
        row |= {"decidable": False, "holds": False, "verdict": "not_comparable"}
        context = self._context(first, second, column, units, 1, 1, 0)
        return row | {"statement": score_statement(row, context)}


def _verdict(row: Mapping[str, Any]) -> str:
    if not row["decidable"]:
        return "undecided"
    if not row["holds"]:
        return "not_shown"
    if not row["direction"]:
        return "different"
    return "better" if row["difference"] * row["direction"] > 0 else "worse"


def _first_statements(dataset: xr.Dataset, headline: str) -> list[str]:
    """Return the headline's statements, then what is shown, then what is undecided, largest effect first."""
    verdicts, statements = dataset["verdict"].values, dataset["statement"].values
    leading = np.broadcast_to(dataset["task"].values == headline, verdicts.shape)
    size = np.nan_to_num(np.abs(dataset["effect_size"].values))
    rank = np.where(leading, 0, np.where(dataset["holds"].values, 1, np.where(verdicts == "undecided", 2, 3)))
    order = np.lexsort((-size.ravel(), rank.ravel()))
    return [str(statements.ravel()[place]) for place in order.tolist() if headline == "" or rank.ravel()[place] < 3]
